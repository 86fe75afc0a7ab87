"""Where the axes of an array come from: exact bookkeeping of reshapes and slices.

An axis of an intermediate array is made of pieces of axes of a parameter, outermost
first, as digits make a number. Every function here takes and gives such descriptions;
none knows what a program is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Positions `start + i * step` for `i < size` along one axis of a parameter.

    An `axis` of None belongs to something else: the parameter is the same all along
    it. A `step` of 0 says that the positions are not known.
    """

    axis: int | None
    start: int
    size: int
    step: int


class Dim(NamedTuple):
    """An axis of `total` positions; from `offset` on, the pieces fill some of them."""

    offset: int
    total: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Return how many positions the pieces fill."""
        return math.prod(piece.size for piece in self.pieces)


Dims = tuple[Dim, ...]


def whole(shape: Sequence[int]) -> Dims:
    """Return the axes of a parameter itself."""
    return tuple(Dim(0, n, (Piece(i, 0, n, 1),)) for i, n in enumerate(shape))


def foreign(size: int) -> Dim:
    """Return an axis along which the parameter is the same."""
    return Dim(0, size, (Piece(None, 0, size, 1),))


def own_axes(dims: Sequence[Dim]) -> set[int]:
    """Return the axes of the parameter that appear at a length above one."""
    return own_axes_of(own_pieces(dims))


def own_pieces(dims: Sequence[Dim]) -> tuple[Piece, ...]:
    """Return the pieces that belong to the parameter."""
    return tuple(p for dim in dims for p in dim.pieces if p.axis is not None)


def own_axes_of(pieces: Sequence[Piece]) -> set[int]:
    """Return the axes of pieces that are longer than one."""
    return {p.axis for p in pieces if p.axis is not None and p.size > 1}


def is_spread(dims: Sequence[Dim]) -> bool:
    """Return whether the parameter is repeated along some axis."""
    return any(p.axis is None and p.size > 1 for dim in dims for p in dim.pieces)


def blurred(dims: Sequence[Dim], size: int) -> Dim:
    """Return an axis of which only the origin is known."""
    axes = sorted({piece.axis for piece in own_pieces(dims)})
    if not axes:
        return foreign(size)
    pieces = [Piece(axes[0], 0, size, 0)] + [Piece(a, 0, 1, 0) for a in axes[1:]]
    return Dim(0, size, tuple(pieces))


def fitted(dims: Dims, shape: Sequence[int]) -> Dims:
    """Return the axes at other lengths, as where a mesh divides an array."""
    pairs = zip(dims, shape, strict=True)
    return tuple(dim if dim.total == n else blurred([dim], n) for dim, n in pairs)


def normal(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return the pieces with neighbours joined that continue each other."""
    found: list[Piece] = []
    for piece in pieces:
        if piece.size == 1 and (piece.axis is None or piece.start == 0):
            continue
        last = found[-1] if found else None
        if (
            last is not None
            and last.axis == piece.axis
            and 0 not in (last[3], piece[3])
        ):
            if last.axis is None:
                found[-1] = Piece(None, 0, last.size * piece.size, 1)
                continue
            if last.step == piece.step * piece.size:
                start = last.start + piece.start
                found[-1] = Piece(last.axis, start, last.size * piece.size, piece.step)
                continue
        found.append(piece)
    return tuple(found)


def _taken(pieces: Sequence[Piece], n: int) -> tuple[list[Piece], list[Piece]] | None:
    """Split pieces into those that make `n` positions and the rest, if they can."""
    rest, found = list(pieces), []
    while n > 1 or (rest and rest[0].size == 1):
        if not rest:
            return None
        piece = rest.pop(0)
        if n % piece.size == 0:
            found.append(piece)
            n //= piece.size
        elif piece.size % n == 0 and piece.step:
            inner = piece.size // n
            found.append(Piece(piece.axis, piece.start, n, piece.step * inner))
            rest.insert(0, Piece(piece.axis, 0, inner, piece.step))
            n = 1
        else:
            return None
    return found, rest


def _distributed(dim: Dim, sizes: list[int]) -> list[Dim] | None:
    """Return an axis split into axes of these sizes, outermost first."""
    found: list[Dim] = []
    offset, total, pieces = dim.offset, dim.total, list(dim.pieces)
    for n in sizes:
        size, inner = math.prod(p.size for p in pieces), total // n
        if offset % inner == 0 and size % inner == 0:
            taken = _taken(pieces, size // inner)
            if taken is None:
                return None
            found.append(Dim(offset // inner, n, tuple(taken[0])))
            pieces, offset = taken[1], 0
        elif offset // inner == (offset + size - 1) // inner:
            found.append(Dim(offset // inner, n, ()))
            offset %= inner
        else:
            return None
        total = inner
    return found


def _merged(dims: Sequence[Dim]) -> Dim | None:
    """Return several axes as one."""
    total = math.prod(dim.total for dim in dims)
    offset, partial = 0, False
    for i, dim in enumerate(dims):
        inner = math.prod(d.total for d in dims[i + 1 :])
        if dim.size != dim.total:
            before = math.prod(d.size for d in dims[:i])
            if partial or before > 1:
                return None
            partial = True
        offset += dim.offset * inner
    return Dim(offset, total, normal([p for dim in dims for p in dim.pieces]))


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims:
    """Return the axes after a reshape."""
    if [dim.total for dim in dims] == list(shape):
        return dims
    found: list[Dim] = [Dim(0, 1, ())] * len(shape)
    old = [dim for dim in dims if dim.total != 1]
    loose = [dim for dim in dims if dim.total == 1]
    new = [i for i, n in enumerate(shape) if n != 1]
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while (a := math.prod(d.total for d in left)) != (
            b := math.prod(shape[i] for i in right)
        ):
            side, source = (left, old) if a < b else (right, new)
            if not source:
                break
            side.append(source.pop(0))
        sizes = [shape[i] for i in right]
        one = _merged(left)
        parts = None if one is None else _distributed(one, sizes)
        if len(left) == len(right) == 1:
            parts = left
        if parts is None:
            parts = [blurred(left, n) for n in sizes]
        for i, dim in zip(right, parts, strict=True):
            found[i] = dim
    return _placed(tuple(found), [p for dim in loose for p in dim.pieces])


def _placed(dims: Dims, fixed: Sequence[Piece]) -> Dims:
    """Return the axes, what a fixed outer digit adds counted to its inner ones."""
    for lost in fixed:
        if lost.axis is not None and lost.start and lost.step:
            dims = _shifted(dims, lost)
    return dims


def _shifted(dims: Dims, lost: Piece) -> Dims:
    for i, dim in enumerate(dims):
        for j, piece in enumerate(dim.pieces):
            if piece.axis == lost.axis and piece.step:
                moved = piece._replace(start=piece.start + lost.start)
                pieces = (*dim.pieces[:j], moved, *dim.pieces[j + 1 :])
                return (*dims[:i], dim._replace(pieces=pieces), *dims[i + 1 :])
    return dims


def without(dims: Dims, axes: Sequence[int]) -> Dims:
    """Return the axes without some of length one, or whose position is not known."""
    fixed = [p for i in axes if dims[i].total == 1 for p in dims[i].pieces]
    kept = tuple(dim for i, dim in enumerate(dims) if i not in set(axes))
    return _placed(kept, fixed)


def _sliced_pieces(pieces: tuple[Piece, ...], lo: int, hi: int) -> tuple[Piece, ...]:
    size = math.prod(piece.size for piece in pieces)
    if (lo, hi) == (0, size):
        return pieces
    outer, rest = pieces[0], pieces[1:]
    inner = size // outer.size
    if lo % inner == 0 and hi % inner == 0:
        start = outer.start + lo // inner * outer.step
        return (outer._replace(start=start, size=(hi - lo) // inner), *rest)
    if lo // inner == (hi - 1) // inner:
        base = lo // inner
        left = outer._replace(start=outer.start + base * outer.step, size=1)
        return (left, *_sliced_pieces(rest, lo - base * inner, hi - base * inner))
    return blurred([Dim(0, size, pieces)], hi - lo).pieces


def sliced(dim: Dim, lo: int, hi: int, stride: int = 1) -> Dim | None:
    """Return positions `lo` to `hi` of an axis, None if the parameter has none."""
    total = -(-(hi - lo) // stride)
    if (lo, hi, stride) == (0, dim.total, 1):
        return dim
    first = max(lo, lo + -(-(dim.offset - lo) // stride) * stride)
    last = min(hi, dim.offset + dim.size)
    if first >= last:
        return None
    offset, count = (first - lo) // stride, -(-(last - first) // stride)
    if stride == 1:
        pieces = _sliced_pieces(dim.pieces, first - dim.offset, last - dim.offset)
    elif len(dim.pieces) == 1 and dim.pieces[0].step:
        (p,) = dim.pieces
        start = p.start + (first - dim.offset) * p.step
        pieces = (Piece(p.axis, start, count, p.step * stride),)
    else:
        pieces = blurred([dim], count).pieces
    return Dim(offset, total, pieces)


def padded(dim: Dim, low: int, high: int, interior: int) -> Dim | None:
    """Return an axis with padding, which may be negative."""
    total = dim.total + low + high + max(dim.total - 1, 0) * interior
    if not (low or high or interior):
        return dim
    if interior:
        return blurred([dim], total)
    cut = sliced(dim, max(-low, 0), dim.total - max(-high, 0))
    return cut and Dim(cut.offset + max(low, 0), total, cut.pieces)


def spread(dim: Dim, size: int) -> Dim:
    """Return an axis of length one, repeated."""
    if dim.total == size:
        return dim
    return foreign(size)
