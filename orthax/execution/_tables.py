"""Tables that fit a page: as lines of text, and as HTML."""

import html
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH = 100


class Table(NamedTuple):
    """Cells, all of them text.

    Attributes:
      head: what the columns are called.
      lines: as many cells each.
      narrow: which columns give way where the table is too wide: one after another,
        each down to the given number of characters.
      breaks: how the cells of some columns are broken into lines of a width; others
        stay on one line.
    """

    head: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    narrow: Sequence[tuple[int, int]]
    breaks: dict[int, Callable[[str, int], list[str]]]


def as_text(table: Table, width: int = WIDTH) -> list[str]:
    """Return the lines of a table, at most `width` wide where `narrow` allows it.

    A column that says nothing of any line gives way first.
    """
    cells = [table.head, *table.lines]
    columns = list(zip(*cells, strict=True))
    widths = {i: max(map(len, column)) for i, column in enumerate(columns)}

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - width

    for i, column in enumerate(columns):
        if excess() > 0 and len(column) > 1 and {*column[1:]} == {"-"}:
            del widths[i]
    for i, least in table.narrow:
        if i in widths:
            less = min(excess(), widths[i] - max(least, len(table.head[i])))
            widths[i] -= max(less, 0)
    return [line for line_cells in cells for line in _lines(line_cells, table, widths)]


def _lines(cells: Sequence[str], table: Table, widths: dict[int, int]) -> list[str]:
    """Return the lines that one line of a table takes."""
    broken = {
        i: table.breaks[i](cells[i], width) if i in table.breaks else [cells[i]]
        for i, width in widths.items()
    }
    out = []
    for row in range(max(map(len, broken.values()))):
        parts = [
            (own[row] if row < len(own) else "").ljust(widths[i])
            for i, own in broken.items()
        ]
        out.append("  ".join(parts).rstrip())
    return out


def as_html(table: Table) -> str:
    """Return a table as HTML, every cell escaped."""

    def row(tag: str, cells: Sequence[str]) -> str:
        style = ' style="text-align: left"'
        inside = "".join(f"<{tag}{style}>{html.escape(c)}</{tag}>" for c in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row("td", line) for line in table.lines)
    head = row("th", table.head)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def paragraph(words: str, width: int = WIDTH) -> list[str]:
    """Return words as lines."""
    return textwrap.wrap(
        words,
        width,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def at_words(cell: str, width: int) -> list[str]:
    """Break a cell between words, and inside one that is too long."""
    return textwrap.wrap(cell, max(width, 1), break_on_hyphens=False) or [""]


def behind(mark: str) -> Callable[[str, int], list[str]]:
    """Return what breaks a cell behind a mark, and nowhere else."""

    def broken(cell: str, width: int) -> list[str]:
        lines = [""]
        for piece in re.split(f"(?<={re.escape(mark)})", cell):
            if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece
        return [line.rstrip() for line in lines]

    return broken


def of_paths(paths: Sequence[str]) -> Callable[[str, int], list[str]]:
    """Return what shortens a path, where it stays the only one of its kind.

    Names in the middle become `...`, and letters in the middle of a name that is too
    long on its own; names with a digit stay, since they tell layers apart. What is
    still too long is broken behind a `"/"`.
    """
    found: dict[int, dict[str, int]] = {}

    def broken(path: str, width: int) -> list[str]:
        if len(path) <= width:
            return [path]
        if width not in found:
            counts: dict[str, int] = {}
            for other in paths:
                short = _shortened(other, width)
                counts[short] = counts.get(short, 0) + 1
            found[width] = counts
        short = _shortened(path, width)
        return behind("/")(short if found[width].get(short) == 1 else path, width)

    return broken


def _shortened(path: str, width: int) -> str:
    """Leave out names without a digit, from the middle, the first and two last stay."""
    names = path.split("/")
    while len("/".join(names)) > width:
        middle = [
            i
            for i in range(1, len(names) - 2)
            if names[i] != "..." and not any(map(str.isdigit, names[i]))
        ]
        if not middle:
            break
        names[min(middle, key=lambda i: abs(i - len(names) / 2))] = "..."
        for i in range(len(names) - 1, 0, -1):
            if names[i] == names[i - 1] == "...":
                del names[i]
    return "/".join(_clipped(name, width - 1) for name in names)


def _clipped(name: str, width: int) -> str:
    """Leave out letters from the middle of a name that is too long on its own."""
    if len(name) <= width or any(map(str.isdigit, name)):
        return name
    kept = (width - 3) // 2
    return f"{name[:kept]}...{name[-kept:]}"
