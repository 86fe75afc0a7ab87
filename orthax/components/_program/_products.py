"""Primitives that multiply matrices, alone, in batches or by groups."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from orthax.components._program._uses import DATA, Product, Value, View
from orthax.components._program._views import (
    Dims,
    Piece,
    foreign,
    is_spread,
    own_axes,
    own_axes_of,
    own_pieces,
)
from orthax.components._program._walk import Rule, Walk


class Sides(NamedTuple):
    """What a product does with the axes of one operand, by their positions."""

    contracted: Sequence[int]
    batch: Sequence[int]
    free: Sequence[int]

    def of(self, dims: Dims) -> tuple[tuple[Piece, ...], ...]:
        """Return the parameter's pieces contracted, batched and free."""
        return tuple(own_pieces([dims[i] for i in part]) for part in self)


def _sides(contracted: Sequence[int], batch: Sequence[int], rank: int) -> Sides:
    free = [i for i in range(rank) if i not in (*contracted, *batch)]
    return Sides(contracted, batch, free)


def _dot(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = values
    a = _sides(lc, lb, len(eqn.invars[0].aval.shape))
    b = _sides(rc, rb, len(eqn.invars[1].aval.shape))
    n = len(lb) + len(a.free)
    at_left = {axis: i for i, axis in enumerate([*a.batch, *a.free])}
    at_right = dict(zip(b.batch, range(len(lb)), strict=True))
    at_right |= {axis: n + i for i, axis in enumerate(b.free)}
    return [_product(walk, eqn, (left, a, at_left), (right, b, at_right))]


def _ragged_dot(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if not groups or values[0].views:
        _unknown_views(walk, values)
        return [Value(DATA)]
    a = _sides(lc, lb, len(eqn.invars[0].aval.shape))
    b = _sides(rc, (*rb, *groups), len(eqn.invars[1].aval.shape))
    n = len(lb) + len(a.free)
    at_left = {axis: i for i, axis in enumerate([*a.batch, *a.free])}
    at_right = dict(zip(rb, range(len(lb)), strict=True))
    at_right |= {axis: n + i for i, axis in enumerate(b.free)}
    return [_product(walk, eqn, (values[0], a, at_left), (values[1], b, at_right))]


def _unknown_views(walk: Walk, values: Sequence[Value]) -> None:
    for view in (view for value in values for view in value.views):
        if not view.scaled:
            walk.use(view, "unknown")


Operand = tuple[Value, Sides, dict[int, int]]


def _product(walk: Walk, eqn: Any, left: Operand, right: Operand) -> Value:
    shape = eqn.outvars[0].aval.shape
    kind = max(left[0].kind, right[0].kind)
    views: list[View] = []
    products: list[Product] = []
    for this, other in ((left, right), (right, left)):
        value, sides, at = this
        times = math.prod(shape[other[2][i]] for i in other[1].free)
        is_data = other[0].acts or _is_fed(other[0], value)
        fed = _is_fed(value, other[0])
        for view in value.views:
            out = _out(view.dims, at, shape)
            if fed:
                walk.end(view, "element-wise")
                kind = DATA
            elif other[0].hot and sides.contracted and not view.inner:
                walk.use(view, "look-up")
                kind = DATA
            elif is_data:
                kind = DATA
                if _multiply(walk, view, sides, times):
                    use = (id(eqn), view.leaf)
                    products.append(Product(view.leaf, out, use, walk.at.depth))
                    _stack(walk, other)
            elif not view.scaled:
                views.append(_composite(walk, view, sides, out, other[0]))
        products += _passed(walk, this, other, shape)
    signal = left[0].signal or right[0].signal
    products = [p for p in products if own_pieces(p.dims)]
    return Value(kind, tuple(views), tuple(products), signal=signal)


def _is_fed(value: Value, other: Value) -> bool:
    """Return whether of two parameters this one is what the other is applied to.

    Learned queries and latents are repeated for every example, matrices are not.
    """
    if not value.views or not other.views or value.acts or other.acts:
        return False
    here = any(is_spread(view.dims) for view in value.views)
    return here and not any(is_spread(view.dims) for view in other.views)


def _out(dims: Dims, at: dict[int, int], shape: Sequence[int]) -> Dims:
    out = [foreign(n) for n in shape]
    for axis, i in at.items():
        out[i] = dims[axis]
    return tuple(out)


def _multiply(walk: Walk, view: View, sides: Sides, times: int) -> bool:
    """Record the product of a parameter and data; return whether it is a matrix's."""
    rows, batch, columns = sides.of(view.dims)
    if view.inner:
        return _multiply_composite(walk, view, sides, times)
    if view.scaled and not (rows and own_axes_of(columns)):
        return False
    fixed = (*view.fixed, *batch)
    if not rows or (not columns and is_spread(view.dims)):
        walk.end(view, "element-wise")
    elif not columns and not _has_unit_axis(walk, view, (*rows, *fixed)):
        walk.end(view, "vector")
    else:
        sort = {"rows": rows, "columns": columns, "fixed": fixed, "times": times}
        walk.use(view, "adapted" if view.scaled == 2 else "matrix", **sort)
        return True
    return False


def _multiply_composite(walk: Walk, view: View, sides: Sides, times: int) -> bool:
    """Record the product of data with a product of parameters, for one of these.

    Whichever axes meet the data are the rows: x (A B) is (x A) B.
    """
    contracted, batch, free = sides.of(view.dims)
    free = tuple(piece for piece in free if piece not in view.batch)
    inner = sum(view.inner, ())
    if contracted and free:
        walk.use(view, "unknown", primitive="a product of parameters")
        return False
    rows, columns = (contracted, inner) if contracted else (inner, free)
    if not columns:
        rows, columns = view.inner[0], sum(view.inner[1:], ())
    walk.use(
        view,
        "matrix" if columns else "vector",
        rows=rows,
        columns=columns,
        fixed=(*view.fixed, *view.batch, *batch),
        weak=True,
        times=times,
        partners=view.partners if contracted else (),
    )
    return bool(free)


def _has_unit_axis(walk: Walk, view: View, used: Sequence[Piece]) -> bool:
    """Return whether the parameter has an axis of length one to be its columns."""
    axes = {piece.axis for piece in used}
    shape = walk.shapes[view.leaf]
    return any(n == 1 and i not in axes for i, n in enumerate(shape))


def _composite(walk: Walk, view: View, sides: Sides, out: Dims, other: Value) -> View:
    """Return a parameter in its product with another, or with a constant."""
    contracted, batch, _ = sides.of(view.dims)
    if not contracted:
        return view._replace(dims=out)
    partners = (*view.partners, *(each.leaf for each in other.views))
    return view._replace(
        dims=out,
        inner=(*view.inner, contracted),
        product=(walk.eqn.primitive.name, walk.where()),
        resized=view.resized or other.grid,
        batch=(*view.batch, *batch),
        partners=tuple(dict.fromkeys(partners)),
    )


def _stack(walk: Walk, other: Operand) -> None:
    """Record the columns of earlier products that this one keeps apart.

    The first layer of experts that all read the same input has its experts among its
    columns; the second layer shows what they are.
    """
    value, sides, _ = other
    for product in value.products:
        for axis in sides.batch:
            for piece in product.dims[axis].pieces:
                if piece.axis is not None:
                    walk.stack(product, piece, walk.eqn.primitive.name)


def _passed(
    walk: Walk, this: Operand, other: Operand, shape: Sequence[int]
) -> list[Product]:
    """Return the products that go through another product, as values do attention.

    `vmap` puts the axes that it maps first among the batch axes; where both operands
    are products, what stands there in both is a mapped axis of both kernels.
    """
    value, sides, at = this
    found = []
    for product in value.products:
        contracted = own_axes([product.dims[i] for i in sides.contracted])
        if contracted and not product.part:
            walk.consumed.add(product.use)
        if other[0].products:
            for axis in sides.batch[: walk.at.depth]:
                for piece in own_pieces([product.dims[axis]]):
                    walk.stack(product, piece, "vmap")
        if not contracted and not other[0].views:
            found.append(product._replace(dims=_out(product.dims, at, shape)))
    return found


PRODUCTS: dict[str, Rule] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
}
