"""The one operation: the orthogonal polar factor, with its derivative."""

import functools
import math

import jax
import jax.numpy as jnp

from orthax.polar._auto import Auto
from orthax.polar._method import PolarMethod, adjoint, matmul
from orthax.polar._svd import in_range, thin_svd


def polar_factor(x: jax.typing.ArrayLike, method: PolarMethod = Auto()) -> jax.Array:
    r"""Return the orthogonal polar factor of every matrix in a stack.

    $X = U P$ with $P = (X^H X)^{1/2}$: $U$ is the nearest matrix to $X$ with
    orthonormal columns (rows, where it is wide) in every unitarily invariant norm.

    Args:
      x: matrices, shape `(*batch, m, n)`, any floating or complex dtype.
      method: how; default `polar.Auto()`.

    Returns:
      The polar factors, shape and dtype of `x`. float32 and below are worked on in
      float32, float64 in float64, complex likewise.

    Raises:
      TypeError: if `x` is not floating or complex, or `method` is not a method.
      ValueError: if `x` has fewer than two axes.

    Limits:
      Scale-free: the result does not depend on a positive factor of `x`, for max|x|
      from 1e-30 to 1e37 in float32. Zero gives zero (see `null_space` of `polar.SVD`
      for the exception). NaN or infinity in a matrix gives NaN in all of that matrix
      and in no other. An empty stack or matrix comes back as it is.

      Differentiable once, in both modes, by the derivative of the exact factor
      whatever the method, for which an SVD is computed. It is finite everywhere: at
      equal singular values, where it exists, and at rank-deficient matrices, where
      the factor is not differentiable and the derivative along matrices of the same
      rank is given, zero at a zero matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import polar_factor
      >>> x = jnp.array([[0.0, -2.0], [5.0, 0.0]])
      >>> polar_factor(x).round(4).tolist()
      [[0.0, -1.0], [1.0, 0.0]]

    References:
      Higham: "Functions of Matrices", SIAM 2008, Theorems 8.1 and 8.4 (nearness).
    """
    x = jnp.asarray(x)
    check_method(method)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"`x` must be floating or complex, got dtype {x.dtype}: convert it first."
        )
    if x.ndim < 2:
        raise ValueError(
            f"`x` must have shape (*batch, m, n), got shape {x.shape}: a vector has no "
            "polar factor; reshape it to a row or a column."
        )
    if x.size == 0:
        return x
    work = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    batch = math.prod(x.shape[:-2])
    out = _factor(work.reshape(batch, *x.shape[-2:]), method)
    return out.reshape(x.shape).astype(x.dtype)


def check_method(method: PolarMethod) -> None:
    """Raise unless `method` is an instance of a polar method."""
    found = f"`method` must be a polar method such as polar.Auto(), got {method!r}"
    if isinstance(method, type):
        raise TypeError(f"{found}: a class; write {method.__name__}().")
    if isinstance(method, str) or not isinstance(method, PolarMethod):
        raise TypeError(f"{found} of type {type(method).__name__}.")
    if callable(method):
        raise TypeError(
            f"{found}, which is callable: optax.inject_hyperparams would take it for "
            "a schedule. Make it a frozen dataclass with `factor` and `flops`."
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _factor(x: jax.Array, method: PolarMethod) -> jax.Array:
    unit, _, finite = _normalised(x)
    return jnp.where(finite, method.factor(unit), jnp.nan)


def _normalised(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Return every matrix with Frobenius norm one or zero, two divisors, finiteness.

    Two divisions, by the largest entry and by the norm of the rest: squares of entries
    beyond 1e19 or below 1e-23 would leave float32. A matrix that is not finite is
    replaced by zero, so that no iteration ever meets one.
    """
    axes = (-2, -1)
    largest = jnp.max(jnp.abs(x.real), axis=axes, keepdims=True)
    if jnp.iscomplexobj(x):
        imaginary = jnp.max(jnp.abs(x.imag), axis=axes, keepdims=True)
        largest = jnp.maximum(largest, imaginary)
    finite = jnp.isfinite(largest)
    x = jnp.where(finite, x, 0)
    largest = jnp.where(finite & (largest > 0), largest, 1)
    x = x / largest
    norm = jnp.sqrt(jnp.sum(x.real**2 + x.imag**2, axis=axes, keepdims=True))
    norm = jnp.where(norm > 0, norm, 1)
    return x / norm, (largest, norm), finite


@_factor.defjvp
def _factor_jvp(method, primals, tangents):
    r"""Differentiate the exact factor.

    With $X = U \Sigma V^H$ and $E = U^H dX V$, the Sylvester equation
    $P \Omega + \Omega P = U^H dX - dX^H U$ gives
    $d(U V^H) = U [(E - E^H)_{ij} / (\sigma_i + \sigma_j)] V^H
    + (I - U U^H) dX V \Sigma^{-1} V^H$ where tall, and its mirror image where wide
    (Higham 2008, Section 8.2 and Problem 8.16). Directions below the numerical rank
    are held at zero: next to them the term is $E_{ij} / \sigma_i$.
    """
    (x,), (dx,) = primals, tangents
    unit, divisors, finite = _normalised(x)
    for divisor in divisors:
        dx = dx / divisor
    dx = jnp.where(finite, dx, 0)
    u, s, vh = thin_svd(unit)
    v = adjoint(vh)
    alive = in_range(s, unit)
    inverse = jnp.where(alive, 1 / jnp.where(alive, s, 1), 0)
    e = matmul(matmul(adjoint(u), dx), v)
    both = alive[:, :, None] & alive[:, None, :]
    total = jnp.where(both, s[:, :, None] + s[:, None, :], 1)
    inner = jnp.where(both, (e - adjoint(e)) / total, 0)
    # One of the two directions dead: s_i counts alone, from whichever side is alive.
    beside = e * (inverse[:, :, None] + inverse[:, None, :])
    inner += jnp.where(both, 0, beside)
    out = matmul(matmul(u, inner), vh)
    m, n = x.shape[-2:]
    if m > n:
        rest = dx - matmul(u, matmul(adjoint(u), dx))
        out += matmul(matmul(rest, v) * inverse[:, None, :], vh)
    elif m < n:
        rest = dx - matmul(matmul(dx, v), vh)
        out += matmul(u, inverse[:, :, None] * matmul(adjoint(u), rest))
    primal = _factor(x, method)
    return primal, jnp.where(finite, out, jnp.nan).astype(primal.dtype)
