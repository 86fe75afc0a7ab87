"""The polar factor by the eigendecomposition of the small Gram matrix."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, eigh, matmul
from orthax.polar._method import (
    PolarMethod,
    check_positive_or_none,
    rank_tolerance,
    sides,
)
from orthax.polar._products import gram, times


@dataclasses.dataclass(frozen=True)
class GramEigh(PolarMethod):
    r"""Polar factors by the eigendecomposition of the Gram matrix of the short side.

    $X^H X = V \Lambda V^H$ gives $X V \Lambda^{-1/2} V^H$: two thin products and one
    small symmetric eigenproblem, the cheapest of the decompositions.

    Attributes:
      rank_tol: singular values of at most `rank_tol` times the largest are dropped,
        dimensionless; default the square root of `max(m, n) * eps`, below which the
        Gram matrix is rounding noise.

    Raises:
      ValueError: if `rank_tol` is not positive.

    Limits:
      The Gram matrix squares the condition number. In float32, a direction of relative
      singular value s has an error of about 1e-7 / s^2, and directions below the
      default `rank_tol` (about 8e-3 for a long side of 512) are dropped, to zero. Use
      `SVD` or `NewtonSchulz` where small singular values matter. A zero matrix gives
      zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jnp.array([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
      >>> polar.polar_factor(x, polar.GramEigh()).round(5).tolist()
      [[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]

    References:
      Higham: "Functions of Matrices", SIAM 2008, equation (8.3): the polar factor is
      $X (X^H X)^{-1/2}$.
    """

    fills_null_space: ClassVar[bool] = False

    rank_tol: float | None = None

    def __post_init__(self):
        check_positive_or_none("rank_tol", self.rank_tol)

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of a batch, `(b, m, n)`."""
        values, v = eigh(gram(x))
        tol = self.rank_tol or rank_tolerance(x.shape, x.dtype) ** 0.5
        kept = values > tol**2 * values[:, -1:]
        inverse = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)
        return times(matmul(v * inverse[:, None, :], adjoint(v)), x)

    def flops(self, m: int, n: int) -> float:
        """Return about `4 k^2 l + 11 k^3`, k the short and l the long side.

        Two thin products, one product of small matrices, and `9 k^3` for the
        eigenproblem (Golub, Van Loan, 4th edition, Section 8.3.3).
        """
        short, long = sides(m, n)
        return 4.0 * short**2 * long + 11.0 * short**3
