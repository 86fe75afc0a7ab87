"""Polar factors by dynamically weighted Halley steps on the small Gram matrix."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthax.polar._decompose import positive_definite_inverse
from orthax.polar._method import gram, matmul, over, sides, times

# What is brought to one: singular values from here up, relative to ||X||_F.
_LOWER = 1e-3
# Eigenvalues of a Gram matrix are known to a few eps of its norm. Where the smallest is
# so many eps of it, half a relative error of 1e-4 remains for the singular values.
_SAFE = 2.0**14


@dataclasses.dataclass(frozen=True)
class DWH:
    r"""Polar factors by two weighted Halley steps on the Gram matrix of the short side.

    A Halley step maps the singular values by $\sigma (a + b \sigma^2) / (1 + c
    \sigma^2)$; weighted for its interval, the first brings [1e-3, 1] to [0.25, 1] and
    the second to [0.96, 1]. On $A = X X^H$ a step is one inverse of $I + c A$, the long
    side is touched by two products only, and the inverse is computed from blocks small
    enough for one core: the fastest method where Cholesky factors are cheap, on CPU.

    Rounding hides eigenvalues of A below about `eps`, singular values below
    $\sqrt{eps}$. Where a bound on the inverse cannot exclude such, the first step is
    applied to the matrix itself, and its Gram matrix computed anew: twice the work on
    the long side, decided for each stack at run time.

    Attributes:
      restart: whether that may happen.
      polish: whether a last polynomial step follows, which takes the remaining error
        from 4e-2 to 2e-5.

    Raises:
      TypeError: if an attribute is not a bool.

    Limits:
      Singular values below 1e-3 of the Frobenius norm end between 0 and one. A zero
      matrix gives zero. Without `restart`, in float32, singular values near 1e-3 of the
      Frobenius norm may be off by 0.15. Tested up to a short side of 2048, where
      rounding may couple directions by 2e-3 if all entries have one magnitude. Not for
      TPU, where Cholesky factors are slow. `vmap` works on one element after another.

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

    def factor(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of a stack, `(b, m, n)`, of any scale."""
        # Under vmap a condition would run both of its branches, and a batch of loops is
        # a loop over batched decompositions, which may hang (`one_by_one`).
        return jax.custom_batching.sequential_vmap(self._factor)(x)

    def flops(self, m: int, n: int) -> float:
        """Return the operations for one real float32 m x n matrix, with a restart.

        A Gram matrix and a product with the long side, both twice with a restart; two
        inverses of `2 k^3`, k the short side; a product of k x k matrices for the
        bound, three for the polish, and one for going on without a restart.
        """
        short, long = sides(m, n)
        thin = 4.0 * (1 + self.restart) * short**2 * long
        products = 1 + 3 * self.polish + (not self.restart)
        return thin + (4 + 2 * products) * short**3

    def factor_split(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Return what a device has of the factors of matrices with sharded columns."""
        return self._factor(x, axes)

    def split_flops(self, m: int, n: int, devices: int) -> tuple[float, int]:
        """Return the operations of each device, and the sums over all of them."""
        short, long = sides(m, n)
        alone = self.flops(m, n)
        thin = 4.0 * (1 + self.restart) * short**2 * long
        return alone - thin * (1 - 1 / devices), 1 + self.restart

    def _factor(self, x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
        # With the polish, two steps leave 2e-5 and three what float64 cannot show.
        double = jnp.finfo(x.dtype).bits > 32
        weights = [*_weights(3 if double and self.polish else 2)]
        table = np.array([(w.alpha, w.beta, w.c) for w in weights])
        table = jnp.asarray(table, jnp.finfo(x.dtype).dtype)
        x = _bounded(x, axes)
        r, scale = _normalised(gram(x, axes))

        def step(i: jax.Array, state: _State) -> _State:
            alpha, beta, c = table[i]
            eye = jnp.eye(r.shape[-1], dtype=r.dtype)
            w = positive_definite_inverse(eye + c * state.r)
            q = alpha * eye + beta * w
            first, last = i == 0, i == len(weights) - 1
            q = jax.lax.cond(first, lambda q, _: q * scale, matmul, q, state.q)
            stepped = functools.partial(
                self._stepped, axes, state.r, w, table[i], first
            )
            if self.polish:
                return stepped(q, state.x)
            # Nothing looks at the R of the last step.
            keep = functools.partial(_State, state.r)
            return jax.lax.cond(last, keep, stepped, q, state.x)

        # In a loop: the steps written out took half as long again to compile.
        r, q, x = jax.lax.fori_loop(0, len(weights), step, _State(r, r, x))
        if self.polish:
            q = matmul(q, _polish(r, weights[-1].lower))
        return times(q, x, axes)

    def _stepped(
        self,
        axes: tuple[str, ...],
        r: jax.Array,
        w: jax.Array,
        weights: jax.Array,
        first: jax.Array,
        q: jax.Array,
        x: jax.Array,
    ) -> "_State":
        """Return the state after a step; where it must be, Q is applied to X now."""
        square = matmul(w, w)

        def go_on(q: jax.Array, x: jax.Array) -> _State:
            return _State(_next(r, w, square, weights), q, x)

        def restart(q: jax.Array, x: jax.Array) -> _State:
            x = times(q, x, axes)
            identity = 0 * q + jnp.eye(q.shape[-1], dtype=q.dtype)
            return _State(gram(x, axes), identity, x)

        if not self.restart:
            return go_on(q, x)
        unsafe = ~jnp.all(_is_safe(r, square, weights[2]))
        # Devices that disagreed, by a rounding, would wait for each other for ever.
        unsafe = over(axes, jax.lax.pmax, unsafe.astype(jnp.int32)) > 0
        return jax.lax.cond(first & unsafe, restart, go_on, q, x)


class _State(NamedTuple):
    """What is known between two steps.

    Attributes:
      r: the Gram matrix of Q X.
      q: the product of the steps that are still to be applied to X.
      x: the matrix, bounded, after those that have been.
    """

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


def _weights(steps: int) -> Iterator[_Weights]:
    low = _LOWER
    for _ in range(steps):
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        root = (1 + d) ** 0.5
        a = root + (8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) ** 0.5 / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        low = min(low * (a + b * low**2) / (1 + c * low**2), 1.0)
        yield _Weights(a, b, c, low)


def _next(
    r: jax.Array, w: jax.Array, square: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return Q R Q: with W R = (I - W) / c, a combination of R, W and W W."""
    alpha, beta, c = weights
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    return (
        alpha**2 * r
        + (2 * alpha * beta / c) * eye
        + ((beta - 2 * alpha) * beta / c) * w
        - (beta**2 / c) * square
    )


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


def _polish(r: jax.Array, lower: float) -> jax.Array:
    """Return the classical quintic step on R = X X^H, of singular values in [lower, 1].

    They are scaled to lie around one, where the step leaves the third power of their
    distance.
    """
    s = 2 / (1 + lower)
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    return 15 / 8 * s * eye - 10 / 8 * s**3 * r + 3 / 8 * s**5 * matmul(r, r)


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
