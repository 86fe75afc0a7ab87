"""The rule that asks the model: the leaves of NNX and Equinox modules, by path."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax

from orthax.components._by_name import ByName, check_attention
from orthax.components._layers import framework_of, is_array, leaves_of
from orthax.components._matricisation import Decision, Matricisation
from orthax.components._paths import path_string
from orthax.components._rule import checked_patterns, match, not_found
from orthax.components._stacked_axes import Sizes, stacked_axes

# What is said of a leaf: a decision, what is wrong with it, or nothing.
Said = Decision | str | None


@dataclasses.dataclass(frozen=True)
class FromModel:
    """The rule that `from_model` makes: what the modules of a model say of each leaf.

    Attributes:
      decisions: path, rank and decision of every leaf of the model; instead of it what
        is wrong, for a leaf whose sizes its layer does not explain, and None for leaves
        of modules that are not known, which `ByName` then decides.
      attention: how attention kernels are cut, as in `ByName`.
      overrides: patterns that come first, as in `ByPath`.

    Raises:
      ValueError: from `resolve`, for a leaf that the model does not have, or one of
        another rank than the model's.
    """

    decisions: tuple[tuple[str, int, Said], ...] = dataclasses.field(repr=False)
    attention: str = "whole"
    overrides: tuple[tuple[str, Matricisation | None], ...] = ()

    # An override that matches nothing is a mistake.
    unmatched: ClassVar[str] = "raise"

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the cut of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        found = match(self.overrides, path, leaf)
        if found is not None:
            return found
        if path not in self._by_path:
            raise ValueError(
                f"The model given to from_model has no leaf '{path}': build the rule "
                "from the model whose parameters are trained, or add the leaf to "
                "`overrides`."
            )
        rank, decision = self._by_path[path]
        if rank != len(leaf.shape):
            raise ValueError(
                f"Leaf '{path}' of shape {tuple(leaf.shape)} has rank {rank} in the "
                "model given to from_model: build the rule from the model as trained."
            )
        if isinstance(decision, str):
            raise ValueError(decision)
        if decision is not None:
            return decision
        try:
            found = ByName(attention=self.attention).decide(path, leaf)
        except ValueError:
            raise ValueError(
                f"Leaf '{path}' of shape {tuple(leaf.shape)} belongs to a module that "
                "from_model does not know, and its name does not tell its axes: "
                "components.from_function(apply, params, *inputs) reads them from the "
                f"program; or say what they are with overrides=[({re.escape(path)!r}, "
                "Matricisation(rows=..., columns=...))], or None to leave it alone."
            ) from None
        return found._replace(reason=f"{found.reason}; its module is not known")

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return which overrides are found in none of the paths, for `explain`."""
        return not_found(self.overrides, paths)

    @functools.cached_property
    def _by_path(self) -> dict[str, tuple[int, Said]]:
        return {path: (rank, decision) for path, rank, decision in self.decisions}


def from_model(
    model: Any,
    *,
    attention: str = "whole",
    overrides: Sequence[tuple[str, Matricisation | None]] = (),
) -> FromModel:
    """Return the rule for the leaves of an NNX or Equinox model.

    It reads the types and attributes of the modules, and so knows what names and shapes
    do not show: groups, fused gates, the axes of general linear layers, transposed
    kernels, embeddings, stacked layers. Depthwise kernels are left alone.

    Args:
      model: an `nnx.Module`, an `eqx.Module`, or containers of these.
      attention: `"whole"`, `"per_head"` or `"heads"`, as in `ByName`.
      overrides: pairs of a regular expression and a `Matricisation` or None, as in
        `ByPath`; they take precedence over the modules.

    Returns:
      A rule for trees whose paths are the model's: `nnx.state(model)`,
      `eqx.filter(model, ...)`, and gradients of these.

    Raises:
      TypeError: if `model` contains no NNX or Equinox module (Linen and Haiku modules
        do not contain their parameters: use `ByName`).
      ValueError: for an unknown `attention`, `"heads"` on Equinox attention, whose
        heads are fused with their features, or malformed overrides.

    Limits:
      Only layers of Flax and Equinox and their subclasses are known; parameters of
      other modules are decided by `ByName`. Stacked axes (a model made under `nnx.vmap`
      or `eqx.filter_vmap`) are found by the sizes of the layer; if these are ambiguous,
      the leaf raises and needs an override.

    Example:
      >>> import jax
      >>> import equinox as eqx
      >>> from orthax import components
      >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
      >>> cut = components.from_model(model).resolve("weight", model.weight)
      >>> cut.rows, cut.columns  # Equinox stores (out, in)
      ((1,), (0,))
    """
    check_attention(attention)
    found: dict[str, tuple[int, Said]] = {}
    overrides = checked_patterns(overrides)
    if isinstance(model, type) or not _walk(model, (), attention, found, ()):
        raise TypeError(_no_module(model))
    decisions = tuple((path, *entry) for path, entry in found.items())
    return FromModel(decisions, attention, overrides)


def _walk(
    node: Any,
    path: tuple[Any, ...],
    attention: str,
    found: dict[str, tuple[int, Said]],
    above: tuple[int, ...],
) -> bool:
    """Record the leaves below a node; return whether a module was among them."""
    if id(node) in above:  # NNX graphs may have cycles
        return False
    has_module = framework_of(type(node)) is not None
    if has_module:
        _record_layer(node, path_string(path), attention, found)
    for key, child in _children(node):
        below = (*path, key)
        if is_array(child):
            found.setdefault(path_string(below), (len(child.shape), None))
        else:
            module_below = _walk(child, below, attention, found, (*above, id(node)))
            has_module = module_below or has_module
    return has_module


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Return the children of a node with the keys that jax or NNX gives them."""
    if framework_of(type(node)) != "nnx":
        below = lambda child: child is not node  # noqa: E731
        pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=below)
        yield from ((path[0], child) for path, child in pairs if path)
    elif isinstance(node, Sequence):
        yield from ((jax.tree_util.SequenceKey(i), x) for i, x in enumerate(node))
    else:
        for name, child in vars(node).items():
            if not name.startswith("_pytree__"):
                yield jax.tree_util.DictKey(name), child


def _record_layer(
    node: Any,
    path: str,
    attention: str,
    found: dict[str, tuple[int, Said]],
) -> None:
    layer, leaves = leaves_of(node, attention)
    shapes, sizes = {}, {}
    for name, (expected, _) in leaves.items():
        leaf = node
        for part in name.split("/"):
            leaf = getattr(leaf, part, None)
        if is_array(leaf):
            shapes[name], sizes[name] = tuple(leaf.shape), expected
    stacked = stacked_axes(shapes, sizes)
    for name, shape in shapes.items():
        below = f"{path}/{name}" if path else name
        said = _said(leaves[name][1], layer, stacked[name], below, shape, sizes[name])
        # What a layer says of its parts goes before what they say themselves.
        found.setdefault(below, (len(shape), said))


def _said(
    cut: Matricisation | str,
    layer: str,
    stacked: list[tuple[int, ...]],
    path: str,
    shape: tuple[int, ...],
    sizes: Sizes,
) -> Decision | str:
    """Return the decision about a leaf, or what is wrong with its shape."""
    if isinstance(cut, str):
        return Decision(None, f"{layer}: {cut}")
    if len(stacked) == 1:
        own = [axis for axis in range(len(shape)) if axis not in stacked[0]]
        rows, columns, spatial = (
            tuple(own[axis] for axis in part)
            for part in (cut.rows, cut.columns, cut.spatial)
        )
        cut = dataclasses.replace(cut, rows=rows, columns=columns, spatial=spatial)
        return Decision(cut, layer)
    why = "does not tell which of its axes are stacked" if stacked else "does not fit"
    return (
        f"Leaf '{path}' of shape {shape} {why}: its layer, a {layer}, says "
        f"{sizes}. components.from_function(apply, params, *inputs) reads the axes "
        "from the program; or say what they are with overrides="
        f"[({re.escape(path)!r}, Matricisation(rows=..., columns=...))]."
    )


def _no_module(model: Any) -> str:
    cls = model if isinstance(model, type) else type(model)
    kind = f"{cls.__module__}.{cls.__name__}"
    if isinstance(model, type):
        return f"from_model was given the class {kind}: give it a model, an instance."
    if kind.startswith("haiku") or any(
        base.__module__.startswith("flax.linen") for base in cls.__mro__
    ):
        return (
            f"from_model was given a {kind}: Linen and Haiku modules do not hold their "
            "parameters, so their axes cannot be read off them. Use "
            "components.ByName(...) on the parameters."
        )
    return (
        f"from_model needs an NNX or Equinox module, or containers of them, got {kind}."
        " For a tree of arrays use components.ByName() or components.ByPath([...])."
    )
