"""From the uses of a parameter to its matrices, or to what is wrong with it."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from orthax.components._matricisation import Matricisation
from orthax.components._program import Found, Part, Piece, Use
from orthax.components._rule import Decision

Shape = tuple[int, ...]
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
_BESIDE = ("scaled", "statistic", "returned", "vector")


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
            {_long(side, shape) for side in axes[:2]} for axes in (self, other)
        )
        return mine == theirs and self[2:] == other[2:]


def _long(axes: Iterable[int], shape: Shape) -> frozenset[int]:
    return frozenset(axis for axis in axes if shape[axis] > 1)


def read(found: Found, shape: Shape, attention: str, blocks: bool) -> Decision | Unread:
    """Return how a parameter is cut, or why that cannot be said."""
    uses = list(found.uses)
    if unknown := [use for use in uses if use.kind == "unknown"]:
        return Unread(f"is used by {_at(unknown[0])}, which cannot be followed")
    matrices = [use for use in uses if use.kind == "matrix" and not use.weak]
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
    if both := _long(rows & columns, shape):
        return f"axis {min(both)} is on both sides of one matrix"
    rows, columns = rows - (columns & rows), columns
    divided, count = None, 1
    for axis in sorted(_long(rows | columns, shape)):
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
    taps = _long(first.spatial, shape)
    return _long(axes.columns, shape) | taps == _long(other.rows, shape) and _long(
        axes.rows, shape
    ) - taps == _long(other.columns, shape)


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
        if axis in columns and axis != axes.divided and _long(columns, shape) != {axis}:
            columns = tuple(c for c in columns if c != axis)
            reason += f", axis {axis} kept apart by {why}"
    sizes: tuple[int, ...] = ()
    if blocks and axes.divided is None:
        parts = _parts(uses, found, shape)
        rest, sizes = _taken_apart(columns, parts, shape)
        if sizes:
            reason += f", its columns split into {len(sizes)} blocks"
        if rest != columns:
            reason += f", split along axis {min(set(columns) - set(rest))}"
        columns = rest
    split = "columns"
    if blocks and axes.divided is None and not sizes and not found.summed:
        sizes = _rows_apart(rows, uses, shape)
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


# --- blocks ---------------------------------------------------------------------------


def _parts(uses: Sequence[Use], found: Found, shape: Shape) -> list[Part]:
    """Return the column ranges used apart: of the products, and of the kernel."""
    parts = [p for p in found.parts if (p.axis, *p.of) not in found.joined]
    return parts + [part for use in uses for part in _of_kernel(use.columns, shape)]


def _of_kernel(pieces: Sequence[Piece], shape: Shape) -> list[Part]:
    """Return the contiguous parts of axes that the pieces of a kernel's side are."""
    found = []
    for p in pieces:
        outer = any(q.axis == p.axis and q.size > 1 and q.step > p.step for q in pieces)
        if p.step and p.size * p.step != shape[p.axis] and not outer:
            end = p.start + p.size * p.step
            found.append(Part(p.axis, p.start, end, (0, shape[p.axis])))
    return found


def _rows_apart(
    rows: tuple[int, ...], uses: Sequence[Use], shape: Shape
) -> tuple[int, ...]:
    """Return the sizes of blocks of rows that are kernels of their own."""
    parts = [part for use in uses for part in _of_kernel(use.rows, shape)]
    kept, sizes = _taken_apart(rows, parts, shape)
    return sizes if kept == rows else ()


def _taken_apart(
    columns: tuple[int, ...], parts: Sequence[Part], shape: Shape
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the columns without axes that are taken apart, and sizes of blocks."""
    sizes: tuple[int, ...] = ()
    for axis in columns:
        ranges = {(part.lo, part.hi) for part in parts if part.axis == axis}
        tiles = _tiles(0, shape[axis], ranges)
        if len(tiles) < 2:
            continue
        rest = _long(columns, shape) - {axis}
        if rest and all(hi - lo == 1 for lo, hi in tiles):
            columns = tuple(c for c in columns if c != axis)
        elif not any(c < axis for c in rest):
            inner = math.prod(shape[c] for c in rest)
            sizes = tuple((hi - lo) * inner for lo, hi in tiles)
    return columns, sizes


def _tiles(lo: int, hi: int, ranges: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the smallest ranges that fill a range, each of them cut as a whole."""
    within = {r for r in ranges if lo <= r[0] and r[1] <= hi and r != (lo, hi)}
    largest = sorted(
        r
        for r in within
        if not any(s != r and s[0] <= r[0] and r[1] <= s[1] for s in within)
    )
    at = lo
    for a, b in largest:
        if a != at:
            return [(lo, hi)]
        at = b
    if at != hi:
        return [(lo, hi)]
    return [tile for a, b in largest for tile in _tiles(a, b, within)]
