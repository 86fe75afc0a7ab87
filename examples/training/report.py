"""The results file of a trainer, and the table and the figure made from it."""

import csv
import dataclasses
import itertools
import math
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax
import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import orthax

RESULTS = Path(__file__).parents[1] / "results"  # what is committed
NOT_YET = "not yet run"

EPOCHS_SHOWN = (1, 3, 5, 10, 20, 50)
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")

# The columns of every results file that say where and with what a row came about.
CIRCUMSTANCES = ("device", "python", "jax", "flax", "optax", "orthax")
# The columns of the results file; those of KEY tell one run from another.
KEY = (
    "data",
    "model",
    "optimiser",
    "method",
    "layers",
    "learning_rate",
    "schedule",
    "chosen",
    "seed",
    "epochs",
    "batch_size",
    "momentum",
    "b2",
    "weight_decay",
    "augment",
    "classes",
    "cifar_stem",
    "dtype",
    "norm_groups",
)
COLUMNS = (
    *KEY,
    *(f"accuracy_{epoch}" for epoch in EPOCHS_SHOWN),
    "status",
    "test_loss",
    "test_accuracy",
    *CURVES,
    "seconds",
    "images_per_s",
    *CIRCUMSTANCES,
    *(f"{name}_curve" for name in CURVES),
)


# --------------------------------------------------------------- the results file

Row = dict[str, str]


class Results:
    """The results file: finds the rows of finished runs, and appends new ones.

    A broken row is named and left out. A file with other columns, of another version
    of this program say, is named and left as it is: the rows go to one beside it, of
    the same name with a number.

    Args:
      path: the file; made, with its folder, at the first row.
      fresh: whether to delete an existing file first.
    """

    columns: ClassVar[tuple[str, ...]] = COLUMNS
    key: ClassVar[tuple[str, ...]] = KEY  # those that tell one run from another

    def __init__(self, path: Path, fresh: bool = False):
        self._rows: dict[tuple[str, ...], Row] = {}
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)
        for number in itertools.count(2):
            if not self.path.exists() or self._read():
                break
            self.path = path.with_stem(f"{path.stem}-{number}")

    def _read(self) -> bool:
        """Read the rows, and return whether the columns are the right ones."""
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or self.columns) != self.columns:
                self._complain(1, "other columns; nothing of it is used or changed")
                return False
            for row in reader:
                whole = len(row) == len(self.columns) and None not in row.values()
                if whole and _is_sound(row):
                    self._add(row)
                else:
                    self._complain(reader.line_num, "a broken row; skipped")
        return True

    def _complain(self, line: int, what: str) -> None:
        print(f"{self.path}, line {line}: {what}", file=sys.stderr)

    def find(self, key: Row) -> Row | None:
        """Return the row of a run, given its `key` columns; None if not finished."""
        return self._rows.get(tuple(key[name] for name in self.key))

    def rows(self) -> list[Row]:
        """Return the rows of all finished runs, in the order of the file."""
        return list(self._rows.values())

    def append(self, row: Row) -> None:
        """Write the row of a finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if not before:
                writer.writeheader()
            elif not before.endswith("\n"):  # half a row, perhaps half a quotation
                file.write('"' * (before.count('"') % 2) + "\r\n")
            writer.writerow(row)
        self._add(row)

    def _add(self, row: Row) -> None:
        self._rows[tuple(row[name] for name in self.key)] = row


def _is_sound(row: Row) -> bool:
    """Return whether the numbers of a row are numbers."""
    try:
        float(row["learning_rate"]), float(row["train_loss"]), int(row["seed"])
        return len(row["validation_accuracy_curve"].split()) == int(row["epochs"])
    except ValueError:
        return False


def describe_device() -> str:
    """Return the name of the first device, with the number of cores of a CPU."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return device.device_kind + cores


def circumstances() -> Row:
    """Return the columns that say where and with what a row came about."""
    versions = (x.__version__ for x in (jax, flax, optax, orthax))
    values = (describe_device(), platform.python_version(), *versions)
    return dict(zip(CIRCUMSTANCES, values, strict=True))


def joined(values: Sequence[float] | np.ndarray) -> str:
    """Return numbers as one column has them: four digits, divided by spaces."""
    return " ".join(f"{value:.4g}" for value in np.asarray(values, float))


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
            np.array([curve(row, "validation_accuracy") for row in group]),
            np.array([float(row["validation_loss"]) for row in group]),
            np.array([float(row["test_accuracy"] or math.nan) for row in group]),
        )
        for (optimiser, rate, chosen), group in groups.items()
    ]


def curve(row: Row, name: str) -> list[float]:
    """Return what a row says of every epoch, one of `CURVES`."""
    return [float(x) for x in row[f"{name}_curve"].split()]


def mean_and_error(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of curves, shape `(runs, epochs)`, and its standard error.

    Of a single curve the error is taken for zero.
    """
    runs, mean = len(curves), curves.mean(0)
    return mean, curves.std(0, ddof=1) / math.sqrt(runs) if runs > 1 else 0.0 * mean


def draw_curves(
    axis: Axes, curves: np.ndarray, x: np.ndarray | None = None, **style: Any
) -> None:
    """Draw the mean of curves, `(runs, points)`, and a band of one standard error.

    Args:
      axis: where.
      curves: one a run.
      x: of the points; by default they are counted from one.
      **style: of the mean, as for `Axes.plot`; the band has its colour.
    """
    mean, error = mean_and_error(curves)
    x = np.arange(1, len(mean) + 1) if x is None else x
    (line,) = axis.plot(x, mean, **style)
    low, high, colour = mean - error, mean + error, line.get_color()
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


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


def plot_rates(arms: Sequence[Arm], title: str, path: Path) -> None:
    """Draw validation accuracy after the last epoch by learning rate, of a search."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(arm.optimiser for arm in arms):
        tried = [arm for arm in arms if arm.optimiser == name]
        rates = np.array([arm.learning_rate for arm in tried])
        best = max(tried, key=Arm.merit)
        label = f"{name}, best at {best.learning_rate:g}"
        last = np.stack([arm.last for arm in tried], axis=1)
        draw_curves(axis, last, rates, marker="o", label=label)
    axis.set(xscale="log", xlabel="learning rate", title=title)
    axis.set_ylabel("validation accuracy after the last epoch")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw(axis: Axes, arm: Arm, colour: str) -> None:
    """Draw the curve of one arm with its band; a diverged seed ends the curve."""
    label = f"{arm.optimiser}, rate {arm.learning_rate:g} (test {spread(arm.tests)})"
    style = {"color": colour, "marker": "o", "markersize": 3, "label": label}
    draw_curves(axis, arm.curves, **style)


def _stretch(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(1.01 - np.minimum(accuracy, 1.0))


def _unstretch(height: np.ndarray) -> np.ndarray:
    return 1.01 - np.exp(-height)
