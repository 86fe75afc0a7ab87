"""What each primitive does to the parameters that can be seen in its operands."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from orthax.components._program._control import CONTROL, call, callee
from orthax.components._program._convolutions import CONVOLUTIONS
from orthax.components._program._elementwise import ELEMENTWISE
from orthax.components._program._products import PRODUCTS
from orthax.components._program._shapes import SHAPES
from orthax.components._program._slices import SLICES
from orthax.components._program._uses import (
    CONSTANT,
    DATA,
    PARAMETER,
    Found,
    Use,
    Value,
    View,
)
from orthax.components._program._views import whole
from orthax.components._program._walk import Rule, Walk

_RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **SHAPES,
    **SLICES,
    **PRODUCTS,
    **CONVOLUTIONS,
    **CONTROL,
}


def rule_of(eqn: Any) -> Rule:
    """Return what to do with an equation."""
    name = eqn.primitive.name
    found = _RULES.get(name)
    if found is not None:
        return found
    return call if callee(eqn) is not None else _unknown


def _unknown(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    for value in values:
        for view in value.views:
            if not view.scaled:
                walk.use(view, "unknown")
    kind = DATA if any(value.kind for value in values) else CONSTANT
    return [Value(kind)] * len(eqn.outvars)


def uses_of(
    jaxpr: Any, shapes: Sequence[tuple[int, ...] | None], captured: bool
) -> list[Found]:
    """Return what a program does with each of its first inputs.

    Args:
      jaxpr: a closed jaxpr; its first inputs are the parameters, the others data.
      shapes: a shape for each parameter, None for those not to be followed.
      captured: whether arrays that the program holds itself are its data.
    """
    walk = Walk(shapes, rule_of, captured)
    values = [
        Value(PARAMETER, (View(i, whole(shape)),)) if shape else Value(PARAMETER)
        for i, shape in enumerate(shapes)
    ]
    values += [Value(DATA)] * (len(jaxpr.jaxpr.invars) - len(values))
    out = walk.call(jaxpr, values)
    for value in out:
        for product in value.products:
            walk.leave(product)
        for view in value.views:
            walk.end(view, "returned")
    return [_turned(own, walk.found) for own in walk.found]


def _turned(own: Found, found: Sequence[Found]) -> Found:
    """Return uses with the rows where another parameter meets them, if that is data.

    Learned queries are parameters that act as data: they are also added to data.
    """

    def acts(leaf: int) -> bool:
        uses = found[leaf].uses
        return any(use.kind in ("element-wise", "scaled") for use in uses)

    def turn(use: Use) -> Use:
        if use.kind == "matrix" and any(map(acts, use.partners)):
            return use._replace(rows=use.columns, columns=use.rows)
        return use

    return dataclasses.replace(own, uses=dict.fromkeys(map(turn, own.uses)))
