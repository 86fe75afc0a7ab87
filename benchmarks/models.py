"""Rules on the leaves of public models: `python -m benchmarks.models`.

The right axes of every leaf are facts, read off the models' programs without names; the
file with them is `models.json` in the folder that the variable `ORTHAX_DATA` names.
Scored are the default rule and the one that Optax's and rollfast's Muon have: a leaf of
two axes is a matrix, others are left to AdamW. Nothing is measured, so that the rows
depend on no machine.
"""

import argparse
import collections
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import tables
from orthax import components
from orthax.internal.components import Decision

KEY = ("code", "rule")
OUTCOMES = ("right", "flagged", "raised", "wrong", "left")
Leaf = dict[str, Any]


def by_name(path: str, shape: tuple[int, ...]) -> Decision | None:
    """Return the decision of the default rule, or None where it raises."""
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    try:
        return components.ByName().decide(path, leaf)
    except ValueError:
        return None


def by_rank(path: str, shape: tuple[int, ...]) -> Decision:
    """Return the decision of a rule that counts axes."""
    del path
    cut = components.Matricisation((0,), (1,)) if len(shape) == 2 else None
    return Decision(cut, "two axes" if cut else "AdamW")


RULES: dict[str, Callable[..., Decision | None]] = {
    "orthax, ByName()": by_name,
    "two axes (Optax, rollfast)": by_rank,
}


def outcome(leaf: Leaf, decision: Decision | None) -> str:
    """Return what a decision is worth.

    A vector, one side of which is one, has no wrong axes. Rows and columns may be
    exchanged: the polar factor is the same.
    """
    if decision is None:
        return "raised"
    shape, cut = leaf["shape"], decision.cut
    wanted = (leaf["rows"], leaf["columns"]) if leaf["kind"] == "matrix" else None
    right = leaf["kind"] == "vector" or _sides(shape, wanted) == _sides(
        shape, cut and (cut.rows, cut.columns)
    )
    if right:
        return "right"
    if decision.guess:
        return "flagged"
    return "wrong" if cut else "left"


def _sides(shape: list[int], cut: Any) -> Any:
    """Return both sides of a matrix, without axes of one."""
    if cut is None:
        return None
    return {frozenset(axis for axis in side if shape[axis] > 1) for side in cut}


def score(models: list[dict[str, Any]]) -> list[tables.Row]:
    """Return a row for each code base and rule, and for all of them."""
    counts: dict[tuple[str, str], collections.Counter] = {}
    for model in models:
        code = model["source"].split()[0]
        for name, rule in RULES.items():
            for leaf in model["leaves"]:
                found = outcome(leaf, rule(leaf["path"], tuple(leaf["shape"])))
                for key in (code, "all"):
                    counter = counts.setdefault((key, name), collections.Counter())
                    counter[found] += leaf["count"]
    codes = collections.Counter(model["source"].split()[0] for model in models)
    codes["all"] = len(models)
    return [
        {"code": code, "models": codes[code], "rule": rule}
        | {name: counter[name] for name in OUTCOMES}
        for (code, rule), counter in counts.items()
    ]


# What the columns of the page are called, for each rule.
COLUMNS = {
    "orthax, ByName()": {
        "right": "right",
        "flagged": "flagged as a guess",
        "raised": "raise",
        "left": "left alone wrongly",
        "wrong": "wrong in silence",
    },
    "two axes (Optax, rollfast)": {
        "right": "two axes: right",
        "left": "left to AdamW",
        "wrong": "wrong in silence",
    },
}


def text(rows: list[dict[str, str]]) -> str:
    """Return the table of the page, a line for each code base."""
    lines: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["code"] == "all"):
        line = lines.setdefault(row["code"], [row["code"], row["models"]])
        line += [row[name] for name in COLUMNS[row["rule"]]]
    heads = [head for columns in COLUMNS.values() for head in columns.values()]
    return tables.markdown(["code base", "models", *heads], lines.values())


def main(arguments: list[str] | None = None) -> None:
    """Score, write the rows, and put the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    tables.add_paths(parser)
    args = parser.parse_args(arguments)
    file = pathlib.Path(os.environ.get("ORTHAX_DATA", ""), "models.json")
    if not file.is_file():
        sys.exit(f"no {file}: let ORTHAX_DATA name the folder that has models.json")
    models = [m for m in json.loads(file.read_text()) if not m["equinox"]]
    path = args.results / "models.csv"
    tables.write(path, score(models), KEY)
    tables.publish(args, models=text(tables.read(path)))


if __name__ == "__main__":
    main()
