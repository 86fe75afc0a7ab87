"""The base class of polar methods, and what several of them share."""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from orthax._linalg import frobenius


class PolarMethod(abc.ABC):
    """Base class of polar methods: frozen dataclasses, never callable.

    A method of your own needs the two abstract methods; the others have defaults.

    Attributes:
      any_scale: whether `factor` accepts matrices of any scale, finite or not. If not,
        it is given finite matrices of Frobenius norm one or zero. Either way they are
        floating or complex, of at least 32 bits.
      fills_null_space: whether zero rows or columns may become nonzero; where they may
        not, matrices of different shapes are padded and batched.

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
        """Return the polar factors of a batch `(b, m, n)`, with its shape and dtype.

        A method with `split_flops` is also called as `factor(x, axes)` inside
        `jax.shard_map`, on one device's columns of wide matrices whose columns are
        sharded over the named mesh axes.
        """

    @abc.abstractmethod
    def flops(self, m: int, n: int) -> float:
        """Return the leading-order operation count for one m x n matrix."""

    def split_flops(
        self, m: int, n: int, devices: int
    ) -> tuple[float, int, int] | None:
        """Return the cost of splitting the long side of one matrix over devices.

        The operations of each device, how many m x m matrices are summed over the
        devices, and how many times a few numbers are; None if it cannot be split.
        """
        del m, n, devices
        return None

    def on(
        self, platform: str, dtype: jax.typing.DTypeLike = "float32"
    ) -> "PolarMethod":
        """Return the method used on a platform: `"cpu"`, `"gpu"`, `"tpu"` ..."""
        del platform, dtype
        return self


@dataclasses.dataclass(frozen=True)
class Own(PolarMethod):
    """Adapter of an object with `factor` and `flops` that is not a `PolarMethod`."""

    method: Any

    def __repr__(self) -> str:
        """Return the representation of the wrapped method."""
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


def normalised(
    x: jax.Array, over_axes: tuple[str, ...] = ()
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Return matrices of Frobenius norm one or zero, the two divisors, and finiteness.

    The factor does not depend on the divisors, so derivatives treat them as constants.
    A matrix that is not finite is replaced by zero, so that no iteration sees one.
    """
    divisors = jax.lax.stop_gradient(frobenius(x, over_axes))
    finite = jnp.isfinite(divisors[1])
    x = jnp.where(finite, x, 0)
    for divisor in divisors:
        x = x / jnp.where(finite, divisor, 1)
    return x, divisors, finite


def rank_tolerance(shape: tuple[int, ...], dtype: jnp.dtype) -> float:
    """Return `max(m, n) eps`, the relative tolerance of numpy's and LAPACK's rank."""
    return max(shape[-2:]) * float(jnp.finfo(dtype).eps)


def sides(m: int, n: int) -> tuple[int, int]:
    """Return the short and the long side."""
    return min(m, n), max(m, n)


def check_positive_or_none(name: str, value: float | None) -> None:
    """Raise unless `value` is None or a finite number above zero."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be finite and positive, got {value}.")
