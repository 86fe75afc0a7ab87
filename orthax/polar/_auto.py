"""The default method: what to use when nothing is asked for."""

import dataclasses

import jax

from orthax.polar._coefficients import polar_express
from orthax.polar._newton_schulz import NewtonSchulz

_TIERS = ("exact", "fast")


@dataclasses.dataclass(frozen=True)
class Auto:
    """The default: Newton-Schulz with optimal coefficients, chosen per platform.

    `"exact"` brings every singular value from 1e-3 of the Frobenius norm up to within
    1e-4 of one in float32; `"fast"`, for those who only need the direction (Muon), to
    within 0.15, with bfloat16 products on GPU and TPU. The choice is made when the
    program is lowered, so one program serves every platform.

    Attributes:
      accuracy: `"exact"` or `"fast"`.

    Raises:
      ValueError: for an unknown `accuracy`.

    Limits:
      Singular values below 1e-3 of the Frobenius norm end between -1e-3 and 1.001: a
      large square Gaussian matrix has some, use `SVD` where all of them must be one.
      Null directions stay below 1e-2 under `"exact"`; under `"fast"`, bfloat16 products
      leave noise of up to about 1e-1 in them. A zero matrix gives zero.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jax.random.normal(jax.random.key(0), (64, 16))
      >>> o = polar.polar_factor(x, polar.Auto())
      >>> bool(jnp.abs(o.T @ o - jnp.eye(16)).max() < 1e-4)
      True

    References:
      Amsel et al.: "The Polar Express", 2025, arXiv 2505.16932.
    """

    accuracy: str = "exact"

    def __post_init__(self):
        if self.accuracy not in _TIERS:
            raise ValueError(
                f"`accuracy` must be one of {_TIERS}, got {self.accuracy!r}."
            )

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of a stack, `(b, m, n)`."""
        if self.accuracy == "exact" or x.dtype != "float32":
            return self._full().factor(x)
        half = dataclasses.replace(self._full(), dtype="bfloat16")
        return jax.lax.platform_dependent(
            x, cpu=self._full().factor, default=half.factor
        )

    def flops(self, m: int, n: int) -> float:
        """Return the operations for one m x n matrix."""
        return self._full().flops(m, n)

    def _full(self) -> NewtonSchulz:
        """Return the method at the full precision of its input."""
        steps = None if self.accuracy == "exact" else 6
        return NewtonSchulz(polar_express(1e-3, steps))
