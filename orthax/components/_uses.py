"""What a traced program does with its parameters, as data: a walk through its jaxpr.

The walk knows shapes alone. It says which axes of a parameter a product contracts, and
how the product's columns are taken apart; what follows from it is for a rule to say.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Literal

from orthax.components._views import Dims, Piece, own_pieces, whole

CONSTANT, PARAMETER, DATA = range(3)
_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "haiku", "optax", "jaxtyping", "jmp")
_LIBRARIES += ("beartype", "einops", "chex", "quax", "orthax")
_CALLS = ("_run_python_pjit", "_python_pjit_helper", "cache_miss")
_IN_BINDS = ("pjit.py", "core.py", "partial_eval.py", "source_info_util.py")
_IN_BINDS += ("traceback_util.py", "batching.py", "ad.py")


class View(NamedTuple):
    """A parameter, or part of it, seen as the array at hand.

    Attributes:
      leaf: which parameter.
      dims: where the array's axes come from.
      fixed: pieces at one position that a loop or an index counts.
      inner: for each product with another parameter before, what it contracted.
      product: the primitive of these products, and its line.
      scaled: whether the values depend on data by now; 2 if something was added.
      looked: where rows were looked up.
      resized: whether a constant was among these products.
      batch: pieces among `dims` that were a batch in these products.
      partners: the other parameters of these products.
    """

    leaf: int
    dims: Dims
    fixed: tuple[Piece, ...] = ()
    inner: tuple[tuple[Piece, ...], ...] = ()
    product: tuple[str, str] = ("", "")
    scaled: int = 0
    looked: tuple[str, str] | None = None
    resized: bool = False
    batch: tuple[Piece, ...] = ()
    partners: tuple[int, ...] = ()


class Product(NamedTuple):
    """Activations that a parameter has just made, and their columns."""

    leaf: int
    dims: Dims
    use: tuple[Any, ...]
    depth: int
    part: bool = False


class Value(NamedTuple):
    """What is known of an array.

    Attributes:
      kind: a constant, made of parameters, or data.
      views: the parameters that can be seen in it.
      products: the parameters that made it.
      iota: whether it counts positions.
      grid: whether it was made from what does.
      hot: whether it is one-hot.
      signal: whether a constant stands for data (noise, sinusoids, captured arrays).
      known: the value of an integer scalar.
    """

    kind: int = CONSTANT
    views: tuple[View, ...] = ()
    products: tuple[Product, ...] = ()
    iota: bool = False
    grid: bool = False
    hot: bool = False
    signal: bool = False
    known: int | None = None

    @property
    def is_plain(self) -> bool:
        """Return whether no parameter can be followed in it."""
        return not self.views and not self.products

    @property
    def acts(self) -> bool:
        """Return whether it is what a parameter is multiplied with, not another one."""
        constant = self.kind == CONSTANT and (self.signal or not self.grid)
        return self.kind == DATA or constant


class Use(NamedTuple):
    """One use of a parameter.

    Attributes:
      leaf: which parameter.
      kind: "matrix", or "look-up", "element-wise", "scaled" (element-wise, but what
        comes of it may be used as a matrix), "statistic", "vector", "depthwise",
        "returned", "unknown".
      primitive: the name of the primitive.
      where: file and line, "" if not known.
      rows, columns, fixed: pieces of the parameter that a matrix has there.
      groups: whether the columns' batch pieces are a convolution's groups.
      spatial: the axes of a convolution's taps.
      weak: whether it counts only if there is no other (products of parameters alone,
        and backward passes).
      times: how many vectors it is applied to.
      partners: the parameters that it was multiplied with before.
    """

    leaf: int
    kind: str
    primitive: str
    where: str
    rows: tuple[Piece, ...] = ()
    columns: tuple[Piece, ...] = ()
    fixed: tuple[Piece, ...] = ()
    groups: bool = False
    spatial: tuple[int, ...] = ()
    weak: bool = False
    times: int = 1
    partners: tuple[int, ...] = ()


class Part(NamedTuple):
    """A contiguous range of a column axis that was cut out of a product."""

    axis: int
    lo: int
    hi: int
    of: tuple[int, int]


@dataclasses.dataclass
class Found:
    """All that a program says of one parameter.

    Attributes:
      uses: in the order of the program.
      parts: what was cut out of its products.
      joined: ranges whose parts were put together again.
      stacked: column axes that later products keep apart, one matrix for each position.
      summed: whether two of its products were added, as those of parts of its rows.
    """

    uses: dict[Use, None] = dataclasses.field(default_factory=dict)
    parts: dict[Part, None] = dataclasses.field(default_factory=dict)
    joined: set[tuple[int, int, int]] = dataclasses.field(default_factory=set)
    stacked: dict[int, str] = dataclasses.field(default_factory=dict)
    summed: bool = False


class Context(NamedTuple):
    """Where an equation stands: the line that called, and what it is within."""

    where: str = ""
    depth: int = 0
    backward: bool = False


class Walk:
    """A walk through a program: one rule for each primitive, one environment each."""

    def __init__(self, shapes: Sequence[tuple[int, ...] | None]):
        self.shapes = shapes
        self.found = [Found() for _ in shapes]
        self.consumed: set[tuple[Any, ...]] = set()
        self.eqn: Any = None
        self.at = Context()
        self.libraries = _library_paths()

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
        from orthax.components._primitives import rule_of

        consts: list[Value] = []
        if isinstance(jaxpr, ClosedJaxpr):
            consts = [constant(c) for c in jaxpr.consts]
            jaxpr = jaxpr.jaxpr
        consts += [Value()] * (len(jaxpr.constvars) - len(consts))
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= dict(zip(jaxpr.invars, values, strict=True))
        outer_eqn, outer = self.eqn, self.at
        where = self.where() if outer_eqn is not None else ""
        for eqn in jaxpr.eqns:
            self.eqn = eqn
            self.at = _within(outer, where, eqn)
            read = [_read(env, atom) for atom in eqn.invars]
            if any(value.products for value in read):
                read = self._left(read)
            out = rule_of(eqn)(self, eqn, read)
            env.update(zip(eqn.outvars, out, strict=True))
        self.eqn, self.at = outer_eqn, outer
        return [_read(env, atom) for atom in jaxpr.outvars]

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


def uses_of(
    jaxpr: Any, shapes: Sequence[tuple[int, ...] | None], captured: bool
) -> list[Found]:
    """Return what a program does with each of its first inputs.

    Args:
      jaxpr: a closed jaxpr; its first inputs are the parameters, the others data.
      shapes: a shape for each parameter, None for those not to be followed.
      captured: whether arrays that the program holds itself are its data.
    """
    walk = Walk(shapes)
    values = [
        Value(PARAMETER, (View(i, whole(shape)),)) if shape else Value(PARAMETER)
        for i, shape in enumerate(shapes)
    ]
    values += [Value(DATA)] * (len(jaxpr.jaxpr.invars) - len(values))
    if captured:
        data = [Value(DATA)] * len(jaxpr.jaxpr.constvars)
        values, inner = [*data, *values], jaxpr.jaxpr
        inner = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
        out = walk.call(inner, values)
    else:
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


def constant(value: Any) -> Value:
    """Return what is known of an array that the program holds."""
    shape = getattr(value, "shape", ())
    kind = getattr(getattr(value, "dtype", type(value)), "kind", "")
    whole_number = isinstance(value, int) or (shape == () and kind in ("i", "u", "b"))
    return Value(signal=len(shape) > 0, known=int(value) if whole_number else None)


def _read(env: dict[Any, Value], atom: Any) -> Value:
    return constant(atom.val) if isinstance(atom, Literal) else env[atom]


def _within(outer: Context, where: str, eqn: Any) -> Context:
    stack = str(getattr(eqn.source_info, "name_stack", ""))
    if not stack:
        return Context(where, outer.depth, outer.backward)
    backward = outer.backward or "transpose(" in stack
    return Context(where, outer.depth + stack.count("vmap("), backward)


def _library_paths() -> tuple[str, ...]:
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    paths = [os.path.dirname(file) + os.sep for file in files if file]
    return (*paths, os.path.dirname(os.__file__) + os.sep + "contextlib", "<frozen")


def line_of(eqn: Any, libraries: tuple[str, ...]) -> str:
    """Return file and line of the user's code that made an equation, if it is known.

    What a library's own jitted function holds may have been traced for another call:
    its equations have no line, and that of the call stands for them.
    """
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    inside = False
    for frame in frames:
        name = getattr(frame, "file_name", "")
        if name.startswith(libraries):
            at_call = getattr(frame, "function_name", "").endswith(_CALLS)
            if name.endswith("pjit.py") and inside and not at_call:
                return ""
            inside = inside or not name.endswith(_IN_BINDS)
            continue
        line = getattr(frame, "line_num", None) or getattr(frame, "start_line", "?")
        return f"{os.path.basename(name)}:{line}"
    return ""


Rule = Callable[[Walk, Any, list[Value]], list[Value]]
