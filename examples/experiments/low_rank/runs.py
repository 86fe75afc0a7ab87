"""Low-rank networks: the epochs of a run, its row in the results file, many runs.

Epochs of equal shapes share a program, whatever arm and seed they belong to. A run that
was stopped resumes from its last checkpoint.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from examples.data import Dataset
from examples.experiments.low_rank.report import COLUMNS
from examples.experiments.low_rank.training import (
    Arm,
    Run,
    State,
    initialise,
    layers_of,
    make_trainer,
    matrices_of,
    named,
    programs,
)
from examples.training import supervised
from examples.training.report import Results, Row, circumstances, joined
from examples.training.runs import Limits, compiled, train_epochs, train_missing
from orthax import diagnostics, low_rank

# ------------------------------------------------------------------------- one run


class History(NamedTuple):
    """What is recorded of every epoch; fractions are of the dense parameters."""

    train_loss: np.ndarray  # (epochs,), during the epoch
    train_accuracy: np.ndarray
    validation_loss: np.ndarray  # after the epoch
    validation_accuracy: np.ndarray
    trainable: np.ndarray  # during the epoch
    stored: np.ndarray
    step_ms: np.ndarray  # milliseconds a step, without compilation and checks
    memory_mib: np.ndarray  # arguments, images apart, and temporary arrays
    ranks: np.ndarray  # (epochs, layers), 0 where nothing is factorised
    stability: np.ndarray  # (epochs // frequency, matrices), between measurements

    @property
    def done(self) -> int:
        """How many epochs there were."""
        return int(np.isfinite(self.step_ms).sum())


def empty(run: Run) -> History:
    """Return the history before the first epoch."""
    recipe, epochs = run.recipe, run.epochs
    stability = epochs // recipe.frequency, len(matrices_of(recipe))
    each = np.full((len(History._fields) - 2, epochs), np.nan)
    ranks = np.zeros((epochs, len(layers_of(recipe))), int)
    return History(*each, ranks, np.full(stability, np.nan))


Tree = tuple[History, State, Any]  # the last: dense weights at the last measurement


def train(
    run: Run,
    data: Dataset,
    limits: Limits = Limits(),
    report: Callable[[int, History], None] = lambda epoch, history: None,
    finish: Callable[[Tree], None] = lambda tree: None,
) -> Tree:
    """Train one network, of any arm but a truncated one.

    Args:
      run: which.
      data: of which the test images are not read.
      limits: when to stop, and where to keep checkpoints; those of networks of full
        rank that are tested stay there, to be truncated.
      report: called with the epoch and the history after every epoch.
      finish: called with what is returned, before the checkpoint is deleted.

    Raises:
      OutOfTime: after the deadline.
    """
    recipe, key = run.recipe, jax.random.key(run.seed)
    steps = len(data.train.labels) // recipe.batch_size
    _, epoch_of, evaluate = programs(recipe)
    images = sum(x.nbytes for x in data.train)
    measures = run.chosen != "grid" and run.arm.arm != "fixed"
    trainer = make_trainer(recipe, 1.0, run.arm)

    def step(epoch: int, tree: Tree) -> Tree:
        history, state, before = tree
        if run.arm.arm == "oialr":
            state = state._replace(training=trainer.check(state.training, epoch))
        weights = state.training.weights
        history.ranks[epoch] = list(low_rank.ranks(weights).values()) or 0
        rates = run.rates(steps, epoch)
        arguments = state, jax.random.fold_in(key, epoch + 1), rates, data.train
        program = compiled(epoch_of, *arguments)
        values = low_rank.fractions(weights)
        values["memory_mib"] = _bytes(program, images) / 2**20
        start = time.perf_counter()
        state, dense, sums = jax.block_until_ready(program(*arguments))
        values["step_ms"] = 1e3 * (time.perf_counter() - start) / steps
        plain = supervised.State(state.graphdef, dense, state.statistics, ())
        scores = map(float, (*sums, *evaluate(plain, data.validation)))
        values |= dict(zip(History._fields[:4], scores, strict=True))
        for name, value in values.items():
            getattr(history, name)[epoch] = value
        count, rest = divmod(epoch + 1, recipe.frequency)
        if not rest and measures:
            cosines = diagnostics.basis_stability(before, dense).values()
            history.stability[count - 1] = [float(x.mean()) for x in cosines]
            before = dense
        report(epoch, history)
        return history, state, before

    def form(leaves: list[Any]) -> Tree:
        history = History(*leaves[: len(History._fields)])
        ranks = named(recipe, history.ranks[history.done - 1].tolist())
        training = trainer.target(initial, ranks)
        return history, first._replace(training=training), initial

    first = initialise(run)
    # The first epoch donates its state.
    initial = jax.tree.map(jnp.copy, low_rank.materialise(first.training.weights))
    tree = empty(run), first, initial
    keep = run.arm.arm == "full" and run.chosen != "grid"
    options = {"finish": finish, "is_over": is_lost, "form": form, "keep": keep}
    return train_epochs([run], step, tree, limits, **options)


def is_lost(tree: Tree) -> bool:
    """Return whether training has diverged."""
    history = tree[0]
    losses = history.train_loss, history.validation_loss
    return not all(np.isfinite(x[: history.done]).all() for x in losses)


def _bytes(program: Any, images: int) -> float:
    """Return the bytes that a program needs besides the images."""
    memory = program.memory_analysis()
    if memory is None:  # not on every platform
        return math.nan
    return memory.argument_size_in_bytes - images + memory.temp_size_in_bytes


def truncate(run: Run, tree: Tree, data: Dataset) -> Tree:
    """Return a trained network of full rank truncated to the ranks of a run.

    Validation scores and fractions are those of the last epoch.
    """
    _, state, before = tree
    params, ranks = state.training.weights.trainable, run.arm.ranks
    training = make_trainer(run.recipe, 1.0).init(params, named(run.recipe, ranks))
    history = empty(run)
    history.ranks[-1] = ranks
    for name, value in low_rank.fractions(training.weights).items():
        getattr(history, name)[-1] = value
    dense = low_rank.materialise(training.weights)
    plain = supervised.State(state.graphdef, dense, state.statistics, ())
    scores = programs(run.recipe)[2](plain, data.validation)
    history.validation_loss[-1], history.validation_accuracy[-1] = map(float, scores)
    return history, state._replace(training=training), before


# ---------------------------------------------------------------------- many runs


def make_row(
    run: Run, history: History, tested: tuple[float, float] | None, images: int
) -> Row:
    """Return the row of a finished run on so many images.

    One number for each epoch, separated by spaces; `;` between the measurements of
    stability, each with a number for every matrix.
    """
    steps = images // run.recipe.batch_size
    finite = math.isfinite(history.validation_loss[-1])
    test = dict(zip(("test_loss", "test_accuracy"), tested or (), strict=False))
    curves = {
        name: values
        for name, values in history._asdict().items()
        if name not in ("ranks", "stability")
    }
    last = {name: values[-1] for name, values in curves.items()} | test
    if not finite:  # no network to speak of
        last = dict.fromkeys(last, math.nan)
    values = {
        **run.key(),
        **{name: f"{value:.6g}" for name, value in last.items()},
        **{f"{name}_curve": joined(values) for name, values in curves.items()},
        "status": "finished" if finite else "diverged",
        "layers": " ".join(layers_of(run.recipe)),
        "ranks_at_end": joined(history.ranks[-1]) if history.ranks[-1].any() else "",
        "matrices": " ".join(matrices_of(run.recipe)),
        "stability": "; ".join(map(joined, history.stability)),
        "seconds": f"{np.nansum(history.step_ms) * steps / 1e3:.6g}",
        "load": f"{os.getloadavg()[0]:.1f}",
        **circumstances(),
    }
    return {name: values.get(name, "") for name in COLUMNS}


def train_runs(
    runs: Sequence[Run],
    results: Results,
    data: Dataset,
    *,
    test: bool,
    limits: Limits = Limits(),
) -> list[Row | None]:
    """Train what the results file does not hold; return the rows of all `runs`.

    Without `test` the rows have no test scores. None for runs that are not finished at
    the deadline.
    """

    def one(together: Sequence[Run], progress: tqdm) -> None:
        for run in together:
            _train_and_write(run, results, data, test, limits, progress)

    return train_missing(runs, results, limits, {}, one)


def _train_and_write(
    run: Run,
    results: Results,
    data: Dataset,
    test: bool,
    limits: Limits,
    progress: tqdm,
) -> None:
    known, arm = progress.n, run.arm
    name = f"{run.recipe.model}, {run.recipe.optimiser}, {arm.arm} {arm.beta:g}"
    progress.set_description(f"{run.chosen}: {name}, seed {run.seed}")

    def report(epoch: int, history: History) -> None:
        progress.update(known + epoch + 1 - progress.n)
        accuracy, trains = history.validation_accuracy, history.trainable
        postfix = f"accuracy {accuracy[epoch]:.3f}, {100 * trains[epoch]:.0f} % trains"
        progress.set_postfix_str(postfix)

    def finish(tree: Tree) -> None:
        history, state, _ = tree
        tested = None
        if test and not is_lost(tree):
            dense = low_rank.materialise(state.training.weights)
            plain = supervised.State(state.graphdef, dense, state.statistics, ())
            tested = tuple(map(float, programs(run.recipe)[2](plain, data.test)))
        results.append(make_row(run, history, tested, len(data.train.labels)))

    if arm.arm == "truncated":
        tree = train(dataclasses.replace(run, arm=Arm()), data, limits)
        finish(tree if is_lost(tree) else truncate(run, tree, data))
    else:
        train(run, data, limits, report, finish)
    progress.update(known + run.epochs - progress.n)
