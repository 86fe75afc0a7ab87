"""Write torch_trajectory.npz, which tests/test_torch_trajectory.py reads.

Twenty steps of orthogonalised optimisers as PyTorch takes them: the gradient of
every parameter with more than one dimension, flattened to components x parameters,
is replaced by U V^T of its thin singular value decomposition, and then the
optimiser's own step runs (Tuddenham, Pruegel-Bennett and Hare 2022,
arXiv 2202.07052, equations 3 to 7). Each run is repeated in float64; the file is
written only if every gradient had full rank and float32 round-off stayed small.

The network ends in a squared error, because the gradient of a softmax head has
rank at most classes - 1, and U V^T of a rank-deficient matrix is not defined.

Usage, in an environment that has PyTorch (the tests themselves do not need it):

    python tests/data/make_torch_trajectory.py
"""

import pathlib

import numpy as np
import torch
import torch.nn.functional as F

STEPS = 20
STORED_STEPS = (1, 5, 10, 20)
BATCH = 16
GROUPS = 2
LEAST_SINGULAR_VALUE = 1e-3  # relative to the largest, over all steps and matrices
LARGEST_ROUND_OFF = 1e-5  # between the float32 and the float64 trajectory

# PyTorch layout: (out, in / groups, height, width) and (out, in).
# conv1 has no bias: batch normalisation would make its gradient pure round-off.
# conv3 has more components (20) than parameters (12): U V^T has orthonormal rows.
SHAPES = {
    "conv1/kernel": (8, 3, 3, 3),
    "norm1/scale": (8,),
    "norm1/bias": (8,),
    "conv2/kernel": (12, 8 // GROUPS, 3, 3),
    "conv2/bias": (12,),
    "conv3/kernel": (20, 12, 1, 1),
    "conv3/bias": (20,),
    "dense/kernel": (6, 20),
    "dense/bias": (6,),
}

# Large enough to move the weights visibly, and different at every step: that tells
# a learning rate inside the momentum from one outside.
LARS_RATE, LARS_BIAS_RATE = 4.0, 0.1
LARS_SCHEDULE = 2.0 + 6.0 * np.abs(np.sin(1.0 + np.arange(STEPS)))
LARS_BIAS_SCHEDULE = 0.02 + 0.2 * np.abs(np.cos(1.0 + np.arange(STEPS)))


def initial_parameters(generator):
    parameters = {}
    for path, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator)
        if path.endswith("kernel"):
            parameters[path] = noise / np.sqrt(np.prod(shape[1:]))
        else:  # away from zero, so that weight decay shows
            parameters[path] = 0.2 * noise + float(path.endswith("scale")) + 0.1
    return parameters


def batches(generator):
    """Sixteenths in int8: small on disk, and exact in every floating dtype."""

    def draw(*shape):
        noise = 16 * torch.randn(STEPS, BATCH, *shape, generator=generator)
        return noise.round().clamp(-127, 127).to(torch.int8)

    return draw(3, 6, 6), draw(6)


def loss_of(p, images, targets):
    x = F.conv2d(images, p["conv1/kernel"], padding=1)
    # Batch statistics; running ones are not kept.
    x = F.batch_norm(x, None, None, p["norm1/scale"], p["norm1/bias"], training=True)
    x = torch.tanh(x)
    x = F.conv2d(
        x, p["conv2/kernel"], p["conv2/bias"], stride=2, padding=1, groups=GROUPS
    )
    x = torch.tanh(x)
    x = torch.tanh(F.conv2d(x, p["conv3/kernel"], p["conv3/bias"]))
    x = F.linear(x.mean(dim=(2, 3)), p["dense/kernel"], p["dense/bias"])
    return ((x - targets) ** 2).mean()


def orthogonalise(parameters, skip=()):
    """Replace the gradients in place; return the least relative singular value."""
    least = 1.0
    for path, parameter in parameters.items():
        if parameter.ndim > 1 and path not in skip:
            matrix = parameter.grad.flatten(start_dim=1)
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            parameter.grad = (u @ vt).reshape(parameter.shape)
            least = min(least, (s[-1] / s[0]).item())
    return least


class LARS:
    """Layer-wise adaptive rates with momentum, as Barlow Twins uses them.

    Matrices: decay, then the trust ratio, then momentum. Vectors: momentum only.
    The learning rate multiplies what comes out of the momentum.
    """

    def __init__(self, parameters, rates, bias_rates):
        self.parameters = parameters
        self.rates, self.bias_rates = iter(rates), iter(bias_rates)
        self.momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self):
        rate, bias_rate = next(self.rates), next(self.bias_rates)
        for p, momentum in zip(self.parameters, self.momenta, strict=True):
            direction = p.grad
            if p.ndim > 1:
                direction = direction + 1e-2 * p
                direction = direction * (1e-3 * p.norm() / direction.norm())
            momentum.mul_(0.9).add_(direction)
            p.sub_((rate if p.ndim > 1 else bias_rate) * momentum)


OPTIMISERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda ps: torch.optim.SGD(
        ps, lr=1e-2, momentum=0.9, weight_decay=5e-3, nesterov=True
    ),
    "adam": lambda ps: torch.optim.Adam(
        ps, lr=5e-3, betas=(0.9, 0.99), weight_decay=5e-2
    ),
    "lars": lambda ps: LARS(ps, [LARS_RATE] * STEPS, [LARS_BIAS_RATE] * STEPS),
    "lars_scheduled": lambda ps: LARS(ps, LARS_SCHEDULE, LARS_BIAS_SCHEDULE),
}
# Orthogonal LARS leaves dense layers as they are in the paper; decay and trust ratio
# still act on them.
SKIPPED = {"lars_scheduled": ("dense/kernel",)}


def trajectory(name, initial, images, targets, dtype):
    parameters = {
        path: value.to(dtype).clone().requires_grad_()
        for path, value in initial.items()
    }
    optimiser = OPTIMISERS[name](list(parameters.values()))
    losses, least, history = [], 1.0, []
    for x, y in zip(images, targets, strict=True):
        for parameter in parameters.values():
            parameter.grad = None
        loss = loss_of(parameters, x.to(dtype) / 16, y.to(dtype) / 16)
        loss.backward()
        least = min(least, orthogonalise(parameters, SKIPPED.get(name, ())))
        optimiser.step()
        losses.append(loss.item())
        history.append({k: v.detach().clone() for k, v in parameters.items()})
    return losses, least, history


def largest_difference(ours, theirs):
    return max(
        (a[path].double() - b[path].double()).abs().max().item()
        for a, b in zip(ours, theirs, strict=True)
        for path in a
    )


def flax_layout(value):
    """(out, in, height, width) to (height, width, in, out); (out, in) to (in, out)."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
    return value.permute(axes).contiguous().numpy().astype(np.float32)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(0)
    initial = initial_parameters(generator)
    images, targets = batches(generator)
    contents = {
        "images": images.permute(0, 1, 3, 4, 2).numpy(),  # sixteenths
        "targets": targets.numpy(),  # sixteenths
        "lars_schedule": LARS_SCHEDULE,
        "lars_bias_schedule": LARS_BIAS_SCHEDULE,
        "torch_version": np.array(torch.__version__),
    }
    for path, value in initial.items():
        contents[f"initial/{path}"] = flax_layout(value)
    for name in OPTIMISERS:
        run = (name, initial, images, targets)
        losses, least, history = trajectory(*run, torch.float32)
        _, _, exact = trajectory(*run, torch.float64)
        round_off = largest_difference(history, exact)
        print(
            f"{name:15} loss {losses[0]:.4f} to {losses[-1]:.4f}, least relative "
            f"singular value {least:.1e}, float32 against float64 {round_off:.1e}"
        )
        assert least > LEAST_SINGULAR_VALUE, (name, least)
        assert round_off < LARGEST_ROUND_OFF, (name, round_off)
        contents[f"{name}/losses"] = np.array(losses)
        contents[f"{name}/least_singular_value"] = np.array(least)
        contents[f"{name}/round_off"] = np.array(round_off)
        for step in STORED_STEPS:
            for path, value in history[step - 1].items():
                contents[f"{name}/step_{step}/{path}"] = flax_layout(value)
    target = pathlib.Path(__file__).with_name("torch_trajectory.npz")
    np.savez_compressed(target, **contents)
    print(f"wrote {target.name}, {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
