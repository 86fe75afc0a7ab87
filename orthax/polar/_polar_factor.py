"""The orthogonal polar factor, differentiable for every method."""

import functools

import jax
import jax.numpy as jnp

from orthax._linalg import working
from orthax.polar._auto import Auto
from orthax.polar._checks import as_array, check_matrices, check_method
from orthax.polar._derivative import derivative
from orthax.polar._method import PolarMethod, normalised
from orthax.polar._svd import SVD


def polar_factor(x: jax.typing.ArrayLike, method: PolarMethod = Auto()) -> jax.Array:
    r"""Return the orthogonal polar factor of every matrix in a batch.

    $X = U P$ with $P = (X^H X)^{1/2}$: $U$ is the nearest matrix to $X$ with
    orthonormal columns (rows, where it is wide) in every unitarily invariant norm.

    Args:
      x: matrices, shape `(*batch, m, n)`, any floating or complex dtype.
      method: a polar method; default `polar.Auto()`.

    Returns:
      The polar factors, shape and dtype of `x`. Computed in float32 for narrower
      dtypes, in float64 for float64, and likewise for complex.

    Raises:
      TypeError: if `x` is not an array of floating or complex numbers, or `method` is
        not a polar method.
      ValueError: if `x` has fewer than two axes.

    Limits:
      The result does not depend on the scale of `x`, for max|x| from 1e-30 to 1e37 in
      float32. Zero gives zero (except with `null_space="complete"` of `polar.SVD`).
      NaN or infinity in a matrix gives NaN in all of that matrix and in no other. An
      empty batch or matrix is returned unchanged.

      Differentiable in both modes and to any order. For every method this is the
      derivative of the exact factor, and computes an SVD. It is finite everywhere: at
      rank-deficient matrices, where the factor is not differentiable, it is the
      derivative along matrices of the same rank, and zero at a zero matrix.

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
    method = check_method(method)
    check_matrices(x)
    if not x.size:
        return x
    stack = working(x).reshape(-1, *x.shape[-2:])
    return _compiled(stack, method).reshape(x.shape).astype(x.dtype)


def split_polar_factors(
    x: jax.Array, axes: tuple[str, ...], method: PolarMethod = Auto()
) -> jax.Array:
    """Return this device's part of polar factors whose columns are sharded.

    For use inside `jax.shard_map`: only Gram matrices of the rows are summed over the
    devices.

    Args:
      x: this device's columns of matrices with at most as many rows as columns, shape
        `(b, m, n / devices)`, any floating or complex dtype.
      axes: the mesh axes over which the columns are sharded.
      method: one with `split_flops`, such as `polar.NewtonSchulz()` or `polar.DWH()`.

    Returns:
      The same columns of the polar factors, shape and dtype of `x`.

    Raises:
      TypeError: as `polar_factor`.
      ValueError: if `method` cannot work on a part of the columns.

    Limits:
      Those of the method. Not differentiable.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from orthax import polar
      >>> from orthax.internal.polar import split_polar_factors
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=auto)
      >>> columns = jax.sharding.PartitionSpec(None, None, "d")
      >>> split = jax.shard_map(
      ...     lambda x: split_polar_factors(x, ("d",)),
      ...     mesh=mesh, in_specs=columns, out_specs=columns, check_vma=False,
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 8 * jax.device_count()))
      >>> bool(jnp.abs(split(x) - polar.polar_factor(x)).max() < 1e-4)
      True

    References:
      Dao-AILab: "Gram Newton-Schulz", 2026 (only the Gram matrix couples the rows).
    """
    method = check_method(method)
    check_matrices(x)
    if method.split_flops(1, 1, 1) is None:
        raise ValueError(f"{method} cannot work on a part of the columns.")
    return _factor(working(x), method, axes).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _factors(x: jax.Array, method: PolarMethod) -> jax.Array:
    return _factor(x, method)


@_factors.defjvp
def _factors_jvp(method, primals, tangents):
    (x,), (dx,) = primals, tangents
    exact = functools.partial(_factors, method=SVD())
    return _factors(x, method), derivative(x, dx, exact)


# Compiled once for each shape and method, even if polar_factor is called eagerly.
_compiled = jax.jit(_factors, static_argnames="method")


def _factor(x: jax.Array, method: PolarMethod, axes: tuple[str, ...] = ()) -> jax.Array:
    factor = functools.partial(method.factor, axes=axes) if axes else method.factor
    if method.any_scale:
        return factor(x)
    unit, _, finite = normalised(x, axes)
    return jnp.where(finite, factor(unit), jnp.nan)
