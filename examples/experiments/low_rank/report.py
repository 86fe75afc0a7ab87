"""The results file of low-rank networks, and the page that is made from it."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.tables import markdown as table
from examples.training.report import CIRCUMSTANCES, Results, Row, curve, spread

# The columns that tell one run from another; those of _ARM may differ in one table.
_ARM = (
    "optimiser",
    "arm",
    "beta",
    "delay",
    "ranks",
    "learning_rate",
    "chosen",
    "seed",
)
_SHARED = (
    "data",
    "model",
    "width",
    "depth",
    "heads",
    "schedule",
    "epochs",
    "batch_size",
    "train_images",
    "momentum",
    "b2",
    "weight_decay",
    "augment",
    "frequency",
    "layer_step",
    "rank_multiple",
    "moments",
)
KEY = (*_SHARED, *_ARM)
_CURVES = (
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "trainable",
    "stored",
    "step_ms",
    "memory_mib",
)
COLUMNS = (
    *KEY,
    "status",
    *_CURVES,
    "test_loss",
    "test_accuracy",
    *(f"{name}_curve" for name in _CURVES),
    "layers",
    "ranks_at_end",
    "matrices",
    "stability",
    "seconds",
    "load",
    *CIRCUMSTANCES,
)


class Rows(Results):
    """The rows of finished runs in a file; see `Results`."""

    columns = COLUMNS
    key = KEY


# ---------------------------------------------------------------------------- arms

Arm = tuple[str, str, str, str]  # optimiser, arm, beta, how it was chosen


def select(rows: Iterable[Row], arm: Arm) -> list[Row]:
    """Return the tested rows of an arm, in the order of their seeds."""
    names = ("optimiser", "arm", "beta", "chosen")
    values = dict(zip(names, arm, strict=True))
    if arm[3] == "joint":  # tuned, not given
        del values["beta"]
    tested = [row for row in rows if all(row[k] == v for k, v in values.items())]
    return sorted(tested, key=lambda row: int(row["seed"]))


def arms_of(rows: Iterable[Row]) -> list[Arm]:
    """Return the arms that were tested, by optimiser, kind and beta."""
    arms = {
        (
            row["optimiser"],
            row["arm"],
            "" if row["chosen"] == "joint" else row["beta"],
            row["chosen"],
        )
        for row in rows
        if row["chosen"] != "grid"
    }
    kinds = ("full", "oialr", "truncated", "fixed")

    def place(arm: Arm) -> tuple:
        orthogonal = arm[0].startswith("orthogonal")
        return orthogonal, arm[3], kinds.index(arm[1]), float(arm[2] or 0)

    # Reversed: "tuned" before "joint".
    return sorted(arms, key=lambda arm: (place(arm)[0], arm[3] != "tuned", place(arm)))


def tests(rows: Sequence[Row]) -> np.ndarray:
    """Return test accuracies in per cent, `(seeds,)`."""
    return 100 * np.array([float(row["test_accuracy"]) for row in rows])


def difference(rows: Sequence[Row], others: Sequence[Row]) -> np.ndarray | None:
    """Return by how much test accuracies differ, seed by seed, in per cent.

    None without the same seeds.
    """
    seeds = [[row["seed"] for row in group] for group in (rows, others)]
    if seeds[0] != seeds[1] or not seeds[0]:
        return None
    return tests(rows) - tests(others)


def title(arm: Arm, rows: Sequence[Row]) -> str:
    """Return what an arm is called."""
    optimiser, kind, beta, chosen = arm
    beta = f"beta {float(beta):g}" if beta else ""
    names = {
        "full": "full rank",
        "oialr": f"OIALR, {beta}",
        "truncated": f"full rank, cut as {beta}",
        "fixed": f"fixed rank, as {beta}",
    }
    name = names[kind]
    if chosen == "joint":
        row = rows[0]
        name = f"OIALR, tuned: beta {float(row['beta']):g}, delay {row['delay']}"
    return f"`{optimiser}`, {name}"


def phases(row: Row, name: str) -> tuple[float, float] | None:
    """Return the least of a curve over dense epochs, and over those of the last ranks.

    Either is NaN without such epochs; None for a network truncated at its end. The
    least, because other work on the machine makes steps slower and never faster.
    """
    values, trains = (np.array(curve(row, x)) for x in (name, "trainable"))
    if np.isnan(values).any():
        return None
    # The first epoch of a process warms up caches.
    dense = values[1:][trains[1:] == 1]
    last = values[trains == trains[-1]] if trains[-1] < 1 else np.array([])
    first, second = (x.min() if len(x) else np.nan for x in (dense, last))
    return float(first), float(second)


# -------------------------------------------------------------------------- tables


def _percent(rows: Sequence[Row], name: str) -> str:
    return f"{100 * np.mean([float(row[name]) for row in rows]):.0f}"


def least(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the least of a curve in any run, dense and at the last ranks."""
    pairs = [x for row in rows if (x := phases(row, name))]
    columns = zip(*pairs, strict=True) if pairs else ((), ())
    finite = [[x for x in column if np.isfinite(x)] for column in columns]
    dense, last = (min(column, default=np.nan) for column in finite)
    return dense, last


def _both(rows: Sequence[Row], name: str, digits: int) -> str:
    shown = [x for x in least(rows, name) if np.isfinite(x)]
    return " → ".join(f"{x:.{digits}f}" for x in shown)


def _memory(rows: Sequence[Row]) -> str:
    peaks = [max(curve(row, "memory_mib")) for row in rows]
    text = _both(rows, "memory_mib", 1)
    return f"{text}, peak {np.median(peaks):.1f}" if "→" in text else text


def _line(rows: Sequence[Row], arm: Arm) -> list[str]:
    selected = select(rows, arm)
    baseline = select(rows, (arm[0], "full", "0.0", "tuned"))
    apart = None if arm[1] == "full" else difference(selected, baseline)
    tried = {
        float(row["learning_rate"])
        for row in rows
        if (row["chosen"], row["optimiser"]) == ("grid", arm[0])
    }
    rate = float(selected[0]["learning_rate"])
    end = "*" * (bool(tried) and rate in (min(tried), max(tried)))
    return [
        title(arm, selected),
        f"{rate:g}{end}",
        spread(tests(selected), 2),
        "" if apart is None else spread(apart, 2),
        _percent(selected, "trainable"),
        _percent(selected, "stored"),
        _both(selected, "step_ms", 2),
        _memory(selected),
        str(len(selected)),
    ]


def comparison(rows: Sequence[Row]) -> str:
    """Return the table of all arms of a network."""
    header = ["arm", "rate", "test, %", "- full rank", "trainable, %", "stored, %"]
    header += ["ms a step", "MiB", "n"]
    return table(header, [_line(rows, arm) for arm in arms_of(rows)])


def rank_table(rows: Sequence[Row]) -> str:
    """Return the mean rank of every layer at the end of every OIALR arm."""
    arms = [arm for arm in arms_of(rows) if arm[1] == "oialr"]
    if not arms:
        return ""
    layers = rows[0]["layers"].split()
    lines = [[f"`{layer}`"] for layer in layers]
    for arm in arms:
        selected = [row for row in select(rows, arm) if row["ranks_at_end"]]
        ranks = [[float(x) for x in row["ranks_at_end"].split()] for row in selected]
        means = np.mean(ranks, axis=0) if ranks else np.full(len(layers), np.nan)
        for line, mean in zip(lines, means, strict=True):
            line.append(f"{mean:.0f}")
    header = ["rank at the end", *(title(arm, select(rows, arm)) for arm in arms)]
    return table(header, lines)


def stability(rows: Sequence[Row]) -> np.ndarray:
    """Return the stability of every matrix over time, `(runs, times, matrices)`."""
    return np.array(
        [
            [[float(x) for x in time.split()] for time in row["stability"].split(";")]
            for row in rows
        ]
    )


def groups_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of one network and its settings together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _SHARED), []).append(row)
    return list(groups.values())


def settings(rows: Sequence[Row]) -> str:
    """Return a sentence on what the rows of a group have in common."""
    row = rows[0]
    shown = [x for x in _SHARED[2:] if row[x] not in ("False", "0", "0.0")]
    given = ", ".join(f"{x.replace('_', ' ')} {row[x]}" for x in shown)
    devices = "; ".join(dict.fromkeys(x["device"] for x in rows))
    versions = ", ".join(f"{x} {row[x]}" for x in ("jax", "flax", "optax"))
    minutes = sum(float(x["seconds"]) for x in rows) / 60
    loads = [float(x["load"]) for x in rows]
    spent = f"{len(rows)} runs, {minutes:.1f} minutes of steps, "
    spent += f"load of the machine {min(loads):.0f} to {max(loads):.0f}"
    return f"{given}; {devices}, {versions}; {spent}."


def pairs(arms: Sequence[Arm], kind: str) -> list[tuple[Arm, Arm]]:
    """Return the OIALR arms with the arms of a kind at the same beta."""
    return [
        (ours, other)
        for ours, other in itertools.product(arms, arms)
        if (ours[1], other[1]) == ("oialr", kind)
        and (ours[0], *ours[2:]) == (other[0], *other[2:])
    ]


def write_page(path: Path, parts: Sequence[str]) -> Path:
    """Write a page of Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path
