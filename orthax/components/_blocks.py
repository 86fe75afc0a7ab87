"""Which contiguous parts of a kernel's columns, or rows, are matrices of their own."""

import math
from collections.abc import Iterable, Sequence

from orthax.components._program import Found, Part, Piece, Use

Shape = tuple[int, ...]


def long_axes(axes: Iterable[int], shape: Shape) -> frozenset[int]:
    """Return the axes that are longer than one."""
    return frozenset(axis for axis in axes if shape[axis] > 1)


def parts_of(uses: Sequence[Use], found: Found, shape: Shape) -> list[Part]:
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


def rows_apart(
    rows: tuple[int, ...], uses: Sequence[Use], shape: Shape
) -> tuple[int, ...]:
    """Return the sizes of blocks of rows that are kernels of their own."""
    parts = [part for use in uses for part in _of_kernel(use.rows, shape)]
    kept, sizes = taken_apart(rows, parts, shape)
    return sizes if kept == rows else ()


def taken_apart(
    columns: tuple[int, ...], parts: Sequence[Part], shape: Shape
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the columns without axes that are taken apart, and sizes of blocks."""
    sizes: tuple[int, ...] = ()
    for axis in columns:
        ranges = {(part.lo, part.hi) for part in parts if part.axis == axis}
        tiles = _tiles(0, shape[axis], ranges)
        if len(tiles) < 2:
            continue
        rest = long_axes(columns, shape) - {axis}
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
