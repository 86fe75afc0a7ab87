"""Time of a training step beside plain backpropagation: `... decorrelation speed`.

One network at a time, on images without meaning. The steps of all arms are timed in
turn, and ratios taken within a round, so that other work of the machine falls on all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tables, timing
from examples.data import Split
from examples.experiments.decorrelation.rules import NAMES
from examples.experiments.decorrelation.settings import Cifar10, Digits
from examples.experiments.decorrelation.training import Recipe, initialise, train_step
from examples.training.report import RESULTS

NAME = "decorrelation_speed.csv"
_SIZES = ("data", "model", "side", "widths", "batch_size", "sample", "update_every")
_ARM = ("learning", "optimiser", "rule")
_KEY = ("platform", "device", *_SIZES, *_ARM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Time of a step of every arm, beside backpropagation with nothing."""

    data: tuple[Literal["digits", "cifar10"], ...] = ("digits", "cifar10")
    """Whose networks and arms, at their default sizes."""
    rounds: int = 20
    """Timed steps of every arm, in turn; the median counts."""
    results: Path = RESULTS
    """Folder of decorrelation_speed.csv and decorrelation.md."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"`rounds` is {self.rounds}; expected at least 1")

    def groups(self) -> list[list[Recipe]]:
        """Return the recipes that are timed beside each other."""
        found: dict[tuple[str, str], list[Recipe]] = {}
        for name in self.data:
            config = {"digits": Digits, "cifar10": Cifar10}[name]()
            for recipe, *_ in config.arms():
                found.setdefault((name, recipe.model), []).append(recipe)
        return list(found.values())


def step_of(recipe: Recipe) -> Callable[[], Any]:
    """Return a compiled training step of a recipe, always the same one."""
    rng, size = np.random.default_rng(0), recipe.batch_size
    images = rng.random((size, 8, 8, 1), np.float32)
    if recipe.data == "cifar10":
        images = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    batch = jax.device_put(Split(images, np.arange(size, dtype=np.int32) % 10))
    key, rate = jax.random.key(0), jnp.float32(1e-3)
    state = jax.tree.map(lambda x: x[0], initialise(key[None], recipe))

    def step(*arguments: Any) -> Any:
        return train_step(*arguments, recipe)

    compiled = jax.jit(step).lower(state, batch, key, rate).compile()
    return lambda: compiled(state, batch, key, rate)


def measure(config: Settings) -> None:
    """Compile and time every arm, and write its row."""
    circumstances = tables.circumstances() | {"flax": flax.__version__}
    for recipes in config.groups():
        calls = {tuple(getattr(x, n) for n in _ARM): step_of(x) for x in recipes}
        for call in calls.values():
            jax.block_until_ready(call())
        counts = dict.fromkeys(calls, config.rounds)
        seconds = timing.interleaved(calls, counts, timing.pause())
        base = next(x for name, x in seconds.items() if name[::2] == ("bp", "nothing"))
        rows = []
        for recipe, (arm, own) in zip(recipes, seconds.items(), strict=True):
            row = {name: getattr(recipe, name) for name in _SIZES}
            row |= {"widths": " ".join(map(str, recipe.widths))}
            row |= dict(zip(_ARM, arm, strict=True))
            low, median, high = timing.quartiles(own.values())
            row |= {"seconds": median, "low": low, "high": high}
            rows.append(row | {"ratio": timing.ratio(own, base)} | circumstances)
        config.results.mkdir(parents=True, exist_ok=True)
        tables.write(config.results / NAME, rows, _KEY)
        print(f"{recipes[0].data}, {recipes[0].model}: {len(rows)} arms")


def read(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a folder."""
    return tables.read(folder / NAME)


def text(rows: Sequence[dict[str, str]]) -> str:
    """Return the section of the page, as Markdown."""
    parts = ["## Time of a training step", _TEXT]
    if not rows:
        parts.append("not yet run: `python -m examples.decorrelation speed`")
    sizes: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        sizes.setdefault(tuple(row[x] for x in _SIZES), []).append(row)
    for values, found in sizes.items():
        told = (f"{x} {y}" for x, y in zip(_SIZES[2:], values[2:], strict=True))
        told = ", ".join(told).replace("_", " ")
        loads = ", ".join(dict.fromkeys(row["load"] for row in found))
        parts.append(f"{values[0]}, {values[1]}: {told}; load of the machine {loads}.")
        parts.append(tables.by_device(found, _table))
    return "\n\n".join(parts)


_TEXT = """\
Of one network alone, the update of R included: beside the step of backpropagation with
nothing, medians of rounds in which all arms take their turns."""


def _table(rows: list[dict[str, str]]) -> str:
    ways = list(dict.fromkeys((row["learning"], row["optimiser"]) for row in rows))
    found = {(row["learning"], row["optimiser"], row["rule"]): row for row in rows}
    header = ["input", *(f"{way}, `{optimiser}`" for way, optimiser in ways)]
    lines = []
    for rule in (x for x in NAMES if any(row["rule"] == x for row in rows)):
        cells = []
        for way in ways:
            row = found.get((*way, rule), {})
            cell = tables.cell(row, "ratio", ".2f")
            base = (way[0], rule) == ("bp", "nothing") and cell == "1.00"
            seconds = tables.cell(row, "seconds", ".2g") if base else ""
            cells.append(f"{cell} ({seconds} s)" if seconds else cell)
        lines.append([f"`{rule}`", *cells])
    return tables.markdown(header, lines)
