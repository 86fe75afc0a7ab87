"""Weights into factors, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthax import components
from orthax._linalg import matmul, replicated, thin_svd, working
from orthax.low_rank._eligible import Order, Ranks, checked_rank, eligible
from orthax.low_rank._sharding import (
    auto_sharded,
    explicit_spec,
    factor_specs,
    not_finite,
    placed,
    sharding_of,
)
from orthax.low_rank._state import (
    Bases,
    LowRankState,
    check_state,
    sigmas,
    squeezed,
)


def factorise(
    params: Any,
    rule: components.RuleOrTree = components.ByName(),
    *,
    min_aspect: float = 0.1,
    keep_first: bool = False,
    keep_last: bool = False,
    order: Order = None,
    ranks: Ranks = None,
) -> LowRankState:
    r"""Replace weights by $U \Sigma V^T$, of which $\Sigma$ is to be trained.

    Args:
      params: floating or complex arrays in any pytree; or `jax.ShapeDtypeStruct`s, for
        a state of these.
      rule: which axes of a leaf form matrices; all other leaves stay dense and train
        as before.
      min_aspect: matrices whose short side is at most this fraction of the long side
        stay dense; dimensionless.
      keep_first: whether the first layer of `order` stays dense.
      keep_last: whether the last layer does.
      order: the layers from the input to the output: patterns, of which the first that
        matches the path of a leaf (`re.search`) is its layer. Needed by `keep_first`
        and `keep_last`, and by `refactor` with `OIALR.layer_step`.
      ranks: one rank for all matrices, clipped to their short sides; or ranks by path,
        as from `low_rank.ranks`, of exactly the leaves to factorise. Default: full.

    Returns:
      The state: bases and Sigma, which is diagonal at first, singular values
      descending. All matrices of a leaf (heads, scanned layers, equal blocks) share
      one rank.

    Raises:
      TypeError: if `rule` is not a rule, a leaf is not an array, or `order` or `ranks`
        has the wrong type.
      ValueError: if the rule cannot decide a leaf; nothing is left to factorise; a
        weight holds NaN or infinity (unless traced); `keep_first` or `keep_last` are
        given without an order; the order and the leaves do not match; or ranks do not
        fit.

    Limits:
      Exact to rounding at full rank; at a lower rank the best approximation in the
      Frobenius norm. Computed in float32 at least, in which the bases stay; Sigma has
      the dtype of the weight. Complex weights have a complex Sigma. The bases of a zero
      weight are arbitrary. A leaf with blocks of unequal sizes stays dense: to
      factorise it as one matrix, give a rule without `blocks`. Bases are sharded like
      the weight; the decomposition gathers one leaf at a time.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> params = {"kernel": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}
      >>> state = low_rank.factorise(params, ranks=2)
      >>> state.trainable["kernel"].tolist()
      [[3.0, 0.0], [0.0, 2.0]]
      >>> low_rank.materialise(state)["kernel"].diagonal().tolist()
      [0.0, 3.0, 2.0]

    References:
      Eckart, Young: "The approximation of one matrix by another of lower rank",
      Psychometrika 1, 1936.
    """
    resolved = components.resolve(params, rule)
    layers = eligible(
        resolved,
        min_aspect=min_aspect,
        keep_first=keep_first,
        keep_last=keep_last,
        order=order,
        ranks=ranks,
    )
    bad = not_finite({resolved[i].path: resolved[i].value for i in layers})
    if bad:
        raise ValueError(
            f"Weights hold NaN or infinity and were not factorised: {', '.join(bad)}. "
            "Training has diverged; go back to a checkpoint, or lower the learning "
            "rate."
        )
    leaves, structure = jax.tree.flatten(params)
    frozen = {}
    for i, layer in layers.items():
        leaf = resolved[i]
        ((_, m, n),) = leaf.cut.matrices(leaf.value.shape)
        rank = checked_rank(ranks, leaf.path, min(m, n))
        leaves[i], frozen[leaf.path] = _factorised(leaf, rank, i, layer)
    return LowRankState(jax.tree.unflatten(structure, leaves), frozen)


def _factorised(
    leaf: components.Leaf, rank: int, index: int, layer: int | None
) -> tuple[Any, Bases]:
    """Return Sigma and the bases of one leaf."""
    x, cut, shape = leaf.value, leaf.cut, tuple(leaf.value.shape)
    sharding = sharding_of(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        unsharded = jax.ShapeDtypeStruct(shape, x.dtype)
        decomposed = functools.partial(_decomposed, cut=cut, rank=rank)
        factors = jax.eval_shape(decomposed, unsharded)
    else:
        factors = _decomposed(jnp.asarray(x), cut=cut, rank=rank)
    if sharding is not None:
        specs = factor_specs(cut, shape, sharding)
        pairs = zip(factors, specs, strict=True)
        factors = [placed(factor, sharding.mesh, spec) for factor, spec in pairs]
    u, sigma, vt = factors
    bases = Bases(u, vt, cut, shape, explicit_spec(sharding), index, layer)
    return sigma, bases


# Compiled once for each shape: called eagerly, a decomposition is compiled every time.
@functools.partial(jax.jit, static_argnames=("cut", "rank"))
def _decomposed(
    x: jax.Array, cut: components.Matricisation, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return U, `(b, m, r)`, Sigma as in the trainable tree, and V^T, `(b, r, n)`."""
    (matrices,) = cut.fold(replicated(working(x)))
    u, s, vt = thin_svd(matrices)
    sigma = s[:, :rank, None] * jnp.eye(rank, dtype=s.dtype)[None]
    return u[:, :, :rank], squeezed(sigma.astype(x.dtype)), vt[:, :rank]


def materialise(state: LowRankState, trainable: Any = None) -> Any:
    r"""Return the dense parameters, $U \Sigma V^T$ for every factorised leaf.

    Differentiable with respect to Sigma and to all other parameters: the gradient of
    Sigma is $U^T G V$ for a gradient G of the weight. The bases get none.

    Args:
      state: from `factorise`.
      trainable: replaces `state.trainable`, for `jax.grad`.

    Returns:
      A tree of the structure, shapes and dtypes of the factorised parameters.

    Raises:
      TypeError: if `state` is not a `LowRankState`.
      ValueError: if Sigma does not have the rank of its bases.

    Limits:
      Computed in float32 at least, at full matmul precision. Where mesh axes are
      explicit, the weights are sharded like those that were factorised; elsewhere XLA
      decides, from rows like those of U and columns like those of V^T.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": 2 * jnp.eye(2)})
      >>> def loss(trainable):
      ...     return jnp.sum(low_rank.materialise(state, trainable)["kernel"] ** 2)
      >>> jax.grad(loss)(state.trainable)["kernel"].diagonal().tolist()
      [4.0, 4.0]
    """
    check_state(state)
    trainable = state.trainable if trainable is None else trainable
    leaves, structure = jax.tree.flatten(trainable)
    for path, sigma in sigmas(state, trainable).items():
        bases = state.frozen[path]
        leaves[bases.index] = _dense(bases, sigma)
    return jax.tree.unflatten(structure, leaves)


def _dense(bases: Bases, sigma: jax.Array) -> jax.Array:
    """Return the dense weight of one leaf."""

    def product(u: jax.Array, sigma: jax.Array, vt: jax.Array) -> jax.Array:
        wide = working(sigma)
        # Sigma is multiplied with the smaller factor.
        if u.shape[1] <= vt.shape[2]:
            weights = matmul(matmul(u, wide), vt)
        else:
            weights = matmul(u, matmul(wide, vt))
        return bases.cut.unfold([weights], bases.shape).astype(sigma.dtype)

    u, vt = jax.lax.stop_gradient((bases.u, bases.vt))
    return auto_sharded(product, bases.spec, u, sigma, vt)


def value_and_grad(
    loss: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Differentiate a loss of dense parameters with respect to what trains.

    Args:
      loss: called as `loss(params, *args)` with dense parameters; returns a scalar, or
        a pair of it and anything else.
      has_aux: whether `loss` returns a pair.

    Returns:
      A function of a `LowRankState` and `*args`, which returns what `loss` does and the
      gradient, a tree like `LowRankState.trainable`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": 2 * jnp.eye(2)})
      >>> def loss(params, x):
      ...     return jnp.sum((x @ params["kernel"]) ** 2)
      >>> value, grads = low_rank.value_and_grad(loss)(state, jnp.ones((1, 2)))
      >>> float(value), grads["kernel"].shape
      (8.0, (2, 2))
    """

    def dense_loss(trainable: Any, frozen: Any, *args: Any) -> Any:
        # NNX variables can be written only at the trace level at which they were made:
        # rebuilt here, those among the arguments (batch statistics) can be.
        args = jax.tree.map(lambda x: x, args)
        return loss(materialise(LowRankState(trainable, frozen)), *args)

    differentiated = jax.value_and_grad(dense_loss, has_aux=has_aux)

    def of_state(state: LowRankState, *args: Any) -> tuple[Any, Any]:
        return differentiated(state.trainable, state.frozen, *args)

    return of_state
