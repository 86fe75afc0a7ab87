"""What a large training writes: steps.csv, epochs.csv, curves.png, TensorBoard."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

_COUNTS = ("images", "unreadable")
_TIMES = ("seconds", "waited")


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Return what is summed over images as their mean; counts as they are."""
    images = float(sums["images"])
    return {
        name: float(x) if name in _COUNTS else float(x) / images if images else math.nan
        for name, x in sums.items()
    }


class Table:
    """Rows of numbers in a CSV file, the first of them the number of a step.

    Args:
      path: the file; made at the first row.
      step: rows of later steps, which a killed run wrote behind its last checkpoint,
        are deleted, as is half a row.
      since: rows up to this step are in the file, but not in `rows`.
    """

    def __init__(self, path: Path, step: int, since: int = 0):
        self.path, self.rows = path, []
        if not path.exists():
            return
        kept = path.with_suffix(".part")
        with path.open(newline="") as old, kept.open("w", newline="") as new:
            reader = csv.DictReader(old)
            writer = csv.DictWriter(new, reader.fieldnames or ())
            writer.writeheader()
            for row in reader:
                if None in row or None in row.values() or int(row["step"]) > step:
                    break
                writer.writerow(row)
                if int(row["step"]) > since:
                    self.rows.append({name: float(x) for name, x in row.items()})
        kept.replace(path)

    def append(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write rows of the same columns."""
        if not rows:
            return
        header = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, tuple(rows[0]))
            if header:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows


class Log:
    """Writes what a training says, in the first process; the others stay silent.

    Args:
      folder: of the files.
      first: steps that are done; what was written of later ones is deleted.
      total: steps in all.
      steps: of an epoch.
    """

    def __init__(self, folder: Path, first: int, total: int, steps: int):
        self._folder, self._steps = folder, steps
        self._silent = jax.process_index() > 0
        self._unwritten: list[tuple[int, Any]] = []
        self._bar = tqdm(
            initial=first,
            total=total,
            unit="step",
            mininterval=1,
            disable=self._silent,
        )
        if self._silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # A whole epoch is evaluated again: the last run may have been killed before.
        before = (first - 1) // steps * steps
        self._rows = Table(folder / "steps.csv", first, before)
        self._epochs = Table(folder / "epochs.csv", before)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._silent:
            self.write()
            self._board.close()
        self._bar.close()

    def step(self, number: int, said: Any) -> None:
        """Note what a step said (`examples.streaming.training.Said`)."""
        self._unwritten.append((number, said))
        self._bar.update()

    def write(self) -> None:
        """Write what the steps since the last call have said; waits for them."""
        noted, self._unwritten = self._unwritten, []
        if self._silent or not noted:
            return
        values = jax.device_get([said.sums for _, said in noted])
        rows = [
            {
                "step": number,
                "learning_rate": said.rate,
                **means(sums),
                "seconds": said.seconds,
                "waited": said.waited,
            }
            for (number, said), sums in zip(noted, values, strict=True)
        ]
        self._rows.append(rows)
        now = summary(rows)
        self._show("steps", now, rows[-1]["step"])
        speed, share = now["images_per_s"], now["waited"]
        self._bar.set_postfix_str(
            f"loss {now['loss']:.4g}, {speed:.0f} images/s, {share:.0%} waiting"
        )

    def epoch(self, scores: Mapping[str, float]) -> None:
        """Write what all steps of an epoch have said, and its evaluation."""
        if self._silent:
            return
        rows, self._rows.rows = self._rows.rows, []
        if not rows:  # somebody has deleted steps.csv
            return
        step = int(rows[-1]["step"])
        own = summary(rows)
        row = {
            "step": step,
            "epoch": step // self._steps,
            "learning_rate": rows[-1]["learning_rate"],
            **{f"train_{name}": own.pop(name) for name in own.copy() if name in scores},
            **{f"validation_{name}": value for name, value in scores.items()},
            **own,
        }
        self._epochs.append([row])
        self._show("epochs", row, step)
        plot(self._epochs.rows, self._folder / "curves.png")
        told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        tqdm.write(f"epoch {row['epoch']}: {told}")

    def _show(self, kind: str, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of rows of steps, over images; counts and seconds are summed.

    "images_per_s" is of the time in steps alone, "waited" the share of it in which the
    host waited for a batch: an upper bound of what the device waited.
    """
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    images, seconds = columns["images"].sum(), columns["seconds"].sum()
    return {
        **{
            name: float((x * columns["images"]).sum() / images)
            for name, x in columns.items()
            if name not in ("step", "learning_rate", *_COUNTS, *_TIMES)
        },
        **{name: float(columns[name].sum()) for name in _COUNTS},
        "seconds": float(seconds),
        "images_per_s": float(images / seconds),
        "waited": float(columns["waited"].sum() / seconds),
    }


def plot(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw what was trained on and what was evaluated, by epoch."""
    kinds = {"train_": "--", "validation_": "-"}
    names = [
        name.removeprefix("validation_")
        for name in rows[0]
        if name.startswith("validation_") and not name.endswith(_COUNTS)
    ]
    figure = Figure(figsize=(1 + 4 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(panels, names, strict=True):
        for kind, style in kinds.items():
            if f"{kind}{name}" in rows[0]:
                x = [row["epoch"] for row in rows]
                y = [row[f"{kind}{name}"] for row in rows]
                axis.plot(x, y, style, marker=".", color="C0", label=kind.strip("_"))
        axis.set(xlabel="epoch", title=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
