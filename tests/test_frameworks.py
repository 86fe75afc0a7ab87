"""Training in Flax NNX, Flax Linen, Equinox and Haiku, as their users write it.

One small network, three times: a convolution, batch normalisation where the framework
has it, and a dense layer. Every optimiser, and `orthogonalise` in a chain, must train
it, keep its state's structure, compile once, and make the first step the one that it
promises for the gradient's matrices.
"""

import dataclasses
import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

import orthax
from orthax import components, polar

STEPS = 6
WIDTH = 3
IMAGES = jax.random.normal(jax.random.key(0), (16, 4, 4, 2))
TARGETS = jax.random.normal(jax.random.key(1), (16, 2))


# --- Optimisers, and what their first step is like ----------------------------------


def flat(step):
    """A multiple of a matrix with orthonormal rows or columns."""
    s = np.linalg.svd(step, compute_uv=False)
    return s[0] / s[-1]


def signs(step):
    """Adam's first step: all entries alike."""
    return np.max(np.abs(step)) / np.min(np.abs(step))


def equal_components(step):
    norms = np.linalg.norm(step, axis=0)
    return np.max(norms) / np.min(norms)


def chained(rule):
    return optax.chain(orthax.orthogonalise(rule=rule), optax.sgd(0.03, momentum=0.5))


def optimiser(factory, learning_rate, **kwargs):
    return functools.partial(factory, learning_rate, **kwargs)


def equalised(rule):
    return optax.chain(
        orthax.orthogonalise(rule=rule),
        orthax.transforms.scale_by_component_rms(rule=rule),
        optax.sgd(0.03, momentum=0.5),
    )


# What is made, and what is one, up to rounding, of every matrix of its first step.
OPTIMISERS = {
    "orthogonalise": (chained, flat),
    "scale_by_component_rms": (equalised, equal_components),
    "orthogonal_sgd": (optimiser(orthax.orthogonal_sgd, 0.02, momentum=0.5), flat),
    "orthogonal_adam": (optimiser(orthax.orthogonal_adam, 0.02), signs),
    "orthogonal_lars": (
        optimiser(orthax.orthogonal_lars, 0.05, trust_coefficient=1.0, momentum=0.5),
        flat,
    ),
    "muon": (optimiser(orthax.muon, 0.05, method=polar.Auto()), flat),
    "normuon": (optimiser(orthax.normuon, 0.1), equal_components),
}
each_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


def make(name, rule=components.ByName()):
    return OPTIMISERS[name][0](rule=rule)


def check(name, losses, steps, traces, before, after):
    """Hold a run against everything that every framework's user expects."""
    assert losses[-1] < 0.8 * losses[0]
    assert len(steps) == 2
    for step in steps:
        assert OPTIMISERS[name][1](step) == pytest.approx(1, abs=2e-3)
    assert traces == 1
    assert types(before) == types(after)


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def squared_error(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


# --- Flax NNX -----------------------------------------------------------------------


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, WIDTH, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dense = nnx.Linear(16 * WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.norm(self.conv(x)))
        return self.dense(x.reshape(len(x), -1))


def nnx_net():
    model = NNXNet(nnx.Rngs(0))
    model.train()
    return model


def nnx_params(model):
    """Copies, so that nothing holds on to what is donated."""
    return nnx.to_pure_dict(jax.tree.map(np.array, nnx.state(model, nnx.Param)))


def nnx_step(traces):
    def step(model, optimiser, images):
        traces.append(None)
        loss, grads = nnx.value_and_grad(lambda m: squared_error(m(images)))(model)
        optimiser.update(model, grads)
        return loss, grads

    return step


@each_optimiser
def test_nnx_optimizer(name):
    model = nnx_net()
    optimiser = nnx.Optimizer(model, make(name), wrt=nnx.Param)
    traces = []
    step = nnx.jit(nnx_step(traces), donate_argnums=(0, 1))
    before = jax.tree.map(np.array, nnx.state(optimiser))
    statistics = np.array(model.norm.mean[...])
    donated = jax.tree.leaves((nnx.state(model), nnx.state(optimiser)))
    history, losses, gradients = [nnx_params(model)], [], []
    for _ in range(STEPS):
        loss, grads = step(model, optimiser, IMAGES)
        losses.append(float(loss))
        gradients.append(nnx.to_pure_dict(grads))
        history.append(nnx_params(model))
    assert all(x.is_deleted() for x in donated)
    assert np.any(statistics != model.norm.mean[...])
    steps = [
        (after["kernel"] - before["kernel"]).reshape(-1, before["kernel"].shape[-1])
        for before, after in [
            (history[0][layer], history[1][layer]) for layer in ("conv", "dense")
        ]
    ]
    check(name, losses, steps, len(traces), before, nnx.state(optimiser))

    # The same gradients in plain dictionaries give the same parameters: nothing of
    # the state was lost where NNX wraps it, and unwraps it again.
    tx, params = make(name), history[0]
    update, state = jax.jit(tx.update), tx.init(params)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(history[-1]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """A rule that keeps what it is asked."""

    asked: set = dataclasses.field(default_factory=set)

    def resolve(self, path, leaf):
        self.asked.add(path)
        return components.ByName().resolve(path, leaf)


@pytest.mark.parametrize("name", ["orthogonalise", "muon", "normuon"])
def test_nnx_paths_are_the_same_at_init_and_update(name):
    # NNX's trees end in ".value" at `init` and do not at `update`.
    model, rule = nnx_net(), Recorder()
    tx = make(name, rule)
    optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
    at_init = set(rule.asked)
    rule.asked.clear()
    optimiser.update(model, nnx.state(model, nnx.Param))
    assert at_init == rule.asked == {"conv/kernel", "dense/kernel"}


# --- Flax Linen ---------------------------------------------------------------------


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (2, 2), name="conv")(x)
        x = linen.BatchNorm(use_running_average=False, name="norm")(x)
        x = linen.tanh(x).reshape(len(x), -1)
        # A box around the kernel, as sharded models have.
        init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None))
        return linen.Dense(2, kernel_init=init, name="dense")(x)


class TrainState(train_state.TrainState):
    """With batch statistics, as Flax's guide has it."""

    batch_stats: dict


@each_optimiser
def test_linen_train_state(name):
    net = LinenNet()
    variables = net.init(jax.random.key(0), IMAGES)
    state = TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=make(name),
    )
    traces = []

    def loss_of(params, state):
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, changed = state.apply_fn(variables, IMAGES, mutable=["batch_stats"])
        return squared_error(outputs), changed["batch_stats"]

    @jax.jit
    def step(state):
        traces.append(None)
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state
        )
        return state.apply_gradients(grads=grads, batch_stats=stats), loss

    def kernels(state):
        conv, dense = (state.params[layer]["kernel"] for layer in ("conv", "dense"))
        return conv.reshape(-1, WIDTH), dense.value

    first, losses = state, []
    for _ in range(STEPS):
        state, loss = step(state)
        losses.append(float(loss))
        if state.step == 1:
            steps = [a - b for a, b in zip(kernels(state), kernels(first), strict=True)]
    check(name, losses, steps, len(traces), first, state)
    assert isinstance(state.params["dense"]["kernel"], linen.Partitioned)


# --- Equinox ------------------------------------------------------------------------


class EquinoxNet(eqx.Module):
    """Callable, and so are the trees that are made like it: masks, labels, states."""

    layers: list
    names: dict[str, str]

    def __init__(self, key):
        keys = jax.random.split(key, 2)
        self.layers = [
            eqx.nn.Conv2d(2, WIDTH, 2, key=keys[0]),
            jnp.tanh,
            jnp.ravel,
            eqx.nn.Linear(9 * WIDTH, 2, key=keys[1]),
        ]
        self.names = {"task": "regression"}

    def __call__(self, x):
        x = jnp.moveaxis(x, -1, 0)
        for layer in self.layers:
            x = layer(x)
        return x


@each_optimiser
def test_equinox(name):
    model = EquinoxNet(jax.random.key(0))
    tx = make(name, components.from_model(model))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    traces = []

    @eqx.filter_value_and_grad
    def loss_of(model):
        return squared_error(jax.vmap(model)(IMAGES))

    @eqx.filter_jit
    def step(model, state):
        traces.append(None)
        loss, grads = loss_of(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    def kernels(model):
        conv, _, _, dense = model.layers
        return conv.weight.reshape(WIDTH, -1).T, dense.weight.T

    start, before, losses = kernels(model), state, []
    for _ in range(STEPS):
        model, state, loss = step(model, state)
        losses.append(float(loss))
        if len(losses) == 1:
            steps = [a - b for a, b in zip(kernels(model), start, strict=True)]
    check(name, losses, steps, len(traces), before, state)


# --- Haiku --------------------------------------------------------------------------


@each_optimiser
def test_haiku(name):
    @hk.without_apply_rng
    @hk.transform
    def net(x):
        x = jnp.tanh(hk.Conv2D(WIDTH, 2, name="conv")(x))
        return hk.Linear(2, name="dense")(x.reshape(len(x), -1))

    tx, traces = make(name), []
    params = net.init(jax.random.key(0), IMAGES)
    state = before = tx.init(params)

    @jax.jit
    def step(params, state):
        traces.append(None)
        loss, grads = jax.value_and_grad(
            lambda params: squared_error(net.apply(params, IMAGES))
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def kernels(params):
        return params["conv"]["w"].reshape(-1, WIDTH), params["dense"]["w"]

    start, losses = kernels(params), []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        if len(losses) == 1:
            steps = [a - b for a, b in zip(kernels(params), start, strict=True)]
    check(name, losses, steps, len(traces), before, state)
