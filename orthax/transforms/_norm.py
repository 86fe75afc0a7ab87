"""Restore the norm of an update, which orthogonalising discards."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax._linalg import working_dtype
from orthax.internal.components import check_rule
from orthax.internal.execution import along_axes

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class OriginalNorm:
    """Rescale every matrix of the update to the Frobenius norm of its input.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import transforms
      >>> norm = transforms.OriginalNorm()
      >>> norm.factor(4 * jnp.eye(2), jnp.eye(2), (0, 1)).tolist()
      [[4.0]]
    """

    def factor(self, before: jax.Array, after: jax.Array, axes: Axes) -> jax.Array:
        """Return one factor for each matrix; `axes` are its axes, and are kept."""
        norm = frobenius(after, axes)
        ratio = frobenius(before, axes) / jnp.where(norm > 0, norm, 1)
        return jnp.where(norm > 0, ratio, 1)


@dataclasses.dataclass(frozen=True)
class NuclearNorm:
    """Multiply every matrix of the update by its inner product with its input.

    For the exact polar factor this is the nuclear norm of the input, and the result is
    the steepest-descent step in the spectral norm.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import transforms
      >>> norm = transforms.NuclearNorm()
      >>> norm.factor(4 * jnp.eye(2), jnp.eye(2), (0, 1)).tolist()
      [[8.0]]

    References:
      Bernstein, Newhouse: "Old Optimizer, New Norm: An Anthology", 2024, arXiv
      2409.20325, Proposition 5.
    """

    def factor(self, before: jax.Array, after: jax.Array, axes: Axes) -> jax.Array:
        """Return one factor for each matrix; `axes` are its axes, and are kept."""
        inner = before.real * after.real + before.imag * after.imag
        return jnp.sum(inner, axis=axes, keepdims=True)


def restore_norm(
    inner: optax.GradientTransformation,
    norm: OriginalNorm | NuclearNorm = OriginalNorm(),
    *,
    rule: components.RuleOrTree = components.ByName(),
) -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation and rescale its update by a norm of its input.

    `restore_norm(orthogonalise())` keeps the norm of the gradient, so that steps shrink
    near a minimum.

    Args:
      inner: the transformation, usually `orthogonalise(...)`.
      norm: `OriginalNorm()` or `NuclearNorm()`.
      rule: how leaves form matrices; the same as for `inner`.

    Returns:
      A transformation with the state of `inner`.

    Raises:
      TypeError: if `inner` is not a transformation.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none.

    Limits:
      Norms are computed in float32 or wider; they overflow where squared entries of
      the input do (1e19 in float32).

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> tx = orthax.transforms.restore_norm(orthax.orthogonalise())
      >>> grads = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"].round(4).tolist()  # both singular values alike, norm 5
      [[3.5355, 0.0], [0.0, 3.5355]]
    """
    rule = check_rule(rule)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be a gradient transformation such as "
            f"orthax.orthogonalise(), got {inner!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def restored(rows: Axes, columns: Axes, x: jax.Array, y: jax.Array) -> jax.Array:
        work = working_dtype(y.dtype)
        factor = norm.factor(x.astype(work), y.astype(work), rows + columns)
        return (factor * y.astype(work)).astype(y.dtype)

    def init(params):
        components.resolve(params, rule)
        return inner.init(params)

    def update(updates, state, params=None, **extra_args):
        after, state = inner.update(updates, state, params, **extra_args)
        values = [
            along_axes(restored, leaf.cut, jnp.asarray(leaf.value), y)
            if leaf.cut
            else y
            for leaf, y in zip(
                components.resolve(updates, rule), jax.tree.leaves(after), strict=True
            )
        ]
        return jax.tree.unflatten(jax.tree.structure(after), values), state

    return optax.GradientTransformationExtraArgs(init, update)


def frobenius(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sqrt(jnp.sum(x.real**2 + x.imag**2, axis=axes, keepdims=True))
