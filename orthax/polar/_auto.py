"""The default method, which depends on the platform."""

import dataclasses
import functools
from typing import ClassVar

import jax

from orthax.polar._coefficients import polar_express
from orthax.polar._dwh import DWH
from orthax.polar._method import PolarMethod
from orthax.polar._newton_schulz import NewtonSchulz

_TIERS = ("exact", "fast")


@dataclasses.dataclass(frozen=True)
class Auto(PolarMethod):
    """The default: the platform's fastest method within the stated error.

    | accuracy | CPU | GPU, TPU, any other |
    |---|---|---|
    | `"exact"` | `DWH()` | `NewtonSchulz(precision="high")` |
    | `"fast"` | `DWH(restart=False, polish=False)` | five steps, bfloat16 products |

    In float32, `"exact"` brings every singular value of at least 1e-3 of the Frobenius
    norm to within 1e-4 of one. `"fast"`, for optimisers that need a direction only
    (Muon), brings it to within 0.2, and 0.05 on CPU. The platform is known when the
    program is lowered. The measurements are in `benchmarks/README.md`.

    Attributes:
      accuracy: `"exact"` or `"fast"`.

    Raises:
      ValueError: for an unknown `accuracy`.

    Limits:
      Singular values below 1e-3 of the Frobenius norm end between -1e-3 and 1.001. A
      large square Gaussian matrix has some: use `SVD` where all of them must be one.
      Null directions stay below 1e-2 with `"exact"`; with `"fast"`, bfloat16 products
      leave noise of up to about 1e-1 in them. A zero matrix gives zero.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jax.random.normal(jax.random.key(0), (64, 16))
      >>> o = polar.polar_factor(x, polar.Auto())
      >>> bool(jnp.abs(o.T @ o - jnp.eye(16)).max() < 1e-4)
      True

    References:
      Amsel et al.: "The Polar Express", 2025, arXiv 2505.16932 (the coefficients);
      Nakatsukasa, Bai, Gygi 2010 (the Halley steps, see `DWH`).
    """

    any_scale: ClassVar[bool] = True
    fills_null_space: ClassVar[bool] = False

    accuracy: str = "exact"

    def __post_init__(self):
        if self.accuracy not in _TIERS:
            raise ValueError(
                f"`accuracy` must be one of {_TIERS}, got {self.accuracy!r}."
            )

    def on(self, platform: str, dtype: jax.typing.DTypeLike = "float32") -> PolarMethod:
        """Return the method used on a platform: `"cpu"`, `"gpu"`, `"tpu"` ...

        An unknown platform is treated as an accelerator. Products are rounded to
        bfloat16, or split into bfloat16 parts, for float32 matrices only.
        """
        fast = self.accuracy == "fast"
        if platform == "cpu":
            return DWH(restart=not fast, polish=not fast)
        single = dtype == "float32"
        if fast:
            table = polar_express(1e-3, 5, safety=0.02)
            return NewtonSchulz(table, dtype="bfloat16" if single else None)
        return NewtonSchulz(precision="high" if single else None)

    def factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        """Return the polar factors of a batch, `(b, m, n)`."""
        cpu, other = (self.on(name, x.dtype) for name in ("cpu", "other"))
        return jax.lax.platform_dependent(
            x,
            cpu=functools.partial(cpu.factor, axes=axes),
            default=functools.partial(other.factor, axes=axes),
        )

    def split_flops(
        self, m: int, n: int, devices: int
    ) -> tuple[float, int, int] | None:
        """Return `split_flops` of the default platform's method."""
        return self.on(jax.default_backend()).split_flops(m, n, devices)

    def flops(self, m: int, n: int) -> float:
        """Return the operations for one m x n matrix on the default platform."""
        return self.on(jax.default_backend()).flops(m, n)
