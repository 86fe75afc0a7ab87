"""Optax transformations under JAX's strict promotion settings."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import optax


@contextlib.contextmanager
def promotion() -> Iterator[None]:
    """Allow promotion of dtypes and ranks inside the context.

    Optax's bias correction raises a number to the power of an integer count, which
    `jax_numpy_dtype_promotion="strict"` forbids.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def promoting(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return an Optax transformation that also works under JAX's strict settings.

    Args:
      inner: the transformation.

    Returns:
      The same transformation, which may promote dtypes and ranks.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax.internal.transforms import promoting
      >>> tx = promoting(optax.scale_by_adam())
      >>> with jax.numpy_dtype_promotion("strict"):
      ...     updates, _ = tx.update(jnp.array(3.0), tx.init(jnp.array(0.0)))
      >>> updates.item()
      1.0
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args: Any):
        with promotion():
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
