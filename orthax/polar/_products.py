"""Products with the short side of a matrix, and long sums in parts."""

import math

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, matmul, over
from orthax.polar._method import sides

# Terms of one part of a long sum. Kernels that add one term after another round more,
# the longer the sum is.
PART = 128


def gram(
    x: jax.Array, axes: tuple[str, ...] = (), rows: int | None = None
) -> jax.Array:
    """Return the Gram matrix of the short side of every matrix of a batch.

    With `axes`, the Gram matrix of the rows, with the columns sharded over those mesh
    axes. With `rows`, and a short side of at most that, the sum over the long side is
    taken in parts of that many rows, which rounds less.
    """
    wide = bool(axes) or x.shape[-2] <= x.shape[-1]
    short, long = x.shape[-2:] if wide else x.shape[:-3:-1]
    if rows is not None and short <= rows < long:
        product = _gram_in_parts(x, wide, -(-long // rows))
    else:
        product = matmul(x, adjoint(x)) if wide else matmul(adjoint(x), x)
    return over(axes, jax.lax.psum, product)


def _gram_in_parts(x: jax.Array, wide: bool, parts: int) -> jax.Array:
    b, m, n = x.shape
    short, long = sides(m, n)
    # Not more parts than rows in each; a few more than asked for where they divide.
    parts = min(parts, math.isqrt(long))
    parts = next((p for p in range(parts, 2 * parts) if long % p == 0), parts)
    pad = (0, -long % parts)
    if wide:
        x = jnp.pad(x, ((0, 0), (0, 0), pad)).reshape(b, short, parts, -1)
        x = x.swapaxes(1, 2).reshape(b * parts, short, -1)
        products = matmul(x, adjoint(x))
    else:
        x = jnp.pad(x, ((0, 0), pad, (0, 0))).reshape(b * parts, -1, short)
        products = matmul(adjoint(x), x)
    # A product adds them up faster than a sum does.
    ones = jnp.ones((b, 1, parts), x.dtype)
    return matmul(ones, products.reshape(b, parts, -1)).reshape(b, short, short)


def times(q: jax.Array, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Return the product of Q with the short side of X, matrix by matrix."""
    wide = axes or x.shape[-2] <= x.shape[-1]
    return matmul(q, x) if wide else matmul(x, q)


def matmul_in_parts(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a b`, summed in parts of `PART` terms.

    Small terms of one sign would be lost, one after another, in a long sum that is
    dominated by large ones.
    """
    k = a.shape[-1]
    if k <= PART:
        return matmul(a, b)
    parts = -(-k // PART)
    width = -(-k // parts)
    pad = (0, parts * width - k)
    a = jnp.pad(a, ((0, 0), (0, 0), pad))
    b = jnp.pad(b, ((0, 0), pad, (0, 0)))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        left = jax.lax.dynamic_slice_in_dim(a, i * width, width, 2)
        right = jax.lax.dynamic_slice_in_dim(b, i * width, width, 1)
        return total + matmul(left, right)

    return jax.lax.fori_loop(0, parts, add, 0 * b[:, :k])
