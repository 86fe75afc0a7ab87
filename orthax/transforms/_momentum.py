"""The momentum of Muon: an averaged gradient with Nesterov's look-ahead."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax.transforms._hyperparameters import check_dtype
from orthax.transforms._promotion import promotion


class NesterovEMAState(NamedTuple):
    """State of `nesterov_ema`.

    Attributes:
      count: how many updates there have been, int32, shape ().
      ema: running mean of the updates, a tree like the parameters.
    """

    count: jax.Array
    ema: optax.Updates


def nesterov_ema(
    decay: float = 0.95, mu_dtype: Any | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the update by its running mean, with Nesterov's look-ahead.

    $m_t = \beta m_{t-1} + (1 - \beta) g_t$ gives $\beta m_t / (1 - \beta^{t+1})
    + (1 - \beta) g_t / (1 - \beta^t)$, as in Nadam. Without the look-ahead this is
    `optax.ema`, without the bias correction `optax.trace(nesterov=True)` up to a
    factor, which a subsequent orthogonalisation removes.

    Args:
      decay: $\beta$, in [0, 1), dimensionless.
      mu_dtype: dtype of the running mean, by name or as a `jnp.dtype`; default
        that of the parameters. A state restored in another dtype is cast to it.

    Returns:
      A transformation with a `NesterovEMAState`.

    Raises:
      TypeError: if `mu_dtype` is not a dtype, or an array, which
        `optax.inject_hyperparams` makes of a dtype's class.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import transforms
      >>> tx = transforms.nesterov_ema(0.9)
      >>> update, state = tx.update(jnp.array(1.0), tx.init(jnp.array(0.0)))
      >>> round(float(update), 4)  # 0.9 * 0.1 / 0.19 + 0.1 / 0.1
      1.4737

    References:
      Dozat: "Incorporating Nesterov Momentum into Adam", 2016, Algorithm 8; Jordan:
      "Muon", 2024; the bias correction is that of `optax.contrib.muon`.
    """
    check_dtype(mu_dtype)

    def init(params: optax.Params) -> NesterovEMAState:
        ema = optax.tree.zeros_like(params, dtype=mu_dtype)
        return NesterovEMAState(jnp.zeros([], jnp.int32), ema)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        with promotion():
            count = optax.safe_increment(state.count)
            ema = optax.tree.update_moment(updates, state.ema, decay, 1)
            ahead = optax.tree.bias_correction(ema, decay, optax.safe_increment(count))
            now = optax.tree.bias_correction(updates, decay, count)
            looked_up = jax.tree.map(
                lambda m, g: (decay * m + (1 - decay) * g).astype(g.dtype), ahead, now
            )
            ema = jax.tree.map(
                lambda new, old: new.astype(mu_dtype or old.dtype), ema, state.ema
            )
        return looked_up, NesterovEMAState(count, ema)

    return optax.GradientTransformationExtraArgs(init, update)
