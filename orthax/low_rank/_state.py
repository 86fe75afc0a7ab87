"""Weights as Sigma, which trains, between bases, which do not."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax

from orthax import components

# Every leaf of a tree by its path, none of them cut.
EVERY_LEAF = components.ByPath([("", None)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sigmas:
    """What stands for a leaf whose matrices are of several shapes: many Sigmas.

    Attributes:
      stacks: one array for each shape, `(r, r)`, or `(b, r, r)` for b matrices.
    """

    stacks: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bases:
    r"""The frozen bases of one leaf: $W = U \Sigma V^T$ for each of its matrices.

    Matrices of equal shape are a stack. Most leaves are one; a leaf with fused blocks
    of unequal sizes is several, and each tuple has as many entries.

    Attributes:
      u: orthonormal columns, `(b, m, r)` each.
      vt: orthonormal rows, `(b, r, n)` each; for complex weights $V^H$.
      rank: how many rows and columns of Sigma count, int32, shape () each; the others
        are zero. Below r only after `refactor_masked`.
      cut: which axes of the leaf make the matrices.
      shape: of the leaf.
      spec: how the leaf lay on a mesh of explicit axes, None on any other.
      index: which leaf it is, in the order of `jax.tree.leaves`.
      layer: to which of the layers it belongs, counted from the input, None without an
        order.
    """

    u: tuple[Any, ...]
    vt: tuple[Any, ...]
    rank: tuple[Any, ...]
    cut: components.Matricisation = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    spec: jax.sharding.PartitionSpec | None = dataclasses.field(
        metadata={"static": True}
    )
    index: int = dataclasses.field(metadata={"static": True})
    layer: int | None = dataclasses.field(metadata={"static": True})

    @property
    def widths(self) -> tuple[int, ...]:
        """The number r of columns of U, for each stack."""
        return tuple(u.shape[-1] for u in self.u)

    def replaced(self, stacks: Sequence[Any]) -> "Bases":
        """Return the same leaf with the `u`, `vt` and `rank` of other stacks."""
        u, vt, rank = zip(*((new.u, new.vt, new.rank) for new in stacks), strict=True)
        return dataclasses.replace(self, u=u, vt=vt, rank=rank)


class LowRankState(NamedTuple):
    r"""Parameters of which some are factorised: a pytree.

    Attributes:
      trainable: a tree like the parameters, in which Sigma stands for a factorised
        leaf: `(r, r)`, or `(b, r, r)` where the leaf holds b matrices (a `Sigmas`
        where they are of several shapes). Dense, not diagonal. What an optimiser and
        `jax.grad` are to see.
      frozen: the bases, by the path of the leaf.
    """

    trainable: Any
    frozen: dict[str, Bases]


class TrainingState(NamedTuple):
    """State of `Training`: a pytree, to be saved as it is.

    Attributes:
      step: how many updates there have been, int32, shape ().
      checks: how many checks there have been, int32, shape ().
      next_check: how many updates there must have been for the next check, int32,
        shape (); the first one converts the weights.
      weights: a `LowRankState`, with nothing frozen before the conversion.
      opt_state: of the optimiser.
    """

    step: Any
    checks: Any
    next_check: Any
    weights: LowRankState
    opt_state: Any

    @property
    def trainable(self) -> Any:
        """What the optimiser sees, and what gradients are taken with respect to."""
        return self.weights.trainable

    @property
    def is_low_rank(self) -> bool:
        """Whether the weights have been converted."""
        return bool(self.weights.frozen)


def is_sigmas(x: Any) -> bool:
    """Return whether something stands for a leaf of several Sigmas."""
    return isinstance(x, Sigmas)


def leaves_of(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a trainable tree, one for each parameter, and its form."""
    return jax.tree.flatten(tree, is_leaf=is_sigmas)


def stacks_of(leaf: Any) -> tuple[Any, ...]:
    """Return the Sigmas of a leaf as `(b, r, r)` each."""
    found = leaf.stacks if is_sigmas(leaf) else (leaf,)
    return tuple(x[None] if x.ndim == 2 else x for x in found)


def leaf_of(stacks: tuple[Any, ...]) -> Any:
    """Return what stands for a leaf with the Sigmas `(b, r, r)`."""
    found = tuple(_first(x) if x.shape[0] == 1 else x for x in stacks)
    return found[0] if len(found) == 1 else Sigmas(found)


def _first(x: Any) -> Any:
    """Return the first matrix of a stack, also of one without values."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[0]
    lies = x.sharding
    if isinstance(lies, jax.NamedSharding):
        lies = jax.NamedSharding(lies.mesh, jax.sharding.PartitionSpec(*lies.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=lies)


def owner_of(path: str, paths: Collection[str]) -> str | None:
    """Return the parameter that a leaf of another tree mirrors: the longest ending.

    Args:
      path: of a leaf that an optimiser keeps, `"0/mu/dense/kernel"`.
      paths: of all parameters.
    """
    parts = path.split("/")
    endings = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    return next((ending for ending in endings if ending in paths), None)


def paths_of(tree: Any) -> list[str]:
    """Return the paths of the leaves of a tree, in the order of `jax.tree.leaves`."""
    return [leaf.path for leaf in components.decide_all(tree, EVERY_LEAF)]


def wrapped(params: Any) -> LowRankState:
    """Return parameters as a state in which nothing is factorised."""
    if isinstance(params, LowRankState):
        return params
    return LowRankState(params, {})


def check_state(state: Any) -> None:
    """Raise unless `state` is a `LowRankState`."""
    if not isinstance(state, LowRankState):
        raise TypeError(
            f"`state` must be a LowRankState, from low_rank.factorise, got "
            f"{type(state).__name__}."
        )


def sigmas(state: LowRankState, trainable: Any = None) -> dict[str, tuple[Any, ...]]:
    """Return the Sigmas of every factorised leaf, by path, `(b, r, r)` each."""
    leaves, _ = leaves_of(state.trainable if trainable is None else trainable)
    found = {}
    for path, bases in state.frozen.items():
        stacks = stacks_of(leaves[bases.index])
        shapes = tuple(x.shape[-2:] for x in stacks)
        expected = tuple((r, r) for r in bases.widths)
        if shapes != expected:
            raise ValueError(
                f"Sigma of '{path}' has shape {shapes}, but its bases have the ranks "
                f"{bases.widths}: `trainable` and `frozen` must come from one state, "
                "one checkpoint."
            )
        found[path] = stacks
    return found


def ranks(state: LowRankState) -> dict[str, int | tuple[int, ...]]:
    """Return the rank of every factorised leaf.

    Args:
      state: from `factorise`, with arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      By path, the rank that its matrices share; a tuple for a leaf with fused blocks
      of unequal sizes, one for each size. What `factorise` takes as `ranks`.

    Raises:
      TypeError: if `state` is no `LowRankState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import low_rank
      >>> state = low_rank.factorise({"dense": {"kernel": jnp.ones((4, 3))}})
      >>> low_rank.ranks(state)
      {'dense/kernel': 3}
    """
    check_state(state)
    found = {path: current_ranks(bases) for path, bases in state.frozen.items()}
    return {path: r[0] if len(r) == 1 else r for path, r in found.items()}


def current_ranks(bases: Bases) -> tuple[int, ...]:
    """Return the rank of every stack of a leaf, on the host."""
    abstract = jax.ShapeDtypeStruct
    return tuple(
        u.shape[-1] if isinstance(rank, abstract) else int(rank)
        for u, rank in zip(bases.u, bases.rank, strict=True)
    )
