"""The one deep function: fold the leaves, call on stacks, unfold."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from orthax.components._by_name import ByName
from orthax.components._costs import Flops, Split
from orthax.components._rule import Rule
from orthax.components._sharded import mesh_of, over_devices
from orthax.components._stacking import Stacking
from orthax.components._tree import resolve


def _two_products(m: int, n: int) -> float:
    """Return the operations of two products of a matrix and its short side."""
    return 4.0 * m * n * min(m, n)


def map_matrices(
    f: Callable[[jax.Array], jax.Array],
    tree: Any,
    rule: Rule = ByName(),
    *,
    stacking: Stacking = Stacking(),
    commutes_with_transpose: bool = False,
    flops: Flops = _two_products,
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
      flops: operations of `f` for one m x n matrix, by which the work is divided where
        leaves lie on many devices; default `4 m n min(m, n)`.

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
    each = stacking.each(f, commutes_with_transpose=commutes_with_transpose)
    return map_stacks(each, tree, rule, stacking=stacking, flops=flops)


def map_stacks(
    f: Callable[[list[jax.Array]], Sequence[jax.Array]],
    tree: Any,
    rule: Rule = ByName(),
    *,
    stacking: Stacking = Stacking(),
    flops: Flops = _two_products,
    split: Split | None = None,
) -> Any:
    """Apply a function on all stacks of a tree at once.

    The plain form of `map_matrices`, for functions that stack what they like: leaves
    are folded as the rule says, `f` is called once with one stack for each leaf (or
    part of a fused one), and everything is put back.

    Args:
      f: maps a list of stacks `(b, m, n)` to as many of equal shapes and dtypes.
      tree: floating or complex arrays in any pytree; other leaves come back untouched.
      rule: how leaves are cut; leaves that it leaves alone come back untouched.
      stacking: on which devices they are worked on; `f` is then called with what one
        device works on, for several devices perhaps in several ways.
      flops: operations for one m x n matrix, as for `map_matrices`.
      split: how several devices share a matrix that is too large for one; default: they
        do not.

    Returns:
      A tree of equal structure, shapes and dtypes.

    Raises:
      ValueError: as `components.resolve`.
      TypeError: as `components.resolve`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> grads = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((4, 3))}}
      >>> shapes = []
      >>> _ = components.map_stacks(
      ...     lambda xs: [shapes.append(x.shape) or x for x in xs], grads
      ... )
      >>> shapes
      [(1, 2, 3), (1, 4, 3)]
    """
    leaves = resolve(tree, rule)
    cut = [leaf for leaf in leaves if leaf.cut]
    results = iter(())
    if cut:
        xs = tuple(jnp.asarray(leaf.value) for leaf in cut)
        cuts = tuple(leaf.cut for leaf in cut)
        shardings = stacking.known(cut, mesh_of(xs))
        costs = stacking.costs(flops, split)
        results = iter(over_devices(xs, f, cuts, costs, shardings))
    values = [next(results) if leaf.cut else leaf.value for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), values)
