"""The trainer of decorrelated networks: what a run is, its steps, the row it leaves.

To be read from top to bottom; `examples/decorrelation.py` is the program. Gradients are
those of backpropagation, or of an approximation (`approximations.py`); an optimiser of
`examples/training/optimisers.py` makes the step. R learns within the step, from the
same batch. Networks that differ in seed and learning rate alone are trained side by
side; what is stopped goes on from its last checkpoint.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.data import Split
from examples.experiments.decorrelation import rules
from examples.experiments.decorrelation.approximations import (
    feedback_aligned,
    node_perturbation,
)
from examples.experiments.decorrelation.report import COLUMNS, CURVES, KEY
from examples.models.decorrelation import Model, decorrelated, inputs, make_network
from examples.models.initialisers import KAIMING_FAN_IN
from examples.training import supervised
from examples.training.report import Row, circumstances, joined
from examples.training.side_by_side import Trainer
from examples.training.supervised import State, evaluate, normalised, score
from orthax import diagnostics

Learning = Literal["bp", "fa", "np"]
LEARNING: tuple[Learning, ...] = Learning.__args__
_CORRELATED = 32  # images whose patches the correlation is measured on; of rows, 16x

# ----------------------------------------------------------------- what a run is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(supervised.Recipe):
    """What the runs of one compiled epoch share."""

    learning: Learning  # backpropagation, feedback alignment, node perturbation
    rule: rules.Name  # what is done to the input of every layer
    rate: float  # of decorrelation, 0 where the rule has none; of `polar` the floor
    side: int  # pixels of an image along a side
    widths: tuple[int, ...]
    train_images: int  # the first ones; 0: all
    validation_images: int
    sample: float  # share of the patches that the R of a convolution learns from
    update_every: int  # steps between two batches that R learns from
    noise: float  # standard deviation, of node perturbation


@dataclasses.dataclass(frozen=True)
class Run(supervised.Run):
    """One run: a row of the results file, and what tells it from the others."""

    condition: float  # of the matrix that mixes the pixels; 1: none

    def key(self) -> dict[str, str]:
        """Return the columns that identify this run, as the results file has them."""
        values = dataclasses.asdict(self)
        values |= values.pop("recipe")
        values["widths"] = " ".join(map(str, values["widths"]))
        return {name: str(values[name]) for name in KEY}


def make_model(recipe: Recipe, key: jax.Array) -> nnx.Sequential:
    """Return the network of a recipe; the same weights whatever is done to inputs."""
    names = ("params", "feedback", "decorrelation")
    streams = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    rngs = nnx.Rngs(**streams)
    shape = (8, 8, 1) if recipe.data == "digits" else (32, 32, 3)
    options = {"side": recipe.side, "widths": recipe.widths, "rngs": rngs}
    model: Model = recipe.model
    network = make_network(model, shape, recipe.classes, **options)
    rule = rules.make_rule(recipe.rule, recipe.rate)
    if rule is not None:
        network = decorrelated(network, rule, sample=recipe.sample, rngs=rngs)
    if recipe.learning == "fa":
        network = feedback_aligned(network, kernel_init=KAIMING_FAN_IN, rngs=rngs)
    return network


# ------------------------------------------------------------------------ the step


class Metrics(NamedTuple):
    """What an epoch leaves behind."""

    train_loss: jax.Array  # along the way
    validation_loss: jax.Array  # after the epoch
    validation_accuracy: jax.Array
    correlation: jax.Array  # (layers,) mean |correlation| between a layer's inputs
    steps: jax.Array


def initialise(keys: jax.Array, recipe: Recipe) -> State:
    """Return the states of networks before the first step, one for every key.

    One after another and outside of `jit`, whose compilation takes longer. Beside the
    optimiser's own state is the number of steps.
    """
    split = [nnx.split(make_model(recipe, key), nnx.Param, ...) for key in keys]
    arrays = jax.tree.map(lambda *xs: jnp.stack(xs), *(own[1:] for own in split))
    # The rate has no part in the optimiser's first state.
    optimiser = jax.vmap(supervised.make_optimiser(recipe, 1.0).init)(arrays[0])
    steps = jnp.zeros(len(keys), jnp.int32)
    return State(split[0][0], *arrays, (steps, optimiser))


def gradients(
    state: State,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    recipe: Recipe,
    updating: bool,
) -> tuple[nnx.State, nnx.State, jax.Array]:
    """Return the gradients, the statistics after the batch, and the mean loss."""

    def losses(logits: jax.Array) -> jax.Array:
        return score(logits, labels)[0]

    def objective(params: nnx.State) -> tuple[jax.Array, tuple]:
        model = nnx.merge(state.graphdef, params, state.statistics, copy=True)
        model.set_attributes(updating=updating, raise_if_not_found=False)
        if recipe.learning == "np":
            _, each, total = node_perturbation(
                model, images, losses, key, scale=recipe.noise
            )
        else:
            each = losses(model(images))
            total = each.mean()
        return total, (nnx.split(model, nnx.Param, ...)[2], each.mean())

    grads, (statistics, loss) = jax.grad(objective, has_aux=True)(state.params)
    return grads, statistics, loss


def train_step(
    state: State, batch: Split, key: jax.Array, rate: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Return the state after a step, and the mean loss before it."""
    images = normalised(batch.images, recipe)
    number, optimiser = state.optimiser
    of = functools.partial(gradients, state, images, batch.labels, key, recipe)
    if recipe.update_every == 1:
        grads, statistics, loss = of(True)
    else:
        grads, statistics, loss = jax.lax.cond(
            number % recipe.update_every == 0, lambda: of(True), lambda: of(False)
        )
    tx = supervised.make_optimiser(recipe, rate)
    updates, optimiser = tx.update(grads, optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.graphdef, params, statistics, (number + 1, optimiser)), loss


def correlations(state: State, images: jax.Array, recipe: Recipe) -> jax.Array:
    """Return the mean |correlation| between the inputs of every layer, `(layers,)`.

    Of the pixels of the first images, and of what the weights meet: decorrelated where
    that is done, with the running mean.
    """
    model = nnx.merge(state.graphdef, state.params, state.statistics, copy=True)
    model.eval()
    count = _CORRELATED * (16 if recipe.model == "mlp" else 1)
    samples = inputs(model, normalised(images[:count], recipe))
    return jnp.stack([diagnostics.off_diagonal_correlation(z) for z in samples])


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
    state, losses = supervised.over_batches(
        step, state, key, rates, train, recipe.batch_size
    )
    held = evaluate(state, validation, recipe)
    correlation = correlations(state, validation.images, recipe)
    steps = jnp.asarray(len(losses))
    return state, Metrics(losses.mean(), *held, correlation, steps)


# --------------------------------------------------------------------- finished runs


def make_row(
    run: Run,
    history: Metrics,
    seconds: float,
    tested: tuple[np.ndarray, np.ndarray] | None,
) -> Row:
    """Return the row of a finished run, from its metrics `(epochs, ...)`.

    Curves have a number for each epoch, divided by spaces; that of the correlations one
    for each layer, and `;` between epochs.
    """
    curves = {name: getattr(history, name) for name in CURVES}
    finite = all(np.isfinite(curve).all() for curve in curves.values())
    last = {name: curve[-1] for name, curve in curves.items()}
    last |= dict(zip(("test_loss", "test_accuracy"), tested or (), strict=False))
    if not finite:  # no network to speak of
        last = dict.fromkeys(last, np.nan)
    values = {
        **run.key(),
        **{name: f"{value:.6g}" for name, value in last.items()},
        **{f"{name}_curve": joined(curve) for name, curve in curves.items()},
        "correlation_curve": "; ".join(map(joined, history.correlation)),
        "status": "finished" if finite else "diverged",
        "steps": str(int(history.steps.sum())),
        "seconds": f"{seconds:.3f}",
        **circumstances(),
    }
    return {name: values.get(name, "") for name in COLUMNS}


def title(recipe: Recipe) -> str:
    """Return what a progress bar says of a recipe."""
    rate = f" at {recipe.rate:g}" * (recipe.rule not in rules.WITHOUT_RATE)
    return f"{recipe.model}, {recipe.learning}, {recipe.optimiser}, {recipe.rule}{rate}"


TRAINER = Trainer(initialise, train_epoch, evaluate, make_row, title)
