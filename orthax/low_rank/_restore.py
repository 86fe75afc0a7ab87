"""Shapes and shardings of a training state, to restore a checkpoint into."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthax.low_rank._sharding import P
from orthax.low_rank._state import LowRankState, TrainingState, owner_of, paths_of


def abstract_state(
    params: Any, weights_of: Callable[[Any], LowRankState], init: Callable[[Any], Any]
) -> TrainingState:
    """Return a training state of `jax.ShapeDtypeStruct`s with shardings.

    Leaves of the optimiser's state are sharded like the weight that they mirror, all
    others are replicated.

    Args:
      params: dense parameters, with or without values.
      weights_of: the weights, of parameters without values.
      init: of the optimiser.
    """
    replicated = _replicated(params)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or replicated
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)

    weights = jax.tree.map(abstract, weights_of(jax.tree.map(abstract, params)))
    leaves = jax.tree.leaves(weights.trainable)
    owners = dict(zip(paths_of(weights.trainable), leaves, strict=True))

    def sharded(path: str, x: Any) -> jax.ShapeDtypeStruct:
        owner = owners.get(owner_of(path, owners))
        mirrors = owner is not None and owner.shape == x.shape
        sharding = owner.sharding if mirrors else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    unsharded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights.trainable
    )
    leaves, structure = jax.tree.flatten(jax.eval_shape(init, unsharded))
    leaves = map(sharded, paths_of(jax.tree.unflatten(structure, leaves)), leaves)
    return TrainingState(weights, jax.tree.unflatten(structure, leaves))


def _replicated(params: Any) -> jax.sharding.Sharding | None:
    """Return the sharding of arrays that are replicated where parameters are."""
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    first = next((sharding for sharding in shardings if sharding is not None), None)
    if isinstance(first, jax.NamedSharding):
        return jax.NamedSharding(first.mesh, P())
    return first
