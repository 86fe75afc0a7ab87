"""The one operation: the orthogonal polar factor, with its derivative."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, eigh, frobenius, matmul, working_dtype
from orthax.polar._auto import Auto
from orthax.polar._checks import as_array, check_matrices, check_method
from orthax.polar._method import PolarMethod, rank_tolerance
from orthax.polar._svd import SVD

Function = Callable[[jax.Array], jax.Array]


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
      TypeError: if `x` is no array of floating or complex numbers, or `method` is not a
        method.
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
    x = as_array(x)
    check_method(method)
    check_matrices(x)
    if not x.size:
        return x
    stack = x.astype(working_dtype(x.dtype)).reshape(-1, *x.shape[-2:])
    return _compiled(stack, method).reshape(x.shape).astype(x.dtype)


def split_polar_factors(
    x: jax.Array, axes: tuple[str, ...], method: PolarMethod = Auto()
) -> jax.Array:
    """Return what a device has of polar factors whose columns are sharded.

    For use inside `jax.shard_map`: only the Gram matrices of the rows are summed over
    the devices.

    Args:
      x: what this device has of matrices with at most as many rows as columns, shape
        `(b, m, n / devices)`, any floating or complex dtype.
      axes: the mesh axes over which the columns are sharded.
      method: one with `factor_split`, as `polar.NewtonSchulz()` and `polar.DWH()`.

    Returns:
      The same part of the polar factors, shape and dtype of `x`.

    Raises:
      TypeError: as `polar_factor`.
      ValueError: if `method` cannot work on a part of the columns.

    Limits:
      As those of the method. No derivative of its own: differentiate around it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=auto)
      >>> columns = jax.sharding.PartitionSpec(None, None, "d")
      >>> split = jax.shard_map(
      ...     lambda x: polar.split_polar_factors(x, ("d",)),
      ...     mesh=mesh, in_specs=columns, out_specs=columns, check_vma=False,
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 8 * jax.device_count()))
      >>> bool(jnp.abs(split(x) - polar.polar_factor(x)).max() < 1e-4)
      True

    References:
      Dao-AILab: "Gram Newton-Schulz", 2026 (the Gram matrix is all that rows share).
    """
    check_method(method)
    check_matrices(x)

    def on(platform: str) -> Function:
        used = method.on(platform, x.dtype) if isinstance(method, Auto) else method
        if not hasattr(used, "factor_split") or used.split_flops(1, 1, 1) is None:
            raise ValueError(f"{used} cannot work on a part of the columns.")
        return lambda x: _factor(x, used, axes)

    work = x.astype(working_dtype(x.dtype))
    out = jax.lax.platform_dependent(work, cpu=on("cpu"), default=on("other"))
    return out.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _factors(x: jax.Array, method: PolarMethod) -> jax.Array:
    if not isinstance(method, Auto):
        return _factor(x, method)

    def on(platform: str) -> Function:
        return functools.partial(_factor, method=method.on(platform, x.dtype))

    return jax.lax.platform_dependent(x, cpu=on("cpu"), default=on("other"))


# Compiled once for each shape and method, also where polar_factor is called eagerly.
_compiled = jax.jit(_factors, static_argnames="method")


def _factor(x: jax.Array, method: PolarMethod, axes: tuple[str, ...] = ()) -> jax.Array:
    factor = (
        functools.partial(method.factor_split, axes=axes) if axes else method.factor
    )
    if getattr(method, "any_scale", False):
        return factor(x)
    unit, _, finite = _normalised(x, axes)
    return jnp.where(finite, factor(unit), jnp.nan)


def _normalised(
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


@_factors.defjvp
def _factors_jvp(method, primals, tangents):
    (x,), (dx,) = primals, tangents
    return _factors(x, method), _derivative(x, dx)


def _derivative(x: jax.Array, dx: jax.Array) -> jax.Array:
    r"""Differentiate the exact factor, of a tall X = U P; a wide one is turned.

    $dU = U \Omega + (I - U U^H) dX P^{-1}$, where $\Omega$ solves the Sylvester
    equation $P \Omega + \Omega P = U^H dX - dX^H U$ (Higham 2008, Section 8.2 and
    Problem 8.16), with inverses on the range of P alone. U is itself differentiable
    and the equations are solved implicitly, so that every order follows.
    """
    unit, divisors, finite = _normalised(x)
    for divisor in divisors:
        dx = dx / jnp.where(finite, divisor, 1)
    dx = jnp.where(finite, dx, 0)
    wide = x.shape[-2] < x.shape[-1]
    if wide:
        unit, dx = unit.mT, dx.mT
    u = _factors(unit, SVD())
    k = matmul(adjoint(u), dx)
    sylvester, division = _solvers(matmul(adjoint(u), unit), unit.shape)
    du = matmul(u, sylvester(k - adjoint(k))) + division(dx - matmul(u, k))
    return jnp.where(finite, du.mT if wide else du, jnp.nan).astype(x.dtype)


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
