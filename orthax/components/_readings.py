"""From the uses of a parameter to its matrices, or to what is wrong with it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from orthax.components._blocks import (
    Shape,
    long_axes,
    parts_of,
    rows_apart,
    taken_apart,
)
from orthax.components._matricisation import Matricisation
from orthax.components._program import Found, Use
from orthax.components._rule import Decision

_ALONE = {
    "look-up": "a look-up",
    "depthwise": "a depthwise convolution",
    "element-wise": "used element by element",
    "scaled": "used element by element",
    "vector": "contracted with nothing left for columns",
    "statistic": "used in a statistic",
    "returned": "returned as it is",
}
# What says nothing of a parameter that is also a matrix.
_BESIDE = ("scaled", "adapted", "statistic", "returned", "vector")


class Unread(NamedTuple):
    """A parameter whose axes the program does not tell.

    Attributes:
      problem: what is wrong.
      unused: whether the program does not use it at all.
    """

    problem: str
    unused: bool = False


class _Axes(NamedTuple):
    """The axes of one use: which are rows, which are columns.

    `count` is in how many contiguous pieces the axis `divided` is, each of them the
    columns (or, if it is among the rows, the rows) of one matrix.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    divided: int | None = None
    count: int = 1

    def same(self, other: "_Axes", shape: Shape) -> bool:
        """Return whether both are the same matrices, up to transposition."""
        mine, theirs = (
            {long_axes(side, shape) for side in axes[:2]} for axes in (self, other)
        )
        return mine == theirs and self[2:] == other[2:]


def read(found: Found, shape: Shape, attention: str, blocks: bool) -> Decision | Unread:
    """Return how a parameter is cut, or why that cannot be said."""
    uses = list(found.uses)
    if unknown := [use for use in uses if use.kind == "unknown"]:
        return Unread(f"is used by {_at(unknown[0])}, which cannot be followed")
    matrices = [use for use in uses if use.kind == "matrix" and not use.weak]
    adapted = [use for use in uses if use.kind == "adapted"]
    if adapted and not matrices:
        return Unread(f"has data added to it, and is then {_matrix_text(adapted[0])}")
    others = [use for use in uses if use.kind not in ("matrix", *_BESIDE)]
    others = [use for use in others if not use.weak]
    if not matrices and not others and not any(use.kind == "scaled" for use in uses):
        matrices = [use for use in uses if use.kind == "matrix"]
    look_up = [use for use in others if use.kind == "look-up"]
    if look_up or not matrices:
        return _alone(look_up or others or uses, bool(matrices))
    axes = [_axes(use, shape) for use in matrices]
    for use, own in zip(matrices, axes, strict=True):
        if isinstance(own, str):
            return Unread(f"is {_matrix_text(use)}, where {own}")
    # A power iteration has one vector: the orientation is that of the use with most.
    most = max(range(len(matrices)), key=lambda i: matrices[i].times)
    first, chosen = matrices[most], axes[most]
    for use, own in zip(matrices, axes, strict=True):
        if not (chosen.same(own, shape) or _is_transposed(first, chosen, own, shape)):
            return Unread(f"is used in two ways: {_way(first)}, and {_way(use)}")
    if others:
        return Unread(f"is used in two ways: {_way(first)}, and {_way(others[0])}")
    return _matrix(first, matrices, chosen, found, shape, attention, blocks)


def _alone(uses: Sequence[Use], also_matrix: bool) -> Decision | Unread:
    if not uses:
        return Unread("is not used by the program", unused=True)
    order = list(_ALONE)
    use = min(uses, key=lambda use: order.index(use.kind) if use.kind in order else 99)
    return Decision(None, _way(use) + ("; also multiplied" if also_matrix else ""))


def _at(use: Use) -> str:
    return use.primitive + (f" at {use.where}" if use.where else "")


def _matrix_text(use: Use) -> str:
    rows = tuple(sorted({piece.axis for piece in use.rows}))
    return f"contracted over {rows} by {_at(use)}"


def _way(use: Use) -> str:
    if use.kind == "matrix":
        return _matrix_text(use)
    return f"{_ALONE.get(use.kind, use.kind)}, by {_at(use)}"


# --- axes -----------------------------------------------------------------------------


def _axes(use: Use, shape: Shape) -> _Axes | str:
    """Return the axes of a use, or why they are no matrix's."""
    rows = {piece.axis for piece in use.rows}
    columns = {piece.axis for piece in use.columns}
    if both := long_axes(rows & columns, shape):
        return f"axis {min(both)} is on both sides of one matrix"
    rows, columns = rows - (columns & rows), columns
    divided, count = None, 1
    for axis in sorted(long_axes(rows | columns, shape)):
        side = use.rows if axis in rows else use.columns
        own = [p for p in side if p.axis == axis]
        outer = [p for p in use.fixed if p.axis == axis and p.size > 1]
        if not outer:
            continue
        inner = max((p.size * p.step for p in own), default=1)
        if divided is not None or any(p.step < inner for p in outer):
            return f"axis {axis} holds several matrices that are not contiguous in it"
        divided, count = axis, math.prod(p.size for p in outer)
    spare = [i for i, n in enumerate(shape) if n == 1 and i not in rows | columns]
    if not rows:
        rows = {spare.pop(0)} if spare else rows
    if not columns:
        columns = {spare.pop()} if spare else columns
    if not rows or not columns:
        return "nothing is left for the other side of a matrix"
    return _Axes(tuple(sorted(rows)), tuple(sorted(columns)), divided, count)


def _is_transposed(first: Use, axes: _Axes, other: _Axes, shape: Shape) -> bool:
    """Return whether a second use is the transpose of a convolution."""
    if not first.spatial:
        return False
    taps = long_axes(first.spatial, shape)
    return long_axes(axes.columns, shape) | taps == long_axes(
        other.rows, shape
    ) and long_axes(axes.rows, shape) - taps == long_axes(other.columns, shape)


def _matrix(
    use: Use,
    uses: Sequence[Use],
    axes: _Axes,
    found: Found,
    shape: Shape,
    attention: str,
    blocks: bool,
) -> Decision:
    rows, columns = axes.rows, axes.columns
    reason = _matrix_text(use)
    for axis, why in found.stacked.items():
        if (
            axis in columns
            and axis != axes.divided
            and long_axes(columns, shape) != {axis}
        ):
            columns = tuple(c for c in columns if c != axis)
            reason += f", axis {axis} kept apart by {why}"
    sizes: tuple[int, ...] = ()
    if blocks and axes.divided is None:
        parts = parts_of(uses, found, shape)
        rest, sizes = taken_apart(columns, parts, shape)
        if sizes:
            reason += f", its columns split into {len(sizes)} blocks"
        if rest != columns:
            reason += f", split along axis {min(set(columns) - set(rest))}"
        columns = rest
    split = "columns"
    if blocks and axes.divided is None and not sizes and not found.summed:
        sizes = rows_apart(rows, uses, shape)
        if sizes:
            split = "rows"
            reason += f", its rows used apart in {len(sizes)} blocks"
    cut = _cut(rows, columns, axes, sizes, split, use)
    if attention != "whole" and not use.spatial and cut.groups == 1:
        cut, reason = _by_heads(cut, shape, attention, reason)
    return Decision(cut, reason)


def _cut(
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    axes: _Axes,
    sizes: tuple[int, ...],
    split: str,
    use: Use,
) -> Matricisation:
    spatial = tuple(axis for axis in use.spatial if axis in rows)
    if axes.count > 1 and axes.divided is not None:
        in_rows = axes.divided in rows
        side = rows if in_rows else columns
        side = (axes.divided, *(axis for axis in side if axis != axes.divided))
        rows, columns = (side, columns) if in_rows else (rows, side)
        split = "rows" if in_rows else "columns"
        if use.groups and not in_rows:
            return Matricisation(rows, columns, groups=axes.count, spatial=spatial)
        return Matricisation(
            rows, columns, blocks=axes.count, split=split, spatial=spatial
        )
    if not sizes:
        return Matricisation(rows, columns, spatial=spatial)
    equal = len(set(sizes)) == 1
    blocks = len(sizes) if equal else sizes
    return Matricisation(rows, columns, blocks=blocks, split=split, spatial=spatial)


def _by_heads(
    cut: Matricisation, shape: Shape, attention: str, reason: str
) -> tuple[Matricisation, str]:
    """Return the cut of a query's kernel (D, H, K), or an output's (H, K, D)."""
    rows, columns = cut.rows, cut.columns
    if (len(rows) > 1) == (len(columns) > 1) or cut.split == "rows":
        return cut, reason
    reason += f", {attention}"
    if len(columns) > 1:
        if attention == "per_head":
            return Matricisation(rows, columns[-1:]), reason
        rows = tuple(sorted((*rows, columns[-1])))
        blocks = cut.blocks
        if not isinstance(blocks, int):
            blocks = tuple(size // shape[columns[-1]] for size in blocks)
        return Matricisation(rows, columns[:-1], blocks=blocks), reason
    if attention == "per_head":
        return Matricisation(rows[-1:], columns), reason
    return Matricisation(tuple(sorted((rows[-1], *columns))), rows[:-1]), reason
