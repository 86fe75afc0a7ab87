"""What `benchmarks.training` times: the step of a network under an optimiser.

Forward, loss, backward and update in one jitted program that is given its state to
overwrite, on a synthetic batch.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import orthax
from benchmarks import trees
from examples.models import gpt
from orthax import components, polar

# ---------------------------------------------------------------- what is trained

Batch = tuple[jax.Array, jax.Array]


def _images(classes: int) -> Callable[[int, int], Batch]:
    def feed(batch: int, size: int) -> Batch:
        rng = np.random.default_rng(0)
        images = rng.standard_normal((batch, size, size, 3), np.float32)
        return jnp.asarray(images), jnp.asarray(rng.integers(0, classes, batch))

    return feed


def _tokens(batch: int, size: int) -> Batch:
    vocabulary = gpt.GPT2_SMALL.vocabulary
    text = np.random.default_rng(0).integers(0, vocabulary, (batch, size + 1))
    return jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:])


def _features(batch: int, size: int) -> Batch:
    """Return tokens of the width of the mixture of experts, and targets for them."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, batch, size, 512), np.float32)
    return jnp.asarray(x), jnp.asarray(y)


class Case(NamedTuple):
    """What a network of `trees.MODELS` is fed, how much, and the activations' dtype."""

    feed: Callable[[int, int], Batch]
    batch: int
    dtype: str


# As accelerators are given them.
CASES = {
    "basic_cnn": Case(_images(10), 1024, "float32"),
    "resnet20": Case(_images(10), 1024, "float32"),
    "resnet18": Case(_images(1000), 256, "bfloat16"),
    "resnet50": Case(_images(1000), 256, "bfloat16"),
    "densenet121": Case(_images(1000), 128, "bfloat16"),
    "vit_ti16": Case(_images(1000), 512, "bfloat16"),
    "vit_b16": Case(_images(1000), 256, "bfloat16"),
    "gpt2_small": Case(_tokens, 16, "bfloat16"),
    "moe32": Case(_features, 8, "bfloat16"),
}


class Setting(NamedTuple):
    """One network as it is timed."""

    network: str
    batch: int
    size: int
    dtype: str


def setting(
    network: str,
    batch: int | None = None,
    size: int | None = None,
    dtype: str | None = None,
) -> Setting:
    """Return a setting, with what the case of the network says for what is None."""
    case, model = CASES[network], trees.MODELS[network]
    return Setting(
        network, batch or case.batch, size or model.size, dtype or case.dtype
    )


# ------------------------------------------------------------- what it is trained by

SGD = "sgd"
# Small: a batch that is met again and again is not to be learned while it is timed.
_LEARNING_RATE = 1e-3


def _sgd(rule: components.Rule) -> optax.GradientTransformation:
    return optax.sgd(_LEARNING_RATE, momentum=0.9)


def _orthogonal(
    method: polar.PolarMethod,
) -> Callable[[components.Rule], optax.GradientTransformation]:
    return lambda rule: optax.chain(orthax.orthogonalise(method, rule=rule), _sgd(rule))


def _optax_muon(rule: components.Rule) -> optax.GradientTransformation:
    """Return optax's Muon with kernels cut as ours, and Adam for everything else."""

    def dimension_numbers(params: Any) -> Any:
        numbers = [
            cut and optax.contrib.MuonDimensionNumbers(cut.rows, cut.columns)
            for _, _, cut in components.resolve(params, rule)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), numbers)

    return optax.contrib.muon(
        _LEARNING_RATE, muon_weight_dimension_numbers=dimension_numbers
    )


OPTIMISERS: dict[str, Callable[[components.Rule], optax.GradientTransformation]] = {
    SGD: _sgd,
    "orthogonalise(), sgd": _orthogonal(polar.Auto()),
    'orthogonalise(Auto("fast")), sgd': _orthogonal(polar.Auto("fast")),
    "orthax.muon()": lambda rule: orthax.muon(_LEARNING_RATE, rule=rule),
    "optax.contrib.muon()": _optax_muon,
}

# ---------------------------------------------------------------------- one program


class State(NamedTuple):
    """All that a step changes. Pure dictionaries, which any optimiser can hold."""

    params: Any
    others: Any  # the running statistics of batch normalisation
    optimiser: optax.OptState


class Start(NamedTuple):
    """A network before the first step, whatever it is trained by."""

    graphdef: nnx.GraphDef
    params: Any
    others: Any


class Program(NamedTuple):
    """A compiled step, the state to start from, and what compiling it told."""

    step: Callable[[State, Batch], tuple[State, jax.Array]]
    state: State
    compile_seconds: float
    temporary_bytes: int | None


def loss_of(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean cross-entropy to labels, squared error to anything else."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    else:
        losses = optax.squared_error(outputs.astype(targets.dtype), targets)
    return losses.mean()


def _parts(model: nnx.Module) -> Start:
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    return Start(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(others))


def initialise(chosen: Setting, *, abstract: bool = False) -> Start:
    """Return a network with its first weights, or with their shapes alone."""

    def make() -> nnx.Module:
        make = trees.MODELS[chosen.network].make
        return make(chosen.size, jnp.dtype(chosen.dtype), nnx.Rngs(0))

    shapes = _parts(nnx.eval_shape(make))
    if abstract:
        return shapes
    return Start(shapes.graphdef, *jax.jit(lambda: _parts(make())[1:])())


def step_of(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, jax.Array]]:
    """Return the function that makes one step of training, and gives the loss."""

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, state.others, copy=True)
            return loss_of(model(batch[0]), batch[1]), _parts(model).others

        (value, others), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, after = tx.update(grads, state.optimiser, state.params)
        return State(optax.apply_updates(state.params, updates), others, after), value

    return step


def program(start: Start, tx: optax.GradientTransformation, batch: Batch) -> Program:
    """Return the step of a network under an optimiser, compiled for a batch."""
    # The first step overwrites its state: not what other programs start from.
    params, others = jax.tree.map(jnp.copy, start[1:])
    state = State(params, others, tx.init(params))
    step = jax.jit(step_of(start.graphdef, tx), donate_argnums=0)
    begun = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    spent = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else None
    return Program(compiled, state, spent, temporary)


class Trainer:
    """Calls a program again and again: its state is overwritten by every step."""

    def __init__(self, program: Program, batch: Batch, steps: int):
        self.step, self.state, self.batch = program.step, program.state, batch
        self.steps = steps
        self.loss = jnp.asarray(jnp.nan)

    def __call__(self) -> jax.Array:
        """Return the loss of the last of so many steps, none of them waited for."""
        for _ in range(self.steps):
            self.state, self.loss = self.step(self.state, self.batch)
        return self.loss
