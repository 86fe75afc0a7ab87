"""Weights as Sigma, which trains, between bases, which do not."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from orthax import components
from orthax.internal.components import path_string


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bases:
    r"""The frozen bases of one leaf: $W = U \Sigma V^T$ for each of its matrices.

    Attributes:
      u: orthonormal columns, `(b, m, r)`.
      vt: orthonormal rows, `(b, r, n)`; for complex weights $V^H$.
      cut: which axes of the leaf form the matrices.
      shape: of the leaf.
      spec: the sharding of the leaf on a mesh with explicit axes, else None.
      index: position of the leaf in `jax.tree.leaves`.
      layer: index of its layer, counted from the input; None without an order.
    """

    u: Any
    vt: Any
    cut: components.Matricisation = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    spec: jax.sharding.PartitionSpec | None = dataclasses.field(
        metadata={"static": True}
    )
    index: int = dataclasses.field(metadata={"static": True})
    layer: int | None = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number r of columns of U."""
        return self.u.shape[-1]

    @property
    def short_side(self) -> int:
        """The smaller of m and n, the largest possible rank."""
        return min(self.u.shape[-2], self.vt.shape[-1])


class LowRankState(NamedTuple):
    r"""Parameters of which some are factorised: a pytree.

    Attributes:
      trainable: a tree like the parameters, with Sigma in place of every factorised
        leaf: `(r, r)`, or `(b, r, r)` for a leaf of b matrices. Dense, not diagonal.
        The optimiser and `jax.grad` see this tree.
      frozen: the bases by the path of the leaf, with `u`, `(b, m, r)`, and `vt`,
        `(b, r, n)`. Empty before the conversion.
    """

    trainable: Any
    frozen: dict[str, Bases]


class TrainingState(NamedTuple):
    """State of a `Trainer`: a pytree, saved in checkpoints as it is.

    Attributes:
      weights: a `LowRankState`.
      opt_state: of the optimiser, for `weights.trainable`.
    """

    weights: LowRankState
    opt_state: Any


def squeezed(sigma: jax.Array) -> jax.Array:
    """Return Sigma of shape `(b, r, r)` as it is in the trainable tree."""
    return sigma[0] if sigma.shape[0] == 1 else sigma


def owner_of(path: str, paths: Collection[str]) -> str | None:
    """Return the parameter that a leaf of another tree mirrors: the longest suffix.

    Args:
      path: of a leaf of an optimiser's state, `"0/mu/dense/kernel"`.
      paths: of all parameters.
    """
    parts = path.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    return next((suffix for suffix in suffixes if suffix in paths), None)


def paths_of(tree: Any) -> list[str]:
    """Return the paths of the leaves of a tree, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [path_string(path) for path, _ in leaves]


def check_state(state: Any) -> None:
    """Raise unless `state` is a `LowRankState`."""
    if not isinstance(state, LowRankState):
        raise TypeError(
            f"`state` must be a LowRankState, from low_rank.factorise, got "
            f"{type(state).__name__}."
        )


def sigmas(state: LowRankState, trainable: Any = None) -> dict[str, jax.Array]:
    """Return Sigma of every factorised leaf, by path, `(b, r, r)` each.

    Raises:
      ValueError: if Sigma does not have the rank of its bases.
    """
    leaves = jax.tree.leaves(state.trainable if trainable is None else trainable)
    result = {}
    for path, bases in state.frozen.items():
        sigma, r = leaves[bases.index], bases.rank
        batch = bases.u.shape[:1] if bases.u.shape[0] > 1 else ()
        if sigma.shape != (*batch, r, r):
            raise ValueError(
                f"Sigma of '{path}' has shape {sigma.shape}, but its bases have rank "
                f"{r}: `trainable` and `frozen` must come from the same state."
            )
        result[path] = sigma if batch else sigma[None]
    return result


def ranks(state: Any) -> dict[str, int]:
    """Return the rank of every factorised leaf, also of a checkpoint.

    Args:
      state: a `LowRankState` or a `TrainingState`; or the tree of a saved
        `TrainingState`: nested dictionaries of anything with a `shape`, such as the
        metadata that Orbax reads without reading the arrays.

    Returns:
      The rank that the matrices of a leaf share, by path; empty before the conversion.
      `factorise` and `Trainer` take it as `ranks`.

    Raises:
      TypeError: if `state` is none of these.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"dense": {"kernel": jnp.ones((4, 3))}})
      >>> low_rank.ranks(state)
      {'dense/kernel': 3}
    """
    for name in ("item_metadata", "tree"):  # Orbax wraps what it saved in these.
        state = getattr(state, name, state)
    weights = state if isinstance(state, LowRankState) else _entry(state, "weights")
    if weights is None:
        raise TypeError(
            "`state` must be a LowRankState, a TrainingState or the saved tree of one, "
            f"with an entry 'weights', got {type(state).__name__}."
        )
    frozen = _entry(weights, "frozen") or {}
    return {path: int(_entry(x, "u").shape[-1]) for path, x in frozen.items()}


def _entry(tree: Any, name: str) -> Any:
    """Return the child of a node that a checkpoint may have made a dictionary."""
    return tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)


def fractions(state: LowRankState) -> dict[str, float]:
    r"""Return how many numbers train, and are stored, per dense parameter.

    Instead of its $m n$ numbers a matrix of rank r trains $r^2$ and stores
    $r (m + n) + r^2$: fewer than $m n$ for a square one only if r is below 0.41 n,
    three times as many at full rank.

    Args:
      state: from `factorise`.

    Returns:
      `"trainable"`, in (0, 1], and `"stored"`, which may exceed one; dimensionless.
      Both count the parameters that are not factorised.

    Raises:
      TypeError: if `state` is not a `LowRankState`.

    Limits:
      Numbers, not bytes: the bases of bfloat16 weights are float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
      >>> fractions = low_rank.fractions(low_rank.factorise(params, ranks=2))
      >>> round(fractions["trainable"], 3)  # (2 * 2 + 8) / (64 + 8)
      0.167
      >>> round(fractions["stored"], 3)  # (2 * 16 + 2 * 2 + 8) / (64 + 8)
      0.611
    """
    check_state(state)
    trainable = sum(math.prod(x.shape) for x in jax.tree.leaves(state.trainable))
    bases = state.frozen.values()
    frozen = sum(math.prod(x.shape) for b in bases for x in (b.u, b.vt))
    sigma = sum(b.u.shape[0] * b.rank**2 for b in bases)
    dense = trainable - sigma + sum(math.prod(b.shape) for b in bases)
    return {"trainable": trainable / dense, "stored": (trainable + frozen) / dense}
