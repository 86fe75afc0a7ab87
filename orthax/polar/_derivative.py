"""The derivative of the exact polar factor, whatever the method."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, eigh, matmul
from orthax.polar._method import normalised, rank_tolerance


def derivative(
    x: jax.Array, dx: jax.Array, exact: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    r"""Differentiate the exact factor of a tall X = U P; wide ones are transposed.

    $dU = U \Omega + (I - U U^H) dX P^{-1}$, where $\Omega$ solves the Sylvester
    equation $P \Omega + \Omega P = U^H dX - dX^H U$ (Higham 2008, Section 8.2 and
    Problem 8.16), with inverses restricted to the range of P. U is itself
    differentiable and the equations are solved implicitly, which gives every order.
    """
    unit, divisors, finite = normalised(x)
    for divisor in divisors:
        dx = dx / jnp.where(finite, divisor, 1)
    dx = jnp.where(finite, dx, 0)
    wide = x.shape[-2] < x.shape[-1]
    if wide:
        unit, dx = unit.mT, dx.mT
    u = exact(unit)
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
