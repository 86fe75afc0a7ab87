"""The curves of language models: validation loss by step and by time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.experiments.language import speed
from examples.experiments.language.arms import ATTENTION, BASELINE
from examples.experiments.language.report import TUNED, arms, of_arm
from examples.training.report import Row, curve, draw_curves

_BASE = {"optimiser": BASELINE, "attention": "", "method": ""}
_STYLES = dict(zip(ATTENTION, ("-", "--", ":"), strict=True))


def draw(rows: Sequence[Row], clock: Sequence[dict[str, str]], path: Path) -> None:
    """Draw the validation loss of tuned runs, mean of seeds and one standard error.

    Args:
      rows: of one study.
      clock: the rows that say how long a step of each arm takes.
      path: of the figure.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    colours: dict[str, str] = {}
    for arm in arms(rows):
        found = of_arm(rows, arm, TUNED)
        if not found:
            continue
        losses = np.array([curve(row, "validation_loss") for row in found])
        steps = int(found[0]["steps"]) * np.arange(1, losses.shape[1] + 1)
        colour = colours.setdefault(arm[0], f"C{len(colours)}")
        style = {"color": colour, "linestyle": _STYLES.get(arm[1], "-")}
        style |= {"label": " ".join(arm).strip(), "linewidth": 1.3}
        draw_curves(by_step, losses, steps, **style)
        seconds = _seconds(clock, found[0])
        if seconds:
            draw_curves(by_time, losses, steps * seconds, **style)
    by_step.set(xlabel="step", ylabel="validation loss, nats a token")
    by_time.set(xlabel="seconds of training, by AdamW's median step")
    by_step.legend(fontsize="small")
    for axis in (by_step, by_time):
        axis.grid(alpha=0.3)
    _zoom(by_step, rows)
    name = f"{rows[0]['text']}, {rows[0]['level']}s"
    figure.suptitle(f"{name}: mean of seeds and one standard error")
    figure.savefig(path, dpi=120)


def _seconds(clock: Sequence[dict[str, str]], row: Row) -> float:
    """Return how long a step of an arm takes, none if it was not timed.

    By its ratio, in whose rounds other work of the machine fell on both.
    """
    own = speed.find(clock, row)
    base = speed.find(clock, row | _BASE)
    if not own.get("ratio") or not base:
        return 0.0
    return float(own["ratio"]) * float(base["seconds"])


def _zoom(axis: Axes, rows: Sequence[Row]) -> None:
    """Leave the first fifth out, in which all fall from the same height."""
    losses = np.array(
        [x for row in rows if row["chosen"] == TUNED for x in _late(row)], float
    )
    if np.isfinite(losses).any():
        low, high = np.nanmin(losses), np.nanmax(losses)
        margin = 0.05 * (high - low) + 1e-3
        axis.set_ylim(low - margin, high + margin)


def _late(row: Row) -> list[float]:
    losses = curve(row, "validation_loss")
    return losses[len(losses) // 5 :]


def draw_single(row: Row, path: Path) -> None:
    """Draw the losses of one training by step and by time."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    count = int(row["epochs"])
    units = {
        "step": int(row["steps"]),
        "seconds, without compilation": float(row["seconds"]) / count,
    }
    for axis, (name, unit) in zip(axes, units.items(), strict=True):
        for part in ("train", "validation"):
            losses = curve(row, f"{part}_loss")
            axis.plot(unit * np.arange(1, count + 1), losses, label=part)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="loss, nats a token")
    axes[0].legend()
    arm = f"{row['optimiser']} {row['attention']}".strip()
    figure.suptitle(f"{row['text']}: {arm}, rate {row['learning_rate']}")
    figure.savefig(path, dpi=120)
