"""Many runs in a row: what is missing, side by side, checkpoints and a deadline.

What a run is, and a row of its results file, is up to the trainers.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from examples.training.checkpoints import checkpoints
from examples.training.report import Results, Row

FIRST_TUNING_SEED = 1_000_000


def seeds_of(chosen: str, final: int, tuning: int) -> range:
    """Return the seeds of the runs of an arm at a rate.

    No final run shares its seed with a run of the grid.

    Args:
      chosen: how the rate is: `"grid"` for those that are tried.
      final: how many seeds the others have.
      tuning: how many those have.
    """
    first, count = (FIRST_TUNING_SEED, tuning) if chosen == "grid" else (0, final)
    return range(first, first + count)


class OutOfTime(Exception):
    """The deadline has passed; what was trained is in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to write a checkpoint, when to stop, and how many seeds to train at once.

    Attributes:
      folder: of the checkpoints; none are written without.
      every: seconds between two checkpoints.
      deadline: stop after the epoch that passes it, in `time.monotonic` seconds.
      seeds_at_once: runs that differ in their seeds alone trained side by side.
    """

    folder: Path | None = None
    every: float = 60.0
    deadline: float = math.inf
    seeds_at_once: int = 1


def train_missing(
    runs: Sequence[Any],
    results: Results,
    limits: Limits,
    apart: Mapping[str, Any],
    train: Callable[[list[Any], tqdm], None],
) -> list[Row | None]:
    """Train what the results file does not hold; return the row of every run.

    Args:
      runs: dataclasses with `epochs` and a method `key`.
      results: which are finished; `train` adds to it.
      limits: how many run side by side, and when no further ones are started.
      apart: the fields in which runs side by side may differ, with any value.
      train: trains runs side by side, and tells a progress bar of epochs.

    Returns:
      Rows, None for what is not finished after the deadline.
    """
    missing = [run for run in runs if results.find(run.key()) is None]
    if len(missing) < len(runs):
        print(
            f"{len(runs) - len(missing)} of {len(runs)} runs skipped: finished in "
            f"{results.path}"
        )
    epochs = sum(run.epochs for run in missing)
    with (
        contextlib.suppress(OutOfTime),
        tqdm(total=epochs, unit="epoch", disable=not missing) as progress,
    ):
        for together in _side_by_side(missing, limits.seeds_at_once, apart):
            train(together, progress)
            if time.monotonic() > limits.deadline:
                break
    return [results.find(run.key()) for run in runs]


def _side_by_side(
    runs: Sequence[Any], most: int, apart: Mapping[str, Any]
) -> Iterator[list[Any]]:
    """Yield runs that differ in some fields alone, so many at most."""
    groups: dict[Any, list[Any]] = {}
    for run in runs:
        groups.setdefault(dataclasses.replace(run, **apart), []).append(run)
    for group in groups.values():
        for i in range(0, len(group), most):
            yield group[i : i + most]


def train_epochs(
    runs: Sequence[Any],
    step: Callable[[int, Any], Any],
    tree: Any,
    limits: Limits,
    *,
    finish: Callable[[Any], None] = lambda tree: None,
    is_over: Callable[[Any], bool] = lambda tree: False,
    form: Callable[[list[Any]], Any] | None = None,
    keep: bool = False,
) -> Any:
    """Take runs side by side through their epochs, from the last checkpoint if any.

    Args:
      runs: dataclasses with `epochs` and a method `key`, alike but for what `tree` has
        of its own for each.
      step: gives the tree after an epoch, counted from zero, from the one before.
      tree: arrays, at the start: the state, and what epochs leave behind.
      limits: when to stop, and where to leave what is not finished.
      finish: is given the last tree before the checkpoint is deleted.
      is_over: whether there is no use in going on.
      form: of the tree, from the arrays of a checkpoint, if its shapes change.
      keep: whether the last tree stays as a checkpoint, to be asked for again.

    Returns:
      The last tree.

    Raises:
      OutOfTime: after the deadline.
    """
    epochs = runs[0].epochs
    identity = [run.key() for run in runs]
    with checkpoints(identity, limits.folder, keep=keep) as saved:
        done, tree = saved.restored(tree, form)
        last_save = time.monotonic()
        for epoch in range(done, epochs):
            tree = step(epoch, tree)
            if is_over(tree):
                break
            now = time.monotonic()
            last = epoch + 1 == epochs
            late = now > limits.deadline and not last
            if late or (keep and last) or now - last_save > limits.every:
                saved.save(epoch + 1, tree)
                last_save = time.monotonic()
            if late:
                raise OutOfTime
        finish(tree)
    return tree


def over_seeds(f: Callable, seeds: int, along: int) -> Callable:
    """Lift `f` to as many seeds along the first axis of its first arguments.

    For one seed nothing is batched: a CPU would be slower.
    """
    if seeds > 1:
        return lambda *args: jax.vmap(f, (0,) * along + (None,) * (len(args) - along))(
            *args
        )

    def one(*args):
        first = jax.tree.map(lambda x: x[0], args[:along])
        return jax.tree.map(lambda x: x[None], f(*first, *args[along:]))

    return one


_PROGRAMS: dict[tuple, Callable] = {}
_MOST_PROGRAMS = 32


def compiled(f: Callable, *args) -> Callable:
    """Return the program of a jitted function: no epoch's time is compilation."""
    shapes = ((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(args))
    key = (f, *shapes)
    if key not in _PROGRAMS:
        while len(_PROGRAMS) >= _MOST_PROGRAMS:
            del _PROGRAMS[next(iter(_PROGRAMS))]
        _PROGRAMS[key] = f.lower(*args).compile()
    return _PROGRAMS[key]
