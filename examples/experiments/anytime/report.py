"""The results file of anytime networks, and the tables and figures made from it."""

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import markdown as table
from examples.experiments.anytime.task_rules import RULES
from examples.models.anytime import MODELS
from examples.training.report import (
    CIRCUMSTANCES,
    NOT_YET,
    Results,
    Row,
    draw_curves,
    mean_and_error,
    spread,
)

INDEPENDENT = "independent"
# The columns that tell one run from another; those of _ARM may differ in one table.
_ARM = ("model", "rule", "exit", "learning_rate", "chosen", "seed")
_SHARED = (
    "data",
    "stages",
    "width",
    "depth",
    "optimiser",
    "schedule",
    "epochs",
    "batch_size",
    "train_images",
    "momentum",
    "weight_decay",
    "augment",
    "two_passes",
)
KEY = (*_SHARED, *_ARM)
COLUMNS = (
    *KEY,
    "status",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "flops",
    "cosines",
    "conflicts",
    "seconds",
    *CIRCUMSTANCES,
)


# --------------------------------------------------------------- the results file


class Rows(Results):
    """The rows of finished runs in a file, which is made at the first one.

    A broken row is named and left out.

    Raises:
      ValueError: if the file has other columns.
    """

    columns = COLUMNS
    key = KEY

    def _read(self) -> bool:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
                raise ValueError(f"{self.path} has other columns: move it away.")
            for row in reader:
                if None in row or None in row.values():
                    self._complain(reader.line_num, "broken; skipped")
                else:
                    self._add(row)
        return True


def numbers(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return what rows say of every exit or pair: `(rows, epochs, n)`, or one epoch."""
    return np.array(
        [[[float(x) for x in e.split()] for e in row[name].split(";")] for row in rows]
    )


def merit(rows: Sequence[Row]) -> tuple[float, float]:
    """Return what is larger for the better learning rate, from its runs.

    Accuracy on validation images, mean of exits and seeds, and minus the loss; minus
    infinity if a run diverged.
    """
    accuracy = numbers(rows, "validation_accuracy").mean()
    loss = numbers(rows, "validation_loss").mean()
    if not np.isfinite(accuracy + loss):
        return -math.inf, -math.inf
    return float(accuracy), -float(loss)


# -------------------------------------------------------------------------- tables


def select(rows: Iterable[Row], **values: str) -> list[Row]:
    """Return the rows with some values, in the order of their seeds."""
    found = [row for row in rows if all(row[k] == v for k, v in values.items())]
    return sorted(found, key=lambda row: int(row["seed"]))


def tests(rows: Sequence[Row], model: str, rule: str) -> np.ndarray | None:
    """Return test accuracies of the tuned runs of an arm, `(seeds, exits)`.

    Of independent networks those of every stage side by side; None if not all ran.
    """
    found = select(rows, model=model, rule=rule, chosen="tuned")
    if rule != INDEPENDENT:
        return numbers(found, "test_accuracy")[:, 0] if found else None
    stages = range(1, int(rows[0]["stages"]) + 1)
    groups = [select(found, exit=str(k)) for k in stages]
    if len({tuple(row["seed"] for row in group) for group in groups}) != 1 or not found:
        return None
    each = [numbers(group, "test_accuracy")[:, 0] for group in groups]
    return np.concatenate(each, axis=1)


def _rates(rows: Sequence[Row], model: str, rule: str) -> str:
    """Return the learning rates of an arm, marked where they end the grid."""
    tried = {float(row["learning_rate"]) for row in select(rows, chosen="grid")}
    ends = {min(tried), max(tried)} if tried else set()
    found = select(rows, model=model, rule=rule, chosen="tuned")
    chosen = dict.fromkeys((row["exit"], float(row["learning_rate"])) for row in found)
    return ", ".join(f"{rate:g}" + "*" * (rate in ends) for _, rate in sorted(chosen))


def _line(rows: Sequence[Row], model: str, rule: str) -> list[str]:
    accuracies = tests(rows, model, rule)
    stages = int(rows[0]["stages"])
    pairs = math.comb(stages, 2)
    if accuracies is None:
        rules = "" if rule == INDEPENDENT else f" --rules {rule}"
        command = f"`{_command(rows[0]['data'])} --models {model}{rules}`"
        return [f"`{rule}`", NOT_YET, command, *[""] * (stages + pairs + 1), "0"]
    baseline = tests(rows, model, "sum")
    apart = ""
    if rule != "sum" and baseline is not None and len(baseline) == len(accuracies):
        apart = spread(100 * (accuracies - baseline).mean(1), 2)
    exits = [spread(100 * accuracies[:, k], 1) for k in range(stages)]
    measured = [""] * (pairs + 1)
    if rule != INDEPENDENT:
        found = select(rows, model=model, rule=rule, chosen="tuned")
        cosines = numbers(found, "cosines").mean((0, 1))
        conflicts = 100 * numbers(found, "conflicts").mean()
        if np.isfinite(conflicts):
            measured = [*(f"{x:+.2f}" for x in cosines), f"{conflicts:.0f}"]
    rates = _rates(rows, model, rule)
    return [f"`{rule}`", rates, *exits, apart, *measured, str(len(accuracies))]


def _flops(rows: Sequence[Row], model: str) -> list[int]:
    """Return the operations of every exit of a network."""
    found = next(row for row in rows if row["model"] == model and _is_whole(row))
    return [int(x) for x in found["flops"].split()]


def _is_whole(row: Row) -> bool:
    return row["exit"] == row["stages"]


def _names(stages: int) -> list[str]:
    return [f"{i}, {j}" for i, j in itertools.combinations(range(1, stages + 1), 2)]


def _short(count: float) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def _model(rows: Sequence[Row], model: str) -> str:
    """Return the table of a network, and who is ahead of the sum and behind it."""
    known = [row for row in rows if row["model"] == model and _is_whole(row)]
    title = f"### {TITLES[model]}"
    if not known:
        command = f"{_command(rows[0]['data'])} --models {model}"
        return f"{title}\n\n{NOT_YET}: `{command}`"
    stages = int(rows[0]["stages"])
    costs = map(_short, _flops(rows, model))
    header = ["rule", "rate", *(f"exit {k}, {x}" for k, x in enumerate(costs, 1))]
    header += ["all exits - sum", *(f"cos {x}" for x in _names(stages)), "< 0, %", "n"]
    lines = [_line(rows, model, rule) for rule in (*RULES, INDEPENDENT)]
    return "\n\n".join([title, table(header, lines), *_verdict(rows, model)])


def _verdict(rows: Sequence[Row], model: str) -> list[str]:
    """Return a sentence on the rules whose mean of exits is not that of the sum."""
    baseline = tests(rows, model, "sum")
    found: dict[str, list[str]] = {"above": [], "below": [], "no further": []}
    for rule in RULES[1:]:
        accuracies = tests(rows, model, rule)
        if baseline is None or accuracies is None or len(accuracies) != len(baseline):
            continue
        if len(accuracies) < 2:
            continue
        apart = (accuracies - baseline).mean(1)
        mean, error = mean_and_error(apart[:, None])
        where = "above" if mean > 2 * error else "below"
        found["no further" if abs(mean) <= 2 * error else where].append(f"`{rule}`")
    if not any(found.values()):
        return []
    parts = [f"{where}: {', '.join(x) or 'none'}" for where, x in found.items()]
    return [f"Two standard errors from the sum - {'; '.join(parts)}."]


def _command(data: str) -> str:
    return f"python -m examples.anytime {data}"


TITLES = {
    "branched": "Branched: exits along a trunk",
    "width": "Nested in width",
    "depth": "Nested in depth, interlaced",
    "both": "Nested in both",
}
_HEAD = """\
# Anytime networks: how the gradients of exits become one

Written by `python -m examples.anytime` from `anytime.csv`, one row a run; nothing is
typed by hand. The networks and `osgd` are a reconstruction of Wan, Hoffmann, Lu, Maire
2020 (arXiv 2008.06635) from its abstract and captions, whose algorithm could not be
read: no number here can be compared with theirs.

Test accuracy in per cent of every exit after the last epoch, with the floating-point
operations of one image up to there; mean of n seeds and one standard error. Each arm
runs at its own learning rate, the best of one grid by the validation images (mean of
exits); * is an end of the grid. "All exits - sum" is the difference to `sum`, mean of
exits, paired by seed. `independent` networks are the same layers up to a stage, trained
on its exit alone, each at its own rate. "Cos i, j" is the cosine between the gradients
of exits i and j before the step, mean of all steps of that arm, and "< 0" the share of
negative ones: where there are none, a rule that acts on conflicts alone is the sum.
`cagrad` is scaled as the mean, not the sum; its rate makes up for that. Of eight rules
that change nothing, one lies beyond two standard errors in about every third table.
Where an error is above one per cent, look at the seeds in the file: an exit may have
collapsed in a few of them at a rate that those of the grid bore."""


def text(rows: Sequence[Row], data: str) -> str:
    """Return what was found on some data, as Markdown, settings by settings."""
    title = {"digits": "scikit-learn's 8x8 digits", "cifar10": "CIFAR-10"}[data]
    parts = [f"## {title}"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["data"] == data:
            groups.setdefault(tuple(row[name] for name in _SHARED), []).append(row)
    if not groups:
        return f"{parts[0]}\n\n{NOT_YET}: `{_command(data)}`"
    for group in groups.values():
        row = group[0]
        shown = [x for x in _SHARED[1:] if row[x] not in ("False", "0")]
        settings = ", ".join(f"{x.replace('_', ' ')} {row[x]}" for x in shown)
        devices = "; ".join(dict.fromkeys(x["device"] for x in group))
        versions = ", ".join(f"{x} {row[x]}" for x in ("jax", "flax", "optax"))
        minutes = sum(float(x["seconds"]) for x in group) / 60
        spent = f"{len(group)} runs, {minutes:.0f} minutes without compilation"
        parts += [f"{settings}; {devices}, {versions}; {spent}."]
        parts += [_model(group, model) for model in MODELS]
    return "\n\n".join(parts)


# -------------------------------------------------------------------------- figures


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against operations, and cosines by epoch, of every network."""
    shown = [x for x in MODELS if tests(rows, x, "sum") is not None]
    figure = Figure(figsize=(2.5 + 4 * len(shown), 7.5), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for (top, bottom), model in zip(axes.T, shown, strict=True):
        _draw_accuracy(top, rows, model)
        _draw_cosines(bottom, select(rows, model=model, rule="sum", chosen="tuned"))
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[1, 0].set_ylabel("cosine of the exits' gradients, under the sum")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    axes[1, 0].legend(fontsize="small")
    figure.suptitle(f"{rows[0]['data']}: mean of seeds and one standard error")
    figure.savefig(path, dpi=120)


def _draw_accuracy(axis: Axes, rows: Sequence[Row], model: str) -> None:
    costs = np.array(_flops(rows, model))
    arms = (*RULES, INDEPENDENT)
    for number, rule in enumerate(arms):
        accuracies = tests(rows, model, rule)
        if accuracies is None:
            continue
        mean, error = mean_and_error(100 * accuracies)
        style = {"color": f"C{number}", "marker": "o"}
        if rule == INDEPENDENT:
            style = {"color": "black", "marker": "s", "linestyle": "--"}
        # Side by side, so that their errors can be seen: 3 % at most.
        x = costs * 1.006 ** (number - len(arms) / 2)
        axis.errorbar(x, mean, error, label=rule, markersize=4, **style)
    axis.set(title=TITLES[model], xlabel="floating-point operations", xscale="log")
    axis.grid(alpha=0.3)


def _draw_cosines(axis: Axes, rows: Sequence[Row]) -> None:
    cosines = numbers(rows, "cosines")
    for pair, name in enumerate(_names(int(rows[0]["stages"]))):
        style = {"color": f"C{pair}", "label": f"exits {name}"}
        draw_curves(axis, cosines[:, :, pair], **style)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="epoch", ylim=(-1, 1))
    axis.grid(alpha=0.3)


def write(folder: Path, rows: Sequence[Row]) -> Path:
    """Write the page and the figures of all rows, and return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for data in ("digits", "cifar10"):
        parts.append(text(rows, data))
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in select(rows, data=data):
            groups.setdefault(tuple(row[name] for name in _SHARED), []).append(row)
        for number, group in enumerate(groups.values()):
            if any(tests(group, model, "sum") is not None for model in MODELS):
                path = folder / f"anytime_{data}{f'_{number + 1}' * (number > 0)}.png"
                draw(group, path)
                parts.append(f"![{path.stem}]({path.name})")
    page = folder / "anytime.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
