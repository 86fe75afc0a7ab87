"""The basis turned onto singular directions, and the rank cut."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthax import execution
from orthax._linalg import matmul, replicated, thin_svd, working
from orthax.low_rank._factorise import masked
from orthax.low_rank._placement import not_finite
from orthax.low_rank._schedule import OIALR
from orthax.low_rank._state import (
    Bases,
    LowRankState,
    check_state,
    leaf_of,
    leaves_of,
    sigmas,
)


def refactor(state: LowRankState, config: OIALR, *, check: int = 0) -> LowRankState:
    r"""Diagonalise Sigma and cut what is small: the check of OIALR, on the host.

    $\Sigma = A S B^T$ turns the bases into $U A$ and $B^T V^T$ and Sigma into S; then
    directions below `config.beta` times the largest singular value are sliced off, as
    many as `config` allows at once. Arrays really shrink, and what was compiled for
    their shapes is compiled again.

    Args:
      state: from `factorise`, concrete arrays.
      config: threshold, bounds and layers.
      check: how many checks came before, for `config.layer_step`.

    Returns:
      A new state. Where nothing is cut, `materialise` gives the same weights to
      rounding. Convert the optimiser's state with `convert_opt_state`.

    Raises:
      TypeError: if `state` or `config` is something else.
      ValueError: if a Sigma holds NaN or infinity, with its path; `state` is unchanged.
        If `config.layer_step` asks for an order and `factorise` was given none.

    Limits:
      Singular vectors are given the sign that leaves them nearest to the coordinate
      axes they come from. The matrices of a leaf share the largest rank that one of
      them needs. A Sigma of zeros keeps its rank as long as nothing else cuts it.
      What `refactor_masked` has cut is sliced off, too, whatever layer it is in.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.1]))})
      >>> config = low_rank.OIALR(delay=0, frequency=1, beta=0.5)
      >>> low_rank.ranks(low_rank.refactor(state, config))
      {'kernel': 2}

    References:
      Coquelin et al. 2024, arXiv 2401.08505, and the authors' code, which rounds half
      of an odd rank down where this rounds it up, so as never to drop more than half.
    """
    check_arguments(state, config)
    found = sigmas(state)
    bad = not_finite(found)
    if bad:
        raise ValueError(
            f"Sigma holds NaN or infinity and was not refactored: {', '.join(bad)}. "
            "Training has diverged; go back to a checkpoint. Nothing was changed."
        )
    leaves, structure = leaves_of(state.trainable)
    active = working_set(state, config, check)
    frozen = {}
    for path, bases in state.frozen.items():
        frozen[path] = bases
        if not active[path] and bases.widths == tuple(map(int, bases.rank)):
            continue
        each = each_stack(bases, found[path])
        cut = [_cut(*stack, config if active[path] else None) for stack in each]
        frozen[path] = bases.replaced(cut)
        leaves[bases.index] = leaf_of(tuple(new.sigma for new in cut))
    return LowRankState(jax.tree.unflatten(structure, leaves), frozen)


def check_arguments(state: Any, config: Any) -> None:
    """Raise unless these are a state and OIALR's numbers that go together."""
    check_state(state)
    if not isinstance(config, OIALR):
        raise TypeError(f"`config` must be a low_rank.OIALR(...), got {config!r}.")
    if config.layer_step:
        for path, bases in state.frozen.items():
            if bases.layer is None:
                raise ValueError(
                    f"layer_step={config.layer_step} needs the order of the layers, "
                    f"and '{path}' was factorised without: give `order` to "
                    "low_rank.factorise, or layer_step=0 to work on all layers."
                )


def working_set(state: LowRankState, config: OIALR, check: Any) -> dict[str, Any]:
    """Return by path whether a check works on a leaf; traced where `check` is."""
    if not config.layer_step:
        return dict.fromkeys(state.frozen, True)
    layers = 1 + max((bases.layer for bases in state.frozen.values()), default=0)
    first = layers - config.layers_at(check, layers)
    return {path: bases.layer >= first for path, bases in state.frozen.items()}


class Turned(NamedTuple):
    """The factors of one stack: `(b, m, r)`, `(b, r, r)`, `(b, r, n)`, and the rank."""

    u: jax.Array
    sigma: jax.Array
    vt: jax.Array
    rank: Any


def each_stack(
    bases: Bases, stacks: tuple[jax.Array, ...]
) -> Iterator[tuple[Turned, int]]:
    """Yield the factors of every stack of a leaf, and its matrices' short side."""
    parts = zip(bases.u, stacks, bases.vt, bases.rank, strict=True)
    shapes = bases.cut.matrices(bases.shape)
    for factors, (_, m, n) in zip(parts, shapes, strict=True):
        yield Turned(*factors), min(m, n)


def _cut(old: Turned, side: int, config: OIALR | None) -> Turned:
    """Return the factors of one stack sliced; turned, too, if there is a `config`."""
    new, r = old, int(old.rank)
    if config is not None:
        new = _turned(old)
        r = int(config.ranks(np.asarray(_values(new.sigma)), r, side))
    sliced = new.u[:, :, :r], new.sigma[:, :r, :r], new.vt[:, :r]
    return Turned(*sliced, np.asarray(r, np.int32))


def turn(old: Turned) -> Turned:
    """Return factors with a diagonal Sigma, singular values descending."""
    rank = old.rank

    def turned(u: jax.Array, x: jax.Array, vt: jax.Array) -> tuple[jax.Array, ...]:
        a, s, bt = thin_svd(masked(working(x), rank))
        # The largest entry of each column of A becomes positive: without this, an
        # optimiser's momentum would meet axes that point the other way.
        at = jnp.argmax(jnp.abs(a), axis=1, keepdims=True)
        sign = jnp.sign(jnp.take_along_axis(a, at, axis=1))
        sign = jnp.where(sign == 0, 1, sign)
        a, bt = a * sign.conj(), bt * sign.mT
        diagonal = s[:, :, None] * jnp.eye(s.shape[1], dtype=s.dtype)[None]
        return matmul(u, a), diagonal.astype(x.dtype), matmul(bt, vt)

    factors = old.u, old.sigma, old.vt
    return Turned(*execution.by_compiler(turned, factors)(*factors), rank)


def values(sigma: jax.Array) -> jax.Array:
    """Return the singular values of diagonal Sigmas, `(b, r)`, on every device."""
    return jnp.diagonal(replicated(sigma), axis1=1, axis2=2).real


# Compiled once for each shape: called eagerly, a decomposition is compiled every time.
_turned, _values = jax.jit(turn), jax.jit(values)
