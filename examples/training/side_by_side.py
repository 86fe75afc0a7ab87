"""Many runs in a row: networks that differ in seed and learning rate alone, at once.

What the trainers of anytime networks and of decorrelated ones share. An epoch is one
program, which serves every seed and rate; what is stopped goes on from its last
checkpoint with the same numbers.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from examples.data import Dataset
from examples.training.report import Results, Row
from examples.training.runs import (
    Limits,
    compiled,
    over_seeds,
    train_epochs,
    train_missing,
)
from examples.training.supervised import Run, State


def whole_batches(recipe: Any, data: Dataset) -> int:
    """Return how many whole batches there are in the images to train on."""
    return len(data.train.labels) // recipe.batch_size


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What tells one trainer from another.

    Attributes:
      initialise: `(keys, recipe)` gives the states before the first step, for each key.
      train_epoch: `(state, key, rates, train, validation, recipe=...)` gives the state
        after an epoch and its metrics, a NamedTuple of arrays.
      evaluate: `(state, split, recipe=...)` gives loss and accuracy.
      make_row: `(run, history, seconds, tested)` gives the row of a finished run, from
        metrics of every epoch.
      title: names a recipe beside the progress bar.
      steps: `(recipe, data)` gives the steps of an epoch; by default as many as there
        are whole batches of images to train on.
    """

    initialise: Callable[[jax.Array, Any], State]
    train_epoch: Callable
    evaluate: Callable
    make_row: Callable[..., Row]
    title: Callable[[Any], str]
    steps: Callable[[Any, Any], int] = whole_batches


@functools.lru_cache(maxsize=4)
def programs(trainer: Trainer, recipe: Any, count: int) -> tuple[Callable, Callable]:
    """Return `train_epoch` and `evaluate` for some runs at once."""
    epoch, test = (
        over_seeds(functools.partial(f, recipe=recipe), count, along)
        for f, along in ((trainer.train_epoch, 3), (trainer.evaluate, 1))
    )
    return jax.jit(epoch, donate_argnums=0), jax.jit(test)


def train_together(
    trainer: Trainer,
    runs: Sequence[Run],
    data: Dataset,
    limits: Limits = Limits(),
    told: Callable[[int, NamedTuple], None] = lambda epoch, metrics: None,
    finish: Callable[[State, NamedTuple, float], None] = lambda *outcome: None,
) -> tuple[State, NamedTuple]:
    """Train networks that differ in seed and learning rate alone.

    Args:
      trainer: of what.
      runs: at least one.
      data: of which the test images are not read.
      limits: when to stop, and where to leave what is not finished.
      told: is given the metrics of all runs after every epoch.
      finish: is given what is returned and the seconds a run, without compilation,
        before the checkpoint is deleted.

    Returns:
      The state, and the metrics of every epoch, numpy arrays `(runs, epochs, ...)`.

    Raises:
      OutOfTime: after the deadline.
    """
    first, count = runs[0], len(runs)
    steps = trainer.steps(first.recipe, data)
    epoch_of, _ = programs(trainer, first.recipe, count)
    keys = jnp.stack([jax.random.key(run.seed) for run in runs])
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def arguments(epoch: int) -> tuple:
        rates = np.stack([run.rates(steps, epoch) for run in runs])
        return fold(keys, epoch + 1), rates, data.train, data.validation

    state = trainer.initialise(fold(keys, 0), first.recipe)
    program = compiled(epoch_of, state, *arguments(0))
    metrics = program.out_info[1]
    history = type(metrics)(
        *(np.full((count, first.epochs, *x.shape[1:]), np.nan) for x in metrics)
    )

    def step(epoch: int, tree: tuple) -> tuple:
        state, history, seconds = tree
        begun = time.perf_counter()
        state, metrics = program(state, *arguments(epoch))
        for values, value in zip(history, metrics, strict=True):
            values[:, epoch] = value
        told(epoch, metrics)
        return state, history, seconds + (time.perf_counter() - begun) / count

    state, history, _ = train_epochs(
        runs,
        step,
        (state, history, np.zeros(())),
        limits,
        finish=lambda tree: finish(*tree[:2], float(tree[2])),
    )
    return state, history


def train_runs(
    trainer: Trainer,
    runs: Sequence[Run],
    results: Results,
    data: Dataset,
    *,
    test: bool,
    limits: Limits = Limits(),
) -> list[Row] | None:
    """Train what the results file does not hold; return the rows of all `runs`.

    Without `test` the rows say nothing about the test images. None after the deadline.
    """

    def train(together: Sequence[Run], progress: tqdm) -> None:
        _train_and_write(trainer, together, results, data, test, limits, progress)

    apart = {"seed": 0, "learning_rate": 1.0}
    found = train_missing(runs, results, limits, apart, train)
    return found if all(found) else None


def _train_and_write(
    trainer: Trainer,
    runs: Sequence[Run],
    results: Results,
    data: Dataset,
    test: bool,
    limits: Limits,
    progress: tqdm,
) -> None:
    first, known = runs[0], progress.n
    progress.set_description(f"{first.chosen}: {trainer.title(first.recipe)}")

    def told(epoch: int, metrics: Any) -> None:
        progress.update(known + (epoch + 1) * len(runs) - progress.n)
        accuracies = np.atleast_1d(np.asarray(metrics.validation_accuracy).mean(0))
        progress.set_postfix_str("accuracy " + " ".join(f"{x:.3f}" for x in accuracies))

    def finish(state: State, history: NamedTuple, seconds: float) -> None:
        tested = [None] * len(runs)
        if test:
            _, evaluate = programs(trainer, first.recipe, len(runs))
            evaluated = evaluate(state, data.test)
            tested = list(zip(*map(np.asarray, evaluated), strict=True))
        for at, run in enumerate(runs):
            own = type(history)(*(values[at] for values in history))
            results.append(trainer.make_row(run, own, seconds, tested[at]))

    train_together(trainer, runs, data, limits, told, finish)
