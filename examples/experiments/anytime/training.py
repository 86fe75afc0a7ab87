"""The trainer of anytime networks: what a run is, its steps, the row it leaves.

To be read from top to bottom; `examples/anytime.py` is the program. The gradients of
all exits become one by a rule of `orthax.transforms`, and an optimiser of
`examples/training/optimisers.py` makes the step. Networks that differ in seed and
learning rate alone are trained side by side; what is stopped goes on from its last
checkpoint.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.data import Split
from examples.data.augmentation import augmented
from examples.experiments.anytime.report import COLUMNS, INDEPENDENT, KEY
from examples.experiments.anytime.task_rules import make_rule
from examples.models.anytime import make_mlp, make_resnet
from examples.training import supervised
from examples.training.report import Row, circumstances, joined
from examples.training.side_by_side import Trainer
from examples.training.supervised import State, forward, normalised, score
from orthax import tasks

_MOST = 1000  # images that are evaluated at a time

# ----------------------------------------------------------------- what a run is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(supervised.Recipe):
    """What the runs of one compiled epoch share."""

    rule: str  # or INDEPENDENT: the last exit alone is trained
    stages: int  # of the whole network
    exit: int  # the last stage that is built, counted from one
    width: int
    depth: int
    train_images: int  # the first ones; 0: all
    two_passes: bool

    def task_rule(self) -> tasks.TaskRule:
        """Return how the gradients of all exits become one; of a single one nothing."""
        return make_rule("sum" if self.rule == INDEPENDENT else self.rule, self.exit)


@dataclasses.dataclass(frozen=True)
class Run(supervised.Run):
    """One run: a row of the results file, and what tells it from the others."""

    def key(self) -> dict[str, str]:
        """Return the columns that identify this run, as the results file has them."""
        values = dataclasses.asdict(self)
        values |= values.pop("recipe")
        return {name: str(values[name]) for name in KEY}


def make_model(recipe: Recipe, key: jax.Array) -> nnx.Module:
    """Return the network of a recipe, up to its last stage."""
    make, inputs = (make_mlp, 64) if recipe.data == "digits" else (make_resnet, 3)
    sizes = {name: getattr(recipe, name) for name in ("stages", "width", "depth")}
    return make(
        recipe.model, inputs, 10, **sizes, built=recipe.exit, rngs=nnx.Rngs(key)
    )


def inputs_of(images: jax.Array, recipe: Recipe) -> jax.Array:
    """Return images as the network gets them."""
    if recipe.data == "digits":
        return images.reshape(len(images), -1)
    return normalised(images, recipe)


@functools.lru_cache(maxsize=16)
def flops(recipe: Recipe) -> list[int]:
    """Return the operations that every exit takes for one image, in a forward pass."""
    model = make_model(recipe, jax.random.key(0))
    model.eval()
    shape = (1, 8, 8, 1) if recipe.data == "digits" else (1, 32, 32, 3)

    def answer(images: jax.Array, stages: int) -> jax.Array:
        return model(inputs_of(images, recipe), stages=stages)[-1]

    lowered = (
        jax.jit(functools.partial(answer, stages=k + 1)).lower(jnp.zeros(shape))
        for k in range(recipe.exit)
    )
    return [int(x.cost_analysis()["flops"]) for x in lowered]


# ------------------------------------------------------------------------ the step


class Metrics(NamedTuple):
    """What an epoch leaves behind; of an independent network one exit."""

    train_loss: jax.Array  # (exits,), along the way
    cosines: jax.Array  # (pairs,) between the gradients of exits, means over steps
    conflicts: jax.Array  # share of negative ones
    validation_loss: jax.Array  # (exits,), after the epoch
    validation_accuracy: jax.Array


def make_optimiser(
    recipe: Recipe, rate: float | jax.Array
) -> optax.GradientTransformation:
    """Return what makes one update of the gradients of all exits."""
    optimiser = supervised.make_optimiser(recipe, rate)
    if recipe.two_passes:
        return optimiser
    return optax.chain(tasks.combine_tasks(recipe.task_rule()), optimiser)


def initialise(keys: jax.Array, recipe: Recipe) -> State:
    """Return the states of networks before the first step, one for every key.

    One after another and outside of `jit`, whose compilation takes longer.
    """
    split = [nnx.split(make_model(recipe, key), nnx.Param, ...) for key in keys]
    arrays = jax.tree.map(lambda *xs: jnp.stack(xs), *(own[1:] for own in split))
    # The rate has no part in the optimiser's first state.
    optimiser = jax.jit(jax.vmap(make_optimiser(recipe, 1.0).init))(arrays[0])
    return State(split[0][0], *arrays, optimiser)


def scores(
    logits: Sequence[jax.Array], labels: jax.Array, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
    """Return loss and accuracy of every exit that counts, `(exits,)`."""
    counted = jnp.stack(logits[-1:] if recipe.rule == INDEPENDENT else logits)
    losses, hits = jax.vmap(score, (0, None))(counted, labels)
    return losses.mean(1), hits.mean(1)


def cosines_of(grads: nnx.State) -> jax.Array:
    """Return the cosines between the gradients of all pairs of exits, `(pairs,)`."""
    leaves = [x.reshape(len(x), -1) for x in jax.tree.leaves(grads)]
    gram = sum(x @ x.T for x in leaves)
    rows, columns = np.triu_indices(len(gram), 1)
    sizes = jnp.sqrt(jnp.diagonal(gram))
    return gram[rows, columns] / jnp.maximum(sizes[rows] * sizes[columns], 1e-30)


def train_step(
    state: State, batch: Split, key: jax.Array, rate: jax.Array, recipe: Recipe
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Return the state after a step, and the losses and cosines before it."""
    images = augmented(batch.images, key) if recipe.augment else batch.images
    images = inputs_of(images, recipe)

    def losses(params: nnx.State) -> tuple[jax.Array, nnx.State]:
        logits, statistics = forward(state, params, images, 1)
        return scores(logits, batch.labels, recipe)[0], statistics

    if recipe.two_passes:
        rule = recipe.task_rule()
        both = tasks.combined_value_and_grad(losses, rule, has_aux=True)
        (values, statistics), grads = both(state.params)
        cosines = jnp.full(math.comb(len(values), 2), jnp.nan)
    else:
        each = tasks.task_value_and_grad(losses, has_aux=True)
        (values, statistics), grads = each(state.params)
        cosines = cosines_of(grads)
    tx = make_optimiser(recipe, rate)
    updates, optimiser = tx.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.graphdef, params, statistics, optimiser), (values, cosines)


def evaluate(state: State, split: Split, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Return loss and accuracy of every exit that counts, with running statistics."""
    model = nnx.merge(state.graphdef, state.params, state.statistics, copy=True)
    model.eval()
    count = len(split.labels)
    parts = next(
        n for n in range(1, count + 1) if count % n == 0 and count <= n * _MOST
    )
    parted = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), split)

    def of_part(part: Split) -> tuple[jax.Array, jax.Array]:
        return scores(model(inputs_of(part.images, recipe)), part.labels, recipe)

    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(of_part, parted))


def train_epoch(
    state: State,
    key: jax.Array,
    rates: jax.Array,
    train: Split,
    validation: Split,
    *,
    recipe: Recipe,
) -> tuple[State, Metrics]:
    """Return the state after a pass over shuffled images, and metrics."""
    step = functools.partial(train_step, recipe=recipe)
    state, (losses, cosines) = supervised.over_batches(
        step, state, key, rates, train, recipe.batch_size
    )
    conflicts = jnp.where(jnp.isnan(cosines), jnp.nan, cosines < 0).mean(0)
    held = evaluate(state, validation, recipe)
    return state, Metrics(losses.mean(0), cosines.mean(0), conflicts, *held)


# ---------------------------------------------------------------------- many runs


def make_row(
    run: Run,
    history: Metrics,
    seconds: float,
    tested: tuple[np.ndarray, np.ndarray] | None,
) -> Row:
    """Return the row of a finished run, from its metrics `(epochs, ...)`.

    One number for each exit or pair, divided by spaces; `;` between epochs of cosines.
    """
    finite = np.isfinite(history.train_loss).all()
    finite = bool(finite and np.isfinite(history.validation_loss).all())
    last = history._asdict() | dict(
        zip(("test_loss", "test_accuracy"), tested or (), strict=False)
    )
    per_exit = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
    last = {x: np.atleast_2d(last[x])[-1] for x in per_exit if x in last}
    if not finite:  # no network to speak of
        last = {name: np.full_like(values, np.nan) for name, values in last.items()}
    values = {
        **run.key(),
        **{name: joined(x) for name, x in last.items()},
        "status": "finished" if finite else "diverged",
        "flops": " ".join(map(str, flops(dataclasses.replace(run.recipe, rule="sum")))),
        "cosines": "; ".join(map(joined, history.cosines)),
        "conflicts": joined(history.conflicts.mean(0)),
        "seconds": f"{seconds:.2f}",
        **circumstances(),
    }
    return {name: values.get(name, "") for name in COLUMNS}


def title(recipe: Recipe) -> str:
    """Return what a progress bar says of a recipe."""
    return f"{recipe.model}, {recipe.rule}"


TRAINER = Trainer(initialise, train_epoch, evaluate, make_row, title)
