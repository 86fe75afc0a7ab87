"""The one operation: the orthogonal polar factor, with its derivative."""

import functools
import math

import jax
import jax.numpy as jnp

from orthax.polar._auto import Auto
from orthax.polar._decompose import eigh
from orthax.polar._method import PolarMethod, adjoint, matmul, rank_tolerance
from orthax.polar._svd import SVD


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

      Differentiable in both modes and to any order, by the derivative of the exact
      factor whatever the method, for which an SVD is computed. It is finite
      everywhere: at equal singular values, where it exists, and at rank-deficient
      matrices, where the factor is not differentiable and the derivative along
      matrices of the same rank is given, zero at a zero matrix.

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
    out = _compiled(work.reshape(batch, *x.shape[-2:]), method)
    return out.reshape(x.shape).astype(x.dtype)


def check_method(method: PolarMethod) -> None:
    """Raise unless `method` is an instance of a polar method.

    Args:
      method: anything.

    Raises:
      TypeError: if it is a class or a string, lacks `factor` or `flops` or is callable.
    """
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


# Compiled once for each shape and method, also where polar_factor is called eagerly.
_compiled = jax.jit(_factor, static_argnames="method")


def _normalised(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Return every matrix with Frobenius norm one or zero, two divisors, finiteness.

    Two divisions, by the largest entry and by the norm of the rest: squares of entries
    beyond 1e19 or below 1e-23 would leave float32. The factor does not depend on them:
    derivatives take them for constants. A matrix that is not finite is replaced by
    zero, so that no iteration ever meets one.
    """
    axes = (-2, -1)
    largest = jnp.max(jnp.abs(x.real), axis=axes, keepdims=True)
    if jnp.iscomplexobj(x):
        imaginary = jnp.max(jnp.abs(x.imag), axis=axes, keepdims=True)
        largest = jnp.maximum(largest, imaginary)
    finite = jnp.isfinite(largest)
    x = jnp.where(finite, x, 0)
    largest = jax.lax.stop_gradient(jnp.where(finite & (largest > 0), largest, 1))
    x = x / largest
    norm = jnp.sqrt(jnp.sum(x.real**2 + x.imag**2, axis=axes, keepdims=True))
    norm = jax.lax.stop_gradient(jnp.where(norm > 0, norm, 1))
    return x / norm, (largest, norm), finite


@_factor.defjvp
def _factor_jvp(method, primals, tangents):
    r"""Differentiate the exact factor, of a tall X = U P; a wide one is turned.

    $dU = U \Omega + (I - U U^H) dX P^{-1}$, where $\Omega$ solves the Sylvester
    equation $P \Omega + \Omega P = U^H dX - dX^H U$ (Higham 2008, Section 8.2 and
    Problem 8.16), with inverses on the range of P alone. U is itself differentiable
    and the equations are solved implicitly, so that every order follows.
    """
    (x,), (dx,) = primals, tangents
    unit, divisors, finite = _normalised(x)
    for divisor in divisors:
        dx = dx / divisor
    dx = jnp.where(finite, dx, 0)
    wide = x.shape[-2] < x.shape[-1]
    if wide:
        unit, dx = unit.mT, dx.mT
    u = _factor(unit, SVD())
    k = matmul(adjoint(u), dx)
    sylvester, division = _solvers(matmul(adjoint(u), unit), unit.shape)
    du = matmul(u, sylvester(k - adjoint(k))) + division(dx - matmul(u, k))
    primal = _factor(x, method)
    du = jnp.where(finite, du.mT if wide else du, jnp.nan)
    return primal, du.astype(primal.dtype)


def _solvers(p: jax.Array, shape: tuple[int, ...]):
    """Return the solvers of `p z + z p = b` and `z p = b` for Hermitian p."""
    p = (p + adjoint(p)) / 2
    values, v = eigh(jax.lax.stop_gradient(p))
    alive = values > rank_tolerance(shape, p.dtype) * values[:, -1:]
    values = jnp.where(alive, values, 0)

    def inverse(x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)

    sums = inverse(values[:, :, None] + values[:, None, :])

    def solver(matvec, solve):
        # p is Hermitian: its transpose is its conjugate.
        return lambda b: jax.lax.custom_linear_solve(
            matvec,
            b,
            lambda _, b: solve(b),
            transpose_solve=lambda _, b: solve(b.conj()).conj(),
        )

    return (
        solver(
            lambda z: matmul(p, z) + matmul(z, p),
            lambda b: matmul(
                v, matmul(sums * matmul(matmul(adjoint(v), b), v), adjoint(v))
            ),
        ),
        solver(
            lambda z: matmul(z, p),
            lambda b: matmul(matmul(b, v) * inverse(values)[:, None, :], adjoint(v)),
        ),
    )
