"""Apply a function to every matrix of a tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthax.components import ByName, RuleOrTree, resolve
from orthax.execution._costs import Factors, Work
from orthax.execution._execute import execute
from orthax.execution._mesh import mesh_of
from orthax.execution._stacking import Stacking


def map_matrices(
    work: Callable[[jax.Array], jax.Array] | Work | Factors,
    tree: Any,
    rule: RuleOrTree = ByName(),
    *,
    stacking: Stacking = Stacking(),
) -> Any:
    """Apply a function on batches of matrices to every matrix of a tree.

    Leaves are reshaped to matrices by the rule, matrices of equal shape and dtype are
    batched, the function is called once for each batch, and the results are reshaped
    back.

    Args:
      work: maps a batch `(b, m, n)` to one of equal shape, matrix by matrix; a `Work`
        also states what it costs and what may be batched.
      tree: floating or complex arrays in any pytree; other leaves are unchanged.
      rule: how leaves form matrices; other leaves are unchanged.
      stacking: how matrices are batched and divided among devices.

    Returns:
      A tree of equal structure, shapes and dtypes, sharded like `tree`.

    Raises:
      ValueError: as `components.resolve`, if the function changes the shape of a batch,
        or as `Stacking`.
      TypeError: as `components.resolve`.

    Limits:
      Batching copies: the matrices of a batch exist twice while the function runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import execution
      >>> grads = {"kernel": jnp.full((2, 3), 4.0), "bias": jnp.ones(3)}
      >>> halved = execution.map_matrices(lambda x: x / 2, grads)
      >>> float(halved["kernel"][0, 0]), float(halved["bias"][0])
      (2.0, 1.0)
    """
    if not isinstance(work, Work | Factors):
        work = Work(work)
    leaves = resolve(tree, rule)
    cut = [leaf for leaf in leaves if leaf.cut]
    results = iter(())
    if cut:
        xs = tuple(jnp.asarray(leaf.value) for leaf in cut)
        cuts = tuple(leaf.cut for leaf in cut)
        shardings = stacking.known(cut, mesh_of(xs))
        results = iter(execute(xs, work, cuts, stacking, shardings))
    values = [next(results) if leaf.cut else leaf.value for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), values)
