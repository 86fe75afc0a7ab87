"""The results file of a trainer, and the table and the figure made from it."""

import csv
import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

EPOCHS_SHOWN = (1, 3, 5, 20)

# The columns of the results file; those of KEY tell one run from another.
KEY = (
    "config",
    "optimiser",
    "method",
    "learning_rate",
    "chosen",
    "seed",
    "epochs",
    "batch_size",
    "momentum",
    "weight_decay",
)
COLUMNS = (
    *KEY,
    *(f"accuracy_{epoch}" for epoch in EPOCHS_SHOWN),
    "test_accuracy",
    "train_loss",
    "validation_loss",
    "seconds",
    "device",
    "python",
    "jax",
    "flax",
    "optax",
    "orthax",
    "curve",
)


# --------------------------------------------------------------- the results file

Row = dict[str, str]


class Results:
    """The results file: finds the rows of finished runs, and appends new ones.

    Args:
      path: the file; made, with its folder, at the first row.
      fresh: whether to delete an existing file first.

    Raises:
      ValueError: if the file is there and is not such a file.
    """

    def __init__(self, path: Path, fresh: bool = False):
        self.path = path
        self._rows: dict[tuple[str, ...], Row] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._expect(tuple(reader.fieldnames or COLUMNS) == COLUMNS, "line 1")
                for row in reader:
                    whole = len(row) == len(COLUMNS) and None not in row.values()
                    self._expect(whole, f"line {reader.line_num}")
                    self._add(row)

    def find(self, key: Row) -> Row | None:
        """Return the row of a run, given its `KEY` columns; None if not finished."""
        return self._rows.get(tuple(key[name] for name in KEY))

    def rows(self) -> list[Row]:
        """Return the rows of all finished runs, in the order of the file."""
        return list(self._rows.values())

    def append(self, row: Row) -> None:
        """Write the row of a finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._add(row)

    def _add(self, row: Row) -> None:
        self._rows[tuple(row[name] for name in KEY)] = row

    def _expect(self, holds: bool, where: str) -> None:
        if not holds:
            raise ValueError(
                f"{self.path}, {where}: expected the {len(COLUMNS)} columns "
                f"{', '.join(COLUMNS)}; delete what is wrong, start over with --fresh, "
                "or choose another folder with --output"
            )


def describe_device() -> str:
    """Return the name of the first device, with the number of cores of a CPU."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return device.device_kind + cores


# --------------------------------------------------------- the table and the figure


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """The runs that differ only in their seeds."""

    optimiser: str
    learning_rate: float
    chosen: str
    curves: np.ndarray  # validation accuracies, (seeds, epochs)
    losses: np.ndarray  # validation losses after the last epoch, (seeds,)
    tests: np.ndarray  # test accuracies, (seeds,), nan without a test

    @property
    def last(self) -> np.ndarray:
        """Validation accuracies after the last epoch, shape `(seeds,)`."""
        return self.curves[:, -1]

    def merit(self) -> tuple[float, float]:
        """Return what is larger for the better arm; minus infinity if one diverged."""
        if np.isnan(self.last).any():
            return -math.inf, -math.inf
        return float(self.last.mean()), -float(self.losses.mean())


def gather(rows: Iterable[Row]) -> list[Arm]:
    """Return the arms of some rows, in the order in which they appear."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        name = row["optimiser"], row["learning_rate"], row["chosen"]
        groups.setdefault(name, []).append(row)
    return [
        Arm(
            optimiser,
            float(rate),
            chosen,
            np.array([[float(x) for x in row["curve"].split()] for row in group]),
            np.array([float(row["validation_loss"]) for row in group]),
            np.array([float(row["test_accuracy"] or math.nan) for row in group]),
        )
        for (optimiser, rate, chosen), group in groups.items()
    ]


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Return the mean and its standard error, or how many runs diverged."""
    if lost := int(np.isnan(values).sum()):
        return f"diverged {lost}/{len(values)}"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def make_table(arms: Sequence[Arm]) -> str:
    """Return the table of the final runs, as text."""
    epochs = arms[0].curves.shape[1]
    shown = [x for x in EPOCHS_SHOWN if x < epochs] + [epochs]
    names = ["optimiser", "rate", "", *(f"epoch {x}" for x in shown), "test"]
    lines = [names] + [
        [
            arm.optimiser,
            f"{arm.learning_rate:g}",
            arm.chosen,
            *(spread(arm.curves[:, x - 1]) for x in shown),
            spread(arm.tests),
        ]
        for arm in arms
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def plot(arms: Sequence[Arm], title: str, path: Path) -> None:
    """Draw accuracy by epoch: mean over seeds, and a band of one standard error."""
    panels = {
        "fixed": "every optimiser at the same learning rate",
        "tuned": "every optimiser at its own learning rate",
    }
    present = [x for x in panels if any(arm.chosen == x for arm in arms)]
    names = list(dict.fromkeys(arm.optimiser for arm in arms))
    figure = Figure(figsize=(1 + 5 * len(present), 4.5), layout="constrained")
    axes = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    for axis, chosen in zip(axes, present, strict=True):
        for arm in arms:
            if arm.chosen == chosen:
                _draw(axis, arm, colour=f"C{names.index(arm.optimiser)}")
        # The error in logarithmic steps: at the end it is a few hundredths for all.
        axis.set_yscale("function", functions=(_stretch, _unstretch))
        axis.set(title=panels[chosen], xlabel="epoch", ylim=(0.0, 1.0))
        axis.set_yticks([0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize="small")
    axes[0].set_ylabel("validation accuracy (axis stretched towards 1)")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw(axis: Axes, arm: Arm, colour: str) -> None:
    """Draw the curve of one arm with its band; a diverged seed ends the curve."""
    seeds, epochs = arm.curves.shape
    mean = arm.curves.mean(0)
    error = arm.curves.std(0, ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0 * mean
    x = np.arange(1, epochs + 1)
    label = f"{arm.optimiser}, rate {arm.learning_rate:g} (test {spread(arm.tests)})"
    axis.plot(x, mean, color=colour, marker="o", markersize=3, label=label)
    low, high = (mean - error).clip(0, 1), (mean + error).clip(0, 1)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _stretch(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(1.01 - np.minimum(accuracy, 1.0))


def _unstretch(height: np.ndarray) -> np.ndarray:
    return 1.01 - np.exp(-height)
