"""Exact polar factors by the QR-based dynamically weighted Halley iteration."""

import dataclasses

import jax
import jax.numpy as jnp

from orthax import _linalg
from orthax.polar._method import PolarMethod, check_positive_or_none, sides


@dataclasses.dataclass(frozen=True)
class QDWH(PolarMethod):
    """Exact polar factors by `jax.lax.linalg.qdwh`, dynamically weighted Halley steps.

    The most accurate method for full-rank matrices of any aspect ratio.

    Attributes:
      max_iterations: maximum number of iterations; float32 needs about six.

    Raises:
      ValueError: if `max_iterations` is not positive.

    Limits:
      Completes the null space with arbitrary directions, of length anywhere in [0, 1];
      a zero matrix gives zero. It is a `while_loop`: on an accelerator a batch takes as
      long as its slowest matrix. Slow to compile. Inside `jax.shard_map` it needs
      `check_vma=False`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jnp.array([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
      >>> jnp.abs(polar.polar_factor(x, polar.QDWH())).round(5).tolist()
      [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]

    References:
      Nakatsukasa, Bai, Gygi: "Optimizing Halley's iteration for computing the matrix
      polar decomposition", SIAM J. Matrix Anal. Appl. 31(5), 2010.
    """

    max_iterations: int = 10

    def __post_init__(self):
        check_positive_or_none("max_iterations", self.max_iterations)

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of a batch, `(b, m, n)`."""
        wide = x.shape[-2] < x.shape[-1]
        tall = x.mT if wide else x
        zero = jnp.all(tall == 0, axis=(-2, -1), keepdims=True)
        # A zero matrix would lead to 0 / 0; compute the factor of another instead.
        other = jnp.eye(*tall.shape[-2:], dtype=x.dtype)
        u = _linalg.qdwh(jnp.where(zero, other, tall), self.max_iterations)
        u = jnp.where(zero, 0, u)
        return u.mT if wide else u

    def flops(self, m: int, n: int) -> float:
        """Return about `6 (4 k^2 l + 7/3 k^3)`: six Cholesky-based iterations.

        A lower bound: ill-conditioned matrices begin with QR-based iterations, which
        cost about twice as much (Nakatsukasa, Higham 2013, Section 5).
        """
        short, long = sides(m, n)
        return 6 * (4.0 * short**2 * long + 7 / 3 * short**3)
