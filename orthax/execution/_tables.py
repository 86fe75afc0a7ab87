"""Tables that fit a page: as lines of text, and as HTML."""

import html
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
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
      colours: of the lines of the HTML table that have one.
    """

    head: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    narrow: Sequence[tuple[int, int]]
    breaks: dict[int, Callable[[str, int], list[str]]]
    colours: Mapping[int, str] = {}


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

    def row(tag: str, cells: Sequence[str], colour: str | None = None) -> str:
        style = ' style="text-align: left"'
        inside = "".join(f"<{tag}{style}>{html.escape(c)}</{tag}>" for c in cells)
        shade = f' style="background: {colour}; color: black"' if colour else ""
        return f"<tr{shade}>{inside}</tr>"

    lines = enumerate(table.lines)
    body = "".join(row("td", line, table.colours.get(i)) for i, line in lines)
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


def after(mark: str) -> Callable[[str, int], list[str]]:
    """Return what breaks a cell after a mark, and inside a piece that is too long."""

    def broken(cell: str, width: int) -> list[str]:
        lines = [""]
        for piece in re.split(f"(?<={re.escape(mark)})", cell):
            if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece
            while len(lines[-1].rstrip()) > width:
                lines[-1:] = lines[-1][:width], lines[-1][width:]
        return [line.rstrip() for line in lines]

    return broken
