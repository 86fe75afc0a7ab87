"""Weights into factors, and back."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthax import components
from orthax._linalg import matmul, replicated, thin_svd, working
from orthax.low_rank._layers import Order, checked_ranks, chosen
from orthax.low_rank._placement import (
    P,
    by_compiler,
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
    leaf_of,
    leaves_of,
    sigmas,
)


def factorise(
    params: Any,
    rule: components.RuleOrTree = components.ByName(),
    *,
    min_aspect: float = 0.1,
    keep_first: bool = False,
    keep_last: bool = False,
    order: Order = None,
    ranks: int | Mapping[str, Any] | None = None,
) -> LowRankState:
    r"""Replace weights by $U \Sigma V^T$, of which $\Sigma$ is to be trained.

    Args:
      params: floating or complex arrays in any pytree; or `jax.ShapeDtypeStruct`s, for
        a state of such.
      rule: how leaves are cut into matrices; leaves that it leaves alone stay as they
        are, and train as before.
      min_aspect: matrices whose short side is not above this fraction of the long side
        stay as they are, dimensionless.
      keep_first: whether the leaves of the first layer of `order` stay as they are.
      keep_last: whether those of the last layer do.
      order: the layers from the input to the output: patterns, of which the first that
        is found in the path of a leaf (`re.search`) is its layer. Needed by
        `keep_first` and `keep_last`, and by `refactor` for progressive layers.
      ranks: the rank of every matrix, at most its short side, or ranks by path, as
        `low_rank.ranks` gives them, of exactly the leaves to factorise. Default: full.

    Returns:
      The state: bases and Sigma, at first diagonal, singular values descending. All
      matrices of a leaf (heads, scanned layers, equal blocks) have one rank.

    Raises:
      TypeError: if `rule` is no rule, a leaf is no array, or `order` or `ranks` are
        something else.
      ValueError: if the rule cannot decide a leaf; nothing is left to factorise; a
        weight holds NaN or infinity (unless traced); `keep_first` or `keep_last` come
        without an order; the order misses a leaf, or a leaf the order; or ranks do not
        fit.

    Limits:
      Exact to rounding at full rank. At a lower rank the best approximation in the
      Frobenius norm. The decomposition is done, and the bases are kept, in float32 at
      least, Sigma in the dtype of the weight. Complex weights have a complex Sigma.
      The bases of a zero weight are arbitrary. Bases of sharded weights are sharded
      likewise; the decomposition gathers one leaf at a time.

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
      Coquelin et al. 2024, arXiv 2401.08505. Eckart, Young: "The approximation of one
      matrix by another of lower rank", Psychometrika 1, 1936.
    """
    found = components.resolve(params, rule)
    places = chosen(
        found,
        min_aspect=min_aspect,
        keep_first=keep_first,
        keep_last=keep_last,
        order=order,
        ranks=ranks,
    )
    bad = not_finite({found[i].path: (found[i].value,) for i in places})
    if bad:
        raise ValueError(
            f"Weights hold NaN or infinity and were not factorised: {', '.join(bad)}. "
            "Training has diverged; go back to a checkpoint, or lower the learning "
            "rate. Nothing was changed."
        )
    leaves, structure = jax.tree.flatten(params)
    frozen = {}
    for i, layer in places.items():
        leaf = found[i]
        sides = tuple(min(m, n) for _, m, n in leaf.cut.matrices(leaf.value.shape))
        each = checked_ranks(ranks, leaf.path, sides)
        leaves[i], frozen[leaf.path] = _factorised(leaf, each, i, layer)
    return LowRankState(jax.tree.unflatten(structure, leaves), frozen)


def _factorised(
    leaf: components.Leaf, ranks: tuple[int, ...], index: int, layer: int | None
) -> tuple[Any, Bases]:
    """Return Sigma and the bases of one leaf."""
    x, shape = leaf.value, tuple(leaf.value.shape)
    sharding = sharding_of(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        bare = jax.ShapeDtypeStruct(shape, x.dtype)
        factors = jax.eval_shape(lambda x: _decomposed(x, leaf.cut, ranks), bare)
    else:
        factors = _decomposed(jnp.asarray(x), leaf.cut, ranks)
    if sharding is not None:
        specs = factor_specs(leaf.cut, shape, sharding)
        factors = [
            tuple(placed(y, sharding, spec) for y, spec in zip(ys, own, strict=True))
            for ys, own in zip(factors, specs, strict=True)
        ]
    u, sigma, vt = zip(*factors, strict=True)
    rank = tuple(np.asarray(r, np.int32) for r in ranks)
    bases = Bases(
        u, vt, rank, leaf.cut, shape, explicit_spec(sharding, len(shape)), index, layer
    )
    return leaf_of(sigma), bases


# Compiled once for each shape: called eagerly, a decomposition is compiled every time.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _decomposed(
    x: jax.Array, cut: components.Matricisation, ranks: tuple[int, ...]
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Return U, Sigma and V^T of every stack of a leaf, `(b, m, r)` and so on."""
    factors = []
    for stack, r in zip(cut.fold(replicated(working(x))), ranks, strict=True):
        u, s, vt = thin_svd(stack)
        sigma = s[:, :r, None] * jnp.eye(r, dtype=s.dtype)[None]
        factors.append((u[:, :, :r], sigma.astype(x.dtype), vt[:, :r]))
    return factors


def materialise(state: LowRankState, trainable: Any = None) -> Any:
    r"""Return the dense parameters, $U \Sigma V^T$ for every factorised leaf.

    Differentiable with respect to Sigma and to all other parameters: the gradient of
    Sigma is $U^T G V$ for a gradient G of the weight. The bases get none.

    Args:
      state: from `factorise`.
      trainable: what to take in place of `state.trainable`, for `jax.grad`.

    Returns:
      A tree of the structure, shapes and dtypes that `factorise` was given.

    Raises:
      TypeError: if `state` is no `LowRankState`.
      ValueError: if Sigma and bases are not of one rank.

    Limits:
      Computed in float32 at least, at full matmul precision. On a mesh of explicit
      axes the weights lie as those did that were factorised; on other axes the compiler
      places them, with rows as the rows of U and columns as the columns of V^T.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"kernel": 2 * jnp.eye(2)})
      >>> def loss(trainable):
      ...     return jnp.sum(low_rank.materialise(state, trainable)["kernel"] ** 2)
      >>> jax.grad(loss)(state.trainable)["kernel"].diagonal().tolist()
      [4.0, 4.0]

    References:
      Coquelin et al. 2024, arXiv 2401.08505, and the authors' code, which multiplies
      the factors out in every step, too.
    """
    check_state(state)
    chosen_tree = state.trainable if trainable is None else trainable
    leaves, structure = leaves_of(chosen_tree)
    for path, stacks in sigmas(state, chosen_tree).items():
        bases = state.frozen[path]
        leaves[bases.index] = _dense(bases, stacks)
    return jax.tree.unflatten(structure, leaves)


def _dense(bases: Bases, stacks: tuple[jax.Array, ...]) -> jax.Array:
    """Return the dense weight of one leaf."""

    def product(*xs: jax.Array) -> jax.Array:
        each = zip(*(iter(xs),) * 4, strict=True)
        whole_stacks = [
            multiplied(u, masked(working(sigma), rank), vt)
            for u, sigma, vt, rank in each
        ]
        return bases.cut.unfold(whole_stacks, bases.shape).astype(stacks[0].dtype)

    fixed = (
        jax.lax.stop_gradient((u, vt)) for u, vt in zip(bases.u, bases.vt, strict=True)
    )
    factors = [
        jnp.asarray(x)
        for (u, vt), sigma, rank in zip(fixed, stacks, bases.rank, strict=True)
        for x in (u, sigma, vt, rank)
    ]
    return by_compiler(product, bases.spec or P(), *factors)


def multiplied(u: jax.Array, sigma: jax.Array, vt: jax.Array) -> jax.Array:
    """Return the product of the factors of a stack."""
    # Sigma goes to the shorter of the two factors.
    if u.shape[1] <= vt.shape[2]:
        return matmul(matmul(u, sigma), vt)
    return matmul(u, matmul(sigma, vt))


def masked(sigma: jax.Array, rank: Any) -> jax.Array:
    """Return Sigmas with zeros beyond the rank in rows and columns."""
    kept = jnp.arange(sigma.shape[-1], dtype=jnp.int32) < rank
    return jnp.where(kept[:, None] & kept[None], sigma, 0)
