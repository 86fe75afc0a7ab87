"""Calls, loops and branches."""

from collections.abc import Callable, Sequence
from typing import Any

from orthax.components._program._elementwise import flags
from orthax.components._program._uses import DATA, Value
from orthax.components._program._views import Dim, fitted, foreign, own_axes
from orthax.components._program._walk import Rule, Walk

# Their jaxprs work on references, or on part of their operands.
_OPAQUE = ("pallas_call", "core_map", "run_state", "pure_callback", "io_callback")


def callee(eqn: Any) -> Any:
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


def call(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """Return what a function gives that a program calls."""
    inner = callee(eqn)
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
    out = flags(values)
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


CONTROL: dict[str, Rule] = {"scan": _scan, "while": _while, "cond": _cond}
