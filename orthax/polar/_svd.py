"""Exact polar factors by the thin singular value decomposition."""

import dataclasses

import jax
import jax.numpy as jnp

from orthax._linalg import matmul, thin_svd
from orthax.polar._method import (
    PolarMethod,
    check_positive_or_none,
    rank_tolerance,
    sides,
)

_NULL_SPACES = ("zero", "complete")


@dataclasses.dataclass(frozen=True)
class SVD(PolarMethod):
    r"""Exact polar factors by the thin singular value decomposition.

    $X = U \Sigma V^H$ gives $U V^H$. The paper's method, and the reference for the
    others.

    Attributes:
      null_space: what happens to directions whose singular value is at most `rank_tol`
        times the largest. `"zero"` drops them: the result is $U_r V_r^H$, the partial
        isometry of the polar decomposition, and a zero matrix gives zero. `"complete"`
        keeps all of $U V^H$, as the paper does; the factor is not unique there, and the
        completion is arbitrary and not reproducible.
      rank_tol: relative threshold of `"zero"`, dimensionless; default
        `max(m, n) * eps` of the dtype computed in, numpy's and LAPACK's numerical rank.

    Raises:
      ValueError: for an unknown `null_space`, a `rank_tol` that is not positive, or a
        `rank_tol` together with `"complete"`, where it has no effect.

    Limits:
      Two to three orders of magnitude slower than Newton-Schulz on accelerators, and
      slow to compile on TPU. A zero matrix gives a full orthonormal matrix under
      `"complete"`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jnp.diag(jnp.array([3.0, 2.0, 0.0]))
      >>> polar.polar_factor(x, polar.SVD()).diagonal().tolist()
      [1.0, 1.0, 0.0]

    References:
      Tuddenham, Pruegel-Bennett, Hare: "Orthogonalising gradients to speed up neural
      network optimisation", 2022, arXiv 2202.07052, equations (4) and (5). Higham:
      "Functions of Matrices", SIAM 2008, Theorem 8.1 (the partial isometry).
    """

    null_space: str = "zero"
    rank_tol: float | None = None

    def __post_init__(self):
        if self.null_space not in _NULL_SPACES:
            raise ValueError(
                f"`null_space` must be one of {_NULL_SPACES}, got {self.null_space!r}."
            )
        check_positive_or_none("rank_tol", self.rank_tol)
        if self.null_space == "complete" and self.rank_tol is not None:
            raise ValueError(
                '`rank_tol` has no effect with null_space="complete", which keeps '
                "every direction."
            )

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of a batch, `(b, m, n)`."""
        u, s, vh = thin_svd(x)
        if self.null_space == "zero":
            tol = self.rank_tol or rank_tolerance(x.shape, x.dtype)
            u = jnp.where((s > tol * s[:, :1])[:, None, :], u, 0)
        return matmul(u, vh)

    def flops(self, m: int, n: int) -> float:
        """Return about `6 k^2 l + 20 k^3 + 2 k^2 l`, k the short and l the long side.

        Golub, Van Loan: "Matrix Computations", 4th edition, Figure 8.6.1 (R-SVD).
        """
        short, long = sides(m, n)
        return 8.0 * short**2 * long + 20.0 * short**3
