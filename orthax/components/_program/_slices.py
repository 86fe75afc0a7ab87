"""Primitives that take part of an array: slices, look-ups, writing."""

from collections.abc import Sequence
from typing import Any

from orthax.components._program._shapes import moved
from orthax.components._program._uses import DATA, PARAMETER, Part, Product, Value, View
from orthax.components._program._views import (
    Dim,
    Dims,
    Piece,
    foreign,
    own_axes,
    own_pieces,
    sliced,
)
from orthax.components._program._walk import Rule, Walk


def _cut(
    walk: Walk, value: Value, ranges: Sequence[tuple[int, int, int]], **flags: Any
) -> Value:
    """Return a value cut along its axes, and record where a product is."""
    if value.is_plain:
        return value._replace(**flags)

    def move(dims: Dims) -> Dims | None:
        cut = [sliced(d, *r) for d, r in zip(dims, ranges, strict=True)]
        return None if None in cut else tuple(cut)

    products = []
    for product in value.products:
        dims = move(product.dims)
        if dims is None:
            continue
        pairs = zip(product.dims, dims, strict=True)
        parts = [_record(walk, product, old, new) for old, new in pairs if old != new]
        if own_pieces(dims):
            part = product.part or any(parts)
            products.append(product._replace(dims=dims, part=part))
    out = moved(value._replace(products=()), move, **flags)
    return out._replace(products=tuple(products))


def _record(walk: Walk, product: Product, old: Dim, new: Dim) -> bool:
    """Record a part of a product's columns; return whether it is one."""
    if old.size == new.size:
        return False
    found = walk.found[product.leaf].parts
    for before, after in zip(old.pieces, new.pieces, strict=False):
        if before == after or after.axis is None:
            continue
        at_once = before.axis == after.axis and before.step == after.step
        if at_once and before.step and not _is_inner(product.dims, before):
            lo, of = after.start, before.start
            found[
                Part(
                    after.axis,
                    lo,
                    lo + after.size * after.step,
                    (of, of + before.size * before.step),
                )
            ] = None
    return bool(own_pieces([old]))


def _is_inner(dims: Dims, piece: Piece) -> bool:
    """Return whether the positions of a piece lie apart, as in each of many heads."""
    return any(
        other.axis == piece.axis and other.size > 1 and other.step > piece.step
        for other in own_pieces(dims)
    )


def _slice(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    lo, hi = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(lo)
    ranges = [tuple(map(int, r)) for r in zip(lo, hi, strides, strict=True)]
    return [_cut(walk, values[0], ranges)]


def _split(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axis, at, found = eqn.params["axis"], 0, []
    shape = eqn.invars[0].aval.shape
    for size in map(int, eqn.params["sizes"]):
        ranges = [(0, n, 1) for n in shape]
        ranges[axis] = (at, at + size, 1)
        found.append(_cut(walk, values[0], ranges))
        at += size
    return found


def _dynamic_slice(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    value, starts = values[0], values[1:]
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    by_data = any(start.kind == DATA for start in starts)
    if value.is_plain:
        kind = max(value.kind, DATA if by_data else value.kind)
        return [value._replace(kind=kind, known=None)]
    ranges, open_ = [], []
    for i, (n, size, start) in enumerate(zip(shape, sizes, starts, strict=True)):
        known = 0 if n == size else start.known
        if known is None:
            open_.append(i)
            ranges.append((0, n, 1))
        else:
            first = min(max(known + n * (known < 0), 0), n - size)
            ranges.append((first, first + size, 1))
    value = _cut(walk, value, ranges, known=None)
    return [_opened(walk, value, open_, sizes, by_data)]


def _opened(
    walk: Walk, value: Value, axes: list[int], sizes: Sequence[int], by_data: bool
) -> Value:
    """Return a value of which some axes are cut nobody knows where."""
    if not axes:
        return value
    views = []
    for view in value.views:
        gone = [view.dims[i] for i in axes]
        dims = tuple(
            foreign(sizes[i]) if i in axes else d for i, d in enumerate(view.dims)
        )
        found = view._replace(dims=dims, fixed=(*view.fixed, *own_pieces(gone)))
        if own_axes(gone) and by_data:
            found = found._replace(looked=_looked(walk))
        if any(sizes[i] > 1 and own_axes([view.dims[i]]) for i in axes):
            if by_data:
                walk.end(found, "look-up")
            else:
                walk.use(view, "unknown")
        else:
            views.append(found)
    return _after_look_up(walk, value._replace(products=()), views, by_data)


def _looked(walk: Walk) -> tuple[str, str]:
    return walk.eqn.primitive.name, walk.where()


def _after_look_up(walk: Walk, value: Value, views: list[View], by_data: bool) -> Value:
    """Return what a look-up gives: matrices to multiply with, or rows, which are data.

    Whole matrices that are chosen are followed on; a row has no matrix in it.
    """
    kept = []
    for view in views:
        if view.looked and not view.inner and len(own_axes(view.dims)) < 2:
            walk.end(view, "look-up")
        else:
            kept.append(view)
    gone = bool(views) and not kept
    kind = DATA if gone or (by_data and value.kind != PARAMETER) else value.kind
    return value._replace(kind=kind, views=tuple(kept), known=None)


def _gather(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    value, index = values[0], values[1]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    by_data = index.kind == DATA
    if not value.views:
        kind = max(value.kind, index.kind)
        return [Value(kind, signal=value.signal or index.signal)]
    shape = eqn.outvars[0].aval.shape
    batched = getattr(numbers, "operand_batching_dims", ())
    gone = (*numbers.collapsed_slice_dims, *batched)
    kept = [i for i in range(len(sizes)) if i not in gone]
    views = []
    for view in value.views:
        dims = [foreign(n) for n in shape]
        fixed = [view.dims[i] for i in gone]
        for at, i in zip(numbers.offset_dims, kept, strict=True):
            if sizes[i] == view.dims[i].total:
                dims[at] = view.dims[i]
            else:
                fixed.append(view.dims[i])
        at_one = by_data or shape != tuple(sizes[i] for i in kept)
        views.append(
            view._replace(
                dims=tuple(dims),
                fixed=(*view.fixed, *own_pieces(fixed)),
                looked=_looked(walk) if at_one or len(own_axes(dims)) < 2 else None,
            )
        )
    return [_after_look_up(walk, Value(value.kind), views, by_data)]


def _updated(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """Writing into an array: what is written is not followed."""
    is_slice = eqn.primitive.name == "dynamic_update_slice"
    operand, update = values[0], values[1 if is_slice else 2]
    for view in update.views:
        if not view.scaled:
            walk.use(view, "unknown")
    kind = max(value.kind for value in values)
    if kind == DATA:
        for view in operand.views:
            walk.end(view, "element-wise")
        return [Value(DATA)]
    return [Value(kind, operand.views, signal=operand.signal or update.signal)]


SLICES: dict[str, Rule] = {
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "dynamic_update_slice": _updated,
    **dict.fromkeys(("scatter", "scatter_add", "scatter-add", "scatter_mul"), _updated),
}
