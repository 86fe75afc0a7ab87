"""The page of the language models: every table, every figure, from rows alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.scipy.special import betainc

from benchmarks.tables import markdown as table
from examples.experiments.anytime.report import select
from examples.experiments.language import speed
from examples.experiments.language.arms import ATTENTION, BASELINE
from examples.experiments.language.figures import draw
from examples.experiments.language.report import (
    EQUAL_TIME,
    GRID,
    SHARED,
    TUNED,
    Rows,
    apart,
    arms,
    groups,
    of_arm,
    rates_of,
    reached,
    values,
)
from examples.training.report import NOT_YET, Row, spread

_LOSS = "validation_loss"
_PROGRAM = "python -m examples.train_lm"
_HEAD = f"""\
# Language models: optimisers, and three cuts of attention

Written by `{_PROGRAM}` from `language.csv`, one row a run, and
`language_speed.csv`; nothing is typed by hand. A GPT (`examples/models/gpt.py`)
foretells the next token of a text. The optimiser that is named moves the kernels of its
blocks; the table of tokens, which is the head too, that of positions, norms and biases
are AdamW's in every arm, at a rate that AdamW's own runs chose, together with that of
their kernels. Attention is cut `whole` (D x HK), `per_head` (H matrices D x K), or with
`heads` as components (DK x H), the paper's own reading (Tuddenham, Prügel-Bennett, Hare
2022, arXiv 2202.07052), which left it to future work. Updates are scaled to AdamW's
root mean square (`RMSMatch(0.2)`) whatever the cut, and SGD's momentum is a mean: two
cuts at one rate differ in where they go, not in how far.

Losses in nats a token, mean of n seeds and one standard error. Every arm has a rate of
its own for the kernels, the best of one grid by the validation part, with seeds that
are not those of the tables; * is an end of the grid. AdamW alone could choose among
several rates for the rest as well. "- AdamW" is a difference paired by seed: weights at
the start and batches are the same. "Equal time": as many steps, with a whole schedule,
as fit into the time of AdamW's by the clock below. "Steps to AdamW's" is the share of
the steps after which an arm's validation loss is where AdamW's ends, and "time to
AdamW's" that share times the time of a step. The test part was looked at once, behind
the runs of equal steps."""

_LARGER = (
    (
        "GPT-2 small's blocks on bytes: tokens/s and what every optimiser adds",
        "speed --vocabulary 256 --depth 12 --heads 12 --width 768 --context 1024 "
        "--batch-size 32 --dtype bfloat16 --scan",
        {"width": "768", "depth": "12", "context": "1024"},
    ),
    (
        "nano-GPT's size for characters, 10.7 million parameters",
        "study --depth 6 --heads 6 --width 384 --context 256 --batch-size 64 "
        "--steps 2000 --evaluate-every 100 --warmup 100 --validation-sequences 0 "
        "--grid 0.0003 0.001 0.003 0.01 0.03 --tuning-seeds 2 --seeds 5",
        {"width": "384", "depth": "6", "context": "256"},
    ),
)

# --------------------------------------------------------------------------- a study


def _rate(rows: Sequence[Row], found: Sequence[Row]) -> str:
    """Return the learning rate of an arm, marked where it ends the grid."""
    rate = float(found[0]["learning_rate"])
    tried = _tried(select(rows, chosen=GRID))
    return f"{rate:g}" + "*" * (len(tried) > 1 and rate in (tried[0], tried[-1]))


def _tried(rows: Sequence[Row]) -> list[float]:
    return sorted({float(row["learning_rate"]) for row in rows})


def _told(numbers: np.ndarray | None, digits: int = 3, unit: float = 1.0) -> str:
    """Return mean and error; nothing without numbers, or who never got there."""
    if numbers is None:
        return ""
    if never := int(np.isinf(numbers).sum()):
        return f"never {never}/{len(numbers)}"
    return spread(unit * numbers, digits)


def _line(
    rows: Sequence[Row], arm: tuple[str, str], clock: Sequence[dict[str, str]]
) -> list[str]:
    found = of_arm(rows, arm, TUNED)
    name = [f"`{arm[0]}`", arm[1]]
    if not found:
        return [*name, "tuning", *[""] * 8, "0"]
    ratio = float(speed.find(clock, found[0]).get("ratio") or np.nan)
    base = of_arm(rows, (BASELINE, ""), TUNED)
    other = base if arm[0] != BASELINE else []
    timed = of_arm(rows, arm, EQUAL_TIME) if other else []
    share = reached(found, other)
    known = share is not None and np.isfinite(ratio)
    return [
        *name,
        _rate(rows, found),
        _told(values(found, "validation_loss")),
        _told(apart(found, other, "validation_loss")),
        _told(values(timed, "validation_loss")) if timed else "",
        _told(apart(timed, other, "validation_loss")),
        _told(values(found, "test_loss")),
        _told(share, 0, 100.0),
        _told(share * ratio, 0, 100.0) if known else "",
        f"{ratio:.2f}" if np.isfinite(ratio) else "",
        str(len(found)),
    ]


_COLUMNS = (
    "optimiser",
    "attention",
    "rate",
    "validation, equal steps",
    "- AdamW",
    "validation, equal time",
    "- AdamW",
    "test, equal steps",
    "steps to AdamW's, %",
    "time to AdamW's, %",
    "a step's time / AdamW's",
    "n",
)


def _cuts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of the cuts of attention beside the whole one."""
    lines = []
    for optimiser in dict.fromkeys(name for name, _ in arms(rows)):
        whole = of_arm(rows, (optimiser, ATTENTION[0]), TUNED)
        for cut in ATTENTION[1:]:
            found = of_arm(rows, (optimiser, cut), TUNED)
            losses = [
                apart(found, whole, name) for name in ("validation_loss", "test_loss")
            ]
            if losses[0] is None:
                continue
            same = found[0]["learning_rate"] == whole[0]["learning_rate"]
            told = [_told(x, 4) for x in losses]
            rate = "the same" if same else "another"
            lines.append([f"`{optimiser}`", cut, *told, rate, str(len(found))])
    if lines:
        header = ["optimiser", "attention", "validation - whole", "test - whole"]
        yield "### Cuts of attention beside the whole kernel, paired by seed"
        yield table([*header, "best rate", "n"], lines)
        yield _verdict(rows)


def _verdict(rows: Sequence[Row]) -> str:
    """Return who is beyond two standard errors of the whole cut by the test loss."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "no further": []}
    for arm in arms(rows):
        whole = of_arm(rows, (arm[0], ATTENTION[0]), TUNED)
        losses = apart(of_arm(rows, arm, TUNED), whole, "test_loss")
        if arm[1] in ATTENTION[1:] and losses is not None and len(losses) > 1:
            error = losses.std(ddof=1) / len(losses) ** 0.5
            where = "better" if losses.mean() < 0 else "worse"
            near = not abs(losses.mean()) > 2 * error
            found["no further" if near else where].append(" ".join(arm))
    if not any(found.values()):
        return ""
    told = "; ".join(f"{x}: {', '.join(y) or 'none'}" for x, y in found.items())
    seeds = len({row["seed"] for row in select(rows, chosen=TUNED)})
    return (
        f"Two standard errors from the whole cut, by the test loss - {told}. Of "
        f"differences that are none, with {seeds} seeds, {_chance(seeds)} in a hundred "
        "lie beyond that."
    )


def _chance(seeds: int) -> int:
    """Return how many per cent of means lie two standard errors from their truth."""
    degrees = seeds - 1  # of Student's t
    return round(100 * float(betainc(degrees / 2, 0.5, degrees / (degrees + 4))))


def _grid(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of the rates that were tried, one line for each rest rate."""
    tried = _tried(select(rows, chosen=GRID))
    lines = []
    for arm in arms(rows):
        found = of_arm(rows, arm, GRID)
        for rest in sorted({rates_of(row)[1] for row in found}):
            losses = [
                values([row for row in found if rates_of(row) == (rate, rest)], _LOSS)
                for rate in tried
            ]
            cells = (_told(x) if len(x) else "" for x in losses)
            lines.append([f"`{arm[0]}`", arm[1], f"{rest:g}", *cells])
    yield "### Validation loss at the rates of the grid"
    yield table(
        ["optimiser", "attention", "rate of the rest", *(f"{x:g}" for x in tried)],
        lines,
    )


def _settings(rows: Sequence[Row]) -> str:
    row = rows[0]
    names = (x for x in SHARED[2:] if x not in ("budget", "steps"))
    shown = [f"{x.replace('_', ' ')} {row[x]}" for x in names if row[x] != "False"]
    steps = int(row["budget"]) * int(row["steps"])
    shown += [f"{steps} steps", f"{int(row['parameters']):,} parameters"]
    devices = "; ".join(dict.fromkeys(x["device"] for x in rows))
    versions = ", ".join(f"{x} {row[x]}" for x in ("jax", "flax", "optax"))
    minutes = sum(float(x["seconds"]) for x in rows) / 60
    spent = f"{len(rows)} runs, {minutes:.0f} minutes without compilation"
    return f"{', '.join(shown)}; {devices}, {versions}; {spent}."


def _section(
    rows: Sequence[Row], clock: Sequence[dict[str, str]], figure: Path
) -> Iterator[str]:
    yield f"## {rows[0]['text']}, {rows[0]['level']}s"
    yield _settings(rows)
    yield table(_COLUMNS, [_line(rows, arm, clock) for arm in arms(rows)])
    yield from _cuts(rows)
    yield from _grid(rows)
    if select(rows, chosen=TUNED):
        draw(rows, clock, figure)
        yield f"![{figure.stem}]({figure.name})"


# -------------------------------------------------------------------------- the page


def write(folder: Path) -> Path:
    """Write the page and the figures of all rows in a folder, and return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, clock = Rows(folder / "language.csv").rows(), speed.read(folder)
    parts = [_HEAD]
    for number, group in enumerate(groups(rows), 1):
        figure = folder / f"language{f'_{number}' * (number > 1)}.png"
        parts += _section(group, clock, figure)
    if len(parts) == 1:
        parts.append(f"{NOT_YET}: `{_PROGRAM} study`")
    parts.append("## Time of a training step")
    parts.append("Medians of rounds in which all arms take their turns.")
    parts.append(speed.text(clock) or f"{NOT_YET}: `{_PROGRAM} speed`")
    missing = [
        f"- {what} - {NOT_YET}: `{_PROGRAM} {command}`"
        for what, command, sizes in _LARGER
        if not any(row.items() >= sizes.items() for row in [*rows, *clock])
    ]
    if missing:
        parts += ["## Larger, for a GPU", "\n".join(missing)]
    page = folder / "language.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page
