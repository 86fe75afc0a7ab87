"""Convolutions, with their groups."""

from collections.abc import Sequence
from typing import Any

from orthax.components._program._uses import DATA, Product, Value, View
from orthax.components._program._views import (
    Dim,
    Piece,
    foreign,
    own_axes,
    own_axes_of,
    own_pieces,
)
from orthax.components._program._walk import Rule, Walk


def _convolution(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    image, kernel = values
    numbers = eqn.params["dimension_numbers"]
    out_axis, in_axis, *taps = numbers.rhs_spec
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    shape = eqn.outvars[0].aval.shape
    for view in image.views:
        walk.end(view, "element-wise")
    for product in image.products:
        if not product.part and own_axes([product.dims[numbers.lhs_spec[1]]]):
            walk.consumed.add(product.use)
    kind = DATA if image.views or kernel.views else max(image.kind, kernel.kind)
    products = []
    for view in kernel.views:
        dims = [foreign(n) for n in shape]
        dims[numbers.out_spec[1]] = view.dims[out_axis]
        if _filter(walk, eqn, view, (out_axis, in_axis, taps), groups):
            use = (id(eqn), view.leaf)
            products.append(Product(view.leaf, tuple(dims), use, walk.at.depth))
        for product in image.products:
            _stack(
                walk, product, product.dims[numbers.lhs_spec[1]], view.dims[out_axis]
            )
    return [Value(kind, products=tuple(products), signal=image.signal)]


def _stack(walk: Walk, product: Product, inputs: Dim, outputs: Dim) -> None:
    """Record columns that a mapped convolution keeps apart.

    `vmap` puts the axis that it maps first on the feature axes of both operands, and
    makes groups of it.
    """
    if not inputs.pieces or not outputs.pieces:
        return
    (first, *rest), (mapped, *others) = inputs.pieces, outputs.pieces
    apart = rest and others and mapped.axis not in {piece.axis for piece in others}
    if apart and first.size == mapped.size and first.axis is not None:
        walk.stack(product, first, "vmap")


def _filter(
    walk: Walk, eqn: Any, view: View, spec: tuple[int, int, list[int]], groups: int
) -> bool:
    """Record a convolution's kernel; return whether it is a matrix."""
    out_axis, in_axis, taps = spec
    batch, columns, left = _groups(view.dims[out_axis].pieces, groups)
    rows = own_pieces([view.dims[i] for i in sorted((*taps, in_axis))])
    own_groups = [p for p in batch if p.axis in {c.axis for c in columns}]
    if left is None or view.inner or view.looked:
        walk.use(view, "unknown")
        return False
    if not rows:
        walk.end(view, "element-wise")
        return False
    inputs = own_axes([view.dims[in_axis]])
    many = any(p.size > 1 for p in own_groups) or (batch and not own_axes_of(columns))
    if many and not inputs:
        walk.use(view, "depthwise")
        return False
    if not own_axes_of(columns) and batch:  # one output each
        own_groups = [batch[-1]]
        columns = (Piece(batch[-1].axis, 0, 1, 1),)
    spatial = own_pieces([view.dims[i] for i in taps])
    walk.use(
        view,
        "matrix",
        rows=rows,
        columns=columns,
        fixed=(*view.fixed, *batch),
        groups=bool(own_groups),
        spatial=tuple(sorted({piece.axis for piece in spatial})),
    )
    return True


def _groups(
    pieces: Sequence[Piece], groups: int
) -> tuple[tuple[Piece, ...], tuple[Piece, ...], int | None]:
    """Split a feature axis in what counts its groups and what is within a group."""
    batch, rest = [], list(pieces)
    while groups > 1 and rest:
        piece = rest.pop(0)
        if groups % piece.size == 0:
            batch.append(piece)
            groups //= piece.size
        elif piece.size % groups == 0 and piece.step:
            inner = piece.size // groups
            batch.append(Piece(piece.axis, piece.start, groups, piece.step * inner))
            rest.insert(0, Piece(piece.axis, 0, inner, piece.step))
            groups = 1
        else:
            return (), (), None
    if groups > 1:
        return (), (), None
    own = [tuple(p for p in part if p.axis is not None) for part in (batch, rest)]
    return own[0], own[1], 1


CONVOLUTIONS: dict[str, Rule] = {"conv_general_dilated": _convolution}
