"""What a checkpoint holds: shapes that depend on how far the training was."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from orthax.low_rank._placement import P
from orthax.low_rank._state import LowRankState, check_state, owner_of, paths_of


def saved_ranks(saved: Any) -> dict[str, int | tuple[int, ...]]:
    """Return the ranks of the weights in a checkpoint, from its tree of shapes.

    Args:
      saved: the tree of a saved `TrainingState`: a `TrainingState`, or nested
        dictionaries of arrays or of anything with a `shape`, such as the metadata that
        Orbax reads without reading the arrays.

    Returns:
      By path, as `low_rank.ranks`; nothing before the conversion.

    Raises:
      ValueError: if this is no tree of a `TrainingState`.

    Example:
      >>> import numpy as np
      >>> from orthax import low_rank
      >>> bases = {"u": [np.ones((1, 8, 3))], "vt": [np.ones((1, 3, 4))]}
      >>> saved = {"weights": {"frozen": {"dense/kernel": bases}}}
      >>> low_rank.saved_ranks(saved)
      {'dense/kernel': 3}
    """
    found = {}
    for path, shapes in _saved_shapes(saved).items():
        each = tuple(shape[-1] for shape in shapes["u"])
        found[path] = each[0] if len(each) == 1 else each
    return found


def check_saved(state: Any, saved: Any) -> None:
    """Raise unless the weights in a checkpoint are factorised as those of a state.

    To ask before restoring into a state at hand, without `Training.target`.

    Args:
      state: a `TrainingState` or its weights, with or without values.
      saved: the tree of a checkpoint, as `saved_ranks` takes it.

    Returns:
      Nothing.

    Raises:
      ValueError: if the ranks, the factorised leaves or their shapes are others, or
        `saved` is no tree of a `TrainingState`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax import low_rank
      >>> config = low_rank.OIALR(delay=10, frequency=5)
      >>> training = low_rank.Training(optax.sgd(0.1), config)
      >>> state = training.init({"kernel": jnp.ones((4, 3))})
      >>> low_rank.check_saved(state, state)
    """
    weights = getattr(state, "weights", state)
    check_state(weights)
    here, there = saved_ranks({"weights": weights}), saved_ranks(saved)
    if here != there:
        raise ValueError(
            f"The checkpoint has weights of the ranks {there}, the state has {here}: "
            "restore into training.target(params, saved), which has the shapes of the "
            "checkpoint. Nothing was restored."
        )
    for path, shapes in _saved_shapes(saved).items():
        for name in ("u", "vt"):
            found = [tuple(x.shape) for x in getattr(weights.frozen[path], name)]
            if found != shapes[name]:
                raise ValueError(
                    f"The bases of '{path}' have the shapes {shapes[name]} in the "
                    f"checkpoint, for these parameters {found}: the checkpoint is of "
                    "another model."
                )


def _saved_shapes(saved: Any) -> dict[str, dict[str, list[tuple[int, ...]]]]:
    """Return the shapes of the bases in a checkpoint, by path and name."""
    for name in ("item_metadata", "tree"):  # in which Orbax wraps it
        saved = getattr(saved, name, saved)
    weights = _child(saved, "weights")
    if weights is None:
        raise ValueError(
            "`saved` is not the tree of a TrainingState, which has an entry 'weights': "
            "pass what was saved, or what Orbax gives as its metadata."
        )
    return {
        path: {
            name: [tuple(x.shape) for x in _child(bases, name)] for name in ("u", "vt")
        }
        for path, bases in (_child(weights, "frozen") or {}).items()
    }


def abstract(
    params: Any, weights: Callable[[Any], LowRankState], init: Callable[[Any], Any]
) -> tuple[LowRankState, Any, Callable[[Any], Any]]:
    """Return weights and an optimiser's state without values.

    Args:
      params: dense parameters, with or without values.
      weights: from parameters without values, gives the weights.
      init: of the optimiser.

    Returns:
      The weights, the optimiser's state, and what makes other arrays abstract.
    """
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    here = next((found for found in shardings if found is not None), None)
    if isinstance(here, jax.NamedSharding):
        here = jax.NamedSharding(here.mesh, P())

    def shaped(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or here
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)

    found = jax.tree.map(shaped, weights(jax.tree.map(shaped, params)))
    bare = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found.trainable
    )
    opt_state = jax.eval_shape(init, bare)
    trained = dict(
        zip(paths_of(found.trainable), jax.tree.leaves(found.trainable), strict=True)
    )

    def laid(path: str, x: Any) -> jax.ShapeDtypeStruct:
        owner = trained.get(owner_of(path, trained))
        lies = here if owner is None or owner.shape != x.shape else owner.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    leaves, structure = jax.tree.flatten(opt_state)
    leaves = list(map(laid, paths_of(opt_state), leaves))
    return found, jax.tree.unflatten(structure, leaves), shaped


def _child(tree: Any, name: str) -> Any:
    if isinstance(tree, Mapping):
        return tree.get(name)
    return getattr(tree, name, None)
