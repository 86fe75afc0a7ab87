"""The rule that reads a program: which axes its products contract."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from orthax.components._by_name import check_attention
from orthax.components._matricisation import Matricisation
from orthax.components._program import uses_of
from orthax.components._readings import Unread, read
from orthax.components._rule import Decision, checked_patterns, match, not_found
from orthax.components._tree import can_be_cut, path_string

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FromFunction:
    """The rule that `from_function` makes: what a program does with each leaf.

    Plain data, which holds nothing of the program. `print` shows it as a table.

    Attributes:
      decisions: path, shape and decision of every leaf that can be cut; a text in place
        of the decision says why there is none.
      overrides: patterns that come first, as in `ByPath`.

    Raises:
      ValueError: from `resolve`, for a leaf that was not among the parameters, or had
        another shape, or whose axes the program does not tell.
    """

    decisions: tuple[tuple[str, Shape, Decision | str], ...] = dataclasses.field(
        repr=False
    )
    overrides: tuple[tuple[str, Matricisation | None], ...] = ()

    # An override that matches nothing is a mistake.
    unmatched: ClassVar[str] = "raise"

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the cut of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        override = match(self.overrides, path, leaf)
        if override is not None:
            return override
        if path not in self._by_path:
            raise ValueError(
                f"The parameters given to from_function have no leaf '{path}': build "
                "the rule from the parameters that are trained, or add the leaf to "
                "`overrides`."
            )
        shape, decision = self._by_path[path]
        if shape != tuple(leaf.shape):
            raise ValueError(
                f"Leaf '{path}' of shape {tuple(leaf.shape)} had the shape {shape} "
                "among the parameters given to from_function: build the rule from the "
                "parameters that are trained."
            )
        if isinstance(decision, str):
            raise ValueError(f"Leaf '{path}' of shape {shape} {decision}")
        return decision

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return which overrides are found in none of the paths, for `explain`."""
        return not_found(self.overrides, paths)

    def __str__(self) -> str:
        """Return the table: path, shape, cut and reason of every leaf."""
        rows = []
        for path, shape, _ in self.decisions:
            try:
                decision = self.decide(path, jax.ShapeDtypeStruct(shape, "float32"))
            except ValueError as error:
                rows.append((path, str(shape), "raises", str(error)))
                continue
            cut = "left alone" if decision.cut is None else str(decision.cut)
            rows.append((path, str(shape), cut, decision.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        lines = [
            "  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip()
            for row in rows
        ]
        return "\n".join([f"{type(self).__name__}:", *lines])

    @functools.cached_property
    def _by_path(self) -> dict[str, tuple[Shape, Decision | str]]:
        return {path: (shape, decision) for path, shape, decision in self.decisions}


def from_function(
    apply: Callable[..., Any],
    params: Any,
    *inputs: Any,
    attention: str = "whole",
    blocks: bool = True,
    unused: str | None = "raise",
    overrides: Sequence[tuple[str, Matricisation | None]] = (),
    **keywords: Any,
) -> FromFunction:
    """Return the rule that matricises the leaves of `params` as a program uses them.

    The program is traced on shapes without computing anything, and every leaf is
    followed to the products that use it, through reshapes, slices, loops and
    transformations. Axes that are contracted with the data are rows, axes that remain
    are columns, all others (scanned, mapped, experts) are batch axes. Names do not
    matter, so any framework will do, or none. Look-ups, depthwise convolutions and
    leaves that are used elementwise are left alone.

    Args:
      apply: called as `apply(params, *inputs, **keywords)`: a forward pass or a loss.
      params: the parameters, in any tree; arrays or `jax.ShapeDtypeStruct`s.
      *inputs: the other arguments of `apply`; arrays likewise, anything else unchanged.
      attention: `"whole"`, `"per_head"` or `"heads"`, as in `ByName`, wherever the
        columns or the rows of one product are several axes, (D, H, K) or (H, K, D).
      blocks: whether a kernel is divided into blocks if the program splits its product
        along the columns (fused query, key and value; gates). False: one matrix.
      unused: `"raise"` for leaves that the program does not use, or None to leave them
        alone.
      overrides: pairs of a regular expression and a `Matricisation` or None, as in
        `ByPath`; they take precedence over the program.
      **keywords: keyword arguments of `apply`.

    Returns:
      A rule for trees with the paths and shapes of `params`. For a leaf that it cannot
      decide (used in two ways, or by an unknown primitive) the rule raises when it is
      applied.

    Raises:
      TypeError: if `apply` is not a function, or `params` contains no array.
      ValueError: for an unknown `attention` or `unused`, or malformed overrides.
      Whatever `apply` raises, with a note.

    Limits:
      Parts of a product that are concatenated to its full width again are not blocks:
      this distinguishes the halves of a rotary embedding from those of a gated unit.
      Neither are parts within each of several heads. A product that is written as a
      multiplication and a sum is not recognised. Experts that read one input in a
      single layer look like heads, unless they are under `vmap`.

    Example:
      >>> import jax
      >>> from orthax import components
      >>> def apply(params, x):
      ...     gate, value = jax.numpy.split(x @ params["up"], 2, axis=-1)
      ...     return (jax.nn.silu(gate) * value) @ params["down"].T
      >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
      >>> params = {"up": shape(8, 64), "down": shape(8, 32)}
      >>> rule = components.from_function(apply, params, shape(2, 8))
      >>> rule.resolve("up", params["up"]), rule.resolve("down", params["down"])
      (Matricisation((0,), (1,), blocks=2), Matricisation((1,), (0,)))
    """
    check_attention(attention)
    if unused not in ("raise", None):
        raise ValueError(f'`unused` must be "raise" or None, got {unused!r}.')
    overrides = checked_patterns(overrides)
    if not callable(apply) or isinstance(apply, type):
        raise TypeError(
            f"`apply` must be a function of the parameters, got {apply!r}: write "
            "from_function(model.apply, params, x), or a lambda that calls the model."
        )
    paths, leaves = _leaves(params)
    jaxpr = _traced(apply, params, inputs, keywords)
    shapes = [tuple(leaf.shape) if can_be_cut(leaf) else None for leaf in leaves]
    captured = len(jaxpr.jaxpr.invars) == len(leaves)
    found = uses_of(jaxpr, shapes, captured)
    decisions = tuple(
        (path, shape, _decision(read(own, shape, attention, blocks), path, unused))
        for path, shape, own in zip(paths, shapes, found, strict=True)
        if shape is not None
    )
    return FromFunction(decisions, overrides)


def _decision(
    found: Decision | Unread, path: str, unused: str | None
) -> Decision | str:
    if isinstance(found, Decision):
        return found
    if found.unused and unused is None:
        return Decision(None, "not used by the program")
    name = f"'^{re.escape(path)}$'"
    advice = f"overrides=[({name}, Matricisation(rows=..., columns=...))]"
    if found.unused:
        return (
            f"{found.problem}: pass unused=None to leave such leaves alone, or say "
            f"what it is with {advice}."
        )
    return f"{found.problem}. Say what it is with {advice}, or None to leave it alone."


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) or (
        isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")
    )


def _leaves(params: Any) -> tuple[list[str], list[Any]]:
    """Return the paths of the arrays of a tree, and the arrays."""
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    pairs = [(path_string(path), x) for path, x in pairs if _is_array(x)]
    if not pairs:
        raise TypeError(
            f"`params` of type {type(params).__name__} holds no array: from_function "
            "is called as from_function(apply, params, *inputs)."
        )
    return [path for path, _ in pairs], [leaf for _, leaf in pairs]


def _traced(apply: Callable[..., Any], *arguments: Any) -> Any:
    """Return the jaxpr of a call; its inputs are the arrays among the arguments."""
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in arrays]

    def call(*values: Any) -> list[Any]:
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        params, inputs, keywords = jax.tree.unflatten(tree, filled)
        try:
            out = apply(params, *inputs, **keywords)
        except Exception as error:
            error.add_note(_note(params, inputs, keywords))
            raise
        return [leaf for leaf in jax.tree.leaves(out) if _is_array(leaf)]

    return jax.make_jaxpr(call)(*shapes)


def _note(params: Any, inputs: Any, keywords: Any) -> str:
    shown = [_shown(x) for x in inputs]
    shown += [f"{name}={_shown(x)}" for name, x in keywords.items()]
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [repr(path_string(path)) for path, _ in pairs]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return (
        "components.from_function called apply(params"
        + "".join(f", {each}" for each in shown)
        + f") on shapes when this was raised; params has the leaves "
        f"{', '.join(paths[:3])}{more}."
    )


def _shown(x: Any) -> str:
    arrays = [leaf for leaf in jax.tree.leaves(x) if _is_array(leaf)]
    if len(arrays) == 1 and _is_array(x):
        return f"{x.dtype}{list(x.shape)}"
    return f"{type(x).__name__} of {len(arrays)} arrays" if arrays else repr(x)[:40]
