"""Transformations of a part of a tree, with states that Flax can store."""

from collections.abc import Callable
from typing import Any

import jax
import optax


class Hidden(optax.MaskedNode):
    """Placeholder of a masked leaf: an `optax.MaskedNode` that can be indexed.

    NNX of Flax 0.11 reads the variables of an optimiser's state by `variable[...]`,
    which fails on `optax.MaskedNode`, an empty tuple.
    """

    def __getitem__(self, key: Any) -> "Hidden":
        """Return itself."""
        return self


def masked(
    inner: optax.GradientTransformation, mask: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation to some leaves: `optax.masked`, with `Hidden` leaves.

    Args:
      inner: the transformation.
      mask: a function from a tree to a tree of booleans: which leaves to transform.

    Returns:
      The transformation, with an `optax.MaskedState`; other leaves pass through
      unchanged.

    Example:
      >>> import jax
      >>> import optax
      >>> from orthax.internal.transforms import masked
      >>> matrices = lambda tree: jax.tree.map(lambda x: x > 1, tree)
      >>> tx = masked(optax.scale(10.0), matrices)
      >>> tx.update({"a": 1.0, "b": 2.0}, tx.init({"a": 1.0, "b": 2.0}))[0]
      {'a': 1.0, 'b': 20.0}
    """
    inner = optax.with_extra_args_support(inner)

    def visible(tree: Any, kept: Any) -> Any:
        return jax.tree.map(lambda keep, x: x if keep else Hidden(), kept, tree)

    def init(params: optax.Params) -> optax.MaskedState:
        return optax.MaskedState(inner.init(visible(params, mask(params))))

    def update(updates, state, params=None, **extra_args):
        if params is not None:
            params = visible(params, mask(params))
        kept = mask(updates)
        new, state = inner.update(
            visible(updates, kept), state.inner_state, params, **extra_args
        )
        new = jax.tree.map(
            lambda keep, old, new: new if keep else old, kept, updates, new
        )
        return new, optax.MaskedState(state)

    return optax.GradientTransformationExtraArgs(init, update)


def without_keys(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Hide PRNG keys from a transformation, and pass them through unchanged.

    Args:
      inner: the transformation; Optax's own do not accept the dtype of a key.

    Returns:
      The transformation, with the state of `inner`.

    Example:
      >>> import jax
      >>> import optax
      >>> from orthax.internal.transforms import without_keys
      >>> tree = {"a": 1.0, "key": jax.random.key(0)}
      >>> tx = without_keys(optax.scale(10.0))
      >>> tx.update(tree, tx.init(tree))[0]["a"]
      10.0
    """
    inner = optax.with_extra_args_support(inner)

    def visible(tree: Any) -> Any:
        return jax.tree.map(lambda x: Hidden() if _is_key(x) else x, tree)

    def init(params: optax.Params) -> Any:
        return inner.init(visible(params))

    def update(updates, state, params=None, **extra_args):
        params = params if params is None else visible(params)
        new, state = inner.update(visible(updates), state, params, **extra_args)
        leaves, structure = jax.tree.flatten(updates)
        pairs = zip(leaves, structure.flatten_up_to(new), strict=True)
        new = [old if _is_key(old) else new for old, new in pairs]
        return jax.tree.unflatten(structure, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_key(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
