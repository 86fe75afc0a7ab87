"""Time of a training step beside AdamW's: `python -m examples.train_lm speed`.

On tokens without meaning. The steps of all arms are timed in turn, and ratios taken
within a round, so that other work of the machine falls on all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tables, timing
from examples.experiments.language.arms import BASELINE, Arm
from examples.experiments.language.training import Recipe, initialise, train_step

NAME = "language_speed.csv"
SIZES = (
    "vocabulary",
    "depth",
    "heads",
    "width",
    "context",
    "scanned",
    "batch_size",
    "dtype",
)
_ARM = ("optimiser", "attention", "method")
_WHERE = ("platform", "device", "cpus", "lapack_threads")
_KEY = (*_WHERE, *SIZES, *_ARM)


def step_of(recipe: Recipe) -> Callable[[], Any]:
    """Return a compiled training step of a recipe, always the same one."""
    shape = (recipe.batch_size, recipe.model.context + 1)
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocabulary, shape)
    tokens, rates = jax.device_put(np.int32(tokens)), jnp.full(2, 1e-3)
    state = jax.tree.map(lambda x: x[0], initialise(jax.random.key(0)[None], recipe))

    def step(*arguments: Any) -> Any:
        return train_step(*arguments, recipe)

    compiled = jax.jit(step).lower(state, tokens, rates).compile()
    return lambda: compiled(state, tokens, rates)


def sizes_of(recipe: Recipe) -> dict[str, Any]:
    """Return the columns that say how large the network and its batches are."""
    values = {name: getattr(recipe.model, name, None) for name in SIZES}
    return values | {"batch_size": recipe.batch_size, "dtype": recipe.dtype}


def measure(recipes: Sequence[Recipe], rounds: int, folder: Path) -> None:
    """Compile and time every arm, and write its row.

    Args:
      recipes: alike but for their arms.
      rounds: timed steps of each, in turn.
      folder: of the CSV file.
    """
    calls = {recipe.arm: step_of(recipe) for recipe in recipes}
    for call in calls.values():
        jax.block_until_ready(call())
    counts = dict.fromkeys(calls, rounds)
    seconds = timing.interleaved(calls, counts, timing.pause())
    base = next((x for arm, x in seconds.items() if arm.optimiser == BASELINE), None)
    circumstances = tables.circumstances() | {"flax": flax.__version__}
    rows = []
    for recipe, own in zip(recipes, seconds.values(), strict=True):
        low, median, high = timing.quartiles(own.values())
        tokens = recipe.batch_size * recipe.model.context
        row = sizes_of(recipe) | {x: getattr(recipe.arm, x) for x in _ARM}
        row |= {"seconds": median, "low": low, "high": high}
        row |= {"ratio": base and timing.ratio(own, base)}
        rows.append(row | {"tokens_per_s": tokens / median} | circumstances)
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / NAME, rows, _KEY)


def read(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a folder."""
    return tables.read(folder / NAME)


def find(rows: Sequence[dict[str, str]], like: dict[str, str]) -> dict[str, str]:
    """Return the row of an arm, given its sizes and itself; the last one, or none."""
    wanted = {name: like[name] for name in (*SIZES, *_ARM)}
    found = [row for row in rows if row.items() >= wanted.items()]
    return found[-1] if found else {}


def ratios(recipes: Sequence[Recipe], rounds: int, folder: Path) -> dict[Arm, float]:
    """Return how long the step of each arm is in AdamW's, measured here if need be."""
    wanted = [
        {x: str(y) for x, y in sizes_of(recipe).items()}
        | {x: getattr(recipe.arm, x) for x in _ARM}
        for recipe in recipes
    ]
    here = {name: str(tables.circumstances()[name]) for name in _WHERE}
    for attempt in (measure, None):
        rows = [row for row in read(folder) if row.items() >= here.items()]
        found = [find(rows, like).get("ratio") for like in wanted]
        if all(found) or attempt is None:
            break
        attempt(recipes, rounds, folder)
    return {
        recipe.arm: float(ratio) for recipe, ratio in zip(recipes, found, strict=True)
    }


def text(rows: Sequence[dict[str, str]]) -> str:
    """Return the table of every size, as Markdown."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SIZES), []).append(row)
    parts = []
    for values, found in groups.items():
        told = zip(SIZES, values, strict=True)
        told = ", ".join(f"{x} {y}" for x, y in told if y != "False")
        loads = ", ".join(dict.fromkeys(row["load"] for row in found))
        parts.append(f"{told.replace('_', ' ')}; load of the machine {loads}.")
        parts.append(tables.by_device(found, _table))
    return "\n\n".join(parts)


def _table(rows: list[dict[str, str]]) -> str:
    header = ["optimiser", "attention", "ms a step", "quartiles", "tokens/s"]
    header += ["over AdamW, %"]
    lines = []
    for row in rows:
        low, median, high = (1e3 * float(row[x]) for x in ("low", "seconds", "high"))
        over = f"{100 * (float(row['ratio']) - 1):+.0f}" if row["ratio"] else ""
        times = [f"{median:.3g}", f"{low:.3g} to {high:.3g}"]
        tokens = tables.cell(row, "tokens_per_s", ".3g")
        own = "" if row["optimiser"] == BASELINE else over
        lines.append([f"`{row['optimiser']}`", row["attention"], *times, tokens, own])
    return tables.markdown(header, lines)
