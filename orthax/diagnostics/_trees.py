"""Leaves by their paths, and two trees that must have the same ones."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from orthax import components
from orthax.internal.components import decide_all

_EVERY_LEAF = components.ByPath([("", None)])
_SHOWN = 5


def floating_leaves(tree: Any) -> dict[str, Any]:
    """Return the floating and complex leaves of a tree, of every rank, by path."""
    leaves = decide_all(tree, _EVERY_LEAF)
    return by_path((leaf.path, leaf.value) for leaf in leaves if _is_floating(leaf))


def by_path(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dictionary, or raise if a path comes twice."""
    found: dict[str, Any] = {}
    for path, value in pairs:
        if path in found:
            raise ValueError(
                f"Two leaves have the path '{path}': rename one, or pass the sub-trees "
                "one at a time."
            )
        found[path] = value
    return found


def check_same_leaves(
    name: str, leaves: dict[str, Any], other_name: str, others: dict[str, Any]
) -> None:
    """Raise unless two trees have the same leaves, in path and shape."""
    pairs = ((name, leaves, other_name, others), (other_name, others, name, leaves))
    for here, present, there, absent in pairs:
        missing = [f"'{path}'" for path in present if path not in absent]
        if missing:
            more = (
                "" if len(missing) <= _SHOWN else f" and {len(missing) - _SHOWN} more"
            )
            raise ValueError(
                f"`{here}` has leaves that `{there}` lacks: "
                f"{', '.join(missing[:_SHOWN])}{more}. Pass two trees of the same "
                "structure, such as the input and the output of one `tx.update`."
            )
    for path, value in leaves.items():
        if jnp.shape(value) != jnp.shape(others[path]):
            raise ValueError(
                f"Leaf '{path}' has shape {jnp.shape(value)} in `{name}`, but "
                f"{jnp.shape(others[path])} in `{other_name}`: pass two trees of the "
                "same parameters."
            )


def _is_floating(leaf: Any) -> bool:
    value = leaf.value
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.inexact)
