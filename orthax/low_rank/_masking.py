"""The same check inside jit, with static shapes: ranks are masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from orthax.low_rank._factorise import masked
from orthax.low_rank._refactor import (
    Turned,
    check_arguments,
    each_stack,
    turn,
    values,
    working_set,
)
from orthax.low_rank._schedule import OIALR
from orthax.low_rank._state import (
    LowRankState,
    check_state,
    leaf_of,
    leaves_of,
    sigmas,
)


def refactor_masked(
    state: LowRankState, config: OIALR, *, check: int | jax.Array = 0
) -> LowRankState:
    """Diagonalise Sigma and zero what is small: `refactor` with static shapes.

    For use inside `jit`, `jax.lax.scan` and `jax.lax.cond`. The rank becomes a number
    in the state; rows and columns of Sigma beyond it are zero, and `materialise` takes
    them for zero. Call `refactor` at some time for arrays that are smaller.

    Args:
      state: from `factorise`, traced or not.
      config: threshold, bounds and layers.
      check: how many checks came before, for `config.layer_step`; may be traced.

    Returns:
      A state of the same structure and shapes. Convert the optimiser's state with
      `convert_opt_state`, and mask updates with `mask_updates`.

    Raises:
      TypeError: if `state` or `config` is something else.
      ValueError: if `config.layer_step` asks for an order and `factorise` was given
        none.

    Limits:
      Saves no memory and no time. Training is that of `refactor` up to rounding. A
      leaf whose Sigma holds NaN or infinity stays as it is.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.1]))})
      >>> config = low_rank.OIALR(delay=0, frequency=1, beta=0.5)
      >>> masked = jax.jit(lambda s: low_rank.refactor_masked(s, config))(state)
      >>> low_rank.ranks(masked), masked.trainable["kernel"].shape
      ({'kernel': 2}, (3, 3))

    References:
      Coquelin et al. 2024, arXiv 2401.08505.
    """
    check_arguments(state, config)
    found, active = sigmas(state), working_set(state, config, check)
    leaves, structure = leaves_of(state.trainable)
    frozen = {}
    for path, bases in state.frozen.items():
        turned = [
            _cut(*stack, config, jnp.asarray(active[path]))
            for stack in each_stack(bases, found[path])
        ]
        leaves[bases.index] = leaf_of(tuple(new.sigma for new in turned))
        frozen[path] = bases.replaced(turned)
    return LowRankState(jax.tree.unflatten(structure, leaves), frozen)


# Compiled once for each shape, also outside jit.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(old: Turned, side: int, config: OIALR, active: bool | jax.Array) -> Turned:
    """Return the factors of one stack after a check."""
    good = jnp.all(jnp.isfinite(old.sigma))
    # No decomposition ever meets a NaN: some never return from one.
    safe = old._replace(sigma=jnp.where(good, old.sigma, 0))
    new = turn(safe)
    rank = config.ranks(values(new.sigma), old.rank, side)
    new = new._replace(sigma=masked(new.sigma, rank), rank=rank)
    pick = good & active
    return Turned(*(jnp.where(pick, x, y) for x, y in zip(new, old, strict=True)))


def mask_updates(updates: Any, state: LowRankState) -> Any:
    """Return updates with zeros where `refactor_masked` has cut Sigma.

    Momentum goes on moving what it moved before: without this, entries that were cut
    would not stay zero.

    Args:
      updates: what the optimiser gives, a tree like `state.trainable`.
      state: the state that they will be added to.

    Returns:
      A tree of equal structure.

    Raises:
      TypeError: if `state` is no `LowRankState`.
      ValueError: if Sigmas and bases are not of one rank.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": jnp.diag(jnp.array([4.0, 0.1]))})
      >>> config = low_rank.OIALR(delay=0, frequency=1, beta=0.5)
      >>> state = low_rank.refactor_masked(state, config)
      >>> low_rank.mask_updates({"kernel": jnp.ones((2, 2))}, state)["kernel"].tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    check_state(state)
    leaves, structure = leaves_of(updates)
    for path, stacks in sigmas(state, updates).items():
        bases = state.frozen[path]
        pairs = zip(stacks, bases.rank, strict=True)
        leaves[bases.index] = leaf_of(tuple(masked(x, rank) for x, rank in pairs))
    return jax.tree.unflatten(structure, leaves)
