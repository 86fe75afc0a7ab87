"""What a factorised network trains and stores, beside the dense one."""

import math
from collections.abc import Callable

from orthax.low_rank._state import (
    Bases,
    LowRankState,
    check_state,
    current_ranks,
    leaves_of,
)


def trainable_fraction(state: LowRankState, *, factorised_only: bool = False) -> float:
    r"""Return what fraction of the dense parameters trains.

    A matrix m x n of rank r trains $r^2$ numbers in place of $m n$.

    Args:
      state: from `factorise`.
      factorised_only: whether to leave out the parameters that are not factorised.

    Returns:
      The fraction, dimensionless, in (0, 1].

    Raises:
      TypeError: if `state` is no `LowRankState`.
      ValueError: if `factorised_only` is asked of a state without factorised leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
      >>> state = low_rank.factorise(params, ranks=2)
      >>> round(low_rank.trainable_fraction(state), 3)  # (4 + 4) / (32 + 4)
      0.222
    """
    return _fraction(state, factorised_only, _trainable_numbers)


def stored_fraction(state: LowRankState, *, factorised_only: bool = False) -> float:
    r"""Return how many numbers are stored, as a fraction of the dense parameters.

    A matrix m x n of rank r is stored as $r (m + n) + r^2$ numbers: fewer than $m n$
    for square ones only where r is below 0.41 n, three times as many at full rank.

    Args:
      state: from `factorise`.
      factorised_only: whether to leave out the parameters that are not factorised.

    Returns:
      The fraction, dimensionless, above or below one.

    Raises:
      TypeError: if `state` is no `LowRankState`.
      ValueError: if `factorised_only` is asked of a state without factorised leaves.

    Limits:
      Numbers, not bytes: the bases of bfloat16 weights are float32. What
      `refactor_masked` has cut is still stored, until `refactor` slices it.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": jnp.ones((8, 8))}, ranks=2)
      >>> low_rank.stored_fraction(state)  # (2 * 16 + 4) / 64
      0.5625
    """
    return _fraction(state, factorised_only, _stored_numbers)


def _trainable_numbers(bases: Bases) -> int:
    pairs = zip(bases.u, current_ranks(bases), strict=True)
    return sum(u.shape[0] * r**2 for u, r in pairs)


def _stored_numbers(bases: Bases) -> int:
    stored = sum(math.prod(x.shape) for x in (*bases.u, *bases.vt))
    return stored + sum(u.shape[0] * u.shape[-1] ** 2 for u in bases.u)


def _fraction(
    state: LowRankState, factorised_only: bool, numbers: Callable[[Bases], int]
) -> float:
    check_state(state)
    if factorised_only and not state.frozen:
        raise ValueError(
            "Nothing is factorised yet: ask without `factorised_only`, or after "
            "low_rank.factorise."
        )
    dense = sum(math.prod(bases.shape) for bases in state.frozen.values())
    kept = sum(numbers(bases) for bases in state.frozen.values())
    if not factorised_only:
        places = {bases.index for bases in state.frozen.values()}
        leaves, _ = leaves_of(state.trainable)
        others = sum(x.size for i, x in enumerate(leaves) if i not in places)
        dense, kept = dense + others, kept + others
    return kept / dense
