"""The check of OIALR: bases rotated to singular directions, the rank truncated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from orthax._linalg import matmul, replicated, thin_svd, working
from orthax.internal.execution import by_compiler
from orthax.low_rank._schedule import OIALR
from orthax.low_rank._sharding import not_finite
from orthax.low_rank._state import LowRankState, check_state, sigmas, squeezed


def refactor(state: LowRankState, config: OIALR, *, check: int = 0) -> LowRankState:
    r"""Diagonalise Sigma and truncate small singular values, on the host.

    With the singular value decomposition $\Sigma = A S B^T$ the bases become $U A$ and
    $B^T V^T$, and Sigma becomes S. Then directions below `config.beta` times the
    largest singular value are sliced off, as many as `config` allows at once. Arrays
    really shrink, and functions compiled for their shapes are compiled again.

    Args:
      state: from `factorise`, concrete arrays.
      config: threshold, bounds and layers.
      check: how many checks came before, for `config.layer_step`.

    Returns:
      A new state. Where nothing is truncated, `materialise` gives the same weights to
      rounding. Convert the optimiser's state with `convert_opt_state`.

    Raises:
      TypeError: if `state` or `config` has the wrong type.
      ValueError: if Sigma holds NaN or infinity, with its path, or if
        `config.layer_step` needs an order and `factorise` was given none.

    Limits:
      The signs of singular vectors are chosen to stay close to the axes that they come
      from. The matrices of a leaf share the largest rank that one of them needs. A
      Sigma of zeros keeps its rank. Half of an odd rank is rounded up, so as never to
      drop more than half; the paper's code rounds down.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.1]))})
      >>> config = low_rank.OIALR(delay=0, frequency=1, beta=0.5)
      >>> low_rank.ranks(low_rank.refactor(state, config))
      {'kernel': 2}
    """
    check_state(state)
    if not isinstance(config, OIALR):
        raise TypeError(f"`config` must be a low_rank.OIALR(...), got {config!r}.")
    stacks = sigmas(state)
    bad = not_finite(stacks)
    if bad:
        raise ValueError(
            f"Sigma holds NaN or infinity and was not refactored: {', '.join(bad)}. "
            "Training has diverged; go back to a checkpoint."
        )
    leaves, structure = jax.tree.flatten(state.trainable)
    frozen = dict(state.frozen)
    for path in _working_set(state, config, check):
        bases = frozen[path]
        u, sigma, vt = _diagonalised(bases.u, stacks[path], bases.vt)
        r = config.rank(np.asarray(_singular_values(sigma)), bases.short_side)
        frozen[path] = dataclasses.replace(bases, u=u[:, :, :r], vt=vt[:, :r])
        leaves[bases.index] = squeezed(sigma[:, :r, :r])
    return LowRankState(jax.tree.unflatten(structure, leaves), frozen)


def _working_set(state: LowRankState, config: OIALR, check: int) -> list[str]:
    """Return the paths of the leaves that a check works on."""
    if not config.layer_step:
        return list(state.frozen)
    for path, bases in state.frozen.items():
        if bases.layer is None:
            raise ValueError(
                f"layer_step={config.layer_step} needs the order of the layers, and "
                f"'{path}' was factorised without: give `order` to low_rank.factorise, "
                "or layer_step=0 to work on all layers."
            )
    layers = 1 + max((bases.layer for bases in state.frozen.values()), default=0)
    first = layers - config.layers_at(check, layers)
    return [path for path, bases in state.frozen.items() if bases.layer >= first]


# Compiled once for each shape: called eagerly, a decomposition is compiled every time.
@jax.jit
def _diagonalised(
    u: jax.Array, sigma: jax.Array, vt: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return factors with a diagonal Sigma, singular values descending."""

    def rotated(u: jax.Array, sigma: jax.Array, vt: jax.Array) -> tuple[jax.Array, ...]:
        a, s, bt = thin_svd(working(sigma))
        # The largest entry of each column of A becomes positive: without this, an
        # optimiser's momentum would meet axes of the opposite sign.
        at = jnp.argmax(jnp.abs(a), axis=1, keepdims=True)
        sign = jnp.sign(jnp.take_along_axis(a, at, axis=1))
        sign = jnp.where(sign == 0, 1, sign)
        a, bt = a * sign.conj(), bt * sign.mT
        diagonal = s[:, :, None] * jnp.eye(s.shape[1], dtype=s.dtype)[None]
        return matmul(u, a), diagonal.astype(sigma.dtype), matmul(bt, vt)

    factors = u, sigma, vt
    return by_compiler(rotated, factors)(*factors)


@jax.jit
def _singular_values(sigma: jax.Array) -> jax.Array:
    """Return the singular values of diagonal Sigmas, `(b, r)`, on every device."""
    return jnp.diagonal(replicated(sigma), axis1=1, axis2=2).real
