"""Rules that keep R itself and take steps along the covariance of z."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from orthax._linalg import matmul, norm
from orthax.decorrelation._rule import averaged, check_at_least_zero, check_number


class _Dense:
    """A rule whose state is R itself."""

    def init(self, features: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the identity, shape (features, features)."""
        return jnp.eye(features, dtype=dtype)

    def apply(self, state: jax.Array, x: jax.Array) -> jax.Array:
        """Return `x @ R.T`, shape (n, d)."""
        return matmul(x, state.T)

    def fold(self, state: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return `R.T @ kernel`, shape (d, out)."""
        return matmul(state.T, kernel)

    def matrix(self, state: jax.Array) -> jax.Array:
        """Return R."""
        return state


def _covariance_times(
    z: jax.Array, r: jax.Array, axis_name: Any | None
) -> tuple[jax.Array, jax.Array]:
    """Return `C R` and the diagonal of C, where C is the covariance of z.

    Associated as the shapes ask: with fewer samples than features C is never formed.
    """
    n, d = z.shape
    product = matmul(z.T, matmul(z, r)) / n if n < d else matmul(matmul(z.T, z) / n, r)
    return averaged((product, jnp.mean(z**2, axis=0)), axis_name)


@dataclasses.dataclass(frozen=True)
class Scaled(_Dense):
    r"""Decorrelation with a gain that keeps the norm of the samples.

    $R \leftarrow g R - \eta C g R$ with $C = \langle z z^T \rangle$, diagonal included,
    and $g = \langle \|x_n\| / \|z_n\| \rangle$. At the fixed point C is proportional to
    the identity: z is white, with about the norm of x.

    Attributes:
      learning_rate: $\eta$, in units of 1 / variance of the input; stable while it is
        well below one over the largest eigenvalue of C.

    Raises:
      TypeError: if `learning_rate` is not a Python number.
      ValueError: if it is not positive.

    Limits:
      Samples that R maps to zero, or that are zero, have no part in g. Rows of R whose
      feature of z is constant stay as they are: the gain would have them overflow.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> decorrelation.Scaled(1e-2).init(2, "float32").tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References:
      Ahmad: "Correlations Are Ruining Your Gradient Descent", 2024, arXiv 2407.10780.
      The rule of the experiments in the author's code; whether Algorithm 1 of the text
      says the same we could not confirm: a reconstruction. Two things differ from the
      code on purpose: the gain compares z with the centred x (the code, with the raw
      one), and C multiplies R from the left also for dense layers.
    """

    learning_rate: float

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return R after a step on centred samples x, shape (n, d)."""
        z = self.apply(state, x)
        before, after = (norm(a, 1) for a in (x, z))
        counted = (before > 0) & (after > 0)
        ratios = jnp.where(counted, before / jnp.where(counted, after, 1), 0)
        # Sums, not means: devices may count different numbers of samples.
        sums = averaged((jnp.sum(ratios), jnp.sum(counted)), axis_name)
        gain = jnp.where(
            sums[1] > 0, sums[0] / jnp.maximum(sums[1], 1).astype(x.dtype), 1
        )
        product, variances = _covariance_times(z, state, axis_name)
        alive = (variances > 0)[:, None]
        return jnp.where(alive, gain * (state - self.learning_rate * product), state)


@dataclasses.dataclass(frozen=True)
class OffDiagonal(_Dense):
    r"""Decorrelation by the off-diagonal covariance alone.

    $R \leftarrow R - \eta\, \mathrm{off}(C) R$. At the fixed point the features of z
    are uncorrelated; their variances are whatever they became.

    Attributes:
      learning_rate: $\eta$, in units of 1 / variance of the input.

    Raises:
      TypeError: if `learning_rate` is not a Python number.
      ValueError: if it is not positive.

    Limits:
      Nothing holds the scale: strongly correlated features lose most of theirs.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule = decorrelation.OffDiagonal(0.1)
      >>> x = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
      >>> rule.update(jnp.eye(2), x).round(2).tolist()
      [[1.0, -0.1], [-0.1, 1.0]]

    References:
      Ahmad, Schrader, van Gerven: "Constrained Parameter Inference as a Principle for
      Learning" (COPI), 2023, arXiv 2203.13203.
    """

    learning_rate: float

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return R after a step on centred samples x, shape (n, d)."""
        product, variances = _covariance_times(self.apply(state, x), state, axis_name)
        off = product - variances[:, None] * state
        return state - self.learning_rate * off


@dataclasses.dataclass(frozen=True)
class Local(_Dense):
    r"""The local form of `OffDiagonal`: a weight learns from what it connects.

    $R \leftarrow R - \eta R\, \mathrm{off}(C)$. The same matrix as `OffDiagonal` while
    R commutes with C (from R = I on one fixed covariance with equal variances), and
    the same fixed point: off(C) = 0 where R is invertible.

    Attributes:
      learning_rate: $\eta$, in units of 1 / variance of the input.

    Raises:
      TypeError: if `learning_rate` is not a Python number.
      ValueError: if it is not positive.

    Limits:
      As `OffDiagonal`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule, x = decorrelation.Local(0.1), jnp.array([[1.0, 1.0], [-1.0, -1.0]])
      >>> rule.update(jnp.eye(2), x).round(2).tolist()
      [[1.0, -0.1], [-0.1, 1.0]]

    References:
      Ahmad, Schrader, van Gerven 2023, arXiv 2203.13203: the biological form of the
      authors' code, a reconstruction.
    """

    learning_rate: float

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return R after a step on centred samples x, shape (n, d)."""
        z = self.apply(state, x)
        # R C = (C R^T)^T, as C is symmetric.
        product, variances = _covariance_times(z, state.T, axis_name)
        return state - self.learning_rate * (product.T - state * variances[None])


@dataclasses.dataclass(frozen=True)
class Whitening(_Dense):
    r"""Textbook whitening: $R \leftarrow R - \eta (C - I) R$, with C = I at the end.

    Attributes:
      learning_rate: $\eta$, dimensionless beside the identity; stable while `eta *
        (largest eigenvalue of C)` stays below one.

    Raises:
      TypeError: if `learning_rate` is not a Python number.
      ValueError: if it is not positive.

    Limits:
      Rows of R whose feature of z is constant stay as they are. Other directions
      without variance (linearly dependent features, more features than samples ever
      seen) are amplified by 1 + eta a step, until rounding has unit variance in them:
      `Polar` has a floor.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule, x = decorrelation.Whitening(0.1), jnp.array([[2.0], [-2.0]])
      >>> rule.update(jnp.eye(1), x).round(2).tolist()
      [[0.7]]

    References:
      Cardoso, Laheld: "Equivariant adaptive source separation", IEEE Transactions on
      Signal Processing 44, 1996 (the whitening part of the algorithm).
    """

    learning_rate: float

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return R after a step on centred samples x, shape (n, d)."""
        product, variances = _covariance_times(self.apply(state, x), state, axis_name)
        growth = jnp.where(variances[:, None] > 0, state, 0)
        return state - self.learning_rate * (product - growth)


@dataclasses.dataclass(frozen=True)
class Blended(_Dense):
    r"""Decorrelation blended with unit variance, of decorrelated backpropagation.

    $R \leftarrow R - \eta [(1 - \kappa)\, \mathrm{off}(C) R + \kappa\, \mathrm{diag}(v)
    R]$ with $v_i = \langle z_i^2 \rangle - 1$; normalised, the first term is divided by
    d - 1 and the second doubled. At the fixed point C = I for kappa between 0 and 1;
    for 0 only off(C) = 0, for 1 only the variances are one.

    Attributes:
      learning_rate: $\eta$, in units of 1 / variance of the input.
      kappa: $\kappa$, the share of the variances, 0 to 1, dimensionless.
      normalised: whether the terms are weighted by how many entries they have.

    Raises:
      TypeError: if a number is not a Python number.
      ValueError: if `learning_rate` is not positive or `kappa` not from 0 to 1.

    Limits:
      With kappa above 0, directions without variance as with `Whitening`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule, x = decorrelation.Blended(0.1, 0.5), jnp.array([[2.0], [-2.0]])
      >>> rule.update(jnp.eye(1), x).round(2).tolist()
      [[0.85]]

    References:
      Dalm, Offergeld, Ahmad, van Gerven: "Efficient Deep Learning with Decorrelated
      Backpropagation", 2024, arXiv 2405.02385: a reconstruction from the authors' code,
      which however scales column i of R by the error of variance i, and not row i.
    """

    learning_rate: float
    kappa: float = 1e-3
    normalised: bool = False

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)
        check_at_least_zero("kappa", self.kappa, 1)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return R after a step on centred samples x, shape (n, d)."""
        product, variances = _covariance_times(self.apply(state, x), state, axis_name)
        others = max(len(state) - 1, 1) if self.normalised else 1
        twice = 2 if self.normalised else 1
        off = (1 - self.kappa) / others * (product - variances[:, None] * state)
        errors = jnp.where(variances > 0, variances - 1, 0)
        scale = twice * self.kappa * errors[:, None] * state
        return state - self.learning_rate * (off + scale)
