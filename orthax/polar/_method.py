"""What a method is, and the steps that several of them share."""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class PolarMethod(Protocol):
    """A way to compute polar factors; a frozen dataclass, never a callable.

    `polar_factor` hands `factor` matrices that are ready: floating or complex of at
    least 32 bits, finite, each of Frobenius norm one or zero. Write your own by giving
    a frozen dataclass these two methods. Two attributes may follow: `any_scale = True`
    where `factor` takes matrices as they are, of any scale and perhaps not finite, and
    `fills_null_space = False` where it gives zeros for zeros, so that matrices may be
    padded. Two methods may follow, for several devices that share the long side of one
    matrix: `factor_split(x, axes)`, called inside `jax.shard_map` with what a device
    has of the columns, sharded over the named mesh axes; and `split_flops(m, n,
    devices)`, the operations of each device, how often an m x m matrix is summed over
    them, and how often a few numbers are, or None where it cannot be.
    """

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of `x`, shape and dtype of `x`, `(b, m, n)`."""
        ...

    def flops(self, m: int, n: int) -> float:
        """Return the leading-order operation count for one m x n matrix."""
        ...


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply two stacks at full precision, also where the default is lower."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def adjoint(x: jax.Array) -> jax.Array:
    """Return the conjugate transpose of every matrix of a stack."""
    return x.mT.conj() if jnp.iscomplexobj(x) else x.mT


def gram(
    x: jax.Array, axes: tuple[str, ...] = (), rows: int | None = None
) -> jax.Array:
    """Return the Gram matrix of the short side of every matrix of a stack.

    Where `axes` are given, that of the rows, with the columns sharded over them. Where
    `rows` are, it is the sum of those of so many along the long side, for short sides
    up to that: parts of one size are added with less rounding than one at a time.
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


def frobenius(x: jax.Array, axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array]:
    """Return two numbers for every matrix whose product is its norm, or one for zero.

    Of shape `(b, 1, 1)`; the second is NaN for a matrix that is not finite. The norm is
    summed three times at once, of the matrix as it is, scaled up and scaled down: in
    float32, squares of entries beyond 1e19 or below 1e-23 are out of range.
    """
    most = jnp.finfo(x.dtype).maxexp
    scales = [1.0, 2.0 ** (5 * most // 8), 2.0 ** (-5 * most // 8)]
    squares = [jnp.square(x.real * s) + jnp.square(x.imag * s) for s in scales]
    sums = [jnp.sum(square, axis=(-2, -1), keepdims=True) for square in squares]
    plain, small, large = over(axes, jax.lax.psum, jnp.stack(sums))
    cases = [plain < 2.0 ** (-most // 2), plain < 2.0 ** (3 * most // 4)]
    square = jnp.select(cases, [small, plain], large)
    scale = jnp.select(cases, [1 / s for s in (scales[1], scales[0])], 1 / scales[2])
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return scale.astype(norm.dtype), jnp.where(jnp.isfinite(large), norm, jnp.nan)


def over(
    axes: tuple[str, ...], reduce: Callable[..., jax.Array], x: jax.Array
) -> jax.Array:
    """Return `reduce(x, axes)` over the devices, or `x` where there are no axes."""
    return reduce(x, axes) if axes else x


def working_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype that matrices of a dtype are worked on in.

    Args:
      dtype: floating or complex.

    Returns:
      float32 for those below, else the same.

    Example:
      >>> from orthax import polar
      >>> polar.working_dtype("bfloat16").name, polar.working_dtype("complex64").name
      ('float32', 'complex64')
    """
    return jnp.promote_types(dtype, jnp.float32)


def rank_tolerance(shape: tuple[int, ...], dtype: jnp.dtype) -> float:
    """Return `max(m, n) eps`, numpy's and LAPACK's relative numerical rank."""
    return max(shape[-2:]) * float(jnp.finfo(dtype).eps)


def sides(m: int, n: int) -> tuple[int, int]:
    """Return the short and the long side."""
    return min(m, n), max(m, n)


def check_positive_or_none(name: str, value: float | None) -> None:
    """Raise unless `value` is None or a finite number above zero."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` must be a Python number or None, got {value!r} of type "
            f"{type(value).__name__}."
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be finite and positive, got {value}.")
