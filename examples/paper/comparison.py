"""Ours beside the paper's: tables and curves of the studies, from finished rows."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tables import markdown as table
from examples.paper.probes import PROBES, draw as draw_probe, read as read_probes
from examples.paper.studies import STUDIES, Cell, Published, Study
from examples.training.report import (
    CURVES,
    NOT_YET,
    Results,
    Row,
    curve,
    draw_curves,
    gather,
    spread,
)
from examples.training.supervised import Run

# What may differ between the rows of a cell: they are told apart by these.
_BESIDE = ("seed", "dtype", "norm_groups")
_SETTINGS = (
    "learning_rate",
    "momentum",
    "batch_size",
    "weight_decay",
    "layers",
    "method",
    "schedule",
)
_GROUP = ("model", "learning_rate", "momentum", "batch_size", "schedule", "epochs")


def matching(run: Run, rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows of a run with any seed, by device, dtype and norm groups."""
    key = {k: v for k, v in run.key().items() if k not in _BESIDE}
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if all(row[name] == value for name, value in key.items()):
            apart = tuple(row[name] for name in ("device", *_BESIDE[1:]))
            found.setdefault(apart, []).append(row)
    return found


def best(candidates: Sequence[Run], results: Results, seeds: int) -> Run | None:
    """Return the run with the best validation images, as a run that is to be tested.

    By mean accuracy after the last epoch, the lower loss between equals. None if all
    diverged.
    """

    def merit(run: Run) -> tuple[float, float]:
        rows = [
            results.find(dataclasses.replace(run, seed=run.seed + i).key())
            for i in range(seeds)
        ]
        (arm,) = gather(rows)
        return arm.merit()

    winner = max(candidates, key=merit)
    if math.isinf(merit(winner)[0]):
        return None
    return dataclasses.replace(winner, chosen="tuned", seed=0)


def winners(study: Study, rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Return the tested rows of every arm, by run, device and dtype."""
    found = {}
    for name, candidates in study.arms.items():
        tested = [dataclasses.replace(run, chosen="tuned") for run in candidates]
        groups = [matching(run, rows).values() for run in tested]
        found[name] = list(itertools.chain.from_iterable(groups))
    return found


# -------------------------------------------------------------------------- tables


def text(study: Study, rows: Sequence[Row], name: str = "") -> str:
    """Return what a study found, as Markdown."""
    parts = [f"## {study.title}"]
    missing = [cell.run for cell in study.cells if not matching(cell.run, rows)]
    tested = winners(study, rows)
    missing += [study.arms[arm][0] for arm, groups in tested.items() if not groups]
    if len(missing) < len(study.cells):
        parts += [_cells_table(study, rows)]
        parts += _orderings(study, rows)
    if any(tested.values()):
        parts += [_arms_table(study, rows)]
    return "\n\n".join([*parts, *_not_yet(missing, name)])


def _cells_table(study: Study, rows: Sequence[Row]) -> str:
    published = any(cell.published for cell in study.cells)
    header = ["network", "optimiser", "settings"]
    header += ["paper, %"] * published + ["accuracy, %", "n"]
    header += ["standard errors apart"] * published + ["paper, loss"] * published
    header += ["loss", "s a run", "images/s", "device"]
    lines = []
    for cell in study.cells:
        groups = matching(cell.run, rows)
        for apart, group in groups.items():
            lines.append(_line(cell, group, apart, published))
    return table(header, lines)


def _heading(cell: Cell) -> list[str]:
    run = cell.run
    values = run.key()
    usual = {"learning_rate": "0.01", "momentum": "0.9", "batch_size": "1024"}
    usual |= {"layers": "all", "schedule": "constant", "method": ""}
    usual |= {"weight_decay": "0.0005"}
    short = {"learning_rate": "rate", "batch_size": "batch"}
    changes = [
        values[name]
        if name in ("layers", "method")
        else f"{short.get(name, name)} {values[name]}"
        for name in _SETTINGS
        if values[name] != usual[name]
    ]
    return [run.recipe.model, f"`{run.recipe.optimiser}`", ", ".join(changes)]


def _line(
    cell: Cell, group: Sequence[Row], apart: tuple[str, ...], published: bool
) -> list[str]:
    accuracy = 100 * _numbers(group, "test_accuracy")
    loss = _numbers(group, "test_loss")
    seconds, rates = (_numbers(group, name) for name in ("seconds", "images_per_s"))
    line = _heading(cell)
    theirs = cell.published
    if published:
        line.append(_pair(theirs.accuracy, theirs.accuracy_error, 2) if theirs else "")
    line += [spread(accuracy, 2), str(len(group))]
    if published:
        line.append(_apart(accuracy, theirs) if theirs else "")
        line.append(_pair(theirs.loss, theirs.loss_error, 4) if theirs else "")
    device, dtype, groups = apart
    where = ", ".join([device, dtype] + [f"{groups} norm groups"] * (groups != "1"))
    line += [spread(loss, 4), f"{np.median(seconds):.0f}", f"{np.median(rates):.0f}"]
    return [*line, where]


def _not_yet(runs: Sequence[Run], name: str) -> list[str]:
    """Return a line for what is not yet run, if there is anything, with its command."""
    models = " ".join(dict.fromkeys(run.recipe.model for run in runs))
    command = f"`python -m examples.reproduce {name} --models {models}`"
    return [f"{NOT_YET} ({len(runs)} cells): {command}"] if runs else []


def _numbers(group: Sequence[Row], name: str) -> np.ndarray:
    return np.array([float(row[name] or math.nan) for row in group])


def _pair(value: float, error: float, digits: int) -> str:
    if math.isnan(value):
        return "diverged"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _apart(accuracy: np.ndarray, theirs: Published) -> str:
    """Return how many standard errors of the difference lie between the means."""
    if len(accuracy) < 2 or not np.isfinite([*accuracy, theirs.accuracy]).all():
        return ""
    ours = accuracy.std(ddof=1) / math.sqrt(len(accuracy))
    error = math.hypot(ours, theirs.accuracy_error)
    return f"{(accuracy.mean() - theirs.accuracy) / error:+.1f}" if error else ""


# ------------------------------------------------------------ ordering, epochs saved


def _groups(study: Study) -> Iterable[list[Cell]]:
    """Yield the cells that are to be compared with each other."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in study.cells:
        values = cell.run.key()
        groups.setdefault(tuple(values[x] for x in _GROUP), []).append(cell)
    return groups.values()


def _orderings(study: Study, rows: Sequence[Row]) -> list[str]:
    """Return lines on who is ahead of SGD, and how soon, where both have been run."""
    lines = []
    for cells in _groups(study):
        plain = [cell for cell in cells if cell.run.recipe.optimiser == "sgd"]
        if not plain:
            continue
        theirs = matching(plain[0].run, rows)
        for cell in cells:
            for apart, group in matching(cell.run, rows).items():
                if cell is not plain[0] and apart in theirs:
                    lines.append(_ordering(cell, plain[0], group, theirs[apart]))
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _ordering(
    cell: Cell, plain: Cell, group: Sequence[Row], baseline: Sequence[Row]
) -> str:
    model, optimiser, settings = _heading(cell)
    ours = 100 * _numbers(group, "test_accuracy").mean()
    sgd = 100 * _numbers(baseline, "test_accuracy").mean()
    said = f"{model}, {optimiser}{', ' + settings if settings else ''}: "
    if math.isnan(sgd):
        return f"{said}SGD diverged"
    compared = cell.published and plain.published
    paper = cell.published.accuracy - plain.published.accuracy if compared else 0.0
    if math.isnan(ours):
        holds = "as" if math.isnan(paper) else "not as"
        return f"{said}diverged" + (f", {holds} in the paper" if compared else "")
    said += f"{ours - sgd:+.2f} % of test accuracy over SGD"
    if compared and math.isnan(paper):
        said += " (diverged in the paper)"
    elif compared:
        holds = "as" if (paper > 0) == (ours > sgd) else "not as"
        said += f" ({holds} in the paper, {paper:+.2f})"
    return f"{said}; {_reached(group, baseline)}"


def _reached(group: Sequence[Row], baseline: Sequence[Row]) -> str:
    """Return when a mean curve first is where SGD's ends, in epochs and seconds."""
    mean, theirs = (
        np.mean([curve(row, "validation_accuracy") for row in rows], axis=0)
        for rows in (group, baseline)
    )
    seconds, whole = (
        np.median(_numbers(rows, "seconds")) for rows in (group, baseline)
    )
    there = np.flatnonzero(mean >= theirs[-1])
    goal = f"SGD's last validation accuracy, {100 * theirs[-1]:.1f} %"
    if not there.size:
        return f"did not reach {goal}"
    epochs = there[0] + 1
    return (
        f"reached {goal}, after {epochs} of {len(mean)} epochs, "
        f"{seconds * epochs / len(mean):.0f} s against {whole:.0f} s"
    )


def _arms_table(study: Study, rows: Sequence[Row]) -> str:
    header = ["arm", "best of", "its settings", "validation, %", "test, %", "n", "loss"]
    header += ["device"]
    lines = []
    for arm, groups in winners(study, rows).items():
        count = str(len(study.arms[arm]))
        lines += [[arm, count, *_arm_cells(group)] for group in groups]
    return table(header, lines)


def _arm_cells(group: Sequence[Row]) -> list[str]:
    first = group[0]
    settings = ", ".join(f"{name} {first[name]}" for name in _SETTINGS if first[name])
    accuracies = (
        spread(100 * _numbers(group, f"{part}_accuracy"), 2)
        for part in ("validation", "test")
    )
    loss = spread(_numbers(group, "test_loss"), 4)
    where = f"{first['device']}, {first['dtype']}"
    return [settings, *accuracies, str(len(group)), loss, where]


# -------------------------------------------------------------------------- figures


def draw(name: str, study: Study, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the curves of every network and setting of which there are rows."""
    drawn = []
    for cells in _groups(study):
        found = [
            (cell, group)
            for cell in cells
            for group in matching(cell.run, rows).values()
        ]
        if len(found) < 2:
            continue
        values = found[0][0].run.key()
        parts = [name, values["model"]]
        usual = {"learning_rate": "0.01", "momentum": "0.9", "batch_size": "1024"}
        parts += [values[k] for k, v in usual.items() if values[k] != v]
        path = folder / f"{'_'.join(parts)}.png"
        _draw(found, path)
        drawn.append(path)
    return drawn


def _draw(found: Sequence[tuple[Cell, Sequence[Row]]], path: Path) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    for axis, name in zip(axes, CURVES, strict=True):
        for number, (cell, group) in enumerate(found):
            curves = np.array([curve(row, name) for row in group])
            label = ", ".join(filter(None, _heading(cell)[1:])).replace("`", "")
            label = f"{label} (n = {len(group)})"
            draw_curves(axis, curves, color=f"C{number}", label=label)
        axis.set(title=name.replace("_", " "))
        axis.grid(alpha=0.3)
        if name.endswith("loss"):
            axis.set_yscale("log")
    axes[0].legend(fontsize="small")
    for axis in axes[2:]:
        axis.set_xlabel("epoch")
    run = found[0][0].run
    figure.suptitle(
        f"{run.recipe.model} on CIFAR-10, batch {run.recipe.batch_size}, rate "
        f"{run.learning_rate:g}; mean and one standard error"
    )
    figure.savefig(path, dpi=120)


_HEAD = """\
# CIFAR-10: ours beside the paper's

Written by `python -m examples.reproduce` from `cifar10.csv`, one row a run; nothing is
typed by hand. Test accuracy and loss after the last epoch, mean and one standard
error of n runs; the validation split is seeded, the test images are looked at once a
run. Where the method is `svd`, polar factors are the exact U Vᵀ of the paper. "Standard
errors apart" divides the difference of the means by its standard error. For what is not
yet run there is a line with its command (`--minutes` stops cleanly, `--seeds-at-once`
trains seeds side by side on a GPU)."""


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write the page of all studies, and the figures of those that have rows."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for name, study in ((name, make()) for name, make in STUDIES.items()):
        parts.append(text(study, rows, name))
        figures = draw(name, study, rows, folder)
        parts += [f"![{path.stem}]({path.name})" for path in figures]
    measured = read_probes(folder / "probes.csv")
    for name, probe in PROBES.items():
        drawn = draw_probe(name, measured, folder / f"{name}.png")
        command = f"{NOT_YET}: `python -m examples.reproduce {name}`"
        parts += [f"## {probe.title}", f"![{name}]({name}.png)" if drawn else command]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")
