"""What a method is, and the steps that several of them share."""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, frobenius, matmul, over


class PolarMethod(abc.ABC):
    """A way to compute polar factors: a frozen dataclass, never a callable.

    Write your own with the two methods that are abstract here. The rest are defaults.

    Attributes:
      any_scale: whether `factor` takes matrices as they are, of any scale and perhaps
        not finite. Else they are floating or complex of at least 32 bits, finite, each
        of Frobenius norm one or zero.
      fills_null_space: whether zero rows or columns may become something else; where
        they may not, matrices are padded to be worked on together.

    Example:
      >>> import dataclasses
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> @dataclasses.dataclass(frozen=True)
      ... class Sign(polar.PolarMethod):  # of 1 x 1 matrices
      ...     def factor(self, x):
      ...         return jnp.sign(x)
      ...     def flops(self, m, n):
      ...         return 1.0
      >>> polar.polar_factor(jnp.array([[-3.0]]), Sign()).item()
      -1.0
    """

    any_scale: ClassVar[bool] = False
    fills_null_space: ClassVar[bool] = True

    @abc.abstractmethod
    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of `x`, shape and dtype of `x`, `(b, m, n)`.

        Where `split_flops` gives something, called as `factor(x, axes)` too, inside
        `jax.shard_map`, with what a device has of the columns of wide matrices, sharded
        over the named mesh axes.
        """

    @abc.abstractmethod
    def flops(self, m: int, n: int) -> float:
        """Return the leading-order operation count for one m x n matrix."""

    def split_flops(
        self, m: int, n: int, devices: int
    ) -> tuple[float, int, int] | None:
        """Return what it costs several devices to share the long side of one matrix.

        The operations of each, how often an m x m matrix is summed over them, and how
        often a few numbers are; or None where it cannot be.
        """
        del m, n, devices
        return None

    def on(
        self, platform: str, dtype: jax.typing.DTypeLike = "float32"
    ) -> "PolarMethod":
        """Return what is used on a platform: `"cpu"`, `"gpu"`, `"tpu"` ..."""
        del platform, dtype
        return self


@dataclasses.dataclass(frozen=True)
class Own(PolarMethod):
    """A method that has `factor` and `flops` and is not derived from `PolarMethod`."""

    method: Any

    def __repr__(self) -> str:
        """Return what the method prints."""
        return repr(self.method)

    @property
    def any_scale(self) -> bool:
        return getattr(self.method, "any_scale", False)

    @property
    def fills_null_space(self) -> bool:
        return getattr(self.method, "fills_null_space", True)

    def factor(self, x: jax.Array) -> jax.Array:
        return self.method.factor(x)

    def flops(self, m: int, n: int) -> float:
        return self.method.flops(m, n)


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


def normalised(
    x: jax.Array, over_axes: tuple[str, ...] = ()
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Return every matrix with Frobenius norm one or zero, two divisors, finiteness.

    The factor does not depend on the divisors: derivatives take them for constants. A
    matrix that is not finite is replaced by zero, so that no iteration ever meets one.
    """
    divisors = jax.lax.stop_gradient(frobenius(x, over_axes))
    finite = jnp.isfinite(divisors[1])
    x = jnp.where(finite, x, 0)
    for divisor in divisors:
        x = x / jnp.where(finite, divisor, 1)
    return x, divisors, finite


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
