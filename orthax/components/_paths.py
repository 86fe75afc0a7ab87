"""Paths of leaves as strings: what rules are asked by."""

from typing import Any

import jax


def path_string(path: tuple[Any, ...]) -> str:
    """Return a path as `"blocks/0/kernel"`, the same whatever the tree is made of.

    Args:
      path: keys, from `jax.tree_util.tree_flatten_with_path`.

    Returns:
      The path without the last attribute `value` that NNX variables and Linen's boxes
      add in some trees (those that `tx.init` is given) and not in others (those that
      `tx.update` is given).

    Example:
      >>> import jax
      >>> from orthax.internal.components import path_string
      >>> [(path, _)], _ = jax.tree_util.tree_flatten_with_path({"a": [1.0]})
      >>> path_string(path)
      'a/0'
    """
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        path = path[:-1]
    return "/".join(_key_string(key) for key in path)


def _key_string(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
