"""Primitives that rearrange axes and join arrays."""

from collections.abc import Callable
from typing import Any

from orthax.components._program._uses import DATA, Product, Value, View
from orthax.components._program._views import (
    Dim,
    Dims,
    Piece,
    foreign,
    own_pieces,
    padded,
    reshaped,
    spread,
    without,
)
from orthax.components._program._walk import Rule, Walk


def moved(value: Value, move: Callable[[Dims], Dims | None], **flags: Any) -> Value:
    """Return a value after something that changes its axes alone."""
    if value.is_plain:
        return value._replace(**flags) if flags else value
    views, products = [], []
    for item, found in [(v, views) for v in value.views] + [
        (p, products) for p in value.products
    ]:
        dims = move(item.dims)
        if dims is not None:
            found.append(item._replace(dims=dims))
    products = [p for p in products if own_pieces(p.dims)]
    return value._replace(views=tuple(views), products=tuple(products), **flags)


def _reshape(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    shape = eqn.outvars[0].aval.shape
    order = eqn.params.get("dimensions") or range(len(eqn.invars[0].aval.shape))

    def move(dims: Dims) -> Dims:
        return reshaped(tuple(dims[i] for i in order), shape)

    return [moved(values[0], move)]


def _transpose(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    order = eqn.params["permutation"]
    return [moved(values[0], lambda dims: tuple(dims[i] for i in order))]


def _squeeze(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axes = eqn.params["dimensions"]
    return [moved(values[0], lambda dims: without(dims, axes))]


def _broadcast(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axes = [int(axis) for axis in eqn.params["broadcast_dimensions"]]
    shape = eqn.outvars[0].aval.shape

    def move(dims: Dims) -> Dims:
        out = [foreign(n) for n in shape]
        for axis, dim in zip(axes, dims, strict=True):
            out[axis] = spread(dim, shape[axis])
        return tuple(out)

    return [moved(values[0], move, known=None)]


def _rev(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    return values


def _tile(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    reps = eqn.params["reps"]

    def move(dims: Dims) -> Dims:
        pairs = zip(dims, reps, strict=True)
        return tuple(
            d if n == 1 else Dim(0, n * d.total, (Piece(None, 0, n, 1), *d.pieces))
            for d, n in pairs
        )

    return [moved(values[0], move)]


def _concatenate(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axis = eqn.params["dimension"]
    total = eqn.outvars[0].aval.shape[axis]
    kind = max(value.kind for value in values)
    views: list[View] = []
    products: list[Product] = []
    at = 0
    for atom, value in zip(eqn.invars, values, strict=True):
        n = atom.aval.shape[axis]
        for item in (*value.views, *value.products):
            dim = item.dims[axis]
            moved = Dim(at + dim.offset, total, dim.pieces)
            item = item._replace(
                dims=(*item.dims[:axis], moved, *item.dims[axis + 1 :])
            )
            (products if isinstance(item, Product) else views).append(item)
        at += n
    if kind == DATA:
        for view in views:
            walk.end(view, "element-wise")
        views = []
    views = _continued(views, axis)
    products = _rejoined(walk, products, axis, total)
    hot, signal = all(v.hot for v in values), any(v.signal for v in values)
    return [Value(kind, tuple(views), tuple(products), hot=hot, signal=signal)]


def _continued(views: list[View], axis: int) -> list[View]:
    """Return the views, neighbours that continue each other made one."""
    found: list[View] = []
    for view in views:
        last = found[-1] if found else None
        if last is not None and last.leaf == view.leaf:
            old, new = last.dims[axis], view.dims[axis]
            same = last._replace(dims=()) == view._replace(dims=()) and all(
                a == b
                for i, (a, b) in enumerate(zip(last.dims, view.dims, strict=True))
                if i != axis
            )
            if same and old.offset + old.size == new.offset:
                one = _one_piece(old.pieces, new.pieces)
                if one is not None:
                    dim = Dim(old.offset, old.total, (one,))
                    dims = (*view.dims[:axis], dim, *view.dims[axis + 1 :])
                    found[-1] = view._replace(dims=dims)
                    continue
        found.append(view)
    return found


def _one_piece(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> Piece | None:
    if len(left) != 1 or len(right) != 1:
        return None
    (a,), (b,) = left, right
    if a.axis != b.axis or a.axis is None or a.step != b.step or not a.step:
        return None
    if a.start + a.size * a.step != b.start:
        return None
    return a._replace(size=a.size + b.size)


def _rejoined(
    walk: Walk, products: list[Product], axis: int, total: int
) -> list[Product]:
    """Return the products, those whose parts come back to their full width whole.

    So do the halves that a rotary embedding turns into each other, whatever is done
    to them in between; the halves of a gated unit do not.
    """
    parts: dict[Any, set[tuple[int, int]]] = {}
    for product in products:
        pieces = own_pieces([product.dims[axis]])
        if product.part and len(pieces) == 1 and pieces[0].step:
            (p,) = pieces
            key = (product.leaf, product.use, p.axis, p.step)
            parts.setdefault(key, set()).add((p.start, p.start + p.size * p.step))
    found: dict[Product, None] = {}
    for product in products:
        pieces = own_pieces([product.dims[axis]])
        key = (product.leaf, product.use, *pieces[0][::3]) if len(pieces) == 1 else None
        ends = _covered(parts.get(key, set()))
        step = pieces[0].step if pieces else 0
        if ends is None or ends[1] - ends[0] != total * step:
            found[product] = None
            continue
        walk.found[product.leaf].joined.add((pieces[0].axis, *ends))
        dim = Dim(0, total, (Piece(pieces[0].axis, ends[0], total, step),))
        dims = (*product.dims[:axis], dim, *product.dims[axis + 1 :])
        found[product._replace(dims=dims, part=False)] = None
    return list(found)


def _covered(ranges: set[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the two ends of ranges that fill what is between them."""
    if len(ranges) < 2:
        return None
    lo, end = min(ranges)[0], None
    for a, b in sorted(ranges):
        if end is not None and a > end:
            return None
        end = b if end is None else max(end, b)
    return lo, end


def _pad(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    config = eqn.params["padding_config"]

    def move(dims: Dims) -> Dims | None:
        found = [padded(d, *map(int, c)) for d, c in zip(dims, config, strict=True)]
        return None if None in found else tuple(found)

    return [moved(values[0], move, hot=False, iota=False)]


SHAPES: dict[str, Rule] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "rev": _rev,
    "tile": _tile,
    "concatenate": _concatenate,
    "pad": _pad,
}
