"""What each primitive does to the parameters that can be seen in its operands."""

from collections.abc import Callable, Sequence
from typing import Any

from orthax.components._products import PRODUCTS
from orthax.components._shapes import SHAPES, moved
from orthax.components._uses import (
    CONSTANT,
    DATA,
    PARAMETER,
    Product,
    Rule,
    Value,
    View,
    Walk,
)
from orthax.components._views import (
    Dim,
    Dims,
    fitted,
    foreign,
    is_spread,
    own_axes,
    spread,
)


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
# Their jaxprs work on references, or on part of their operands.
_OPAQUE = _names("pallas_call core_map run_state pure_callback io_callback")
_LIMIT = 8


def rule_of(eqn: Any) -> Rule:
    """Return what to do with an equation."""
    name = eqn.primitive.name
    found = _RULES.get(name)
    if found is not None:
        return found
    return _call if _callee(eqn) is not None else _unknown


def _flags(values: Sequence[Value]) -> Value:
    kind = max((value.kind for value in values), default=CONSTANT)
    grid = any(value.grid for value in values)
    return Value(kind, signal=any(value.signal for value in values), grid=grid)


def _ends(walk: Walk, values: Sequence[Value], kind: str) -> None:
    for value in values:
        for view in value.views:
            walk.end(view, kind)


# --- element by element ---------------------------------------------------------------


def _elementwise(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    out = _flags(values)
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


# --- reductions -----------------------------------------------------------------------


def _reduction(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    axes = {int(axis) for axis in eqn.params.get("axes", eqn.params.get("dimensions"))}
    out = _flags(values)
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
    return [_flags(values)._replace(products=values[0].products)]


def _statistic(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    _ends(walk, values, "statistic")
    return [_flags(values)] * len(eqn.outvars)


def _transform(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    _ends(walk, values, "element-wise")
    return [_flags(values)] * len(eqn.outvars)


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


def _unknown(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    for value in values:
        for view in value.views:
            if not view.scaled:
                walk.use(view, "unknown")
    kind = DATA if any(value.kind for value in values) else CONSTANT
    return [Value(kind)] * len(eqn.outvars)


# --- calls and loops ------------------------------------------------------------------


def _callee(eqn: Any) -> Any:
    """Return the one jaxpr that an equation runs on all of its operands, if it does."""
    if eqn.primitive.name in _OPAQUE:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        inner = eqn.params.get(key)
        open_ = getattr(inner, "jaxpr", inner)
        if hasattr(open_, "invars") and len(open_.invars) == len(eqn.invars):
            ranks = [len(getattr(v.aval, "shape", ())) for v in open_.invars]
            given = [len(getattr(v.aval, "shape", ())) for v in eqn.invars]
            if ranks == given and len(open_.outvars) == len(eqn.outvars):
                return inner
    return None


def _call(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    inner = _callee(eqn)
    if inner is None:
        return _unknown(walk, eqn, values)
    open_ = getattr(inner, "jaxpr", inner)
    values = [_sized(v, var) for v, var in zip(values, open_.invars, strict=True)]
    out = walk.call(inner, values)
    return [_sized(v, var) for v, var in zip(out, eqn.outvars, strict=True)]


def _sized(value: Value, var: Any) -> Value:
    """Return a value at the lengths of a variable, which `shard_map` changes."""
    if value.is_plain:
        return value
    shape = var.aval.shape
    views = tuple(v._replace(dims=fitted(v.dims, shape)) for v in value.views)
    products = tuple(p._replace(dims=fitted(p.dims, shape)) for p in value.products)
    return value._replace(views=views, products=products)


def _joined(values: Sequence[Value]) -> Value:
    """Return what holds of an array that is one of several."""
    first = values[0]
    if all(value == first for value in values):
        return first
    out = _flags(values)
    views = {view: None for value in values for view in value.views}
    products = {product: None for value in values for product in value.products}
    hot = all(value.hot for value in values)
    return out._replace(views=tuple(views), products=tuple(products), hot=hot)


def _carried(
    body: Callable[[list[Value]], list[Value]], carry: list[Value], count: int
) -> list[Value]:
    """Return what a loop's body gives, when its carry has come to rest."""
    carry = [value._replace(known=None, products=()) for value in carry]
    for _ in range(8):
        out = body(carry)
        back = [value._replace(known=None, products=()) for value in out[:count]]
        joint = [_joined(pair) for pair in zip(carry, back, strict=True)]
        if joint == carry:
            break
        carry = joint
    return [*carry, *out[count:]]


def _scan(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    consts, count = eqn.params["num_consts"], eqn.params["num_carry"]
    n = eqn.params["length"]
    xs = [_row(value) for value in values[consts + count :]]

    def body(carry: list[Value]) -> list[Value]:
        return walk.call(eqn.params["jaxpr"], [*values[:consts], *carry, *xs])

    out = _carried(body, values[consts : consts + count], count)
    return out[:count] + [_stacked(value, n) for value in out[count:]]


def _row(value: Value) -> Value:
    """Return what a loop sees of an array at each of its steps."""
    views = tuple(
        v._replace(dims=v.dims[1:], fixed=(*v.fixed, *v.dims[0].pieces))
        for v in value.views
    )
    products = tuple(p._replace(dims=p.dims[1:]) for p in value.products)
    products = tuple(p for p in products if own_axes(p.dims))
    return value._replace(views=views, products=products, iota=False, known=None)


def _stacked(value: Value, n: int) -> Value:
    """Return what a loop's steps make together."""
    views = []
    for view in value.views:
        dim, fixed = foreign(n), view.fixed
        if fixed and fixed[-1].size == n:  # what the loop took apart
            dim, fixed = Dim(0, n, fixed[-1:]), fixed[:-1]
        views.append(view._replace(dims=(dim, *view.dims), fixed=fixed))
    products = [p._replace(dims=(foreign(n), *p.dims)) for p in value.products]
    return value._replace(views=tuple(views), products=tuple(products), known=None)


def _while(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = values[a + b :]

    def body(carry: list[Value]) -> list[Value]:
        walk.call(eqn.params["cond_jaxpr"], [*values[:a], *carry])
        return walk.call(eqn.params["body_jaxpr"], [*values[a : a + b], *carry])

    return _carried(body, carry, len(carry))


def _cond(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    branches = [walk.call(branch, values[1:]) for branch in eqn.params["branches"]]
    out = [_joined(parts) for parts in zip(*branches, strict=True)]
    if values[0].kind != DATA:
        return out
    return [v._replace(kind=DATA) if v.is_plain else v for v in out]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR | _OTHERS, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_RUNNING, _running),
    **dict.fromkeys(_COLLECTIVES, _collective),
    **dict.fromkeys(_NOISE, _noise),
    **dict.fromkeys(
        ("iota", "axis_index", "create_token", "empty", "empty2"), _constant
    ),
    **dict.fromkeys(("sort", "top_k", "approx_top_k"), _statistic),
    **dict.fromkeys(("optimization_barrier", "device_put"), _barrier),
    **dict.fromkeys(("fft",), _transform),
    **SHAPES,
    **PRODUCTS,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
__all__ = ["PARAMETER", "rule_of"]
