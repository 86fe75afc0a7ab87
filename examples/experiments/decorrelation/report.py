"""The results file of decorrelated networks; tables and figures made from it."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import markdown as table
from examples.experiments.anytime.report import select
from examples.experiments.decorrelation.rules import NAMES, WITHOUT_RATE
from examples.training.report import (
    CIRCUMSTANCES,
    NOT_YET,
    Results,
    Row,
    curve,
    draw_curves,
    mean_and_error,
    spread,
)

CURVES = ("train_loss", "validation_loss", "validation_accuracy")
# The columns that tell one run from another; those of _ARM may differ in one table.
_ARM = ("learning", "optimiser", "method", "rule", "rate", "learning_rate", "chosen")
_SHARED = (
    "data",
    "model",
    "side",
    "widths",
    "condition",
    "schedule",
    "epochs",
    "batch_size",
    "train_images",
    "validation_images",
    "momentum",
    "b2",
    "weight_decay",
    "sample",
    "update_every",
    "noise",
)
KEY = (*_SHARED, *_ARM, "seed")
COLUMNS = (
    *KEY,
    "status",
    *CURVES,
    "test_loss",
    "test_accuracy",
    "steps",
    "seconds",
    *CIRCUMSTANCES,
    *(f"{name}_curve" for name in CURVES),
    "correlation_curve",
)
LEARNING = {
    "bp": "Backpropagation",
    "fa": "Feedback alignment",
    "np": "Node perturbation",
}
_TOGETHER = "orthogonal_sgd"


class Rows(Results):
    """The rows of finished runs in a file, which is made at the first one."""

    columns = COLUMNS
    key = KEY


def merit(rows: Sequence[Row]) -> float:
    """Return what is larger for better rates: minus the validation loss.

    Mean of epochs and seeds; minus infinity if a run diverged.
    """
    loss = np.mean([curve(row, "validation_loss") for row in rows])
    diverged = any(row["status"] != "finished" for row in rows)
    return -math.inf if diverged or not np.isfinite(loss) else -float(loss)


# -------------------------------------------------------------------------- tables


def early(epochs: int) -> int:
    """Return the epoch, counted from one, whose loss is told beside the last one's."""
    return max(1, epochs // 5)


def arm(rows: Sequence[Row], learning: str, optimiser: str, rule: str) -> list[Row]:
    """Return the tuned runs of an arm, in the order of their seeds."""
    names = {"learning": learning, "optimiser": optimiser, "rule": rule}
    return select(rows, chosen="tuned", **names)


def values(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return what a table says of runs; not a number where one diverged."""
    curves = np.array([curve(row, "train_loss") for row in rows])
    lost = np.array([row["status"] != "finished" for row in rows])
    found = {
        "early": curves[:, early(curves.shape[1]) - 1],
        "late": curves[:, -1],
        "validation": np.array([float(row["validation_loss"]) for row in rows]),
        "test": np.array([100 * float(row["test_accuracy"]) for row in rows]),
    }
    return {name: np.where(lost, np.nan, x) for name, x in found.items()}


def correlation(rows: Sequence[Row]) -> np.ndarray:
    """Return the mean |correlation| of layers' inputs: `(runs, epochs, layers)`."""
    each = (row["correlation_curve"].split(";") for row in rows)
    return np.array(
        [[[float(x) for x in e.split()] for e in epochs] for epochs in each]
    )


def _rate(rows: Sequence[Row], found: Sequence[Row], name: str) -> str:
    """Return a rate of an arm, marked where it ends the grid."""
    row = found[0]
    same = {x: row[x] for x in ("learning", "optimiser", "rule")}
    tried = {float(x[name]) for x in select(rows, chosen="grid", **same)}
    rate = float(row[name])
    ends = {min(tried), max(tried)} if len(tried) > 1 else set()
    return f"{rate:g}" + "*" * (rate in ends)


def _line(rows: Sequence[Row], learning: str, optimiser: str, rule: str) -> list[str]:
    found = arm(rows, learning, optimiser, rule)
    if not found:
        tried = select(rows, learning=learning, optimiser=optimiser, rule=rule)
        command = f"`{_command(rows[0])} --learning {learning} --rules {rule}`"
        told = "tuning, or diverged at every rate" if tried else NOT_YET
        return [f"`{rule}`", told, "" if tried else command, *[""] * 7, "0"]
    own = values(found)
    apart = ["", ""]
    base = arm(rows, learning, optimiser, "mean")
    if rule != "mean" and [x["seed"] for x in base] == [x["seed"] for x in found]:
        other = values(base)
        apart = [
            spread(own["early"] - other["early"], 3),
            spread(own["test"] - other["test"], 2),
        ]
    layers = correlation(found)[:, -1].mean(0)
    return [
        f"`{rule}`",
        _rate(rows, found, "learning_rate"),
        "" if rule in WITHOUT_RATE else _rate(rows, found, "rate"),
        *(spread(own[name], 3) for name in ("early", "late", "validation")),
        spread(own["test"], 1),
        *apart,
        " ".join(f"{x:.2f}" for x in layers),
        str(len(found)),
    ]


def _table(rows: Sequence[Row], learning: str, optimiser: str) -> str:
    """Return the table of a way to learn with an optimiser, and who differs."""
    epochs = int(rows[0]["epochs"])
    first = early(epochs)
    header = ["input", "rate", "decorrelation", f"loss, epoch {first}"]
    header += [f"loss, epoch {epochs}", "validation loss", "test, %"]
    header += [f"loss {first} - mean", "test - mean", "correlation", "n"]
    present = {row["rule"] for row in rows if row["optimiser"] == optimiser}
    names = [rule for rule in NAMES if rule in present]
    lines = [_line(rows, learning, optimiser, rule) for rule in names]
    return "\n\n".join([table(header, lines), *_verdict(rows, learning, optimiser)])


def _verdict(rows: Sequence[Row], learning: str, optimiser: str) -> list[str]:
    """Return sentences on what is two standard errors from mean removal."""
    base = arm(rows, learning, optimiser, "mean")
    told = {
        "early": ("early training loss", "lower", "higher"),
        "late": ("last training loss", "lower", "higher"),
        "test": ("test accuracy", "lower", "higher"),
    }
    parts = []
    for name, (what, *ways) in told.items():
        found: dict[str, list[str]] = {way: [] for way in ways}
        for rule in NAMES:
            rows_of_rule = arm(rows, learning, optimiser, rule)
            if rule == "mean" or len(rows_of_rule) != len(base) or len(base) < 2:
                continue
            apart = values(rows_of_rule)[name] - values(base)[name]
            mean, error = mean_and_error(apart[:, None])
            if abs(mean) > 2 * error:
                found[ways[0] if mean < 0 else ways[1]].append(f"`{rule}`")
        if len(base) > 1:
            ends = (f"{way}: {', '.join(x) or 'none'}" for way, x in found.items())
            parts.append(f"{what} - {'; '.join(ends)}")
    return [f"Two standard errors from `mean`, {'. '.join(parts)}."] if parts else []


def _added(rows: Sequence[Row], learning: str, plain: str) -> list[str]:
    """Return a sentence on what `orthogonalise()` adds, rule by rule."""
    parts = []
    for rule in NAMES:
        found, base = (arm(rows, learning, x, rule) for x in (_TOGETHER, plain))
        if not found or [x["seed"] for x in found] != [x["seed"] for x in base]:
            continue
        own, other = values(found), values(base)
        loss, test = (own[x] - other[x] for x in ("early", "test"))
        parts.append(f"`{rule}` {spread(loss, 3)} and {spread(test, 2)}")
    told = f"Differences to `{plain}`, paired by seed, of early loss and test accuracy"
    return [f"{told}: {'; '.join(parts)}."] if parts else []


def _command(row: Row) -> str:
    models = f" --models {row['model']}" if row["data"] == "cifar10" else ""
    return f"python -m examples.decorrelation {row['data']}{models}"


def groups(rows: Sequence[Row], data: str) -> Iterator[list[Row]]:
    """Yield the rows of some data that one section is about, settings by settings."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["data"] == data:
            found.setdefault(tuple(row[name] for name in _SHARED), []).append(row)
    yield from found.values()


def section(rows: Sequence[Row]) -> str:
    """Return what was found at some settings, as Markdown."""
    row = rows[0]
    title = {"mlp": "MLP", "conv": "Convolutional network"}[row["model"]]
    mixed = row["condition"] != "1.0"
    also = f", pixels mixed to condition {float(row['condition']):g}" if mixed else ""
    shown = [x for x in _SHARED[2:] if row[x] not in ("0", "0.0") and x != "condition"]
    settings = ", ".join(f"{x.replace('_', ' ')} {row[x]}" for x in shown)
    devices = "; ".join(dict.fromkeys(x["device"] for x in rows))
    versions = ", ".join(f"{x} {row[x]}" for x in ("jax", "flax", "optax"))
    minutes = sum(float(x["seconds"]) for x in rows) / 60
    spent = f"{len(rows)} runs, {minutes:.1f} minutes without compilation"
    parts = [f"### {title}{also}", f"{settings}; {devices}, {versions}; {spent}."]
    plain = next((x["optimiser"] for x in rows if x["optimiser"] != _TOGETHER), "sgd")
    for learning, name in LEARNING.items():
        known = [row for row in rows if row["learning"] == learning]
        if any(row["optimiser"] == plain for row in known):
            parts += [f"#### {name}, `{plain}`", _table(rows, learning, plain)]
        if any(row["optimiser"] == _TOGETHER for row in known):
            parts.append(f"#### {name}, with `orthogonalise()` before the momentum")
            parts.append(_table(rows, learning, _TOGETHER))
            parts += _added(rows, learning, plain)
    return "\n\n".join(parts)


# -------------------------------------------------------------------------- figures


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw training loss and correlation by epoch, for every way to learn."""
    plain = next((x["optimiser"] for x in rows if x["optimiser"] != _TOGETHER), "sgd")
    ways = [x for x in LEARNING if any(arm(rows, x, plain, rule) for rule in NAMES)]
    figure = Figure(figsize=(2.5 + 4 * len(ways), 7), layout="constrained")
    axes = figure.subplots(2, len(ways), squeeze=False, sharex=True)
    for (top, bottom), learning in zip(axes.T, ways, strict=True):
        for rule in NAMES:
            found = arm(rows, learning, plain, rule)
            if found:
                losses = np.array([curve(row, "train_loss") for row in found])
                _draw(top, losses, rule)
                _draw(bottom, correlation(found).mean(2), rule)
        top.set(title=LEARNING[learning], yscale="log")
        bottom.set(xlabel="epoch")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("mean |correlation| of layers' inputs")
    handles = {}
    for axis in axes[0]:
        handles |= {x.get_label(): x for x in axis.get_lines()}
    figure.legend(handles.values(), handles, loc="outside right upper")
    row = rows[0]
    mixed = f", condition {float(row['condition']):g}" * (row["condition"] != "1.0")
    title = f"{row['data']}, {row['model']}{mixed}"
    figure.suptitle(f"{title}: mean of seeds and one standard error")
    figure.savefig(path, dpi=120)


def _draw(axis: Axes, curves: np.ndarray, rule: str) -> None:
    number = NAMES.index(rule)
    black = {"nothing": "dimgrey", "mean": "black"}
    style = {"color": black.get(rule, f"C{number - 2}")}
    style["linestyle"] = "--" if rule in black else "-"
    draw_curves(axis, curves, label=rule, **style)
    axis.grid(alpha=0.3)
