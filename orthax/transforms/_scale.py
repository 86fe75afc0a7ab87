"""Scale every matrix of an update by what its shape, or its input, says."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax.transforms._stateless import stateless


@runtime_checkable
class ShapeRule(Protocol):
    """A scale factor from the shape of a matrix; a frozen dataclass, not callable."""

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor.

        Args:
          fan_in: rows of the matrix, parameters of a component.
          fan_out: columns of the matrix, components.
          taps: taps of a convolution kernel among `fan_in`; 1 for dense layers.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Width:
    """`sqrt(max(1, fan_out / fan_in))`: what Muon and `optax.contrib.muon` do.

    References:
      Jordan: "Muon", 2024, https://kellerjordan.github.io/posts/muon.
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(max(1.0, fan_out / fan_in))


@dataclasses.dataclass(frozen=True)
class Spectral:
    """`sqrt(fan_out / fan_in)`: the update has spectral norm one from RMS to RMS.

    References:
      Yang, Simon, Bernstein: "A Spectral Condition for Feature Learning", 2023, arXiv
      2310.17813, Condition 1.
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(fan_out / fan_in)


@dataclasses.dataclass(frozen=True)
class MaxDim:
    """`sqrt(max(fan_out, fan_in))`: entries of root mean square one at full rank.

    References:
      Liu et al.: "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982, Lemma 1.
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(max(fan_out, fan_in))


@dataclasses.dataclass(frozen=True)
class RMSMatch:
    """`rms * sqrt(max(fan_out, fan_in))`: entries as large as AdamW's.

    Learning rates and weight decays tuned for AdamW carry over.

    Attributes:
      rms: root mean square of the entries of a full-rank update, dimensionless; 0.2 is
        what the paper measured for AdamW.

    Raises:
      TypeError: if `rms` is not a Python number.
      ValueError: if `rms` is not finite and positive.

    References:
      Liu et al. 2025, arXiv 2502.16982, equation (4).
    """

    rms: float = 0.2

    def __post_init__(self):
        if isinstance(self.rms, bool) or not isinstance(self.rms, int | float):
            raise TypeError(f"`rms` must be a Python number, got {self.rms!r}.")
        if not (math.isfinite(self.rms) and self.rms > 0):
            raise ValueError(f"`rms` must be finite and positive, got {self.rms}.")

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return self.rms * math.sqrt(max(fan_out, fan_in))


@dataclasses.dataclass(frozen=True)
class ConvSpectral:
    """`sqrt(channels_out / channels_in) / taps`: `Spectral` for convolutions.

    A convolution sums over its taps, so its norm from RMS to RMS is at most the sum of
    the norms of its taps. For dense layers the same as `Spectral`.

    References:
      Pethick et al.: "Training Deep Learning Models with Norm-Constrained LMOs", 2025,
      arXiv 2502.07529, Table 2 (Scion).
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(fan_out / (fan_in / taps)) / taps


def scale_by_shape(
    scale: ShapeRule = Width(), *, rule: components.Rule = components.ByName()
) -> optax.GradientTransformationExtraArgs:
    """Scale every matrix by a factor of its fan-in and fan-out.

    The fans are those of the matrices that `rule` cuts: of a whole convolution kernel,
    of one head where attention is cut by head, of one expert.

    Args:
      scale: which factor: `Width`, `Spectral`, `MaxDim`, `RMSMatch`, `ConvSpectral`,
        or an own dataclass with the method `factor`.
      rule: how leaves are cut into matrices; the same as for `orthogonalise`.

    Returns:
      A stateless transformation.

    Raises:
      TypeError: if `scale` is no shape rule, or `rule` no rule.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none.

    Limits:
      The factor is exact for full-rank updates of spectral norm one; an update of
      lower rank comes out smaller.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> tx = orthax.scale_by_shape(orthax.transforms.Spectral())
      >>> updates = {"kernel": jnp.ones((4, 16)), "bias": jnp.ones(16)}
      >>> scaled, _ = tx.update(updates, tx.init(updates))
      >>> float(scaled["kernel"][0, 0]), float(scaled["bias"][0])
      (2.0, 1.0)

    References:
      See each rule.
    """
    components.check_rule(rule)
    if isinstance(scale, type) or not isinstance(scale, ShapeRule):
        raise TypeError(
            "`scale` must be a shape rule such as transforms.Width() or "
            f"transforms.RMSMatch(0.2), got {scale!r}."
        )

    def scaled(leaf: components.Leaf) -> jax.Array:
        x, cut = jnp.asarray(leaf.value), leaf.cut
        taps = cut.taps(x.shape)
        stacks = [s * scale.factor(*s.shape[1:], taps) for s in cut.fold(x)]
        return cut.unfold(stacks, x.shape)

    def update(updates: optax.Updates) -> optax.Updates:
        leaves = components.resolve(updates, rule)
        values = [scaled(leaf) if leaf.cut else leaf.value for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(updates), values)

    return stateless(update, rule)


@dataclasses.dataclass(frozen=True)
class OriginalNorm:
    """Give the update the Frobenius norm of its input, matrix by matrix."""

    def factor(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Return one factor for each matrix of a stack, `(b, 1, 1)`."""
        norm = _frobenius(after)
        return jnp.where(norm > 0, _frobenius(before) / jnp.where(norm > 0, norm, 1), 1)


@dataclasses.dataclass(frozen=True)
class NuclearNorm:
    """Multiply the update by its inner product with its input, matrix by matrix.

    For the exact polar factor this is the nuclear norm of the input, and the result is
    the steepest-descent step in the spectral norm.

    References:
      Bernstein, Newhouse: "Old Optimizer, New Norm: An Anthology", 2024, arXiv
      2409.20325, Proposition 5.
    """

    def factor(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Return one factor for each matrix of a stack, `(b, 1, 1)`."""
        inner = before.real * after.real + before.imag * after.imag
        return jnp.sum(inner, axis=(-2, -1), keepdims=True)


def restore_norm(
    inner: optax.GradientTransformation,
    norm: OriginalNorm | NuclearNorm = OriginalNorm(),
    *,
    rule: components.Rule = components.ByName(),
) -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation, and give its update a size taken from its input.

    `restore_norm(orthogonalise())` keeps the size of the gradient, which
    `orthogonalise` discards, and with it a step that shrinks near a minimum.

    Args:
      inner: the transformation, usually `orthogonalise(...)`.
      norm: `OriginalNorm()` or `NuclearNorm()`.
      rule: how leaves are cut into matrices; the same as for `inner`.

    Returns:
      A transformation with the state of `inner`.

    Raises:
      TypeError: if `inner` is no transformation, `norm` no norm rule, `rule` no rule.
      ValueError: from `update`, if the rule cannot decide a leaf or cuts none.

    Limits:
      Norms are computed in float32 at least; they overflow where the squared entries
      of the input do (1e19 in float32).

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> tx = orthax.transforms.restore_norm(orthax.orthogonalise())
      >>> grads = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"].round(4).tolist()  # both singular values alike, norm 5
      [[3.5355, 0.0], [0.0, 3.5355]]
    """
    components.check_rule(rule)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be a gradient transformation such as "
            f"orthax.orthogonalise(), got {inner!r}."
        )
    if isinstance(norm, type) or not hasattr(norm, "factor"):
        raise TypeError(
            f"`norm` must be OriginalNorm() or NuclearNorm(), got {norm!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def restored(before: components.Leaf, after: Any) -> jax.Array:
        stacks = []
        for x, y in zip(
            before.cut.fold(before.value), before.cut.fold(after), strict=True
        ):
            work = jnp.promote_types(y.dtype, jnp.float32)
            factor = norm.factor(x.astype(work), y.astype(work))
            stacks.append((factor * y).astype(y.dtype))
        return before.cut.unfold(stacks, after.shape)

    def update(updates, state, params=None, **extra_args):
        after, state = inner.update(updates, state, params, **extra_args)
        values = [
            restored(leaf, y) if leaf.cut else y
            for leaf, y in zip(
                components.resolve(updates, rule), jax.tree.leaves(after), strict=True
            )
        ]
        return jax.tree.unflatten(jax.tree.structure(after), values), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _frobenius(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
