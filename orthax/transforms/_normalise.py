"""The paper's two baselines, which normalise gradients without orthogonalising."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax._linalg import working
from orthax.internal.components import check_rule
from orthax.internal.execution import along_axes
from orthax.transforms._axis import check_axis, reduced_axes
from orthax.transforms._stateless import stateless


def normalise(
    *, rule: components.RuleOrTree = components.ByName(), safe: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Divide every gradient matrix by its Frobenius norm (N-SGD, "per tensor").

    Args:
      rule: how leaves form matrices; other leaves pass through unchanged.
      safe: whether zero stays zero and the result is exact at every scale. `False`
        divides plainly, as the authors' code does: a zero gradient gives NaN.

    Returns:
      A stateless transformation.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none.

    Limits:
      NaN or infinity in a matrix gives NaN in all of it, and in no other.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> tx = orthax.normalise()
      >>> grads = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"].round(4).tolist()
      [[0.6, 0.0], [0.0, 0.8]]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 3.1 (N-SGDM).
    """
    return _divided(rule, safe, None)


def normalise_components(
    *,
    axis: str = "columns",
    rule: components.RuleOrTree = components.ByName(),
    safe: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Divide the gradient of every component by its Euclidean norm (CN-SGD).

    A component is a column of the P x N gradient matrix: a filter, a unit. Before
    `orthogonalise` this equilibrates its input (MuonEq), after it the output (Muon+).

    Args:
      axis: which vectors are divided by their norms: `"columns"`, the components;
        `"rows"`; or `"short"`, the rows of tall matrices and the columns of others,
        whose norms differ even in a polar factor.
      rule: how leaves form matrices; other leaves pass through unchanged.
      safe: whether zero stays zero and the result is exact at every scale. `False`
        divides plainly, as the authors' code does: a component without gradient, such
        as an output class that never occurs, gives NaN, which may explain the
        divergence in the paper's Table 4.

    Returns:
      A stateless transformation.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: for an unknown `axis`; from `init` and `update`, if the rule cannot
        decide a leaf or cuts none.

    Limits:
      NaN or infinity in a component gives NaN in all of it, and in no other.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> tx = orthax.normalise_components()
      >>> grads = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"].round(4).tolist()
      [[0.6, 0.0], [0.8, 0.0]]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 3.1 and Table 4 (CN-SGDM);
      arXiv 2602.21545 (Muon+); arXiv 2603.28254 (MuonEq).
    """
    check_axis(axis)
    return _divided(rule, safe, axis)


def _divided(
    rule: components.Rule, safe: bool, axis: str | None
) -> optax.GradientTransformationExtraArgs:
    """Divide vectors along an axis, or whole matrices, by their norms."""
    rule = check_rule(rule)

    def divide(
        rows: tuple[int, ...], columns: tuple[int, ...], x: jax.Array
    ) -> jax.Array:
        axes = rows + columns
        if axis is not None:
            axes = reduced_axes(axis, rows, columns, x.shape)
        work = working(x)
        if safe:
            # First by the largest entry: squares of small entries would underflow.
            largest = jnp.max(jnp.abs(work), axis=axes, keepdims=True)
            work = work / jnp.where(largest == 0, 1, largest)
        square = jnp.sum(work.real**2 + work.imag**2, axis=axes, keepdims=True)
        norm = jnp.sqrt(square)
        return (work / (jnp.where(norm == 0, 1, norm) if safe else norm)).astype(
            x.dtype
        )

    def update(updates: optax.Updates) -> optax.Updates:
        leaves = components.resolve(updates, rule)
        values = [
            along_axes(divide, leaf.cut, jnp.asarray(leaf.value))
            if leaf.cut
            else leaf.value
            for leaf in leaves
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), values)

    return stateless(update, rule)
