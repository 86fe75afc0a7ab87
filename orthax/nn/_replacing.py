"""A walk over an NNX model that puts modules in the place of others."""

from collections.abc import Callable, MutableMapping, MutableSequence
from typing import Any

import jax
from flax import nnx

# Gives the module for the place of another (itself, if it stays), or None to have the
# modules inside it looked at.
Change = Callable[[str, nnx.Module], nnx.Module | None]


def replaced(node: Any, change: Change) -> Any:
    """Return the model, changed in place, with `change(path, module)` for its modules.

    A module that is found in several places is changed once, by the path that comes
    first.
    """
    return _replaced(node, "", change, {})


def _replaced(node: Any, path: str, change: Change, done: dict[int, Any]) -> Any:
    if not isinstance(node, nnx.Module):
        return _in_container(node, path, change, done)
    if id(node) in done:
        return done[id(node)]
    new = change(path, node)
    # Before looking inside: there may be cycles.
    done[id(node)] = node if new is None else new
    if new is not None:
        return new
    for name, child in _attributes(node):
        found = _replaced(child, _below(path, name), change, done)
        if found is child:
            continue
        if isinstance(node, MutableSequence | MutableMapping):
            node[name] = found
        else:
            is_module = isinstance(found, nnx.Module)
            setattr(node, name, found if is_module else nnx.data(found))
    return node


def _attributes(node: nnx.Module) -> list[tuple[Any, Any]]:
    if isinstance(node, MutableSequence):
        return list(enumerate(node))
    if isinstance(node, MutableMapping):
        return list(node.items())
    return [pair for pair in vars(node).items() if not pair[0].startswith("_pytree__")]


def _in_container(node: Any, path: str, change: Change, done: dict[int, Any]) -> Any:
    """Return a list, tuple, dict or other tree: itself, if nothing changed in it."""
    leaf = lambda x: isinstance(x, nnx.Module | nnx.Variable)  # noqa: E731
    pairs, tree = jax.tree_util.tree_flatten_with_path(node, is_leaf=leaf)
    new = [
        _replaced(x, _below(path, *keys), change, done)
        if isinstance(x, nnx.Module)
        else x
        for keys, x in pairs
    ]
    if all(x is y for x, (_, y) in zip(new, pairs, strict=True)):
        return node
    return jax.tree.unflatten(tree, new)


def _below(path: str, *keys: Any) -> str:
    names = (
        jax.tree_util.keystr((key,), simple=True)
        if not isinstance(key, str | int)
        else str(key)
        for key in keys
    )
    return "/".join((path, *names) if path else names)
