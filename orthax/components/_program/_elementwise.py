"""Primitives that work element by element, and reductions."""

from collections.abc import Callable, Sequence
from typing import Any

from orthax.components._program._shapes import moved
from orthax.components._program._uses import CONSTANT, DATA, Product, Value, View
from orthax.components._program._views import (
    Dims,
    fitted,
    is_spread,
    own_axes,
    spread,
)
from orthax.components._program._walk import Rule, Walk


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Linear in a product of parameters: it can still be multiplied by data.
_LINEAR = _names(
    "neg convert_element_type copy copy_p real imag conj complex reduce_precision "
    "stop_gradient optimization_barrier name sharding_constraint reshard mesh_cast "
    "device_put add add_any sub mul div select_n"
)
_SCALING = {"mul", "div", "select_n"}
_OTHERS = _names(
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp cos cosh digamma eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma "
    "igammac integer_pow is_finite le lgamma log log1p logistic lt max min ne "
    "nextafter not or polygamma pow rem round rsqrt shift_left sign sin sinh sqrt "
    "square tan tanh xor zeta shift_right_logical shift_right_arithmetic "
    "population_count"
)
_COLLECTIVES = _names(
    "psum psum2 psum_invariant pmax pmin ppermute pbroadcast pvary pcast all_gather "
    "all_gather_invariant all_gather_reduced reduce_scatter all_to_all "
    "unreduced_psum"
)
_NOISE = _names(
    "random_bits random_wrap random_unwrap random_seed random_split random_fold_in "
    "random_gamma random_clone threefry2x32 rng_bit_generator rng_uniform"
)
_REDUCTIONS = _names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "argmax argmin reduce"
)
_RUNNING = _names("cumsum cumprod cummax cummin cumlogsumexp")
_LIMIT = 8


def flags(values: Sequence[Value]) -> Value:
    kind = max((value.kind for value in values), default=CONSTANT)
    grid = any(value.grid for value in values)
    return Value(kind, signal=any(value.signal for value in values), grid=grid)


def _ends(walk: Walk, values: Sequence[Value], kind: str) -> None:
    for value in values:
        for view in value.views:
            walk.end(view, kind)


def _elementwise(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    out = flags(values)
    name = eqn.primitive.name
    if not eqn.outvars[0].aval.shape:
        _ends(walk, values, "statistic")
        known = _folded(name, eqn, [value.known for value in values])
        return [out._replace(known=known)] * len(eqn.outvars)
    out = out._replace(**_marks(name, values))
    if all(value.is_plain for value in values):
        return [out] * len(eqn.outvars)
    shape, same = eqn.outvars[0].aval.shape, []
    for atom, value in zip(eqn.invars, values, strict=True):
        if len(getattr(atom.aval, "shape", ())) == len(shape):
            same.append(moved(value, lambda dims: tuple(map(spread, dims, shape))))
        else:
            _ends(walk, [value], "element-wise")
    views = _kept_views(walk, name, same, out.kind)
    composite = any(view.inner for value in same for view in value.views)
    if composite and not any(view.inner for view in views):
        out = out._replace(kind=DATA)
    out = out._replace(views=views, products=_joint_products(walk, name, same))
    return [out] * len(eqn.outvars)


def _kept_views(
    walk: Walk, name: str, values: list[Value], kind: int
) -> tuple[View, ...]:
    found = [
        _kept(walk, name, v, kind == DATA) for value in values for v in value.views
    ]
    return tuple(dict.fromkeys(view for view in found if view is not None))


def _kept(walk: Walk, name: str, view: View, data: bool) -> View | None:
    """Return a view of the result, or record that there is none."""
    if view.scaled:
        return view if name in _LINEAR else None
    if not data and (name in _LINEAR or not view.inner):
        return view
    if view.resized and data:
        walk.use(view, "element-wise")
        return None
    adds = name in ("add", "add_any", "sub") and not is_spread(view.dims)
    if not data or view.inner or view.looked or not (adds or name in _SCALING):
        walk.end(view, "element-wise")
        return view._replace(scaled=1) if data and name in _SCALING else None
    walk.use(view, "scaled")
    return view._replace(scaled=2 if adds else 1)


def _joint_products(walk: Walk, name: str, values: list[Value]) -> tuple[Product, ...]:
    """Return the products in a result; once multiplied on, they are in no sum."""
    found = {product: None for value in values for product in value.products}
    if sum(bool(value.products) for value in values) > 1:
        if any(product.use in walk.consumed for product in found):
            return ()
        if name in ("add", "add_any", "sub"):
            leaves = [product.leaf for product in found]
            for leaf in {leaf for leaf in leaves if leaves.count(leaf) > 1}:
                walk.found[leaf].summed = True
    return tuple(found) if len(found) <= _LIMIT else ()


def _marks(name: str, values: list[Value]) -> dict[str, bool]:
    """Return whether the result counts positions, is one-hot, or waves."""
    if name in ("sin", "cos"):
        return {"signal": True}
    iota = [value.iota for value in values]
    if name == "eq" and sum(iota) == 1:
        return {"hot": True}
    plain = all(
        v.iota or v.hot or (v.kind == CONSTANT and not v.signal) for v in values
    )
    if name in ("convert_element_type", "mul", "copy", "stop_gradient"):
        hot = sum(value.hot for value in values) == 1 and plain
        return {"hot": hot, "iota": any(iota) and plain and not hot}
    return {"iota": name in ("add", "sub") and any(iota) and plain}


_FOLDS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "max": max,
    "min": min,
    "neg": lambda x: -x,
    "lt": lambda x, y: int(x < y),
    "ge": lambda x, y: int(x >= y),
    "select_n": lambda which, *cases: cases[which],
    "convert_element_type": lambda x: x,
    "clamp": lambda low, x, high: min(max(x, low), high),
}


def _folded(name: str, eqn: Any, known: list[int | None]) -> int | None:
    if name not in _FOLDS or any(value is None for value in known):
        return None
    return _FOLDS[name](*known)


def _barrier(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    return list(values)


def _constant(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    return [Value(iota=eqn.primitive.name == "iota", grid=True)] * len(eqn.outvars)


def _noise(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    return [Value(signal=True)] * len(eqn.outvars)


def _reduction(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axes = {int(axis) for axis in eqn.params.get("axes", eqn.params.get("dimensions"))}
    out = flags(values)
    if all(value.is_plain for value in values):
        return [out] * len(eqn.outvars)

    def left(dims: Dims) -> Dims | None:
        gone = [dim for i, dim in enumerate(dims) if i in axes]
        if own_axes(gone) or not own_axes(dims):
            return None
        return tuple(dim for i, dim in enumerate(dims) if i not in axes)

    views, products = [], []
    for value in values:
        for view in value.views:
            dims = left(view.dims)
            if dims is None:
                walk.end(view, "statistic")
            else:
                views.append(view._replace(dims=dims))
        for product in value.products:
            kept = [dim for i, dim in enumerate(product.dims) if i not in axes]
            if own_axes(kept):
                products.append(product._replace(dims=tuple(kept)))
    out = out._replace(views=tuple(views), products=tuple(products))
    return [out] * len(eqn.outvars)


def _running(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    _ends(walk, values, "statistic")
    return [flags(values)._replace(products=values[0].products)]


def _statistic(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    _ends(walk, values, "statistic")
    return [flags(values)] * len(eqn.outvars)


def _transform(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    _ends(walk, values, "element-wise")
    return [flags(values)] * len(eqn.outvars)


def _collective(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """Sums and copies between devices: the same axes, perhaps at another length."""
    found = []
    for value, var in zip(values, eqn.outvars, strict=False):
        rank = len(var.aval.shape)
        views = [v for v in value.views if len(v.dims) == rank]
        for view in value.views:
            if len(view.dims) != rank:
                walk.use(view, "unknown")
        shape = var.aval.shape
        views = [v._replace(dims=fitted(v.dims, shape)) for v in views]
        found.append(value._replace(views=tuple(views), products=()))
    return found


ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR | _OTHERS, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_RUNNING, _running),
    **dict.fromkeys(_COLLECTIVES, _collective),
    **dict.fromkeys(_NOISE, _noise),
    **dict.fromkeys(_names("iota axis_index create_token empty empty2"), _constant),
    **dict.fromkeys(("sort", "top_k", "approx_top_k"), _statistic),
    **dict.fromkeys(("optimization_barrier", "device_put"), _barrier),
    "fft": _transform,
}
