"""The result of `explain`, and how it prints."""

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from orthax import polar
from orthax.execution._tables import (
    Table,
    after,
    as_html,
    as_text,
    paragraph,
)
from orthax.internal.components import in_one_message

# Most shapes of matrices that one line of a table lists.
_SHOWN = 2
# Colours of errors and guesses in notebooks.
_ERROR, _GUESS = "#f8d0d0", "#fff0c0"


class Row(NamedTuple):
    """What happens to one leaf.

    Attributes:
      path: the path of the leaf, joined by `"/"`.
      shape: its shape.
      rows: the axes of the parameters (fan-in), or None if the leaf is left alone.
      columns: the axes of the components (fan-out), or None.
      batch: all other axes, or None.
      matrices: shapes `(b, m, n)` of its batches of matrices.
      reason: why.
      guess: whether the decision is uncertain and worth checking.
      error: the message that `orthogonalise` would raise for this leaf, or None.
    """

    path: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None
    batch: tuple[int, ...] | None
    matrices: tuple[tuple[int, int, int], ...]
    reason: str
    guess: bool
    error: str | None


class Stack(NamedTuple):
    """A batch of matrices of one update.

    Attributes:
      shape: `(b, m, n)`, with `m <= n` if tall matrices are transposed to join it.
      paths: the leaves with matrices in it.
      dtype: the dtype of the computation.
      at_once: how many matrices are processed at once.
      flops: floating-point operations of one update.
      bytes: size of all matrices.
    """

    shape: tuple[int, int, int]
    paths: tuple[str, ...]
    dtype: str
    at_once: int
    flops: float
    bytes: int


class Share(NamedTuple):
    """Leaves whose matrices are divided among devices in one way.

    Attributes:
      plan: `"local"`, `"stack"`, `"split"` or `"compiler"`.
      paths: the leaves.
      shapes: shapes `(b, m, n)` of all their matrices.
      axes: mesh axes over which the work is divided.
      collectives: the collectives of one update, in order.
      bytes: bytes that one device sends per update.
      flops: operations of the busiest device, padding included.
      seconds: on the `execution.Machine` of the stacking, without overlap.
    """

    plan: str
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    axes: tuple[str, ...]
    collectives: tuple[str, ...]
    bytes: int
    flops: float
    seconds: float


class Explanation(NamedTuple):
    """The result of `explain`; prints as tables, in notebooks as HTML.

    Leaves that are treated alike, and whose paths differ in numbers only, share a line.

    Attributes:
      rows: one for each leaf.
      stacks: one for each batch of matrices on one device.
      shares: one for each way in which leaves are divided among the devices of a mesh;
        empty without a mesh.
      method: the polar method of the platform.
      platform: the platform.
      unused: names and patterns of the rule that match no leaf, probably typos.
    """

    rows: tuple[Row, ...]
    stacks: tuple[Stack, ...]
    shares: tuple[Share, ...]
    method: polar.PolarMethod
    platform: str
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return tables: a line for each leaf, and one for each batch or share."""
        lines = [*as_text(self._leaves()), ""]
        for note in self._notes():
            lines += paragraph(note)
        title, table = self._cost()
        if table.lines:
            lines += ["", *paragraph(title), "", *as_text(table)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the same for a notebook, unabridged."""
        notes = "<br>".join(map(html.escape, self._notes()))
        parts = [as_html(self._leaves()), f"<p>{notes}</p>"]
        title, table = self._cost()
        if table.lines:
            parts += [f"<p>{html.escape(title)}</p>", as_html(table)]
        return "".join(parts)

    def _leaves(self) -> Table:
        head = ("leaf", "shape", "rows", "columns", "batch", "matrices", "why")
        folded = _folded(self.rows)
        lines = [_cells(path, row) for path, row in folded]
        breaks = {0: after("/"), 5: after(" + "), 6: after(" ")}
        narrow = (6, 18), (0, 24), (5, 17), (6, 12), (0, 16)
        shades = {i: _ERROR for i, (_, row) in enumerate(folded) if row.error}
        shades |= {i: _GUESS for i, (_, row) in enumerate(folded) if row.guess}
        return Table(head, lines, narrow, breaks, shades)

    def _notes(self) -> list[str]:
        cut = [row for row in self.rows if row.matrices]
        count = sum(b for row in cut for b, _, _ in row.matrices)
        guesses = sum(row.guess for row in self.rows)
        errors = [row.error for row in self.rows if row.error]
        text = f"{len(cut)} of {len(self.rows)} leaves cut into {count} matrices"
        if guesses:
            text += f"; {guesses} by a guess (marked ?)"
        if errors:
            text += f"; {len(errors)} AMBIGUOUS, which raises:"
        notes = [text + ("" if errors else ".")]
        notes += in_one_message(errors).splitlines()
        if self.unused:
            names = ", ".join(self.unused)
            notes.append(f"The rule names what matches no leaf: {names}.")
        return notes

    def _cost(self) -> tuple[str, Table]:
        if self.shares:
            return self._devices()
        head = ("batch", "at once", "leaves", "dtype", "MFLOP", "MiB")
        lines = []
        for s in self.stacks:
            counts = str(s.at_once), str(len(s.paths))
            lines.append((_stack_text(s.shape), *counts, s.dtype, *_amounts([s])))
        if lines:
            lines.append(("one update", "", "", "", *_amounts(self.stacks)))
        title = f"Batches on {self.platform}, by {self.method}:"
        return title, Table(head, lines, (), {})

    def _devices(self) -> tuple[str, Table]:
        head = "plan", "leaves", "matrices", "over", "collectives", "MiB sent", "MFLOP"
        lines = [_share_cells(share) for share in self.shares]
        sent = sum(share.bytes for share in self.shares)
        flops = sum(share.flops for share in self.shares)
        count = sum(len(s.collectives) for s in self.shares)
        total = f"{sent / 2**20:.3g}", f"{flops / 1e6:.3g}"
        lines.append(("one update", "", "", "", str(count), *total))
        title = f"Divided among devices (maximum per device), by {self.method}:"
        breaks = {2: after(" + "), 3: after(", ")}
        breaks[4] = after(", ")
        return title, Table(head, lines, ((4, 16), (2, 20), (3, 8)), breaks)


def _amounts(stacks: Sequence[Stack]) -> tuple[str, str]:
    flops = sum(stack.flops for stack in stacks)
    return f"{flops / 1e6:.3g}", f"{sum(stack.bytes for stack in stacks) / 2**20:.3g}"


def _share_cells(share: Share) -> tuple[str, ...]:
    calls = dict.fromkeys(share.collectives)
    return (
        share.plan,
        str(len(share.paths)),
        _shapes_text(share.shapes),
        ", ".join(share.axes) or "-",
        ", ".join(f"{share.collectives.count(name)} {name}" for name in calls) or "-",
        f"{share.bytes / 2**20:.3g}",
        f"{share.flops / 1e6:.3g}",
    )


def _shapes_text(shapes: Sequence[tuple[int, int, int]]) -> str:
    if len(shapes) <= _SHOWN:
        return " + ".join(map(_stack_text, shapes))
    count = sum(b for b, _, _ in shapes)
    _, m, n = max(shapes, key=lambda shape: shape[1] * shape[2])
    return f"{count} of {len(shapes)} shapes up to ({m} x {n})"


def _stack_text(shape: tuple[int, int, int]) -> str:
    b, m, n = shape
    return f"{b} x ({m} x {n})"


def _folded(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return the rows with their paths, those of equal layers as one."""
    alike: dict[Row, list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"\d+", "*", row.path)
        key = row._replace(path=pattern, error=row.error and "")
        alike.setdefault(key, []).append(row)
    return [
        (f"{len(same)} x {key.path}" if len(same) > 1 else same[0].path, same[0])
        for key, same in alike.items()
    ]


def _cells(path: str, row: Row) -> tuple[str, ...]:
    def axes(part: tuple[int, ...] | None) -> str:
        return ",".join(map(str, part)) if part else "-"

    matrices = " + ".join(map(_stack_text, row.matrices))
    reason = f"? {row.reason}" if row.guess else row.reason
    return (
        path or "(root)",
        str(row.shape),
        axes(row.rows),
        axes(row.columns),
        axes(row.batch),
        matrices or "-",
        reason,
    )
