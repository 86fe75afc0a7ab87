"""Scale every matrix of an update by a factor of its shape."""

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
          taps: taps of a convolution kernel among `fan_in`; 1 for dense layers.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Width:
    """`sqrt(max(1, fan_out / fan_in))`: what Muon and `optax.contrib.muon` do.

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
    """`sqrt(fan_out / fan_in)`: the update has spectral norm one from RMS to RMS.

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

    Learning rates and weight decays tuned for AdamW carry over.

    Attributes:
      rms: root mean square of the entries of a full-rank update, dimensionless; 0.2 is
        what the paper measured for AdamW.

    Raises:
      TypeError: if `rms` is not a Python number.
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
    rule = check_rule(rule)
    if isinstance(scale, type) or not isinstance(scale, ShapeRule):
        advice = ""
        if isinstance(scale, type):
            advice = f" Write {scale.__name__}()."
        elif isinstance(scale, int | float):
            advice = f" For one factor write optax.scale({scale})."
        raise TypeError(
            "`scale` must be a shape rule such as transforms.Width() or "
            f"transforms.RMSMatch(0.2), got {scale!r}.{advice}"
        )

    def scaled(leaf: components.Leaf) -> jax.Array:
        x, cut = jnp.asarray(leaf.value), leaf.cut
        taps = cut.taps(x.shape)
        # Python numbers, which leave the dtype alone, as numpy's would not.
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
