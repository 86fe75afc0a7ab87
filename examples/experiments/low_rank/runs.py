"""Low-rank networks: the epochs of a run, its row in the results file, many runs.

Epochs of equal shapes share a program, whatever arm and seed they belong to. What is
stopped goes on from its last checkpoint.
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
    driver,
    factorise,
    initialise,
    layers_of,
    matrices_of,
    programs,
    with_ranks,
)
from examples.training import supervised
from examples.training.report import Results, Row, circumstances, joined
from examples.training.runs import Limits, compiled, train_epochs, train_missing
from orthax import diagnostics, low_rank

# ------------------------------------------------------------------------- one run


class History(NamedTuple):
    """What every epoch leaves behind; fractions are of the dense parameters."""

    train_loss: np.ndarray  # (epochs,), along the way
    train_accuracy: np.ndarray
    validation_loss: np.ndarray  # after the epoch
    validation_accuracy: np.ndarray
    trainable: np.ndarray  # during the epoch
    stored: np.ndarray
    step_ms: np.ndarray  # milliseconds a step, without compilation and checks
    memory_mib: np.ndarray  # arguments, images apart, and temporary arrays
    ranks: np.ndarray  # (epochs, layers), 0 where nothing is factorised
    stability: np.ndarray  # (epochs // frequency, matrices), since the look before

    @property
    def done(self) -> int:
        """How many epochs there were."""
        return int(np.isfinite(self.step_ms).sum())


def empty(run: Run) -> History:
    """Return the history before the first epoch."""
    recipe, epochs = run.recipe, run.epochs
    looks = epochs // recipe.frequency, len(matrices_of(recipe))
    each = np.full((len(History._fields) - 2, epochs), np.nan)
    ranks = np.zeros((epochs, len(layers_of(recipe))), int)
    return History(*each, ranks, np.full(looks, np.nan))


Tree = tuple[History, State, Any]  # the last: dense weights at the last look


def train(
    run: Run,
    data: Dataset,
    limits: Limits = Limits(),
    told: Callable[[int, History], None] = lambda epoch, history: None,
    finish: Callable[[Tree], None] = lambda tree: None,
) -> Tree:
    """Train one network, of any arm but a truncated one.

    Args:
      run: which.
      data: of which the test images are not read.
      limits: when to stop, and where to leave what is not finished; networks of full
        rank that are tested stay there, to be truncated.
      told: is given the history after every epoch.
      finish: is given what is returned, before the checkpoint is deleted.

    Raises:
      OutOfTime: after the deadline.
    """
    recipe, key = run.recipe, jax.random.key(run.seed)
    steps = len(data.train.labels) // recipe.batch_size
    _, epoch_of, evaluate = programs(recipe)
    images = sum(x.nbytes for x in data.train)
    looks = run.chosen != "grid" and run.arm.arm != "fixed"

    def step(epoch: int, tree: Tree) -> Tree:
        history, state, before = tree
        if run.arm.arm == "oialr":
            checked = driver(recipe, 1.0, run.arm, steps).check(state.training)
            state = state._replace(training=checked)
        weights = state.training.weights
        history.ranks[epoch] = list(low_rank.ranks(weights).values()) or 0
        rates = run.rates(steps, epoch)
        arguments = state, jax.random.fold_in(key, epoch + 1), rates, data.train
        program = compiled(epoch_of, *arguments)
        now = {"trainable": low_rank.trainable_fraction(weights)}
        now["stored"] = low_rank.stored_fraction(weights)
        now["memory_mib"] = _bytes(program, images) / 2**20
        begun = time.perf_counter()
        state, dense, sums = jax.block_until_ready(program(*arguments))
        now["step_ms"] = 1e3 * (time.perf_counter() - begun) / steps
        plain = supervised.State(state.graphdef, dense, state.statistics, ())
        held = evaluate(plain, data.validation)
        names = History._fields[:4]
        now |= dict(zip(names, map(float, (*sums, *held)), strict=True))
        for name, value in now.items():
            getattr(history, name)[epoch] = value
        look, rest = divmod(epoch + 1, recipe.frequency)
        if not rest and looks:
            found = diagnostics.basis_stability(before, dense)
            history.stability[look - 1] = [float(x.mean()) for x in found.values()]
            before = dense
        told(epoch, history)
        return history, state, before

    def form(leaves: list[Any]) -> Tree:
        history = History(*leaves[: len(History._fields)])
        state = first
        if (ranks := history.ranks[history.done - 1]).any():
            params = low_rank.materialise(first.training.weights)
            training = with_ranks(params, recipe, ranks.tolist())
            state = state._replace(training=training)
        return history, state, start[2]

    first = initialise(run, steps)
    # The first epoch gives its state away.
    initial = jax.tree.map(jnp.copy, low_rank.materialise(first.training.weights))
    start = empty(run), first, initial
    keep = run.arm.arm == "full" and run.chosen != "grid"
    options = {"finish": finish, "is_over": is_lost, "form": form, "keep": keep}
    return train_epochs([run], step, start, limits, **options)


def is_lost(tree: Tree) -> bool:
    """Return whether training has diverged."""
    history = tree[0]
    seen = history.train_loss, history.validation_loss
    return not all(np.isfinite(x[: history.done]).all() for x in seen)


def _bytes(program: Any, images: int) -> float:
    """Return the bytes that a program needs besides the images."""
    memory = program.memory_analysis()
    if memory is None:  # not on every platform
        return math.nan
    return memory.argument_size_in_bytes - images + memory.temp_size_in_bytes


def truncate(run: Run, tree: Tree, data: Dataset) -> Tree:
    """Return a trained network of full rank cut to the ranks of a run.

    What it says of validation and fractions stands at the last epoch.
    """
    _, state, before = tree
    weights = factorise(state.training.trainable, run.recipe, run.arm.ranks)
    history = empty(run)
    history.ranks[-1] = run.arm.ranks
    history.trainable[-1] = low_rank.trainable_fraction(weights)
    history.stored[-1] = low_rank.stored_fraction(weights)
    dense = low_rank.materialise(weights)
    plain = supervised.State(state.graphdef, dense, state.statistics, ())
    held = programs(run.recipe)[2](plain, data.validation)
    history.validation_loss[-1], history.validation_accuracy[-1] = map(float, held)
    training = state.training._replace(weights=weights)
    return history, state._replace(training=training), before


# ---------------------------------------------------------------------- many runs


def make_row(
    run: Run, history: History, tested: tuple[float, float] | None, images: int
) -> Row:
    """Return the row of a finished run on so many images.

    One number for each epoch, divided by spaces; `;` between the looks at the bases,
    each with a number for every matrix.
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

    Without `test` the rows say nothing about the test images. None for what is not
    finished after the deadline.
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

    def told(epoch: int, history: History) -> None:
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
        train(run, data, limits, told, finish)
    progress.update(known + run.epochs - progress.n)
