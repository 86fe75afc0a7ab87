"""Updates in proportion to the weights, and weights that keep their norm."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax._linalg import working
from orthax.internal.components import check_rule
from orthax.internal.execution import along_axes
from orthax.transforms._norm import frobenius

Axes = tuple[int, ...]


def scale_to_weights(
    *, rule: components.RuleOrTree = components.ByName()
) -> optax.GradientTransformationExtraArgs:
    r"""Scale every matrix of the update to the Frobenius norm of its weight.

    $U \leftarrow U \|W\|_F / \|U\|_F$, so that the learning rate that follows is the
    relative change of the weight. Unlike `optax.scale_by_trust_ratio`, per matrix: per
    expert, per head, as the rule says. Before the learning rate.

    Args:
      rule: how leaves form matrices; other leaves pass through unchanged.

    Returns:
      A stateless transformation; `update` needs `params`.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none; from `update`, without `params`.

    Limits:
      A zero update stays zero. The update of a zero weight is unchanged. NaN in a
      matrix stays in it. Norms overflow where squared entries do (1e19 in float32).

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import transforms
      >>> tx = transforms.scale_to_weights()
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> updates = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
      >>> tx.update(updates, tx.init(params), params)[0]["kernel"].tolist()
      [[0.0, 5.0], [0.0, 0.0]]

    References:
      Wen et al.: "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
      Optimization", 2026, arXiv 2606.16899.
    """

    def scaled(w: jax.Array, u: jax.Array, axes: Axes) -> jax.Array:
        size, norm = frobenius(w, axes), frobenius(u, axes)
        ratio = size / jnp.where(norm == 0, 1, norm)
        return u * jnp.where(size == 0, 1, ratio)

    return _with_weights(scaled, rule)


def on_sphere(
    *, rule: components.RuleOrTree = components.ByName()
) -> optax.GradientTransformationExtraArgs:
    r"""Change the update of every matrix such that its weight keeps its norm.

    Returns $\|W\|_F (W + U) / \|W + U\|_F - W$ for an update U. Last in the chain,
    after the learning rate, and instead of weight decay, which would have no effect.

    Args:
      rule: how leaves form matrices; other leaves pass through unchanged.

    Returns:
      A stateless transformation; `update` needs `params`. The norm is that of the
      current weight, so that there is nothing to store or to restore.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none; from `update`, without `params`.

    Limits:
      Zero weights are free: they take the update unchanged, and keep the norm that it
      gives them. If W + U is zero, the weight stays. In 1,000 steps in float32 the norm
      drifted by 1e-7, and by 1e-6 where it has nine entries; with bfloat16 weights,
      whose entries are rounded to 8 bits, by 3e-3, and small updates are lost: keep
      float32 weights. NaN in a matrix stays in it. Norms overflow where squared entries
      do.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax import transforms
      >>> tx = transforms.on_sphere()
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> updates = {"kernel": jnp.array([[-3.0, 0.0], [0.0, 0.0]])}
      >>> updates, _ = tx.update(updates, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, 0.0], [0.0, 5.0]]

    References:
      Wen et al. 2026, arXiv 2606.16899.
    """

    def restored(w: jax.Array, u: jax.Array, axes: Axes) -> jax.Array:
        size, norm = frobenius(w, axes), frobenius(w + u, axes)
        # |W + U|^2 / |W|^2 - 1 is small, and so is its rounding error, without which
        # the norm would drift; unless U nearly cancels W.
        change = jnp.sum(_product(u, 2 * w + u), axis=axes, keepdims=True)
        change = change / jnp.where(size == 0, 1, size) ** 2
        excess = jnp.where(
            change > -0.5,
            jnp.expm1(-jnp.log1p(jnp.maximum(change, -0.5)) / 2),
            size / jnp.where(norm == 0, 1, norm) - 1,
        )
        kept = jnp.where(norm == 0, 0, u + excess * (w + u))
        return jnp.where(size == 0, u, kept)

    return _with_weights(restored, rule)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.real * b.real + a.imag * b.imag


def _with_weights(
    f: Callable[[jax.Array, jax.Array, Axes], jax.Array], rule: components.RuleOrTree
) -> optax.GradientTransformationExtraArgs:
    """Return the stateless transformation that maps weights and updates by `f`."""
    rule = check_rule(rule)

    def changed(rows: Axes, columns: Axes, u: jax.Array, w: jax.Array) -> jax.Array:
        return f(working(w), working(u), rows + columns).astype(u.dtype)

    def init(params: optax.Params) -> optax.EmptyState:
        components.resolve(params, rule)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("`params` are needed: tx.update(updates, state, params).")
        leaves = components.resolve(updates, rule)
        weights = jax.tree.structure(updates).flatten_up_to(params)
        values = [
            along_axes(changed, leaf.cut, jnp.asarray(leaf.value), jnp.asarray(weight))
            if leaf.cut
            else leaf.value
            for leaf, weight in zip(leaves, weights, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), values), state

    return optax.GradientTransformationExtraArgs(init, update)
