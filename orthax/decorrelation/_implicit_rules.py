"""Rules that keep something else than R: its inverse, or a factor of few columns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from orthax._linalg import inverse, matmul, orthonormal
from orthax.decorrelation._rule import averaged, check_number


@dataclasses.dataclass(frozen=True)
class Lateral:
    r"""Lateral inhibition: features that excite together learn to inhibit each other.

    z solves $M z = x$, the resting state of $\dot z = x - M z$, so that R is the
    inverse of M, and $M \leftarrow M + \eta (C - I)$. At the fixed point C = I, and M
    is the square root of the covariance of x: zero-phase whitening.

    Attributes:
      learning_rate: $\eta$, in units of the input; stable near the fixed point while
        it is below the smallest standard deviation of x in any direction.

    Raises:
      TypeError: if `learning_rate` is not a Python number.
      ValueError: if it is not positive.

    Limits:
      The inverse of M in every forward pass. Where a feature of z is constant,
      M stays as it is. Other directions without variance lose `learning_rate` from M
      with every step: they are amplified until M is singular and batches are skipped.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule, x = decorrelation.Lateral(0.1), jnp.array([[2.0], [-2.0]])
      >>> rule.update(jnp.eye(1), x).round(2).tolist()
      [[1.3]]

    References:
      Földiák: "Adaptive network for optimal linear feature extraction", IJCNN 1989
      (lateral inhibition). Ahmad 2024, arXiv 2407.10780: an early rule of the author's
      code, without the identity: there M grows and z shrinks for ever, so we subtract
      it. A reconstruction.
    """

    learning_rate: float

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)

    def init(self, features: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return M = I, shape (features, features)."""
        return jnp.eye(features, dtype=dtype)

    def apply(self, state: jax.Array, x: jax.Array) -> jax.Array:
        """Return the solutions of `M z = x`, shape (n, d)."""
        return matmul(x, inverse(state).T)

    def fold(self, state: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return the solution of `M.T k = kernel`, shape (d, out)."""
        return matmul(inverse(state).T, kernel)

    def matrix(self, state: jax.Array) -> jax.Array:
        """Return the inverse of M."""
        return inverse(state)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return M after a step on centred samples x, shape (n, d)."""
        z = self.apply(state, x)
        covariance = averaged(matmul(z.T, z) / len(z), axis_name)
        target = jnp.diag(jnp.diag(covariance) > 0)
        return state + self.learning_rate * (
            covariance - target.astype(covariance.dtype)
        )


@dataclasses.dataclass(frozen=True)
class Factorised:
    r"""Decorrelation in a subspace: R = U U^T, with U of shape (d, k).

    $U \leftarrow U - \eta [(1 - \kappa) C U + 2 \kappa \bar v U]$, where $\bar v$ is
    the mean of $\langle z_i^2 \rangle - 1$ over the features. U starts with random
    orthonormal columns. At the fixed point C is $c$ on the range of U and zero besides,
    with $c = 2 \kappa / (1 - \kappa + 2 \kappa k / d)$. No d x d matrix is ever formed.

    Attributes:
      learning_rate: $\eta$, in units of 1 / variance of the input; stable near the
        fixed point while `eta * (1 - kappa) * c * sqrt(condition)` is below 2, with the
        condition number of the covariance of x in the range of U.
      kappa: $\kappa$, weight of the scale, above 0 (else z shrinks for ever), at most
        1, dimensionless.
      fraction: k / d, above 0, at most 1, dimensionless.
      seed: of the first U, where `fraction` is below 1; with 1, R starts at I.

    Raises:
      TypeError: if a number is not a Python number.
      ValueError: if a number is out of range.

    Limits:
      The update never leaves the range of U: what is orthogonal to it is lost in the
      forward pass, for good. Inputs of no variance in it are amplified without bound.

    Example:
      >>> from orthax import decorrelation
      >>> rule = decorrelation.Factorised(1e-3, kappa=0.5, fraction=0.25)
      >>> rule.init(8, "float32").shape
      (8, 2)

    References:
      Dalm, Offergeld, Ahmad, van Gerven 2024, arXiv 2405.02385: a reconstruction from
      the authors' code.
    """

    learning_rate: float
    kappa: float = 0.5
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_number("learning_rate", self.learning_rate)
        check_number("kappa", self.kappa, 1)
        check_number("fraction", self.fraction, 1)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"`seed` must be an integer, got {self.seed!r}.")

    def init(self, features: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return U with orthonormal columns, shape (features, k)."""
        k = max(1, round(self.fraction * features))
        if k == features:
            return jnp.eye(features, dtype=dtype)
        key = jax.random.key(self.seed)
        return orthonormal(jax.random.normal(key, (features, k), dtype))

    def apply(self, state: jax.Array, x: jax.Array) -> jax.Array:
        """Return `x @ U @ U.T`, shape (n, d)."""
        return matmul(matmul(x, state), state.T)

    def fold(self, state: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return `U @ U.T @ kernel`, shape (d, out)."""
        return matmul(state, matmul(state.T, kernel))

    def matrix(self, state: jax.Array) -> jax.Array:
        """Return `U @ U.T`."""
        return matmul(state, state.T)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return U after a step on centred samples x, shape (n, d)."""
        z = self.apply(state, x)
        step = matmul(z.T, matmul(z, state)) / len(z)
        step, variance = averaged((step, jnp.mean(z**2)), axis_name)
        scale = 2 * self.kappa * (variance - 1)
        return state - self.learning_rate * ((1 - self.kappa) * step + scale * state)
