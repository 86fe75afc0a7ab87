"""The results file of language models, and what is read from its rows."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from examples.experiments.anytime.report import select
from examples.training.report import CIRCUMSTANCES, Results, Row, curve

CURVES = ("train_loss", "validation_loss", "validation_accuracy")
# The columns that tell one run from another; those of _ARM may differ in one table.
_ARM = (
    "optimiser",
    "attention",
    "method",
    "learning_rate",
    "rest_rate",
    "chosen",
    "epochs",
    "seed",
)
SHARED = (
    "text",
    "level",
    "vocabulary",
    "depth",
    "heads",
    "width",
    "context",
    "initial",
    "scanned",
    "batch_size",
    "budget",
    "steps",
    "warmup",
    "schedule",
    "momentum",
    "b1",
    "b2",
    "weight_decay",
    "dtype",
)
KEY = (*SHARED, *_ARM)
COLUMNS = (
    *KEY,
    "status",
    "parameters",
    *CURVES,
    "test_loss",
    "test_accuracy",
    "seconds",
    "tokens_per_s",
    *CIRCUMSTANCES,
    *(f"{name}_curve" for name in CURVES),
)
# How the learning rate and the steps of a run came about.
GRID, TUNED, EQUAL_TIME, SINGLE = "grid", "tuned", "equal_time", "single"


class Rows(Results):
    """The rows of finished runs in a file, which is made at the first one."""

    columns = COLUMNS
    key = KEY


def rates_of(row: Row) -> tuple[float, float]:
    """Return the rates of a run: of the kernels, and of all else."""
    return float(row["learning_rate"]), float(row["rest_rate"])


def merit(rows: Sequence[Row]) -> float:
    """Return what is larger for a better rate: minus the last validation loss.

    Mean of seeds; minus infinity if a run diverged.
    """
    loss = np.mean([float(row["validation_loss"]) for row in rows])
    return -float(loss) if np.isfinite(loss) else -math.inf


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of studies, each of which makes a table."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["chosen"] != SINGLE:
            found.setdefault(tuple(row[name] for name in SHARED), []).append(row)
    yield from found.values()


def arms(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return optimisers and cuts of attention, in the order of the rows."""
    return list(dict.fromkeys((row["optimiser"], row["attention"]) for row in rows))


def of_arm(rows: Sequence[Row], arm: tuple[str, str], chosen: str) -> list[Row]:
    """Return the runs of an arm, in the order of their seeds."""
    return select(rows, optimiser=arm[0], attention=arm[1], chosen=chosen)


def values(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return a number of every run, not one where it diverged, shape `(runs,)`."""
    return np.array([float(row[name] or math.nan) for row in rows])


def apart(rows: Sequence[Row], other: Sequence[Row], name: str) -> np.ndarray | None:
    """Return the differences of a number, paired by seed; None if seeds differ."""
    if not rows or [row["seed"] for row in rows] != [row["seed"] for row in other]:
        return None
    return values(rows, name) - values(other, name)


def reached(rows: Sequence[Row], other: Sequence[Row]) -> np.ndarray | None:
    """Return the share of the steps after which runs are where others end.

    By the validation loss, paired by seed, with straight lines between two looks.
    Infinite where a run does not get there, not a number where one diverged.
    """
    if not rows or [row["seed"] for row in rows] != [row["seed"] for row in other]:
        return None
    found = []
    for row, goal in zip(rows, values(other, "validation_loss"), strict=True):
        losses = np.array(curve(row, "validation_loss"))
        if not np.isfinite([*losses, goal]).all():
            found.append(math.nan)
            continue
        (there,) = np.nonzero(losses <= goal)
        if not len(there):
            found.append(math.inf)
            continue
        at = there[0]
        part = 1.0
        if at:
            part = (losses[at - 1] - goal) / (losses[at - 1] - losses[at])
        found.append((at + part) / len(losses))
    return np.array(found)
