"""Twenty steps beside PyTorch: the paper's optimisers, step for step.

The expected numbers were computed by PyTorch (tests/data/make_torch_trajectory.py);
here only the file is read. Every gradient matrix in it has full rank, so U V^T is
unique and two implementations can be compared at all.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthax

FILE = pathlib.Path(__file__).parent / "data" / "torch_trajectory.npz"
STORED_STEPS = (1, 5, 10, 20)
SVD = orthax.polar.SVD(null_space="complete")
# Measured on CPU: at most 4.5e-7 over all runs and stored steps; PyTorch's own
# float32 and float64 trajectories differ by up to 4.0e-7.
TOLERANCE = 5e-6
# A wrong chain must be far outside of it. Measured: 9.6e-3 (decay of matrices only) to
# 2e-1 (not orthogonalised) after twenty steps.
WRONG = 1e-3


@functools.cache
def golden():
    with np.load(FILE) as file:
        return dict(file)


def tree(prefix):
    """{"conv1": {"kernel": ...}, ...} from the entries "prefix/conv1/kernel", ..."""
    nested = {}
    for key, value in golden().items():
        if key.startswith(prefix + "/"):
            layer, name = key.removeprefix(prefix + "/").split("/")
            nested.setdefault(layer, {})[name] = value
    return nested


def batches():
    """All steps' images and targets, stored in sixteenths."""
    return tuple(
        jnp.asarray(golden()[name], jnp.float32) / 16 for name in ("images", "targets")
    )


def convolve(x, kernel, *, stride=1, padding=0, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=jax.lax.Precision.HIGHEST,
    )


def loss_of(params, images, targets):
    x = convolve(images, params["conv1"]["kernel"], padding=1)
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    x = jnp.tanh(x * params["norm1"]["scale"] + params["norm1"]["bias"])
    x = convolve(x, params["conv2"]["kernel"], stride=2, padding=1, groups=2)
    x = jnp.tanh(x + params["conv2"]["bias"])
    x = convolve(x, params["conv3"]["kernel"])
    x = jnp.tanh(x + params["conv3"]["bias"])
    x = jnp.matmul(
        x.mean(axis=(1, 2)),
        params["dense"]["kernel"],
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.mean((x + params["dense"]["bias"] - targets) ** 2)


# Compiled once for all optimisers, which takes most of the time of these tests.
loss_and_gradient = jax.jit(jax.value_and_grad(loss_of))


def train(optimiser):
    """Return the loss before, and the parameters after, each of the steps."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, losses, history = tree("initial"), [], []
    state = optimiser.init(params)
    for images, targets in zip(*batches(), strict=True):
        loss, grads = loss_and_gradient(params, images, targets)
        params, state = step(params, state, grads)
        losses.append(float(loss))
        history.append(params)
    return losses, history


def differences(name, history):
    """Largest absolute difference from PyTorch's parameters, per stored step."""
    found = {}
    for step in STORED_STEPS:
        ours, theirs = history[step - 1], tree(f"{name}/step_{step}")
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours, theirs)
        found[step] = float(max(jax.tree.leaves(gaps)))
    return found


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def from_table(name):
    """The learning rate of every step, as an optax schedule."""
    table = jnp.asarray(golden()[name], jnp.float32)
    return lambda count: table[count]


def scheduled_lars():
    return orthax.orthogonal_lars(
        from_table("lars_schedule"),
        from_table("lars_bias_schedule"),
        weight_decay=1e-2,
        method=SVD,
        rule=orthax.components.OnlyConvolutions(orthax.components.ByName()),
    )


RIGHT = {
    "sgd": lambda: orthax.orthogonal_sgd(1e-2, 0.9, weight_decay=5e-4, method=SVD),
    "nesterov": lambda: orthax.orthogonal_sgd(
        1e-2, 0.9, nesterov=True, weight_decay=5e-3, method=SVD
    ),
    "adam": lambda: orthax.orthogonal_adam(
        5e-3, b1=0.9, b2=0.99, weight_decay=5e-2, method=SVD
    ),
    "lars": lambda: orthax.orthogonal_lars(4.0, 0.1, weight_decay=1e-2, method=SVD),
    "lars_scheduled": scheduled_lars,
}


@pytest.mark.parametrize("name", RIGHT)
def test_follows_pytorch(name):
    losses, history = train(RIGHT[name]())
    np.testing.assert_allclose(losses, golden()[f"{name}/losses"], atol=TOLERANCE)
    found = differences(name, history)
    assert max(found.values()) < TOLERANCE, found


def test_orthogonalise_before_an_ordinary_optimiser_is_the_same():
    """The line that the README shows, with PyTorch's coupled weight decay."""
    _, history = train(
        optax.chain(
            orthax.orthogonalise(SVD),
            optax.add_decayed_weights(5e-4),
            optax.sgd(1e-2, momentum=0.9),
        )
    )
    found = differences("sgd", history)
    assert max(found.values()) < TOLERANCE, found


def sgd(*first):
    return optax.chain(*first, optax.sgd(1e-2, momentum=0.9))


def decayed_lars(*last):
    return optax.chain(
        orthax.orthogonalise(SVD, rule=orthax.components.ByName(skip=("dense",))),
        optax.add_decayed_weights(1e-2, mask=is_matrix),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=1e-3), is_matrix),
        *last,
    )


def lars_rates():
    labels = functools.partial(
        jax.tree.map, lambda p: "matrix" if p.ndim > 1 else "vector"
    )
    schedules = {"matrix": "lars_schedule", "vector": "lars_bias_schedule"}
    return optax.partition(
        {k: optax.scale_by_learning_rate(from_table(v)) for k, v in schedules.items()},
        labels,
    )


WRONG_CHAINS = {
    "not orthogonalised": (
        "sgd",
        lambda: sgd(optax.add_decayed_weights(5e-4)),
    ),
    "decay before orthogonalisation": (
        "sgd",
        lambda: sgd(optax.add_decayed_weights(5e-4), orthax.orthogonalise(SVD)),
    ),
    "momentum before orthogonalisation": (
        "sgd",
        lambda: optax.chain(
            optax.trace(0.9),
            orthax.orthogonalise(SVD),
            optax.add_decayed_weights(5e-4),
            optax.scale_by_learning_rate(1e-2),
        ),
    ),
    "decay of matrices only": (
        "nesterov",
        lambda: optax.chain(
            orthax.orthogonalise(SVD),
            optax.add_decayed_weights(5e-3, mask=is_matrix),
            optax.sgd(1e-2, momentum=0.9, nesterov=True),
        ),
    ),
    "no Nesterov": (
        "nesterov",
        lambda: sgd(orthax.orthogonalise(SVD), optax.add_decayed_weights(5e-3)),
    ),
    "decoupled decay": (
        "adam",
        lambda: optax.chain(
            orthax.orthogonalise(SVD),
            optax.adamw(5e-3, b1=0.9, b2=0.99, weight_decay=5e-2),
        ),
    ),
    "learning rate inside the momentum": (
        "lars_scheduled",
        lambda: decayed_lars(lars_rates(), optax.trace(0.9)),
    ),
    "head orthogonalised too": (
        "lars_scheduled",
        lambda: orthax.orthogonal_lars(
            from_table("lars_schedule"),
            from_table("lars_bias_schedule"),
            weight_decay=1e-2,
            method=SVD,
        ),
    ),
}


@pytest.mark.parametrize("mistake", WRONG_CHAINS)
def test_a_wrong_chain_leaves_the_tolerance(mistake):
    """Proof that the trajectories above can tell the right order from another."""
    name, chain = WRONG_CHAINS[mistake]
    _, history = train(chain())
    found = differences(name, history)
    assert found[20] > WRONG, found


def test_the_written_out_lars_chain_is_right_with_the_rate_outside():
    """So the mistake above is the position of the learning rate and nothing else."""
    _, history = train(decayed_lars(optax.trace(0.9), lars_rates()))
    found = differences("lars_scheduled", history)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", RIGHT)
def test_every_gradient_in_the_file_had_full_rank(name):
    """Otherwise U V^T is not unique, and agreement would be luck."""
    assert golden()[f"{name}/least_singular_value"] > 1e-3
    assert golden()[f"{name}/round_off"] < TOLERANCE
