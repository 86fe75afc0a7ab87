"""A dense layer on its factors."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from orthax._linalg import working
from orthax.low_rank._factorise import masked, multiplied
from orthax.low_rank._state import Bases, LowRankState, check_state, sigmas


def apply(
    state: LowRankState, path: str, x: jax.Array, *, trainable: Any = None
) -> jax.Array:
    r"""Apply a factorised dense weight to activations, by the cheaper way.

    $((x U) \Sigma) V^T$ where that takes fewer operations than multiplying the factors
    out first, which depends on the rank and on how many rows x has.

    Args:
      state: from `factorise`.
      path: of a factorised leaf that holds one matrix and is no convolution.
      x: activations; its last axes are the row axes of the weight, `(*batch, m)` for a
        dense kernel.
      trainable: what to take in place of `state.trainable`, for `jax.grad`.

    Returns:
      The product, `(*batch, n)`; its last axes are the column axes of the weight.

    Raises:
      TypeError: if `state` is no `LowRankState`.
      ValueError: if no leaf of this path is factorised, it holds several matrices or a
        convolution, or the last axes of `x` are others.

    Limits:
      Products of activations have the default matmul precision, as in a dense layer,
      and the dtype of `x` and of the weight, promoted. Without bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": 2 * jnp.eye(4)}, ranks=4)
      >>> low_rank.apply(state, "kernel", jnp.ones((1, 4))).round(4).tolist()
      [[2.0, 2.0, 2.0, 2.0]]
    """
    check_state(state)
    bases = _one_matrix(state, path)
    ((_, m, n),) = bases.cut.matrices(bases.shape)
    rows = tuple(bases.shape[axis] for axis in bases.cut.rows)
    columns = tuple(bases.shape[axis] for axis in bases.cut.columns)
    if x.ndim < len(rows) or x.shape[x.ndim - len(rows) :] != rows:
        raise ValueError(
            f"The last axes of `x` must be {rows}, as in '{path}', got {x.shape}."
        )
    batch = x.shape[: x.ndim - len(rows)]
    (sigma,) = sigmas(state, trainable)[path]
    dtype = jnp.result_type(x, sigma)
    flat = x.reshape(*batch, m).astype(dtype)
    count, r = math.prod(batch), bases.widths[0]
    factored = count * (m * r + r * r + r * n)
    dense = count * m * n + min(m, n) * r * r + m * r * n
    u, vt = (jax.lax.stop_gradient(y[0][0]) for y in (bases.u, bases.vt))
    sigma = masked(working(sigma[0]), bases.rank[0])
    if factored <= dense:
        y = flat
        for factor in (u, sigma, vt):
            y = jnp.matmul(y, factor.astype(dtype))
    else:
        y = jnp.matmul(
            flat, multiplied(u[None], sigma[None], vt[None])[0].astype(dtype)
        )
    return y.reshape(*batch, *columns)


def _one_matrix(state: LowRankState, path: str) -> Bases:
    if path not in state.frozen:
        raise ValueError(
            f"No leaf '{path}' is factorised, but {', '.join(map(repr, state.frozen))}."
        )
    bases = state.frozen[path]
    shapes = bases.cut.matrices(bases.shape)
    if len(shapes) > 1 or shapes[0][0] != 1 or bases.cut.spatial:
        what = "is a convolution" if bases.cut.spatial else f"holds matrices {shapes}"
        raise ValueError(
            f"'{path}' {what}: apply is for one dense matrix. Use low_rank.materialise."
        )
    return bases
