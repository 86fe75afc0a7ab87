"""Weight decay that never works against the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orthax.transforms._hyperparameters import check_hyperparameters


def add_cautious_decay(
    weight_decay: optax.ScalarOrSchedule,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Decay the entries of the weights that the update shrinks as well.

    $U \leftarrow U + \lambda W$ where $U W > 0$, entry by entry, and U elsewhere. Like
    `optax.add_decayed_weights`, and in its place: before the learning rate, where U is
    still the direction that is subtracted.

    Args:
      weight_decay: $\lambda$, dimensionless; a number or a schedule.
      mask: which leaves decay, as in `optax.add_decayed_weights`; default: all.

    Returns:
      A transformation with the state of `optax.add_decayed_weights`: empty, or the step
      count of a schedule.

    Raises:
      TypeError: if `weight_decay` is neither a number nor a schedule.
      ValueError: from `update`, without `params`.

    Limits:
      Where the update is zero nothing decays: experts without tokens and frozen layers
      keep their weights. After the learning rate, where the sign of U is reversed, it
      would do the opposite of what it is for.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import transforms
      >>> tx = transforms.add_cautious_decay(0.1)
      >>> params = jnp.array([2.0, 2.0, 2.0])
      >>> updates = jnp.array([1.0, 0.0, -1.0])
      >>> tx.update(updates, tx.init(params), params)[0].round(4).tolist()
      [1.2, 0.0, -1.0]

    References:
      Chen et al.: "Cautious Weight Decay", 2025, arXiv 2510.12402.
    """
    check_hyperparameters(weight_decay=weight_decay)
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        decayed, state = decay.update(updates, state, params)
        return jax.tree.map(_agreeing, updates, decayed, params), state

    return optax.GradientTransformationExtraArgs(decay.init, update)


def _agreeing(u: jax.Array, decayed: jax.Array, w: jax.Array) -> jax.Array:
    shrinks = jnp.real(u) * jnp.real(w) + jnp.imag(u) * jnp.imag(w) > 0
    return jnp.where(shrinks, decayed, u).astype(u.dtype)
