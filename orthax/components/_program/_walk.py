"""A walk through a program's jaxpr, equation by equation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Literal

from orthax.components._program._lines import library_paths, line_of
from orthax.components._program._uses import (
    DATA,
    Found,
    Product,
    Use,
    Value,
    View,
    constant,
)
from orthax.components._program._views import Piece, own_pieces


class Context(NamedTuple):
    """Where an equation stands: the line that called, and what it is within."""

    where: str = ""
    depth: int = 0
    backward: bool = False


class Walk:
    """A walk through a program: one rule for each primitive, one environment each."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...] | None],
        rule_of: Callable[[Any], "Rule"],
        captured: bool,
    ):
        self.shapes = shapes
        self.captured = captured
        self.rule_of = rule_of
        self.found = [Found() for _ in shapes]
        self.consumed: set[tuple[Any, ...]] = set()
        self.eqn: Any = None
        self.at = Context()
        self.libraries = library_paths()

    # --- what is recorded -------------------------------------------------------------

    def where(self) -> str:
        """Return the user's own line of the equation at hand."""
        return line_of(self.eqn, self.libraries) or self.at.where

    def use(self, view: View, kind: str, **more: Any) -> None:
        """Record a use of a parameter by the equation at hand."""
        more.setdefault("primitive", self.eqn.primitive.name if self.eqn else "output")
        if "where" not in more:
            more["where"] = self.where() if self.eqn else ""
        weak = more.pop("weak", False) or self.at.backward
        self.found[view.leaf].uses[Use(view.leaf, kind, weak=weak, **more)] = None

    def end(self, view: View, kind: str) -> None:
        """Record that a parameter is used, and not followed any further."""
        if view.scaled:
            return
        if view.inner:
            self._end_composite(view)
        elif view.looked:
            primitive, where = view.looked
            self.use(view, "look-up", primitive=primitive, where=where)
        else:
            self.use(view, kind)

    def _end_composite(self, view: View) -> None:
        primitive, where = view.product
        own = tuple(p for p in own_pieces(view.dims) if p not in view.batch)
        rows, columns = view.inner[0], sum(view.inner[1:], ()) + own
        made: dict[str, Any] = {"primitive": primitive, "where": where}
        if columns:
            fixed = (*view.fixed, *view.batch)
            made |= {"rows": rows, "columns": columns, "fixed": fixed}
        self.use(view, "matrix" if columns else "vector", weak=True, **made)

    # --- the walk ---------------------------------------------------------------------

    def call(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
        """Return what a jaxpr gives for these values, within the equation at hand."""
        consts: list[Value] = []
        if isinstance(jaxpr, ClosedJaxpr):
            consts = [self.constant(c) for c in jaxpr.consts]
            jaxpr = jaxpr.jaxpr
        consts += [Value()] * (len(jaxpr.constvars) - len(consts))
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= dict(zip(jaxpr.invars, values, strict=True))
        outer_eqn, outer = self.eqn, self.at
        where = self.where() if outer_eqn is not None else ""
        for eqn in jaxpr.eqns:
            self.eqn = eqn
            self.at = _within(outer, where, eqn)
            read = [self.read(env, atom) for atom in eqn.invars]
            if any(value.products for value in read):
                read = self._left(read)
            out = self.rule_of(eqn)(self, eqn, read)
            env.update(zip(eqn.outvars, out, strict=True))
        self.eqn, self.at = outer_eqn, outer
        return [self.read(env, atom) for atom in jaxpr.outvars]

    def read(self, env: dict[Any, Value], atom: Any) -> Value:
        """Return what is known of an operand."""
        return self.constant(atom.val) if isinstance(atom, Literal) else env[atom]

    def constant(self, array: Any) -> Value:
        """Return what is known of an array that the program holds itself."""
        found = constant(array)
        return Value(DATA) if self.captured and found.signal else found

    def _left(self, values: list[Value]) -> list[Value]:
        """Return the values, those noted that have left a `vmap` since they were made.

        What stands first where a product leaves is the mapped axis, unless said
        otherwise by `out_axes`.
        """
        return [
            value._replace(products=tuple(map(self.leave, value.products)))
            if any(p.depth > self.at.depth for p in value.products)
            else value
            for value in values
        ]

    def leave(self, product: Product) -> Product:
        """Return a product at the depth at hand."""
        if product.depth <= self.at.depth:
            return product
        for dim in product.dims[: product.depth - self.at.depth]:
            if len(dim.pieces) != 1 or dim.pieces[0].axis is None:
                break
            self.stack(product, dim.pieces[0], "vmap")
        return product._replace(depth=self.at.depth)

    def stack(self, product: Product, piece: Piece, why: str) -> None:
        """Record that an axis of its own among the columns keeps matrices apart."""
        if piece.size == self.shapes[product.leaf][piece.axis]:
            self.found[product.leaf].stacked.setdefault(piece.axis, why)


def _within(outer: Context, where: str, eqn: Any) -> Context:
    stack = str(getattr(eqn.source_info, "name_stack", ""))
    if not stack:
        return Context(where, outer.depth, outer.backward)
    backward = outer.backward or "transpose(" in stack
    return Context(where, outer.depth + stack.count("vmap("), backward)


Rule = Callable[[Walk, Any, list[Value]], list[Value]]
