"""The one deep function: fold the leaves, stack equal shapes, call once, unfold."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthax.components._by_name import ByName
from orthax.components._rule import Rule
from orthax.components._tree import Leaf, resolve


@dataclasses.dataclass(frozen=True)
class Stacking:
    """How equal matrices are worked on together.

    Attributes:
      max_bytes: largest stack that is handed to the function at once, in bytes of its
        input; larger ones are worked on in pieces, one after another. Default: no
        limit.

    Raises:
      ValueError: if `max_bytes` is not positive; from `map_matrices`, if it is smaller
        than one matrix.
      TypeError: if `max_bytes` is not an integer.

    Example:
      >>> from orthax import components
      >>> components.Stacking(max_bytes=2**28)
      Stacking(max_bytes=268435456)
    """

    max_bytes: int | None = None

    def __post_init__(self):
        limit = self.max_bytes
        if limit is None:
            return
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"`max_bytes` must be an integer or None, got {limit!r}.")
        if limit < 1:
            raise ValueError(f"`max_bytes` must be positive, got {limit}.")


def map_matrices(
    f: Callable[[jax.Array], jax.Array],
    tree: Any,
    rule: Rule = ByName(),
    *,
    stacking: Stacking = Stacking(),
    commutes_with_transpose: bool = False,
) -> Any:
    """Apply a function on stacks of matrices to every matrix of a tree.

    Leaves are folded into matrices as the rule says, matrices of equal shape and dtype
    are stacked, `f` is called once for each stack, and everything is put back.

    Args:
      f: maps a stack `(b, m, n)` to one of equal shape, matrix by matrix.
      tree: floating or complex arrays in any pytree; other leaves come back untouched.
      rule: how leaves are cut; leaves that it leaves alone come back untouched.
      stacking: how equal matrices are worked on together.
      commutes_with_transpose: whether `f(x.mT) == f(x).mT`, so that an m x n and an
        n x m matrix may share a stack.

    Returns:
      A tree of equal structure, shapes and dtypes.

    Raises:
      ValueError: as `components.resolve`, if `f` changes the shape of a stack, or if
        `stacking.max_bytes` is smaller than one matrix.
      TypeError: as `components.resolve`.

    Limits:
      Stacking copies: the matrices of a group exist once more while `f` runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> grads = {"kernel": jnp.full((2, 3), 4.0), "bias": jnp.ones(3)}
      >>> halved = components.map_matrices(lambda x: x / 2, grads)
      >>> float(halved["kernel"][0, 0]), float(halved["bias"][0])
      (2.0, 1.0)
    """
    leaves = resolve(tree, rule)
    stacks = [
        stack
        for leaf in leaves
        if leaf.cut
        for stack in leaf.cut.fold(jnp.asarray(leaf.value))
    ]
    turned = [commutes_with_transpose and x.shape[1] > x.shape[2] for x in stacks]
    results = iter(_turn(_grouped(f, _turn(stacks, turned), stacking), turned))
    values = [
        leaf.cut.unfold([next(results) for _ in _shapes(leaf)], leaf.value.shape)
        if leaf.cut
        else leaf.value
        for leaf in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def _shapes(leaf: Leaf) -> tuple[tuple[int, int, int], ...]:
    return leaf.cut.matrices(leaf.value.shape)


def _turn(stacks: list[jax.Array], turned: list[bool]) -> list[jax.Array]:
    return [x.mT if turn else x for x, turn in zip(stacks, turned, strict=True)]


def _grouped(
    f: Callable[[jax.Array], jax.Array], stacks: list[jax.Array], stacking: Stacking
) -> list[jax.Array]:
    """Call `f` once for all stacks of equal matrices, and take its result apart."""
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(stacks):
        groups.setdefault((x.shape[1:], x.dtype), []).append(i)
    results = list(stacks)
    for members in groups.values():
        parts = [stacks[i] for i in members]
        whole = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
        whole = _bounded(f, whole, stacking)
        ends = [sum(len(x) for x in parts[: k + 1]) for k in range(len(parts) - 1)]
        for i, x in zip(members, jnp.split(whole, ends), strict=True):
            results[i] = x
    return results


def _bounded(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, stacking: Stacking
) -> jax.Array:
    """Call `f` on a stack, in pieces of at most `stacking.max_bytes`."""
    b, m, n = x.shape
    bytes_each = m * n * x.dtype.itemsize
    at_once = b if stacking.max_bytes is None else stacking.max_bytes // bytes_each
    if at_once < 1:
        raise ValueError(
            f"Stacking(max_bytes={stacking.max_bytes}) is smaller than one {m} x {n} "
            f"matrix of dtype {x.dtype}, which takes {bytes_each} bytes: raise it."
        )
    whole, rest = divmod(b, at_once)
    if whole < 2 and not (whole and rest):
        return _called(f, x)
    head = x[: whole * at_once].reshape(whole, at_once, m, n)
    head = jax.lax.map(lambda piece: _called(f, piece), head).reshape(-1, m, n)
    if not rest:
        return head
    return jnp.concatenate([head, _called(f, x[whole * at_once :])])


def _called(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    out = f(x)
    if out.shape != x.shape:
        raise ValueError(
            f"The function mapped over matrices turned a stack of shape {x.shape} into "
            f"{out.shape}; it must keep the shape."
        )
    return out
