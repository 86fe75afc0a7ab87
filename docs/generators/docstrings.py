"""Docstrings of orthax, which are Markdown where they are prose, as Sphinx wants them.

`name` becomes a link where it is a public name and code elsewhere, $x$ a formula, and a
table of bars a list-table; examples are left as they are.
"""

import functools
import importlib
import inspect
import re
import types
from typing import Any

ROOMS = (
    *("polar", "components", "execution", "transforms", "optimisers", "low_rank"),
    *("nn", "decorrelation", "tasks", "diagnostics"),
)
# Code and what follows it, a formula, or what is markup in RST alone.
_PIECE = re.compile(r"`([^`]+)`(\w?)|\$([^$]+)\$|(?<!\*)(\*)(?!\*)|(\|)")
_NAME = re.compile(r"(?:orthax\.)?((?:\w+\.)?\w+)(?:\(.*\))?", re.DOTALL)


@functools.cache
def public_names() -> dict[str, Any]:
    """Return every public name, `"polar.Auto"`, and what it is called by."""
    found = {}
    for room in ROOMS:
        module = importlib.import_module(f"orthax.{room}")
        for name, value in vars(module).items():
            home = getattr(value, "__module__", module.__name__)
            ours = isinstance(home, str) and home.startswith("orthax")
            if ours and not name.startswith("_") and not inspect.ismodule(value):
                found[f"{room}.{name}"] = value
    return found


def names_at_the_root() -> dict[str, Any]:
    """Return what `orthax` itself offers, rooms apart."""
    import orthax

    return {
        name: value
        for name, value in vars(orthax).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and value is not types.ModuleType
    }


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list):
    """Rewrite the lines of a docstring in place, for `autodoc-process-docstring`."""
    del app, what, thing, options
    lines[:] = to_rst("\n".join(lines), name).split("\n")


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any):
    """Leave out fields of named tuples, which their "Attributes" already name."""
    del app, what, name, options
    alias = str(getattr(thing, "__doc__", "")).startswith("Alias for field number")
    return True if alias else skipped


def to_rst(text: str, name: str) -> str:
    """Return a docstring with its prose in reStructuredText."""
    room = name.removeprefix("orthax.").partition(".")[0]
    blocks = re.split(r"(\n\s*\n)", text)
    done, example = [], False
    for block in blocks:
        example = example and (not block.strip() or ">>>" in block)
        if ">>> " in block:
            head, mark, rest = block.partition(">>> ")
            done.append(_prose(head, room) + mark + rest)
        elif re.match(r"\s*\|", block):
            done.append(_table(block, room))
        else:
            done.append(_prose(block, room))
    return "".join(done)


def _prose(text: str, room: str) -> str:
    def piece(found: re.Match) -> str:
        code, suffix, formula, *marks = found.groups()
        if code:
            return _code(code, room) + ("\\ " + suffix) * bool(suffix)
        return f":math:`{formula}`" if formula else "\\" + "".join(filter(None, marks))

    return _PIECE.sub(piece, text)


def _code(code: str, room: str) -> str:
    code = re.sub(r"\s+", " ", code)
    target = _target(code, room)
    return f"``{code}``" if target is None else f":py:obj:`{code} <orthax.{target}>`"


def _target(code: str, room: str) -> str | None:
    """Return the public name that a piece of code is, or calls."""
    found = _NAME.fullmatch(code)
    if found is None or ("(" in code and code.count("(") != code.count(")")):
        return None
    name, names = found[1], public_names()
    if name in names:
        return name
    # A word of its own may be an argument: only what looks like a name of ours.
    telling = name != name.lower() or "_" in name or f"{name}()" in code
    if "." in name or not telling:
        return None
    homes = [home for home in (room, *ROOMS) if f"{home}.{name}" in names]
    return f"{homes[0]}.{name}" if homes else None


def _table(block: str, room: str) -> str:
    rows = [line.strip().strip("|").split("|") for line in block.split("\n")]
    rows = [[cell.strip() for cell in row] for row in rows]
    indent = re.match(r"\s*", block)[0].replace("\n", "")
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (rows[0], *rows[2:]):
        marks = ["* -"] + ["  -"] * (len(row) - 1)
        for mark, cell in zip(marks, row, strict=True):
            lines.append(f"   {mark} {_prose(cell, room)}")
    lines = [indent + line if line else "" for line in lines]
    return "\n".join(lines)
