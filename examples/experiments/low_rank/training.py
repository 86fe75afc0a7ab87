"""The trainer of low-rank networks: what a run is, its networks, state and steps.

To be read from top to bottom; `examples/low_rank.py` is the program, and the loop over
epochs and runs is in `examples/experiments/low_rank/runs.py`. Every run has a
`low_rank.TrainingState` from start to end, also at full rank; the checks of OIALR are
between epochs, so that every epoch is one program of fixed shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import orthax
from examples.data import Split
from examples.data.augmentation import augmented
from examples.experiments.low_rank.report import KEY
from examples.models.initialisers import KAIMING_FAN_IN
from examples.models.resnet import ResNet
from examples.models.vit import VisionTransformer
from examples.training import optimisers, supervised
from examples.training.supervised import forward, normalised, score
from orthax import components, low_rank

Model = Literal["mlp", "vit", "resnet"]
Kind = Literal["full", "oialr", "truncated", "fixed"]

# ----------------------------------------------------------------- what a run is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(supervised.Recipe):
    """What the runs of all arms of one network and optimiser share."""

    width: int
    depth: int
    heads: int  # of a transformer, else 0
    train_images: int  # the first ones; 0: all
    frequency: int  # epochs between two checks, and two measurements of stability
    layer_step: float
    rank_multiple: int
    moments: str


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is done about the rank.

    Attributes:
      arm: full rank; OIALR; a trained network of full rank, truncated at its end; or
        one rank from the first step on, in the bases of the initial weights.
      beta: of OIALR, or of the OIALR runs whose ranks are taken.
      delay: epochs before weights are converted.
      ranks: of a network that is truncated, or of one rank, layer by layer.
    """

    arm: Kind = "full"
    beta: float = 0.0
    delay: int = 0
    ranks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run(supervised.Run):
    """One run: a row of the results file, and what tells it from the others."""

    arm: Arm = Arm()

    def key(self) -> dict[str, str]:
        """Return the columns that identify this run, as the results file has them."""
        values = dataclasses.asdict(self)
        values |= values.pop("recipe")
        values |= values.pop("arm")
        values["ranks"] = " ".join(map(str, values["ranks"]))
        return {name: str(values[name]) for name in KEY}


def make_model(recipe: Recipe, key: jax.Array) -> nnx.Module:
    """Return the network of a recipe."""
    rngs, width = nnx.Rngs(key), recipe.width
    if recipe.model == "vit":
        sizes = {name: getattr(recipe, name) for name in ("width", "depth", "heads")}
        return VisionTransformer(32, 8, 10, **sizes, rngs=rngs)
    if recipe.model == "resnet":  # ResNet-20 for width 16 and depth 3
        options = {"init": KAIMING_FAN_IN, "head_init": KAIMING_FAN_IN}
        options |= {"projected": False, "cifar_stem": True, "rngs": rngs}
        return ResNet((recipe.depth,) * 3, (width, 2 * width, 4 * width), 10, **options)
    layers, fan_in = [_flat], 64
    for _ in range(recipe.depth):
        layers += [nnx.Linear(fan_in, width, rngs=rngs), nnx.relu]
        fan_in = width
    return nnx.Sequential(*layers, nnx.Linear(fan_in, 10, rngs=rngs))


def _flat(images: jax.Array) -> jax.Array:
    return images.reshape(len(images), -1)


def order_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the patterns of the layers from the input to the output."""
    if recipe.model == "mlp":
        return tuple(f"layers/{2 * i + 1}/" for i in range(recipe.depth + 1))
    count = recipe.depth * (3 if recipe.model == "resnet" else 1)
    first = "patches/" if recipe.model == "vit" else "stem/"
    return (first, *(f"blocks/layers/{i}/" for i in range(count)), "head/")


# ------------------------------------------------------------------ state and step


class State(NamedTuple):
    """All that a step changes, and the structure (no arrays) of the model."""

    graphdef: nnx.GraphDef
    training: low_rank.TrainingState
    statistics: nnx.State  # the running mean and variance of batch normalisation


@functools.lru_cache(maxsize=32)
def shapes(recipe: Recipe) -> nnx.State:
    """Return the shapes of the dense parameters."""
    return jax.eval_shape(programs(recipe)[0], jax.random.key(0))[1]


def make_optimiser(
    recipe: Recipe, rate: float | jax.Array
) -> optax.GradientTransformation:
    """Return the optimiser; one that orthogonalises does so with Sigmas, too."""
    if recipe.optimiser != "orthogonal_sgd":
        return supervised.make_optimiser(recipe, rate)
    return orthax.orthogonal_sgd(
        rate,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        method=optimisers.METHODS[recipe.method],
        rule=low_rank.with_sigmas(shapes(recipe)),
    )


def make_trainer(
    recipe: Recipe, rate: float | jax.Array, arm: Arm = Arm()
) -> low_rank.Trainer:
    """Return the trainer of an arm, whose checks are counted in epochs.

    Checks do not depend on the rate, nor updates on the arm.
    """
    config = low_rank.OIALR(
        delay=arm.delay,
        frequency=recipe.frequency,
        beta=arm.beta or 0.5,  # arms that are never checked do not use it
        keep_last=True,
        layer_step=recipe.layer_step,
        rank_multiple=recipe.rank_multiple,
    )
    tx = make_optimiser(recipe, rate)
    return low_rank.Trainer(tx, config, order=order_of(recipe), moments=recipe.moments)


@functools.lru_cache(maxsize=32)
def layers_of(recipe: Recipe) -> dict[str, int]:
    """Return the paths of the weights that are factorised, with their full ranks."""
    options = {"keep_last": True, "order": order_of(recipe)}
    return low_rank.ranks(low_rank.factorise(shapes(recipe), **options))


def named(recipe: Recipe, ranks: Sequence[int]) -> dict[str, int]:
    """Return ranks, given layer by layer, by path; zeros are of dense networks."""
    return dict(zip(layers_of(recipe), ranks, strict=True)) if any(ranks) else {}


@functools.lru_cache(maxsize=32)
def matrices_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the paths of all weights that are matrices, factorised or not."""
    leaves = components.resolve(shapes(recipe), components.ByName())
    return tuple(leaf.path for leaf in leaves if leaf.cut)


def initialise(run: Run) -> State:
    """Return the state before the first epoch."""
    key = jax.random.fold_in(jax.random.key(run.seed), 0)
    graphdef, params, statistics = programs(run.recipe)[0](key)
    trainer = make_trainer(run.recipe, 1.0, run.arm)
    ranks = run.arm.ranks if run.arm.arm == "fixed" else ()
    training = trainer.init(params, named(run.recipe, ranks))
    return State(graphdef, training, statistics)


def train_step(
    state: State, batch: Split, key: jax.Array, rate: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Return the state after a step, and the loss and hits of its batch, summed."""
    images = augmented(batch.images, key) if recipe.augment else batch.images
    images = normalised(images, recipe)

    def objective(params: nnx.State) -> tuple[jax.Array, tuple]:
        logits, statistics = forward(state, params, images, 1)
        losses, hits = score(logits, batch.labels)
        return losses.mean(), (statistics, jnp.stack([losses.sum(), hits.sum()]))

    value_and_grad = low_rank.value_and_grad(objective, has_aux=True)
    (_, (statistics, sums)), grads = value_and_grad(state.training.weights)
    training = make_trainer(recipe, rate).update(state.training, grads)
    return State(state.graphdef, training, statistics), sums


def train_epoch(
    state: State, key: jax.Array, rates: jax.Array, train: Split, *, recipe: Recipe
) -> tuple[State, Any, jax.Array]:
    """Return the state after a pass over shuffled images, dense weights, loss, hits.

    Images beyond the last whole batch wait for another epoch.
    """
    step = functools.partial(train_step, recipe=recipe)
    size = recipe.batch_size
    state, sums = supervised.over_batches(step, state, key, rates, train, size)
    count = len(train.labels) // size * size
    return state, low_rank.materialise(state.training.weights), sums.sum(0) / count


@functools.lru_cache(maxsize=32)
def programs(recipe: Recipe) -> tuple[Callable, Callable, Callable]:
    """Return what makes a network, `train_epoch`, and what evaluates a network."""

    def start(key: jax.Array) -> tuple:
        return nnx.split(make_model(recipe, key), nnx.Param, ...)

    epoch = functools.partial(train_epoch, recipe=recipe)
    test = functools.partial(supervised.evaluate, recipe=recipe)
    return jax.jit(start), jax.jit(epoch, donate_argnums=0), jax.jit(test)
