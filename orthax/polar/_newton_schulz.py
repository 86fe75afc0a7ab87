"""Polar factors by odd matrix polynomials: Newton-Schulz in all its forms."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from orthax._linalg import adjoint, frobenius, norm
from orthax.polar._checks import checked_dtype, checked_restarts
from orthax.polar._coefficients import (
    CLASSIC_QUINTIC,
    Table,
    checked_table,
    polar_express,
    table_text,
)
from orthax.polar._method import PolarMethod, check_positive_or_none, sides
from orthax.polar._precision import Products

# Aspect ratio from which the iteration on the small Gram matrix needs fewer
# operations than the one on the matrix, for any number of restarts.
_GRAM_ASPECT = 1.5
# Most steps of an adaptive run: enough for a condition number of 1e7 in float32.
_MOST_STEPS = 24


@dataclasses.dataclass(frozen=True)
class NewtonSchulz(PolarMethod):
    r"""Approximate polar factors by a composition of odd polynomials.

    Every step maps the singular values by $p(\sigma) = a \sigma + b \sigma^3 (+ c
    \sigma^5)$ and keeps the singular vectors; the table decides how close to one the
    singular values end. Only matrix products: the method for accelerators.

    Attributes:
      coefficients: one row `(a, b, c)` or `(a, b)` per step, first step first,
        dimensionless; for singular values in [0, 1]. Default `polar_express()`.
      gram: iterate on the Gram matrix of the short side, and multiply with the long
        side at restarts only. Default: if possible and if the aspect ratio is at least
        1.5, which saves operations. It amplifies rounding, so it needs the highest
        `precision`, no `dtype` and no `tolerance`.
      restarts: the steps after which the Gram matrix is recomputed, which keeps its
        rounding errors from growing; default 2, 4, 7, 10 ...
      dtype: round the inputs of every product to this dtype (`"bfloat16"`,
        `"float16"`); sums and the matrix itself keep their dtype.
      precision: `jax.lax.Precision` of every product, or its name; default the highest.
        `"high"` means the same on every platform for float32: each input is split into
        two bfloat16 numbers, 16 bits, for half the operations of the highest on tensor
        cores and matrix units; with a short side below 192 it is the highest. For other
        values and dtypes it is what XLA makes of it.
      tolerance: stop each matrix when $\|A^2 - A\|_F \leq$ `tolerance`
        $\sqrt{\mathrm{tr} A}$, $A = X X^H$, which works for rank-deficient matrices
        too; dimensionless. A matrix that has not reached it at the end of the table
        continues with the classical polynomial, up to 24 steps in total. Default: no
        test, one step per row.

    Raises:
      ValueError: for an empty table, rows that are not all of length two or all of
        length three, numbers that are not finite, restarts that are not ascending steps
        inside the table, restarts or `gram=True` where they would have no effect, a
        `tolerance` that is not positive, an unknown dtype or precision.
      TypeError: for coefficients that are not Python numbers (traced values cannot
        shape a program), or a complex matrix with a half-precision `dtype`.

    Limits:
      A zero matrix gives zero. Singular values far below the `lower` of the table stay
      small: with the default, those below 1e-3 of the Frobenius norm end between zero
      and one. Rounding noise in the null space is amplified by the product of the
      leading coefficients, to about 1e-4 with the defaults in float32 and to about 1e-1
      in half precision. `tolerance` compiles to a `while_loop`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jnp.array([[3.0, 0.0], [0.0, -0.1], [0.0, 0.0]])
      >>> polar.polar_factor(x, polar.NewtonSchulz()).round(4).tolist()
      [[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]
      >>> jordan = polar.NewtonSchulz(polar.JORDAN)  # Muon's: between 0.7 and 1.2
      >>> abs(polar.polar_factor(x, jordan)[0, 0] - 1) > 0.1
      Array(True, dtype=bool)

    References:
      Higham: "Functions of Matrices", SIAM 2008, Section 8.3; Amsel et al. 2025, arXiv
      2505.16932 (optimal tables); Dao-AILab: "Gram Newton-Schulz", 2026,
      https://github.com/Dao-AILab/gram-newton-schulz (iterating on the Gram matrix,
      with restarts).
    """

    any_scale: ClassVar[bool] = True
    fills_null_space: ClassVar[bool] = False

    coefficients: Sequence[Sequence[float]] = dataclasses.field(
        default_factory=polar_express
    )
    gram: bool | None = None
    restarts: Sequence[int] | None = None
    dtype: str | None = None
    precision: str | jax.lax.Precision | None = None
    tolerance: float | None = None

    def __post_init__(self):
        set_ = object.__setattr__
        set_(self, "coefficients", checked_table(self.coefficients))
        set_(self, "dtype", checked_dtype(self.dtype))
        precision = "highest" if self.precision is None else self.precision
        set_(self, "precision", jax.lax.Precision(precision))
        check_positive_or_none("tolerance", self.tolerance)
        if self.gram and not self._gram_is_safe:
            raise ValueError(
                "gram=True needs the highest `precision`, no `dtype` and no "
                "`tolerance`: it amplifies rounding, and does not form the matrix that "
                "`tolerance` tests. Use gram=False, or leave them out."
            )
        if self.restarts is not None:
            if self.gram is False or not self._gram_is_safe:
                raise ValueError(
                    "`restarts` only applies to the Gram iteration, which is not used "
                    "with gram=False, a `dtype`, a `tolerance` or a lower `precision`."
                )
            steps = len(self.coefficients)
            set_(self, "restarts", checked_restarts(self.restarts, steps))

    def __repr__(self) -> str:
        """Return the expression that makes it: tables by name, without defaults."""
        table = self.coefficients
        arguments = [] if table == polar_express() else [table_text(table)]
        for name in ("gram", "restarts", "dtype", "tolerance"):
            value = getattr(self, name)
            arguments += [] if value is None else [f"{name}={value!r}"]
        if self.precision != jax.lax.Precision.HIGHEST:
            arguments.append(f"precision={self.precision.name.lower()!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"

    def factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        """Return the polar factors of a batch, `(b, m, n)`, of any scale.

        With sharded columns, iterates on the Gram matrix where that is safe, with one
        sum over the devices per segment; otherwise with one per step.
        """
        if self.dtype is not None and jnp.iscomplexobj(x):
            raise TypeError(
                f"dtype={self.dtype!r} cannot hold complex matrices of dtype "
                f"{x.dtype}: leave `dtype` out."
            )
        x = _normalised(x, axes)
        if self.tolerance is not None:
            return self._adaptive(x)
        if self._may_share_gram if axes else self._in_gram_space(*x.shape[-2:]):
            return self._gram(x, axes)
        return self._direct(x, axes)

    def flops(self, m: int, n: int) -> float:
        """Return the operations of all products, for one real m x n matrix."""
        if self._in_gram_space(m, n):
            return self._gram_flops(m, n, 1)
        return self._direct_flops(m, n, 1)

    def split_flops(
        self, m: int, n: int, devices: int
    ) -> tuple[float, int, int] | None:
        """Return the operations of each device, and the sums over devices."""
        if self.tolerance is not None:
            return None
        if self._may_share_gram:
            return self._gram_flops(m, n, devices), len(self._segments()), 1
        return self._direct_flops(m, n, devices), len(self.coefficients), 1

    def _direct_flops(self, m: int, n: int, devices: int) -> float:
        short, long = sides(m, n)
        steps, squares = len(self.coefficients), len(self.coefficients[0]) - 2
        thin = 4.0 * short**2 * long / devices
        return steps * (thin + 2.0 * squares * short**3)

    def _gram_flops(self, m: int, n: int, devices: int) -> float:
        short, long = sides(m, n)
        steps, segments = len(self.coefficients), len(self._segments())
        squares = len(self.coefficients[0]) - 2
        small = steps * (squares + 1) + 2 * (steps - segments) - segments
        return 4.0 * segments * short**2 * long / devices + 2.0 * small * short**3

    def _in_gram_space(self, m: int, n: int) -> bool:
        if self.gram is not None:
            return self.gram
        short, long = sides(m, n)
        return self._gram_is_safe and long >= _GRAM_ASPECT * short

    @property
    def _products(self) -> Products:
        return Products(self.dtype, self.precision)

    @property
    def _may_share_gram(self) -> bool:
        return self._gram_is_safe and self.gram is not False

    @property
    def _gram_is_safe(self) -> bool:
        return self._products.exact and self.tolerance is None

    def _segments(self) -> list[Table]:
        """Return the table, divided at the restarts."""
        steps = len(self.coefficients)
        cuts = self.restarts
        if cuts is None:  # The first steps amplify rounding most.
            cuts = [i for i in (2, *range(4, steps, 3)) if i < steps - 1]
        ends = [0, *cuts, steps]
        return [self.coefficients[i:j] for i, j in itertools.pairwise(ends)]

    def _direct(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        def step(i, x):
            row = _row(self.coefficients, i, jnp.finfo(x.dtype).dtype)
            gram = self._products.gram(x, axes)
            p = row[1] * gram
            if len(row) == 3:
                p += row[2] * self._products.gram(gram)
            return self._products.apply(p, row[0], x, axes)

        return jax.lax.fori_loop(0, len(self.coefficients), step, x)

    def _gram(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        for rows in self._segments():
            q = self._gram_segment(self._products.gram(x, axes), rows)
            x = self._products.times(q, x, axes)
        return x

    def _gram_segment(self, r: jax.Array, rows: Table) -> jax.Array:
        """Return Q such that Q X is X after `rows`, from R = X X^H.

        R and the product Q of the steps so far are polynomials of one Hermitian matrix,
        so they are Hermitian and commute. Rounding breaks the symmetry, and the
        iteration amplifies the error, so every product is symmetrised.
        """
        eye = jnp.eye(r.shape[-1], dtype=r.dtype)[None]
        q = None
        for i, row in enumerate(rows):
            z = row[0] * eye + row[1] * r
            if len(row) == 3:
                z += row[2] * _hermitian(self._products.matmul(r, r))
            q = z if q is None else _hermitian(self._products.matmul(q, z))
            if i < len(rows) - 1:
                r = _hermitian(self._products.matmul(z, self._products.matmul(r, z)))
        return q

    def _adaptive(self, x: jax.Array) -> jax.Array:
        real = jnp.finfo(x.dtype).dtype
        classic = np.asarray(CLASSIC_QUINTIC[0], real)
        rows = np.stack([classic] * _MOST_STEPS)
        rows[: len(self.coefficients)] = 0
        for i, row in enumerate(self.coefficients[:_MOST_STEPS]):
            rows[i, : len(row)] = row
        rows = jnp.asarray(rows)

        def step(state):
            i, x, done = state
            gram = self._products.gram(x)
            square = self._products.matmul(gram, gram)
            trace = jnp.trace(gram, axis1=-2, axis2=-1).real
            distance = norm(square - gram, (-2, -1))
            converged = distance <= self.tolerance * jnp.sqrt(trace)
            # One is not a fixed point of the rows of a table. A matrix that has
            # converged gets a classical step, for which it is, and only one: more
            # would fill its null space with noise.
            row = jnp.where(converged[:, None], classic, rows[i])[:, :, None, None]
            p = row[:, 1] * gram + row[:, 2] * square
            stepped = self._products.apply(p, row[:, 0], x)
            x = jnp.where(done[:, None, None], x, stepped)
            return i + 1, x, done | converged

        def unfinished(state):
            i, _, done = state
            return (i < _MOST_STEPS) & ~jnp.all(done)

        # A matrix that is not finite never converges, and must not delay the others.
        not_finite = jnp.any(jnp.isnan(x), axis=(-2, -1))
        return jax.lax.while_loop(unfinished, step, (0, x, not_finite))[1]


def _normalised(x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Return matrices of norm one; zero stays zero, what is not finite becomes NaN."""
    scale, norm = frobenius(x, axes)
    return x / scale / norm


def _row(rows: Table, i: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """Return the numbers of row `i`, by comparisons: on TPU a slice does not fuse."""
    columns = []
    for numbers in zip(*rows, strict=True):
        chosen = jnp.asarray(numbers[-1], dtype)
        for k, number in enumerate(numbers[:-1]):
            chosen = jnp.where(i == k, jnp.asarray(number, dtype), chosen)
        columns.append(chosen)
    return columns


def _hermitian(x: jax.Array) -> jax.Array:
    return (x + adjoint(x)) / 2
