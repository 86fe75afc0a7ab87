"""Polar factors by dynamically weighted Halley steps on the small Gram matrix."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthax._linalg import matmul, over
from orthax.polar._coefficients import minimax
from orthax.polar._inverse import positive_definite_inverse
from orthax.polar._method import PolarMethod, gram, sides, times

# What is brought to one: singular values from here up, relative to ||X||_F.
_LOWER = 1e-3
# Eigenvalues of a Gram matrix are known to a few eps of its norm. Where the smallest is
# so many eps of it, half a relative error of 1e-4 remains for the singular values.
_SAFE = 2.0**14
# A step multiplies the rounding of its Gram matrix by half its c: the first by 8,000.
# After a restart that is weighted for singular values from here up, which makes it 610.
_MILD = 7e-3
# And Gram matrices are summed in parts of so many rows, up to this short side: kernels
# that add one row after another round more, the longer the long side is. From `_LONG`
# up that would be too much without a restart, too.
_ROWS = 128
_LONG = 2048


@dataclasses.dataclass(frozen=True)
class DWH(PolarMethod):
    r"""Polar factors by two weighted Halley steps on the Gram matrix of the short side.

    A Halley step maps the singular values by $\sigma (a + b \sigma^2) / (1 + c
    \sigma^2)$; weighted for its interval, the first brings [1e-3, 1] to [0.25, 1] and
    the second to [0.96, 1]. On $A = X X^H$ a step is one inverse of $I + c A$, the long
    side is touched by two products only, and the inverse is computed from blocks small
    enough for one core: the fastest method where Cholesky factors are cheap, on CPU.

    Rounding hides eigenvalues of A below about `eps`, singular values below
    $\sqrt{eps}$, and couples directions by up to `c eps`. Where a bound on the inverse
    cannot exclude that this matters, the iteration begins again: its first step has a
    smaller c, 1,220 instead of 16,000, and is applied to the matrix itself, whose Gram
    matrix is computed anew: twice the work on the long side. That is decided for each
    stack at run time, and beforehand for nearly square matrices, where the bound is of
    no use even for Gaussian ones.

    Attributes:
      restart: whether that may happen.
      polish: whether a last polynomial step follows, which takes the remaining error
        from 4e-2 to 1e-5.

    Raises:
      TypeError: if an attribute is not a bool.

    Limits:
      Singular values below 1e-3 of the Frobenius norm end between 0 and one. A zero
      matrix gives zero. In float32 a search for the worst matrix, with kernels of
      several instruction sets, found directions coupled by 1.2e-4 and larger singular
      values off by 3e-5 (`benchmarks/README.md`). Without `restart`, singular values
      near 1e-3 of the Frobenius norm may be off by 0.15. Tested up to a short side of
      2048. Not for TPU, where Cholesky factors are slow. `vmap` works on one element
      after another.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> x = jnp.array([[3.0, 0.0], [0.0, -0.1], [0.0, 0.0]])
      >>> polar.polar_factor(x, polar.DWH()).round(4).tolist()
      [[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]

    References:
      Nakatsukasa, Bai, Gygi: "Optimizing Halley's iteration for computing the matrix
      polar decomposition", SIAM J. Matrix Anal. Appl. 31(5), 2010, Section 3 (the
      weights); Nakatsukasa, Higham 2013, SIAM J. Sci. Comput. 35(3), Section 5.3 (the
      step by a Cholesky factor). Iterating on the Gram matrix, the bound and the
      restart are ours.
    """

    any_scale: ClassVar[bool] = True
    fills_null_space: ClassVar[bool] = False

    restart: bool = True
    polish: bool = True

    def __post_init__(self):
        for name in ("restart", "polish"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}."
                )

    def factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        """Return the polar factors of a stack, `(b, m, n)`, of any scale."""
        if axes:
            return self._factor(x, axes)
        # Under vmap a condition would run both of its branches, and a batch of loops is
        # a loop over batched decompositions, which may hang (`one_by_one`).
        return jax.custom_batching.sequential_vmap(self._factor)(x)

    def flops(self, m: int, n: int) -> float:
        """Return the operations for one real float32 m x n matrix, with a restart.

        On the long side a Gram matrix and a product, both twice with a restart, and one
        more Gram matrix where only the restart sums it in parts; an inverse of `2 k^3`
        for every step, k the short side, and products of k x k matrices.
        """
        return self.split_flops(m, n, 1)[0]

    def split_flops(self, m: int, n: int, devices: int) -> tuple[float, int, int]:
        """Return the operations of each device, and the sums over all of them.

        Of matrices, and of numbers: the largest entry, and whether to begin again.
        """
        short, long = sides(m, n)
        straight, restarted = map(len, self._plans("float32"))
        # Of k x k matrices: an inverse and two products a step, a few less, the polish.
        if not self.restart:
            passes, grams, small = 1, 1, 3 * straight + (1 if self.polish else -2)
        else:
            passes, grams, small = 2, 2, 3 * restarted - (0 if self.polish else 4)
            if devices > 1 or not _surely_unsafe(m, n):
                anew = short <= _ROWS < long / devices < _LONG
                grams, small = grams + anew, small + 2
        thin = 2.0 * (grams + passes) * short**2 * long / devices
        return thin + 2.0 * small * short**3, grams, 1 + self.restart

    def _plans(self, dtype: jax.typing.DTypeLike) -> "tuple[list[_Weights], ...]":
        """Return the steps without and with a restart."""
        # With the polish, two steps leave 2e-5 and three what float64 cannot show.
        steps = 3 if jnp.finfo(dtype).bits > 32 and self.polish else 2
        return _weights(steps), _weights(max(steps, 3 - self.polish), _MILD)

    def _factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        x = _bounded(x, axes)
        known = self.restart and not axes and _surely_unsafe(*x.shape[-2:])
        in_parts = known or max(x.shape[-2:]) >= _LONG
        r, scale = _normalised(gram(x, axes, _ROWS if in_parts else None))
        eye = jnp.eye(r.shape[-1], dtype=r.dtype)
        # Under shard_map the zero must vary over devices like x.
        zero = 0 * jnp.isnan(r).any().astype(jnp.int32)
        plans = self._plans(x.dtype)
        steps = _table([[(w.alpha, w.beta, w.c) for w in plan] for plan in plans], r)
        lengths = jnp.array([*map(len, plans)], jnp.int32)

        # In a loop: the steps written out took half as long again to compile.
        def step(s: _State) -> _State:
            last = s.done + 1 == lengths[s.plan]
            tested = self.restart and not known
            return self._step(s, steps[s.plan, s.done], last, axes, tested)

        s = _State(zero + int(known), zero, r, scale * eye[None], x)
        s = jax.lax.while_loop(lambda s: s.done < lengths[s.plan], step, s)
        if not self.polish:
            return times(s.q, s.x, axes)
        rows = _table([_polish(plan[-1].lower) for plan in plans], r)
        again = self.restart and s.plan == 1
        return times(_polished(s.q, s.r, rows[s.plan], again), s.x, axes)

    def _step(
        self,
        s: "_State",
        weights: jax.Array,
        last: jax.Array,
        axes: tuple[str, ...],
        tested: bool,
    ) -> "_State":
        alpha, beta, c = weights
        short = s.r.shape[-1]
        long = math.prod(s.x.shape[-2:]) // short  # of this device's part, where split
        eye = jnp.eye(short, dtype=s.r.dtype)
        w = positive_definite_inverse(eye[None] + c * s.r)
        step = (alpha * eye)[None] + beta * w

        def multiplied(s: _State) -> jax.Array:
            # The first Q of either plan is a multiple of one.
            scaled = lambda q: step * q[:, :1, :1]  # noqa: E731
            return jax.lax.cond(
                s.done == s.plan, scaled, lambda q: matmul(step, q), s.q
            )

        def go_on(s: _State, square: jax.Array) -> _State:
            r = _next(s.r, w, square, weights)
            return _State(s.plan, s.done + 1, r, multiplied(s), s.x)

        def begin_again(s: _State, _: jax.Array) -> _State:
            if not short <= _ROWS < long < _LONG:
                return s._replace(plan=s.plan + 1)
            r, scale = _normalised(gram(s.x, axes, _ROWS))
            return s._replace(plan=s.plan + 1, r=r, q=scale * eye[None] + 0 * s.q)

        def apply(s: _State) -> _State:
            x = times(step * s.q[:, :1, :1], s.x, axes)
            return _State(
                s.plan, s.done + 1, gram(x, axes, _ROWS), 0 * s.q + eye[None], x
            )

        def in_gram_space(s: _State) -> _State:
            square = matmul(w, w)
            if not tested:
                return go_on(s, square)
            unsafe = ~jnp.all(_is_safe(s.r, square, c)) & (s.plan == 0) & (s.done == 0)
            # Devices that disagreed, by a rounding, would wait for each other for ever.
            unsafe = over(axes, jax.lax.pmax, unsafe.astype(jnp.int32)) > 0
            return jax.lax.cond(unsafe, begin_again, go_on, s, square)

        def finish(s: _State) -> _State:
            return s._replace(done=s.done + 1, q=multiplied(s))

        onward = in_gram_space
        if not self.polish:  # nothing looks at the R of the last step
            onward = lambda s: jax.lax.cond(last, finish, in_gram_space, s)  # noqa: E731
        if not self.restart:
            return onward(s)
        return jax.lax.cond((s.plan == 1) & (s.done == 0), apply, onward, s)


class _State(NamedTuple):
    """What is known between two steps.

    Attributes:
      plan: which list of weights is followed: 0, or 1 after a restart.
      done: how many of its steps have been taken.
      r: the Gram matrix of Q X.
      q: the product of the steps that are still to be applied to X.
      x: the matrix, bounded, after those that have been.
    """

    plan: jax.Array
    done: jax.Array
    r: jax.Array
    q: jax.Array
    x: jax.Array


class _Weights(NamedTuple):
    """A Halley step: sigma (a + b sigma^2) / (1 + c sigma^2).

    In partial fractions sigma (alpha + beta / (1 + c sigma^2)): on X, with W the
    inverse of I + c X X^H, a product with Q = alpha I + beta W. `lower` is where the
    lower end of its interval goes.
    """

    a: float
    b: float
    c: float
    lower: float

    @property
    def alpha(self) -> float:
        return self.b / self.c

    @property
    def beta(self) -> float:
        return self.a - self.alpha


def _weights(steps: int, first: float | None = None) -> list[_Weights]:
    """Return steps that each bring what they are given as near to one as they can.

    The first may be weighted for a shorter interval, from `first` up: its c is smaller.
    """
    low, found = _LOWER, []
    for _ in range(steps):
        w = _weighted(low if found or first is None else first)
        low = min(low * (w.a + w.b * low**2) / (1 + w.c * low**2), 1.0)
        found.append(w._replace(lower=low))
    return found


def _weighted(low: float) -> _Weights:
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = (1 + d) ** 0.5
    a = root + (8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) ** 0.5 / 2
    b = (a - 1) ** 2 / 4
    return _Weights(a, b, a + b - 1, low)


def _next(
    r: jax.Array, w: jax.Array, square: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return Q R Q: with W R = (I - W) / c, a combination of R, W and W W."""
    alpha, beta, c = weights
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    return (
        alpha**2 * r
        + ((2 * alpha * beta / c) * eye)[None]
        + ((beta - 2 * alpha) * beta / c) * w
        - (beta**2 / c) * square
    )


def _surely_unsafe(m: int, n: int) -> bool:
    """Return whether the bound excludes nothing even for float32 Gaussian matrices.

    Measured with short sides from 64 to 1024, of which it is too low by a root.
    """
    short, long = sides(m, n)
    return long < short * (1 + short**0.5 / 21)


def _is_safe(r: jax.Array, square: jax.Array, c: jax.Array) -> jax.Array:
    """Return whether rounding leaves every eigenvalue of R, shape `(b, 1, 1)`.

    The norm of W, the inverse of I + c R, bounds the smallest from below; the column
    sums of its square bound it more tightly than its own.
    """
    smallest = (jax.lax.rsqrt(_norm_bound(square)) - 1) / c
    eps = float(jnp.finfo(r.dtype).eps)
    # NaN is NaN either way, and must not decide for the other matrices of the stack.
    return ~(smallest < _SAFE * eps * _norm_bound(r))


def _norm_bound(x: jax.Array) -> jax.Array:
    """Return the largest column sum: a bound on the spectral norm of Hermitian ones."""
    sums = jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.max(sums, axis=-2, keepdims=True)


def _polish(lower: float) -> tuple[float, ...]:
    """Return the best odd polynomial on [lower, 1], of degree five or nine.

    It leaves 5e-6 from 0.96 up, and 7e-6 from 0.81 up.
    """
    if lower > 0.9:
        return (*minimax(lower, 1.0), 0.0, 0.0)
    return minimax(lower, 1.0, 5)


def _table(rows: Sequence, like: jax.Array) -> jax.Array:
    """Return two lists of numbers, or of rows, filled up with zeros to one length."""
    table = np.zeros((2, max(map(len, rows)), *np.shape(rows[0][0])))
    for filled, row in zip(table, rows, strict=True):
        filled[: len(row)] = row
    return jnp.asarray(table, jnp.finfo(like.dtype).dtype)


def _polished(
    q: jax.Array, r: jax.Array, row: jax.Array, restarted: jax.Array | bool
) -> jax.Array:
    """Return Q P, P a polynomial in R = X X^H: of degree two, after a restart four."""
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    square = matmul(r, r)
    p = (row[0] * eye)[None] + row[1] * r + row[2] * square
    if restarted is False:
        return matmul(q, p)

    def long(p: jax.Array) -> jax.Array:
        p += matmul(square, row[3] * r + row[4] * square)
        return _matmul_in_parts(q, p)

    return jax.lax.cond(restarted, long, lambda p: matmul(q, p), p)


def _matmul_in_parts(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a product summed in parts.

    Q P lifts null directions by 40. Where rounding leaves small numbers of one sign,
    they would be lost, one after another, beside the large ones of a sum.
    """
    k = a.shape[-1]
    if k <= _ROWS:
        return matmul(a, b)
    parts = -(-k // _ROWS)
    width = -(-k // parts)
    pad = (0, parts * width - k)
    a = jnp.pad(a, ((0, 0), (0, 0), pad))
    b = jnp.pad(b, ((0, 0), pad, (0, 0)))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        left = jax.lax.dynamic_slice_in_dim(a, i * width, width, 2)
        right = jax.lax.dynamic_slice_in_dim(b, i * width, width, 1)
        return total + matmul(left, right)

    return jax.lax.fori_loop(0, parts, add, 0 * b[:, :k])


def _bounded(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return every matrix with largest entry one, zero, or NaN if it is not finite."""
    largest = jnp.max(jnp.abs(x.real), axis=(-2, -1), keepdims=True)
    if jnp.iscomplexobj(x):
        imaginary = jnp.max(jnp.abs(x.imag), axis=(-2, -1), keepdims=True)
        largest = jnp.maximum(largest, imaginary)
    largest = over(axes, jax.lax.pmax, largest)
    return x / jnp.where(largest > 0, largest, 1)


def _normalised(r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return R over its trace, which is ||X||_F squared, and 1 / ||X||_F."""
    trace = jnp.trace(r, axis1=-2, axis2=-1).real[:, None, None]
    trace = jnp.where(trace == 0, 1, trace)
    return r / trace, jax.lax.rsqrt(trace)
