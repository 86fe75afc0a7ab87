"""The page of low-rank networks: claims, measurements, tables, figures."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.tables import markdown as table
from examples.experiments.low_rank.report import (
    Arm,
    arms_of,
    comparison,
    difference,
    groups_of,
    least,
    pairs,
    rank_table,
    select,
    settings,
    stability,
    tests,
    title,
    write_page,
)
from examples.training.report import (
    NOT_YET,
    Row,
    curve,
    draw_curves,
    mean_and_error,
    spread,
)

_HEAD = """\
# OIALR: low rank in bases that have settled

Written by `python -m examples.low_rank` from `low_rank.csv`, one row a run; nothing is
typed by hand. The method is that of Coquelin et al. 2024 (arXiv 2401.08505) and of the
authors' code, with the last layer left dense: after `delay` epochs W = U S Vᵀ, of which
S (r x r, dense) keeps training; after every `frequency` epochs singular values below
`beta` times the largest are cut, half of them at most, and the remaining rank is
rounded up to a multiple of `rank multiple`. `beta` 1e-06 cuts nothing. Of the authors'
results, only those of an Autoformer on ETTm2 were available (tables in their
repository): best mean squared error 0.2684 against 0.2741 at full rank at a horizon of
192, with 7.1 % of the parameters trainable, and 0.4201 against 0.4201 at 720. They are
not comparable with the numbers here.

Test accuracy in per cent after the last epoch, mean of n seeds and one standard error.
Each arm runs at its own learning rate, the best of one grid on the validation images; *
marks an end of the grid. "- full rank" is the difference from the network of full rank
with the same optimiser, paired by seed. Trainable and stored are fractions of the
numbers in the dense network, at the end. "ms a step" and "MiB" are those of dense
epochs, then of epochs at the last ranks. The time is that of a step in the fastest such
epoch of any seed, because the machine was shared; without compilation (one for every
change of ranks) and checks. The memory is that of the arguments (without the images)
and temporary arrays of a compiled epoch, with its peak over training, without checks.
Cut: the trained network of full rank, truncated to the ranks that OIALR with that beta
ended with at the same seed. Fixed: only S trains, from the first step on, in the bases
of the initial weights, at the median ranks of OIALR with that beta. Tuned: delay, beta
and learning rate are the best of all combinations, a larger search than any other
arm's. `orthogonal_sgd` takes the polar factor of every gradient; after the conversion,
of the gradient of S: the orthogonal step inside the frozen bases.

Stability is that of U Vᵀ since the previous measurement
(`diagnostics.basis_stability`). A cosine schedule takes the learning rate to zero, and
with it every change: a stability of one at the end means nothing. Whether bases settle
is judged half-way, where the learning rate is still half of its initial value: above
0.9 for every matrix, higher than at first, and not lower later."""
_MODELS = {
    "mlp": "MLP on scikit-learn's 8x8 digits",
    "vit": "Vision transformer on CIFAR-10",
    "resnet": "Residual network on CIFAR-10",
}
_DATA = {"mlp": "digits", "vit": "cifar10", "resnet": "cifar10"}
FULL_SIZE = {
    "vit": "python -m examples.low_rank cifar10 --models vit --epochs 300 --delay 50 "
    "--delays 25 50 100 --frequency 10 --layer-step 0.1",
    "resnet": "python -m examples.low_rank cifar10 --models resnet --epochs 200 "
    "--delay 40 --delays 20 40 80 --frequency 10",
}

# -------------------------------------------------------------------------- claims

_HOLDS, _FAILS, _OPEN = "holds", "does not hold", "no difference seen"


def verdict(values: np.ndarray) -> str:
    """Return whether differences are above zero, two standard errors away."""
    if len(values) < 2 or np.isnan(values).any():
        return "too few runs"
    mean, error = mean_and_error(values[:, None])
    if abs(mean[0]) <= 2 * error[0]:
        return _OPEN
    return _HOLDS if mean[0] > 0 else _FAILS


def claims(rows: Sequence[Row]) -> list[list[str]]:
    """Return what is claimed of a network, what was measured, and whether it holds."""
    arms = arms_of(rows)
    lines = [*_settling(rows, arms)]
    for ours in (arm for arm in arms if arm[1] == "oialr"):
        full = (ours[0], "full", "0.0", "tuned")
        what = "better than" if ours[3] == "joint" else "as good as"
        lines += _apart(f"{what} full rank", rows, ours, full)
    for kind, what in (
        ("truncated", "better than cutting the trained network"),
        ("fixed", "better than that rank from the start"),
    ):
        for ours, other in pairs(arms, kind):
            lines += _apart(what, rows, ours, other)
    for ours in (arm for arm in arms if arm[1] == "oialr"):
        lines += _saving(rows, ours)
    return lines


def _settling(rows: Sequence[Row], arms: Sequence[Arm]) -> Iterator[list[str]]:
    for arm in (x for x in arms if x[1] == "full"):
        means = stability(select(rows, arm)).mean(0)
        times = means[[0, len(means) // 2, -1]]
        first, half, last = times
        each = ", ".join(" → ".join(f"{x:.3f}" for x in one) for one in times.T)
        if len(first) > 4:
            each = " → ".join(f"{x.min():.3f} to {x.max():.3f}" for x in times)
        rises = (half > first).all() and (last >= half - 0.01).all()
        held = _HOLDS if rises and half.min() >= 0.9 else "rises" if rises else _FAILS
        what = "the bases of every matrix settle: at first, half-way, at the end"
        yield [f"{title(arm, [])}: {what}", each, held]


def _apart(
    what: str, rows: Sequence[Row], ours: Arm, other: Arm
) -> Iterator[list[str]]:
    selected = select(rows, ours)
    apart = difference(selected, select(rows, other))
    if apart is None:
        return
    held = verdict(apart)
    if what.startswith("as good") and held == _OPEN:
        held = "no worse"
    yield [f"{title(ours, selected)}: {what}", f"{spread(apart, 2)} %", held]


def _saving(rows: Sequence[Row], ours: Arm) -> Iterator[list[str]]:
    selected = select(rows, ours)
    stored = np.mean([float(row["stored"]) for row in selected])
    held = _HOLDS if stored < 1 else _FAILS
    name = title(ours, selected)
    yield [f"{name}: fewer numbers to store", f"{stored:.2f} of the dense ones", held]
    for column, what in (("step_ms", "faster steps"), ("memory_mib", "less memory")):
        dense, last = least(selected, column)
        ratio = last / dense
        if math.isfinite(ratio):
            held = _HOLDS if ratio < 0.9 else _FAILS if ratio > 1.1 else _OPEN
            yield [f"{name}: {what} at the end", f"{ratio:.2f} of the dense ones", held]


# -------------------------------------------------------------------------- figure


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw stability, accuracy against fractions, and step time, of one network."""
    arms = arms_of(rows)
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    full = next(arm for arm in arms if arm[1] == "full")
    _draw_stability(axes[0, 0], rows, full, arms)
    _draw_times(axes[0, 1], rows, arms)
    for axis, name in zip(axes[1], ("trainable", "stored"), strict=True):
        _draw_fractions(axis, rows, arms, name)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    row = rows[0]
    figure.suptitle(f"{_MODELS[row['model']]}: means of seeds, one standard error")
    figure.savefig(path, dpi=110)


def _draw_stability(
    axis: Axes, rows: Sequence[Row], full: Arm, arms: Sequence[Arm]
) -> None:
    selected = select(rows, full)
    curves = stability(selected)
    x = int(rows[0]["frequency"]) * np.arange(1, curves.shape[1] + 1)
    names = selected[0]["matrices"].split()
    for k, name in enumerate(names):
        shade = f"C{k % 10}" if len(names) <= 10 else f"{0.2 + 0.6 * k / len(names)}"
        label = name if len(names) <= 10 else None
        draw_curves(axis, curves[:, :, k], x, color=shade, label=label)
    ours = [arm for arm in arms if arm[1] == "oialr" and arm[0] == full[0]]
    for number, arm in enumerate(ours):
        mean = np.nanmean(stability(select(rows, arm)), axis=(0, 2))
        label = f"{_label(arm, select(rows, arm))}, mean"
        axis.plot(x, mean, "--", color=f"C{number}", linewidth=1, label=label)
    given = f"stability since {rows[0]['frequency']} epochs before"
    what = "full rank, matrix by matrix; dashed: OIALR, mean"
    axis.set(title=what, xlabel="epoch", ylabel=given)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)


def _draw_times(axis: Axes, rows: Sequence[Row], arms: Sequence[Arm]) -> None:
    for number, arm in enumerate(arms):
        selected = select(rows, arm)
        if arm[1] == "truncated":
            continue
        times = np.min([curve(row, "step_ms") for row in selected], axis=0)
        x = np.arange(1, len(times) + 1)
        axis.plot(x, times, color=_colour(number), label=_label(arm, selected))
    axis.set(title="time of a step, fastest of seeds", xlabel="epoch", ylabel="ms")
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.grid(alpha=0.3)


def _draw_fractions(
    axis: Axes, rows: Sequence[Row], arms: Sequence[Arm], name: str
) -> None:
    markers = {"full": "*", "oialr": "o", "truncated": "v", "fixed": "s"}
    for number, arm in enumerate(arms):
        selected = select(rows, arm)
        mean, error = mean_and_error(tests(selected)[:, None])
        x = 100 * np.mean([float(row[name]) for row in selected])
        style = {"color": _colour(number), "marker": markers[arm[1]]}
        axis.errorbar(
            x, mean, error, linestyle="", label=_label(arm, selected), **style
        )
    axis.set(xlabel=f"{name} at the end, % of the dense network", xscale="log")
    _plain(axis.xaxis)
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3)


def _label(arm: Arm, rows: Sequence[Row]) -> str:
    return title(arm, rows).replace("`", "")


def _plain(axis: Axis) -> None:
    """Let a logarithmic axis say 20, not 2 times a power of ten."""
    for place in (axis.set_major_formatter, axis.set_minor_formatter):
        place(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))


def _colour(number: int) -> tuple:
    return colormaps["tab20"](number % 20)


# ------------------------------------------------------------------------ the page


def section(model: str, rows: Sequence[Row]) -> list[str]:
    """Return the results of one network with some settings."""
    header = ["claim", "measured", "here"]
    parts = [f"## {_MODELS[model]}", settings(rows), comparison(rows)]
    there = {word for arm in arms_of(rows) for word in (*arm, arm[0].split("_")[0])}
    parts += [
        f"`--parts {part}`: {NOT_YET} with these settings."
        for part in ("truncated", "fixed", "joint", "orthogonal")
        if part not in there
    ]
    return [*parts, table(header, claims(rows)), rank_table(rows)]


def write(folder: Path, rows: Sequence[Row]) -> Path:
    """Write the page and the figures of all rows, and return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for model, named in _MODELS.items():
        groups = groups_of(row for row in rows if row["model"] == model)
        drawn = 0
        for group in groups:
            if not any(row["arm"] == "full" and row["test_loss"] for row in group):
                continue
            drawn += 1
            path = folder / f"low_rank_{model}{f'_{drawn}' * (drawn > 1)}.png"
            draw(group, path)
            parts += [*section(model, group), f"![{path.stem}]({path.name})"]
        if not drawn:
            command = f"python -m examples.low_rank {_DATA[model]} --models {model}"
            parts += [f"## {named}", f"{NOT_YET}: `{command}`"]
        if model in FULL_SIZE:
            parts.append(f"At full size, {NOT_YET}: `{FULL_SIZE[model]}`")
    return write_page(folder / "low_rank.md", parts)
