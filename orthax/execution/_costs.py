"""Functions of matrices and their cost."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from orthax import polar
from orthax._linalg import working_dtype
from orthax.execution._layout import Axes
from orthax.internal.polar import check_method, split_polar_factors

Flops = Callable[[int, int], float]
SplitFlops = Callable[[int, int, int], tuple[float, int, int] | None]


def _two_products(m: int, n: int) -> float:
    """Return the operations of two products of a matrix and its short side."""
    return 4.0 * m * n * min(m, n)


def _same(dtype: jnp.dtype) -> jnp.dtype:
    return dtype


@dataclasses.dataclass(frozen=True)
class Work:
    """A function of a batch of matrices, its cost, and how it may be batched.

    Attributes:
      f: maps a batch `(b, m, n)` to one of equal shape, matrix by matrix. With
        `split_flops`, it is also called as `f(x, axes)` inside a `shard_map`, on one
        device's columns of a batch, m <= n, with columns sharded over mesh axes.
      flops: operations for one m x n matrix; default `4 m n min(m, n)`.
      commutes_with_transpose: whether `f(x.mT) == f(x).mT`, so that an m x n and an
        n x m matrix may share a batch.
      zeros_for_zeros: whether zero rows and columns stay zero and change nothing else,
        so that matrices may be padded to share a batch.
      split_flops: as `PolarMethod.split_flops`; None if matrices cannot be split.
      dtype: maps the dtype of a batch to the one it is cast to before `f`; default: the
        same.

    Example:
      >>> from orthax import execution
      >>> execution.Work(abs, commutes_with_transpose=True).flops(2, 3)
      48.0
    """

    f: Callable[..., jax.Array]
    _: dataclasses.KW_ONLY
    flops: Flops = _two_products
    commutes_with_transpose: bool = False
    zeros_for_zeros: bool = False
    split_flops: SplitFlops | None = None
    dtype: Callable[[jnp.dtype], jnp.dtype] = _same

    def on(self, platform: str | None) -> "Work":
        """Return what is done on a platform: the same on all."""
        del platform
        return self


@dataclasses.dataclass(frozen=True)
class Factors:
    """The work of `orthogonalise`: polar factors, by the method of each platform.

    Attributes:
      method: how they are computed.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import execution, polar
      >>> from orthax.internal.execution import Factors
      >>> factors = Factors(polar.Auto())
      >>> execution.map_matrices(factors, [3 * jnp.eye(2)])[0].round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    method: polar.PolarMethod

    def __post_init__(self):
        object.__setattr__(self, "method", check_method(self.method))

    def on(self, platform: str | None) -> Work:
        """Return the work on a platform; None: JAX's default backend."""
        platform = platform or jax.default_backend()
        method = self.method.on(platform)
        shared = method.split_flops(1, 1, 1) is not None
        return Work(
            self._on(platform),
            flops=method.flops,
            commutes_with_transpose=True,
            zeros_for_zeros=not method.fills_null_space,
            split_flops=method.split_flops if shared else None,
            dtype=working_dtype,
        )

    def _on(self, platform: str) -> Callable[..., jax.Array]:
        def f(x: jax.Array, axes: Axes = ()) -> jax.Array:
            method = self.method.on(platform, x.dtype)
            if axes:
                return split_polar_factors(x, axes, method)
            return polar.polar_factor(x, method)

        return f


@dataclasses.dataclass(frozen=True)
class Machine:
    """The speed of a device and its network, by which plans are compared.

    Only ratios matter. The defaults are roughly those of an accelerator of 2024 in
    float32 at the highest precision, in a fast network.

    Attributes:
      flops: operations per second.
      bandwidth: bytes per second that a device sends while receiving as many.
      latency: minimum seconds of a collective.

    Raises:
      ValueError: if a number is not finite and positive.

    Example:
      >>> from orthax import execution
      >>> slow = execution.Machine(bandwidth=1e9)
      >>> execution.Stacking(machine=slow).machine.bandwidth
      1000000000.0
    """

    flops: float = 5e13
    bandwidth: float = 1e11
    latency: float = 2e-5

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(
                    f"`{name}` must be finite and positive, got {value!r}."
                )

    def seconds(self, flops: float, sent: float, collectives: int) -> float:
        """Return the time of some work without overlap."""
        return flops / self.flops + sent / self.bandwidth + collectives * self.latency
