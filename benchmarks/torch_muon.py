"""Torch's Muon behind a pipe: every line that comes in is one step of the optimiser.

Needs nothing but numpy and torch. Started by `peers.torch_muon`.
"""

import sys

import numpy as np
import torch


def main(gradients: str, factors: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    with np.load(gradients) as file:
        names = list(file)
        grads = [torch.from_numpy(file[name]) for name in names]
    # From zero, with a learning rate of one, the parameters after the first step are
    # the factors, turned and scaled by the root of the aspect ratio.
    parameters = [torch.zeros_like(grad, requires_grad=True) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimiser = torch.optim.Muon(parameters, lr=1.0, weight_decay=0.0)
    optimiser.step()
    found = [
        -parameter.detach().numpy()
        / max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5
        for parameter in parameters
    ]
    np.savez(factors, **dict(zip(names, found, strict=True)))
    optimiser.param_groups[0]["lr"] = 1e-9
    optimiser.step()
    print("done", flush=True)
    for _ in sys.stdin:
        optimiser.step()
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
