"""Scale every matrix of an update by a function of its shape."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax.internal.components import check_rule
from orthax.internal.execution import by_compiler
from orthax.transforms._stateless import stateless


@runtime_checkable
class ShapeRule(Protocol):
    """A scale factor from the shape of a matrix; a frozen dataclass, not callable."""

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor.

        Args:
          fan_in: rows of the matrix, parameters of a component.
          fan_out: columns of the matrix, components.
          taps: spatial positions of a convolution kernel; 1 for dense layers.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Width:
    """`sqrt(max(1, fan_out / fan_in))`, as in Muon and `optax.contrib.muon`.

    Example:
      >>> from orthax import transforms
      >>> transforms.Width().factor(fan_in=4, fan_out=16, taps=1)
      2.0

    References:
      Jordan: "Muon", 2024, https://kellerjordan.github.io/posts/muon.
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(max(1.0, fan_out / fan_in))


@dataclasses.dataclass(frozen=True)
class Spectral:
    """`sqrt(fan_out / fan_in)`: the RMS-to-RMS operator norm of the update is one.

    Example:
      >>> from orthax import transforms
      >>> transforms.Spectral().factor(fan_in=16, fan_out=4, taps=1)
      0.5

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

    Example:
      >>> from orthax import transforms
      >>> transforms.MaxDim().factor(fan_in=16, fan_out=4, taps=1)
      4.0

    References:
      Liu et al.: "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982, Lemma 1.
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(max(fan_out, fan_in))


@dataclasses.dataclass(frozen=True)
class RMSMatch:
    """`rms * sqrt(max(fan_out, fan_in))`: entries as large as AdamW's.

    AdamW's learning rate and weight decay are then a safe start, though rarely the best
    (see the documentation's page on learning rates).

    Attributes:
      rms: root mean square of the entries of a full-rank update, dimensionless; 0.2 is
        what the paper measured for AdamW.

    Raises:
      ValueError: if `rms` is not finite and positive.

    Example:
      >>> from orthax import transforms
      >>> transforms.RMSMatch(0.5).factor(fan_in=16, fan_out=4, taps=1)
      2.0

    References:
      Liu et al. 2025, arXiv 2502.16982, equation (4).
    """

    rms: float = 0.2

    def __post_init__(self):
        if not 0 < self.rms < math.inf:
            raise ValueError(f"`rms` must be finite and positive, got {self.rms}.")

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return self.rms * math.sqrt(max(fan_out, fan_in))


@dataclasses.dataclass(frozen=True)
class ConvSpectral:
    """`sqrt(channels_out / channels_in) / taps`: `Spectral` for convolutions.

    A convolution sums over its spatial positions, so its RMS-to-RMS norm is at most the
    sum of theirs. For dense layers this is `Spectral`.

    Example:
      >>> from orthax import transforms
      >>> transforms.ConvSpectral().factor(fan_in=4 * 4, fan_out=4, taps=4)
      0.25

    References:
      Pethick et al.: "Training Deep Learning Models with Norm-Constrained LMOs", 2025,
      arXiv 2502.07529, Table 2 (Scion).
    """

    def factor(self, fan_in: int, fan_out: int, taps: int) -> float:
        """Return the factor of one matrix."""
        return math.sqrt(fan_out / (fan_in / taps)) / taps


def scale_by_shape(
    scale: ShapeRule = Width(), *, rule: components.RuleOrTree = components.ByName()
) -> optax.GradientTransformationExtraArgs:
    """Scale every matrix by a function of its fan-in and fan-out.

    The fans are those of the matrices that `rule` gives: of a whole convolution kernel,
    of one head with `attention="per_head"`, of one expert.

    Args:
      scale: `Width()`, `Spectral()`, `MaxDim()`, `RMSMatch()`, `ConvSpectral()`, or a
        frozen dataclass of your own with the method `factor`.
      rule: how leaves form matrices; the same as for `orthogonalise`.

    Returns:
      A stateless transformation.

    Raises:
      TypeError: if `scale` is not a shape rule.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none.

    Limits:
      The stated norms are those of full-rank updates of spectral norm one; updates of
      lower rank are smaller.

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
    rule = check_rule(rule)
    if isinstance(scale, type) or not isinstance(scale, ShapeRule):
        raise TypeError(
            "`scale` must be a shape rule such as transforms.Width() or "
            f"transforms.RMSMatch(0.2), got {scale!r}; a constant factor is "
            "optax.scale(0.2)."
        )

    def scaled(leaf: components.Leaf) -> jax.Array:
        x, cut = jnp.asarray(leaf.value), leaf.cut
        taps = cut.taps(x.shape)
        # Python numbers keep the dtype; numpy's would not.
        factors = [float(scale.factor(m, n, taps)) for _, m, n in cut.matrices(x.shape)]
        if len(set(factors)) == 1:
            return x * factors[0]

        def each(x: jax.Array) -> tuple[jax.Array, ...]:
            stacks = zip(cut.fold(x), factors, strict=True)
            return (cut.unfold([s * factor for s, factor in stacks], x.shape),)

        return by_compiler(each, [x])(x)[0]

    def update(updates: optax.Updates) -> optax.Updates:
        leaves = components.resolve(updates, rule)
        values = [scaled(leaf) if leaf.cut else leaf.value for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(updates), values)

    return stateless(update, rule)
