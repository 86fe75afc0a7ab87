"""The exact polar factor, by the QR-weighted dynamic Halley iteration."""

import dataclasses

import jax
import jax.numpy as jnp

from orthax import _linalg
from orthax.polar._method import PolarMethod, sides


@dataclasses.dataclass(frozen=True)
class QDWH(PolarMethod):
    """Exact polar factors, by JAX's QR-weighted dynamic Halley iteration (QDWH).

    The most accurate method for full-rank matrices, of any aspect ratio.

    Attributes:
      max_iterations: most iterations of `jax.lax.linalg.qdwh`; float32 needs about six.

    Raises:
      ValueError: if `max_iterations` is not a positive integer.

    Limits:
      Completes the null space with arbitrary directions, of length anywhere in [0, 1];
      a zero matrix gives zero. A `while_loop` inside: the slowest matrix of a stack
      decides on an accelerator. Slow to compile. Inside `jax.shard_map` it needs
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
        if not isinstance(self.max_iterations, int) or self.max_iterations < 1:
            raise ValueError(
                "`max_iterations` must be a positive integer, got "
                f"{self.max_iterations!r}."
            )

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of a stack, `(b, m, n)`."""
        wide = x.shape[-2] < x.shape[-1]
        tall = x.mT if wide else x
        zero = jnp.all(tall == 0, axis=(-2, -1), keepdims=True)
        # A zero matrix would divide zero by zero inside; any other stands in for it.
        stand_in = jnp.eye(*tall.shape[-2:], dtype=x.dtype)
        u = _linalg.qdwh(jnp.where(zero, stand_in, tall), self.max_iterations)
        u = jnp.where(zero, 0, u)
        return u.mT if wide else u

    def flops(self, m: int, n: int) -> float:
        """Return about `6 (4 k^2 l + 7/3 k^3)`: six Cholesky-based iterations.

        A lower bound: ill-conditioned matrices begin with QR-based iterations, which
        cost about twice as much (Nakatsukasa, Higham 2013, Section 5).
        """
        short, long = sides(m, n)
        return 6 * (4.0 * short**2 * long + 7 / 3 * short**3)
