"""Which learning rate to start from: what the searches in the results files found.

A search is the same network, data and batch with several optimisers, each at the rates
of a grid; which rate is the best, the trainer that wrote the rows has said (`chosen`).
"""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import tables
from examples.training.report import RESULTS


class Source(NamedTuple):
    """A results file: the rows that differ in the optimiser alone, and their scale."""

    where: Mapping[str, str] = {}
    scale: str = ""


FILES: Mapping[str, Source] = {
    "digits.csv": Source(),
    "cifar10.csv": Source(),
    "low_rank.csv": Source({"arm": "full"}),
    "decorrelation.csv": Source({"learning": "bp", "rule": "nothing"}),
    "language.csv": Source(scale=" with `RMSMatch(0.2)`"),
}
# What makes two rows comparable, as far as a file has it.
SETTING = (
    *("data", "text", "level", "model", "condition", "depth", "width", "context"),
    *("scanned", "batch_size", "train_images", "momentum", "budget", "schedule"),
)
PLAIN = ("sgd", "adam", "adamw")
ORTHOGONAL = ("orthogonal_sgd", "orthogonal_adam", "muon", "normuon")


class Arm(NamedTuple):
    """An optimiser in a setting: the rates tried, and the one that was taken."""

    name: str
    family: str  # the name without what is cut how
    scores: Mapping[float, float]
    best: float

    @property
    def at_an_end(self) -> bool:
        """Whether the best rate is the lowest or the highest of the grid."""
        return self.best in (min(self.scores), max(self.scores))


class Search(NamedTuple):
    """A setting with a plain and an orthogonal optimiser at least."""

    file: str
    setting: Mapping[str, str]
    measure: str
    plain: Sequence[Arm]
    orthogonal: Sequence[Arm]

    @property
    def title(self) -> str:
        """What tells the setting from others, in words."""
        shown = ("data", "text", "level", "model")
        names = [self.setting[key] for key in shown if self.setting[key]]
        for key in ("condition", "batch_size", "momentum"):
            if self.setting[key]:
                names.append(f"{key.replace('_', ' ')} {self.setting[key]}")
        return ", ".join([*names, self.setting["schedule"]])


def searches(folder: Path = RESULTS) -> list[Search]:
    """Return every search of the results files with both kinds of optimisers."""
    found = []
    for file, (where, scale) in FILES.items():
        rows = tables.read(folder / file)
        rows = [row for row in rows if where.items() <= row.items()]
        found += _searches(file, rows, scale)
    return found


def _searches(file: str, rows: Iterable[Mapping[str, str]], scale: str) -> list[Search]:
    settings = collections.defaultdict(list)
    for row in rows:
        row = {"budget": row.get("epochs", "")} | row
        settings[tuple((key, row.get(key, "")) for key in SETTING)].append(row)
    found = []
    for setting, members in settings.items():
        measure = "validation accuracy, %"
        if not any(row.get("validation_accuracy") for row in members):
            measure = "validation loss"
        arms = collections.defaultdict(list)
        for row in members:
            arms[row["optimiser"], row.get("attention", "")].append(row)
        kinds: list[list[Arm]] = [[], []]
        for (optimiser, cut), own in arms.items():
            ours = optimiser in ORTHOGONAL
            family = f"`{optimiser}`" + scale * ours
            name = family + f", attention {cut}" * (ours and bool(cut))
            arm = _arm(name, family, own, measure)
            if arm is not None and (ours or optimiser in PLAIN):
                kinds[ours].append(arm)
        if all(kinds):
            found.append(Search(file, dict(setting), measure, *kinds))
    return found


def _arm(
    name: str, family: str, rows: Iterable[Mapping[str, str]], measure: str
) -> Arm | None:
    """Return one optimiser's search, or None where there was none."""
    column, factor = "validation_loss", 1.0
    if "accuracy" in measure:
        column, factor = "validation_accuracy", 100.0
    tried, best = collections.defaultdict(list), set()
    for row in rows:
        rate = float(row["learning_rate"])
        if row["chosen"] == "grid":
            score = float(row[column]) if row[column] else math.nan
            tried[rate].append(factor * score)
        elif row["chosen"] == "tuned":
            best.add(rate)
    if len(best) != 1 or len(tried) < 2:
        return None
    scores = {rate: statistics.fmean(tried[rate]) for rate in sorted(tried)}
    return Arm(name, family, scores, *best)


def page(folder: Path = RESULTS) -> str:
    """Return the tables of the page on learning rates."""
    found = searches(folder)
    return "\n\n".join(
        [
            tables.markdown(*_ratios(found)),
            "## The searches",
            r"Best learning rates; \* marks an end of the grid.",
            tables.markdown(*_best(found)),
            "## How much it matters",
            "Mean over the seeds of the search, by learning rate; the rate that was "
            "chosen in bold. An empty cell was not tried.",
            *(_grid(search) for search in found),
        ]
    )


def _ratios(found: Sequence[Search]) -> tuple[list[str], list[list[str]]]:
    """Return where to start, relative to another recipe's learning rate."""
    ratios = collections.defaultdict(list)
    for search in found:
        for plain in search.plain:
            recipe = "SGD" if plain.name == "`sgd`" else "Adam, AdamW"
            for arm in search.orthogonal:
                ratios[recipe, arm.family].append(arm.best / plain.best)
    body = []
    for (recipe, family), values in ratios.items():
        low, high, middle = min(values), max(values), statistics.median_low(values)
        spread = f"{low:.2g}" + f" to {high:.2g}" * (high > low)
        body.append([recipe, family, f"**{middle:.2g} x**", spread, str(len(values))])
    same = "**1 x**, the same update up to the factor's error"
    body.append(["a Muon", "`muon` with the same scale", same, "", ""])
    return ["your recipe", "here", "start at", "best, measured", "searches"], body


def _best(found: Sequence[Search]) -> tuple[list[str], list[list[str]]]:
    body = []
    for search in found:
        for plain in search.plain:
            for arm in search.orthogonal:
                pair = plain.name, _rate(plain), arm.name, _rate(arm)
                body.append([search.title, *pair, f"{arm.best / plain.best:.2g}"])
    rates = ["recipe", "its best rate", "orthogonal", "its best rate", "ratio"]
    return ["search", *rates], body


def _rate(arm: Arm) -> str:
    return f"{arm.best:g}" + r"\*" * arm.at_an_end


def _score(score: float) -> str:
    return "diverged" if math.isnan(score) else f"{score:.4g}"


def _grid(search: Search) -> str:
    arms = [*search.plain, *search.orthogonal]
    rates = sorted({rate for arm in arms for rate in arm.scores})
    body = []
    for arm in arms:
        cells = [_score(arm.scores[r]) if r in arm.scores else "" for r in rates]
        cells[rates.index(arm.best)] = f"**{cells[rates.index(arm.best)]}**"
        body.append([arm.name, *cells])
    header = [search.measure, *(f"{rate:g}" for rate in rates)]
    title = f"{search.title} (`examples/results/{search.file}`):"
    return f"{title}\n\n{tables.markdown(header, body)}"
