"""Products at the precision that a method asks for."""

import dataclasses

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, matmul, over

# Short side from which `precision="high"` splits the factors of products. Smaller
# matrices cost launches, not operations, and average less rounding away.
_SPLIT_FROM = 192


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of matrices: see `dtype` and `precision` of `polar.NewtonSchulz`."""

    dtype: str | None
    precision: jax.lax.Precision

    @property
    def exact(self) -> bool:
        """Whether products are as accurate as the dtype of the matrices allows."""
        return self.dtype is None and self.precision == jax.lax.Precision.HIGHEST

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if self._splits(a) and self._splits(b):
            return _split_matmul(a, b)
        if self.dtype is None:
            exact = self.precision == jax.lax.Precision.HIGH and a.dtype == jnp.float32
            precision = jax.lax.Precision.HIGHEST if exact else self.precision
            return matmul(a, b, precision)
        out = a.dtype
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        return matmul(a, b, self.precision, out).astype(out)

    def gram(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        wide = bool(axes) or x.shape[-2] <= x.shape[-1]
        if self._splits(x):
            gram = _split_gram(x, wide)
        elif wide:
            gram = self.matmul(x, adjoint(x))
        else:
            gram = self.matmul(adjoint(x), x)
        return over(axes, jax.lax.psum, gram)

    def apply(
        self, p: jax.Array, a: jax.Array, x: jax.Array, axes: tuple[str, ...] = ()
    ) -> jax.Array:
        """Return `(p + a I) X`, on the side of X that is short."""
        if self.exact:
            p, a = p + a * jnp.eye(p.shape[-1], dtype=p.dtype)[None], None
        y = self.times(p, x, axes)
        # Rounded inputs would lose the small singular values that `a` lifts.
        return y if a is None else y + a * x

    def times(
        self, p: jax.Array, x: jax.Array, axes: tuple[str, ...] = ()
    ) -> jax.Array:
        wide = bool(axes) or x.shape[-2] <= x.shape[-1]
        return self.matmul(p, x) if wide else self.matmul(x, p)

    def _splits(self, x: jax.Array) -> bool:
        high = self.precision == jax.lax.Precision.HIGH and self.dtype is None
        return high and x.dtype == jnp.float32 and min(x.shape[-2:]) >= _SPLIT_FROM


def _split_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product of two batches by three products of their parts.

    The fourth, of the two low parts, makes no difference to polar factors of matrices
    with short sides of 192 and more (`benchmarks/README.md`).
    """
    (a_high, a_low), (b_high, b_low) = _parts(a), _parts(b)
    return _product(a_high, b_high) + _product(a_high, b_low) + _product(a_low, b_high)


def _split_gram(x: jax.Array, wide: bool) -> jax.Array:
    """Return `x x^T`, or `x^T x` if not `wide`, by two products of the parts of `x`.

    The two mixed products are transposes of each other.
    """
    high, low = _parts(x)
    if wide:
        square, mixed = _product(high, high.mT), _product(high, low.mT)
    else:
        square, mixed = _product(high.mT, high), _product(high.mT, low)
    return square + mixed + mixed.mT


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
