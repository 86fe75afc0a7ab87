"""The supervised trainer: what a run is, its state, its steps, and many runs in a row.

To be read from top to bottom. A run is plain data and a row of the results file; runs
that differ in their seeds alone may be trained side by side. An epoch is one program:
the images stay on the device as they are stored, and are shuffled, augmented and
normalised there. Whatever is stopped goes on from its last checkpoint, with the same
numbers as if it had not been.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from examples.data import Dataset, Split
from examples.data.augmentation import augmented
from examples.models import CLASSIFIERS
from examples.models.basic_cnn import BasicCNN
from examples.training import optimisers
from examples.training.report import (
    COLUMNS,
    EPOCHS_SHOWN,
    KEY,
    Results,
    Row,
    circumstances,
    joined,
)
from examples.training.runs import (
    Limits,
    OutOfTime as OutOfTime,
    compiled,
    over_seeds,
    train_epochs,
    train_missing,
)

# ----------------------------------------------------------------- what a run is


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the runs of one compiled epoch share."""

    data: str  # "digits", "digits, split 1", "cifar10"
    model: str
    optimiser: optimisers.Optimiser
    method: optimisers.Method | Literal[""]  # empty where no polar factor is taken
    layers: optimisers.Layers  # those whose gradients are orthogonalised
    batch_size: int
    momentum: float
    b2: float
    weight_decay: float
    augment: bool = False  # random crops with a border of 4 pixels, and flips
    classes: int = 10  # width of the head: 1000 in the paper's ImageNet networks
    cifar_stem: bool = False  # in place of ImageNet's
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the activations
    norm_groups: int = 1  # parts of a batch with batch statistics of their own


Schedule = Literal["constant", "steps", "cosine"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: a row of the results file, and what tells it from the others."""

    recipe: Recipe
    epochs: int
    learning_rate: float
    schedule: Schedule
    chosen: Literal["fixed", "grid", "tuned"]  # how the learning rate was
    seed: int

    def key(self) -> dict[str, str]:
        """Return the columns that identify this run, as the results file has them."""
        values = dataclasses.asdict(self)
        values |= values.pop("recipe")
        return {name: str(values[name]) for name in KEY}

    def rates(self, steps: int, epoch: int) -> np.ndarray:
        """Return the learning rates of the steps of an epoch, counted from zero."""
        whole, rate = self.epochs * steps, self.learning_rate
        schedules = {
            "constant": lambda: optax.constant_schedule(rate),
            "steps": lambda: optax.piecewise_constant_schedule(
                rate, {whole // 2: 0.1, whole * 3 // 4: 0.1}
            ),
            "cosine": lambda: optax.cosine_decay_schedule(rate, whole),
        }
        at = np.arange(epoch * steps, (epoch + 1) * steps)
        return np.broadcast_to(schedules[self.schedule]()(at), at.shape).astype(
            "float32"
        )


# ------------------------------------------------------------- the model, its state


class State(NamedTuple):
    """All that a step changes, and the structure (no arrays) of the model."""

    graphdef: nnx.GraphDef
    params: nnx.State
    statistics: nnx.State  # the running mean and variance of batch normalisation
    optimiser: optax.OptState


def make_model(recipe: Recipe, key: jax.Array) -> nnx.Module:
    """Return the network of a recipe."""
    rngs = nnx.Rngs(key)
    if recipe.data.startswith("digits"):
        return BasicCNN((8, 8, 1), recipe.classes, strides=(1, 2, 2), rngs=rngs)
    return CLASSIFIERS[recipe.model](
        classes=recipe.classes,
        cifar_stem=recipe.cifar_stem,
        dtype=jnp.dtype(recipe.dtype),
        rngs=rngs,
    )


def make_optimiser(
    recipe: Recipe, learning_rate: float | jax.Array
) -> optax.GradientTransformation:
    """Return the optimiser of a recipe."""
    return optimisers.make_optimiser(
        recipe.optimiser,
        learning_rate,
        momentum=recipe.momentum,
        b2=recipe.b2,
        weight_decay=recipe.weight_decay,
        method=recipe.method,
        layers=recipe.layers,
    )


def initialise(key: jax.Array, recipe: Recipe) -> State:
    """Return the state before the first step."""
    model = make_model(recipe, key)
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    # The rate has no part in the optimiser's first state.
    optimiser = make_optimiser(recipe, learning_rate=1.0).init(params)
    return State(graphdef, params, statistics, optimiser)


# ------------------------------------------------------------------------ the step

# Mean and standard deviation of the three colours as the paper's code has them.
_MEAN, _DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def normalised(images: jax.Array, recipe: Recipe) -> jax.Array:
    """Return images as the network gets them."""
    if recipe.data.startswith("digits"):
        return images
    mean, deviation = jnp.asarray(_MEAN), jnp.asarray(_DEVIATION)
    return (images / jnp.float32(255) - mean) / deviation


class Metrics(NamedTuple):
    """What an epoch leaves behind, means over images; accuracy between 0 and 1."""

    train_loss: jax.Array  # along the way, before every step
    train_accuracy: jax.Array
    validation_loss: jax.Array  # after the epoch
    validation_accuracy: jax.Array


def score(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the loss and whether it is right, for every image."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss, logits.argmax(-1) == labels


def forward(
    state: State, params: nnx.State, images: jax.Array, groups: int
) -> tuple[jax.Array, nnx.State]:
    """Return the logits in training mode, and the running statistics after it.

    With several groups each has its own batch statistics, and the first one's go into
    the running ones: what the paper's code does on several devices.
    """

    def of_group(images: jax.Array) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(state.graphdef, params, state.statistics, copy=True)
        logits = model(images)
        return logits, nnx.split(model, nnx.Param, ...)[2]

    if groups == 1:
        return of_group(images)
    parts = images.reshape(groups, -1, *images.shape[1:])
    logits, statistics = jax.vmap(of_group)(parts)
    first = jax.tree.map(lambda x: x[0], statistics)
    return logits.reshape(len(images), -1), first


def train_step(
    state: State, batch: Split, key: jax.Array, rate: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Return the state after a step, and the loss and hits of its batch, summed."""
    images = augmented(batch.images, key) if recipe.augment else batch.images
    images = normalised(images, recipe)

    def objective(params: nnx.State) -> tuple[jax.Array, tuple]:
        logits, statistics = forward(state, params, images, recipe.norm_groups)
        losses, hits = score(logits, batch.labels)
        return losses.mean(), (statistics, jnp.stack([losses.sum(), hits.sum()]))

    gradient = jax.grad(objective, has_aux=True)
    grads, (statistics, sums) = gradient(state.params)
    tx = make_optimiser(recipe, rate)
    updates, optimiser = tx.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.graphdef, params, statistics, optimiser), sums


def evaluate(state: State, split: Split, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Return mean loss and accuracy, between 0 and 1, with the running statistics."""
    model = nnx.merge(state.graphdef, state.params, state.statistics, copy=True)
    model.eval()

    def sums(batch: Split) -> jax.Array:
        losses, hits = score(model(normalised(batch.images, recipe)), batch.labels)
        return jnp.stack([losses.sum(), hits.sum()])

    whole, rest = divmod(len(split.labels), recipe.batch_size)
    head, tail = _divided(split, whole, recipe.batch_size)
    total = jax.lax.map(sums, head).sum(0)
    if rest:
        total += sums(tail)
    return tuple(total / len(split.labels))


def over_batches(
    step: Callable[..., tuple[Any, Any]],
    state: Any,
    key: jax.Array,
    rates: jax.Array,
    train: Split,
    size: int,
) -> tuple[Any, Any]:
    """Return the state after a step for every whole batch of shuffled images.

    Args:
      step: from state, batch, key and learning rate to the next state and anything.
      state: before.
      key: of this pass.
      rates: of every step; traced, so that one compilation serves all.
      train: the images; those beyond the last whole batch are left over.
      size: images of a batch.

    Returns:
      The state, and what the steps gave besides, stacked.
    """
    whole = len(train.labels) // size
    rows, _ = _divided(_shuffled(key, len(train.labels)), whole, size)

    def one(state: Any, at: tuple) -> tuple[Any, Any]:
        rows, rate, number = at
        return step(state, _batch(train, rows), jax.random.fold_in(key, number), rate)

    return jax.lax.scan(one, state, (rows, rates[:whole], 1 + jnp.arange(whole)))


def _shuffled(key: jax.Array, count: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(key, 0), count)


def _batch(split: Split, rows: jax.Array) -> Split:
    return Split(split.images[rows], split.labels[rows])


def train_epoch(
    state: State,
    key: jax.Array,
    rates: jax.Array,
    train: Split,
    validation: Split,
    *,
    recipe: Recipe,
) -> tuple[State, Metrics]:
    """Return the state after one pass over shuffled training images, and metrics.

    The images beyond the last whole batch make a smaller one. The learning rates are
    traced: one compilation serves every rate and seed.
    """
    size = recipe.batch_size
    whole, rest = divmod(len(train.labels), size)
    step = functools.partial(train_step, recipe=recipe)
    state, sums = over_batches(step, state, key, rates, train, size)
    sums = sums.sum(0)
    if rest:
        last = _batch(train, _shuffled(key, len(train.labels))[whole * size :])
        key_of_last = jax.random.fold_in(key, 1 + whole)
        state, more = step(state, last, key_of_last, rates[whole])
        sums += more
    return state, Metrics(
        *(sums / len(train.labels)), *evaluate(state, validation, recipe)
    )


def _divided(tree, whole: int, size: int):
    """Return the whole batches of every array, and what is left."""

    def head(x: jax.Array) -> jax.Array:
        return x[: whole * size].reshape(whole, size, *x.shape[1:])

    return jax.tree.map(head, tree), jax.tree.map(lambda x: x[whole * size :], tree)


# ------------------------------------------------------- runs with different seeds


@functools.lru_cache(maxsize=32)
def programs(recipe: Recipe, seeds: int) -> tuple[Callable, Callable, Callable]:
    """Return `initialise`, `train_epoch` and `evaluate` for some seeds at once."""
    start = over_seeds(functools.partial(initialise, recipe=recipe), seeds, 1)
    epoch = over_seeds(functools.partial(train_epoch, recipe=recipe), seeds, 2)
    test = over_seeds(functools.partial(evaluate, recipe=recipe), seeds, 1)
    return jax.jit(start), jax.jit(epoch, donate_argnums=0), jax.jit(test)


class History(NamedTuple):
    """What every epoch of some runs left behind, shape `(runs, epochs)`."""

    train_loss: np.ndarray
    train_accuracy: np.ndarray
    validation_loss: np.ndarray
    validation_accuracy: np.ndarray
    seconds: np.ndarray  # training and validation, without compilation


def train_together(
    runs: Sequence[Run],
    train: Split,
    validation: Split,
    *,
    limits: Limits = Limits(),
    told: Callable[[int, History], None] = lambda epoch, history: None,
    watch: Callable[[int, State], None] = lambda epoch, state: None,
    finish: Callable[[State, History], None] = lambda state, history: None,
) -> tuple[State, History]:
    """Train networks that differ in their seeds alone; the first axis is the run.

    A run whose loss is not finite has diverged: not a number from there on, and all
    stop where all have.

    Args:
      runs: at least one.
      train: the images to train on.
      validation: those that are looked at after every epoch.
      limits: when to stop, and where to leave what is not finished.
      told: is given the history after every epoch, counted from zero.
      watch: is given the state after every epoch.
      finish: is given what is returned, before the checkpoint is deleted.

    Raises:
      OutOfTime: after the deadline.
    """
    first, seeds = runs[0], len(runs)
    if {dataclasses.replace(run, seed=first.seed) for run in runs} != {first}:
        raise ValueError("runs side by side may differ in their seeds alone")
    check_batches(first.recipe, len(train.labels))
    start, epoch_of, _ = programs(first.recipe, seeds)
    keys = jnp.stack([jax.random.key(run.seed) for run in runs])
    fold = jax.vmap(jax.random.fold_in, (0, None))
    state = start(fold(keys, 0))
    history = History(*np.full((len(History._fields), seeds, first.epochs), np.nan))
    steps = -(-len(train.labels) // first.recipe.batch_size)
    arguments = (fold(keys, 1), first.rates(steps, 0), train, validation)
    program = compiled(epoch_of, state, *arguments)

    def step(epoch: int, tree: tuple[State, History]) -> tuple[State, History]:
        state, history = tree
        rates = first.rates(steps, epoch)
        begun = time.perf_counter()
        state, metrics = program(state, fold(keys, epoch + 1), rates, train, validation)
        values = np.asarray(jnp.stack(metrics))
        seconds = (time.perf_counter() - begun) / seeds
        lost = ~np.isfinite(values).all(0)
        if epoch:
            lost |= np.isnan(history.train_loss[:, epoch - 1])
        values = np.where(lost, np.nan, values)
        for name, value in zip(history, (*values, seconds), strict=True):
            name[:, epoch] = value
        told(epoch, history)
        watch(epoch, state)
        return state, history

    def all_lost(tree: tuple[State, History]) -> bool:
        seen = np.isfinite(tree[1].seconds[0]).sum()
        return bool(np.isnan(tree[1].train_loss[:, seen - 1]).all())

    return train_epochs(
        runs,
        step,
        (state, history),
        limits,
        finish=lambda tree: finish(*tree),
        is_over=all_lost,
    )


def check_batches(recipe: Recipe, count: int) -> None:
    """Raise ValueError unless the images can be divided as the recipe says."""
    if recipe.batch_size > count:
        raise ValueError(
            f"`batch_size` is {recipe.batch_size}; expected at most the {count} "
            "training images"
        )
    rest = count % recipe.batch_size
    if recipe.batch_size % recipe.norm_groups or rest % recipe.norm_groups:
        raise ValueError(
            f"`norm_groups` is {recipe.norm_groups}; expected a divisor of the sizes "
            f"of the batches, {recipe.batch_size} and for the last {rest} images"
        )


# ---------------------------------------------------------------------- many runs


def make_row(
    run: Run,
    history: History,
    at: int,
    tested: tuple[float, float] | None,
    images: int,
) -> Row:
    """Return the row of a finished run; what was not reached or done is empty.

    Args:
      run: which.
      history: what every epoch of it and of those beside it left behind.
      at: its place among these.
      tested: loss and accuracy on the test images.
      images: how many there are to train on.
    """
    curves = History(*(values[at] for values in history))
    diverged = not math.isfinite(curves.train_loss[-1])
    test = dict(zip(("test_loss", "test_accuracy"), tested or (), strict=False))
    if diverged:  # no network to speak of
        test = dict.fromkeys(test, math.nan)
    last = {name: values[-1] for name, values in curves._asdict().items()}
    seconds = float(np.nansum(curves.seconds))
    epochs = int(np.isfinite(curves.seconds).sum())
    numbers = {
        **{
            f"accuracy_{epoch}": curves.validation_accuracy[epoch - 1]
            for epoch in EPOCHS_SHOWN
            if epoch <= run.epochs
        },
        **{name: value for name, value in last.items() if name != "seconds"},
        **test,
    }
    series = {
        f"{name}_curve": joined(values)
        for name, values in curves._asdict().items()
        if name != "seconds"
    }
    values = {
        **run.key(),
        **{name: f"{value:.6g}" for name, value in numbers.items()},
        "status": "diverged" if diverged else "finished",
        "seconds": f"{seconds:.2f}",
        "images_per_s": f"{images * epochs / seconds:.4g}",
        **circumstances(),
        **series,
    }
    return {name: values.get(name, "") for name in COLUMNS}


def train_runs(
    runs: Sequence[Run],
    results: Results,
    data: Dataset,
    *,
    test: bool = True,
    limits: Limits = Limits(),
) -> list[Row]:
    """Train what the results file does not hold; return the rows of all `runs`.

    Without `test` the rows say nothing about the test images. After the deadline the
    rows of what is not finished are left out.
    """

    def train(together: Sequence[Run], progress: tqdm) -> None:
        _train_and_write(together, results, data, test, limits, progress)

    found = train_missing(runs, results, limits, {"seed": 0}, train)
    return [row for row in found if row]


def _train_and_write(
    runs: Sequence[Run],
    results: Results,
    data: Dataset,
    test: bool,
    limits: Limits,
    progress: tqdm,
) -> None:
    first, known = runs[0], progress.n
    seeds = ", ".join(str(run.seed) for run in runs)
    name = f"{first.recipe.model}, {first.recipe.optimiser} at {first.learning_rate:g}"
    progress.set_description(f"{first.chosen}: {name}, seed {seeds}")
    images = len(data.train.labels)

    def told(epoch: int, history: History) -> None:
        progress.update(known + (epoch + 1) * len(runs) - progress.n)
        accuracy = history.validation_accuracy[:, epoch].mean()
        rate = images / history.seconds[0, epoch]
        progress.set_postfix_str(f"accuracy {accuracy:.3f}, {rate:.0f} images/s")

    def finish(state: State, history: History) -> None:
        tested = None
        if test:
            _, _, evaluated = programs(first.recipe, len(runs))
            tested = np.asarray(jnp.stack(evaluated(state, data.test)), float)
        for at, run in enumerate(runs):
            outcome = None if tested is None else tuple(tested[:, at])
            results.append(make_row(run, history, at, outcome, images))

    train_together(
        runs, data.train, data.validation, limits=limits, told=told, finish=finish
    )
    progress.update(known + len(runs) * first.epochs - progress.n)
