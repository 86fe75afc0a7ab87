"""Polar factors by dynamically weighted Halley steps on the small Gram matrix."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from orthax._linalg import matmul, over
from orthax.polar._halley import (
    Weights,
    final_polynomial,
    halley_weights,
    padded_tables,
)
from orthax.polar._inverse import positive_definite_inverse
from orthax.polar._method import PolarMethod, sides
from orthax.polar._products import PART, gram, matmul_in_parts, times

# Eigenvalues of a Gram matrix are known to a few eps of its norm. If the smallest is at
# least this many eps of it, singular values are off by less than half of 1e-4.
_SAFE = 2.0**14
# A step amplifies the rounding of its Gram matrix by c / 2, the first by 8,000. The
# first step after a restart is weighted for singular values from here up: 610.
_MILD = 7e-3
# Long side from which the Gram matrix is summed in parts even without a restart.
_LONG = 2048


@dataclasses.dataclass(frozen=True)
class DWH(PolarMethod):
    r"""Polar factors by two weighted Halley steps on the Gram matrix of the short side.

    A Halley step maps the singular values by $\sigma (a + b \sigma^2) / (1 + c
    \sigma^2)$; weighted for its interval, the first brings [1e-3, 1] to [0.25, 1] and
    the second to [0.96, 1]. On $A = X X^H$ a step is one inverse of $I + c A$, only two
    products involve the long side, and the inverse is computed from blocks small enough
    for one core: the fastest method where Cholesky factors are cheap, on CPU.

    Rounding hides eigenvalues of A below about `eps`, singular values below
    $\sqrt{eps}$, and couples directions by up to `c eps`. Unless a bound on the inverse
    excludes this, the iteration restarts: the first step has a smaller c, 1,220 instead
    of 16,000, and is applied to the matrix itself, whose Gram matrix is then computed
    again, for twice the work on the long side. This is decided for each batch at run
    time, and in advance for nearly square matrices, where the bound never helps.

    Attributes:
      restart: whether to restart where rounding may matter.
      polish: whether to end with a polynomial step, which reduces the error from 4e-2
        to 1e-5.

    Limits:
      Singular values below 1e-3 of the Frobenius norm end between zero and one. A zero
      matrix gives zero. In float32, a search for the worst matrix on several
      instruction sets found directions coupled by 1.2e-4 and larger singular values off
      by 3e-5 (`benchmarks/README.md`). Without `restart`, singular values near 1e-3 of
      the Frobenius norm may be off by 0.15. Tested up to a short side of 2048. Not for
      TPU, where Cholesky factors are slow. `vmap` processes its elements one by one.

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

    def factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        """Return the polar factors of a batch, `(b, m, n)`, of any scale."""
        if axes:
            return self._factor(x, axes)
        # Under vmap, a condition would run both branches, and batched loops would loop
        # over batched decompositions, which can hang (`_linalg.one_by_one`).
        return jax.custom_batching.sequential_vmap(self._factor)(x)

    def flops(self, m: int, n: int) -> float:
        """Return the operations for one real float32 m x n matrix, with a restart.

        On the long side, a Gram matrix and a product, both twice with a restart, and
        another Gram matrix if only the restart sums it in parts; per step an inverse of
        `2 k^3`, k the short side, and products of k x k matrices.
        """
        return self.split_flops(m, n, 1)[0]

    def split_flops(self, m: int, n: int, devices: int) -> tuple[float, int, int]:
        """Return the operations of each device, and the sums over devices."""
        short, long = sides(m, n)
        straight, restarted = map(len, self._plans("float32"))
        # Products of k x k matrices: three a step (one for the inverse), fewer at the
        # ends, and those of the polish.
        if not self.restart:
            passes, grams, small = 1, 1, 3 * straight + (1 if self.polish else -2)
        else:
            passes, grams, small = 2, 2, 3 * restarted - (0 if self.polish else 4)
            if devices > 1 or not _surely_unsafe(m, n):
                anew = short <= PART < long / devices < _LONG
                grams, small = grams + anew, small + 2
        thin = 2.0 * (grams + passes) * short**2 * long / devices
        return thin + 2.0 * small * short**3, grams, 1 + self.restart

    def _plans(self, dtype: jax.typing.DTypeLike) -> "tuple[list[Weights], ...]":
        """Return the steps without and with a restart."""
        # With the polish, two steps leave 2e-5, three less than float64 resolves.
        steps = 3 if jnp.finfo(dtype).bits > 32 and self.polish else 2
        longer = max(steps, 3 - self.polish)
        return halley_weights(steps), halley_weights(longer, _MILD)

    def _factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        x = _bounded(x, axes)
        known = self.restart and not axes and _surely_unsafe(*x.shape[-2:])
        in_parts = known or max(x.shape[-2:]) >= _LONG
        r, scale = _normalised(gram(x, axes, PART if in_parts else None))
        eye = jnp.eye(r.shape[-1], dtype=r.dtype)
        # Under shard_map the zero must vary over devices like x.
        zero = 0 * jnp.isnan(r).any().astype(jnp.int32)
        plans = self._plans(x.dtype)
        steps = padded_tables(
            [[(w.alpha, w.beta, w.c) for w in plan] for plan in plans], r
        )
        lengths = jnp.array([*map(len, plans)], jnp.int32)

        # Unrolled, the steps take 1.5 times as long to compile.
        def step(s: _State) -> _State:
            last = s.done + 1 == lengths[s.plan]
            tested = self.restart and not known
            return self._step(s, steps[s.plan, s.done], last, axes, tested)

        s = _State(zero + int(known), zero, r, scale * eye[None], x)
        s = jax.lax.while_loop(lambda s: s.done < lengths[s.plan], step, s)
        if not self.polish:
            return times(s.q, s.x, axes)
        rows = padded_tables([final_polynomial(plan[-1].lower) for plan in plans], r)
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
            if not short <= PART < long < _LONG:
                return s._replace(plan=s.plan + 1)
            r, scale = _normalised(gram(s.x, axes, PART))
            return s._replace(plan=s.plan + 1, r=r, q=scale * eye[None] + 0 * s.q)

        def apply(s: _State) -> _State:
            x = times(step * s.q[:, :1, :1], s.x, axes)
            return _State(
                s.plan, s.done + 1, gram(x, axes, PART), 0 * s.q + eye[None], x
            )

        def in_gram_space(s: _State) -> _State:
            square = matmul(w, w)
            if not tested:
                return go_on(s, square)
            unsafe = ~jnp.all(_is_safe(s.r, square, c)) & (s.plan == 0) & (s.done == 0)
            # If rounding made devices disagree, they would deadlock.
            unsafe = over(axes, jax.lax.pmax, unsafe.astype(jnp.int32)) > 0
            return jax.lax.cond(unsafe, begin_again, go_on, s, square)

        def finish(s: _State) -> _State:
            return s._replace(done=s.done + 1, q=multiplied(s))

        onward = in_gram_space
        if not self.polish:  # The R of the last step is not used.
            onward = lambda s: jax.lax.cond(last, finish, in_gram_space, s)  # noqa: E731
        if not self.restart:
            return onward(s)
        return jax.lax.cond((s.plan == 1) & (s.done == 0), apply, onward, s)


class _State(NamedTuple):
    """The state between two steps.

    Attributes:
      plan: which list of weights is used: 0, or 1 after a restart.
      done: the number of steps taken.
      r: the Gram matrix of Q X.
      q: the product of the steps not yet applied to X.
      x: the bounded matrix, after the steps that were applied.
    """

    plan: jax.Array
    done: jax.Array
    r: jax.Array
    q: jax.Array
    x: jax.Array


def _next(
    r: jax.Array, w: jax.Array, square: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return Q R Q, by W R = (I - W) / c a combination of R, W and W W."""
    alpha, beta, c = weights
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    return (
        alpha**2 * r
        + ((2 * alpha * beta / c) * eye)[None]
        + ((beta - 2 * alpha) * beta / c) * w
        - (beta**2 / c) * square
    )


def _surely_unsafe(m: int, n: int) -> bool:
    """Return whether the bound is useless even for float32 Gaussian matrices.

    Fitted to short sides k from 64 to 1024; the bound is too low by about `k**0.5`.
    """
    short, long = sides(m, n)
    return long < short * (1 + short**0.5 / 21)


def _is_safe(r: jax.Array, square: jax.Array, c: jax.Array) -> jax.Array:
    """Return whether rounding preserves every eigenvalue of R, shape `(b, 1, 1)`.

    The norm of W, the inverse of I + c R, bounds the smallest from below; column sums
    of the square of W give a tighter bound than those of W.
    """
    smallest = (jax.lax.rsqrt(_norm_bound(square)) - 1) / c
    eps = float(jnp.finfo(r.dtype).eps)
    # NaN stays NaN either way, and must not decide for the other matrices.
    return ~(smallest < _SAFE * eps * _norm_bound(r))


def _norm_bound(x: jax.Array) -> jax.Array:
    """Return the largest column sum, a bound on the norm of a Hermitian matrix."""
    sums = jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.max(sums, axis=-2, keepdims=True)


def _polished(
    q: jax.Array, r: jax.Array, row: jax.Array, restarted: jax.Array | bool
) -> jax.Array:
    """Return Q P, P a polynomial in R = X X^H of degree two, four after a restart."""
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    square = matmul(r, r)
    p = (row[0] * eye)[None] + row[1] * r + row[2] * square
    if restarted is False:
        return matmul(q, p)

    def long(p: jax.Array) -> jax.Array:
        p += matmul(square, row[3] * r + row[4] * square)
        # P amplifies null directions by 40, and with them rounding of one sign.
        return matmul_in_parts(q, p)

    return jax.lax.cond(restarted, long, lambda p: matmul(q, p), p)


def _bounded(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return matrices with largest entry one; zero stays zero, else NaN."""
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
