"""Inverses of positive definite matrices by Cholesky factors of small blocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from orthax._linalg import adjoint, cholesky, matmul

# Rows of the largest block whose Cholesky factor is computed. On CPU, OpenBLAS gives
# larger blocks to several threads, which spin long after they are done and slow ours.
_BLOCK = 96


def positive_definite_inverse(x: jax.Array) -> jax.Array:
    r"""Return the inverses of Hermitian matrices whose eigenvalues are at least one.

    Recursively by halves: with the leading block P, the off-diagonal block Q and the
    Schur complement S of P, the inverse has the blocks $P^{-1} + T S^{-1} T^H$,
    $-T S^{-1}$ and $S^{-1}$, $T = P^{-1} Q$ (Horn, Johnson: "Matrix Analysis", 2nd
    edition, (0.7.3.1)). That is `2 m^3` operations, nearly all in large products.
    """
    m = x.shape[-1]
    halvings = max(0, math.ceil(math.log2(m / _BLOCK)))
    whole = -(-m // 2**halvings) * 2**halvings
    if whole == m:
        return _inverse(x, halvings)
    border = np.diag(np.repeat(np.array([0, 1], x.dtype), (m, whole - m)))
    padded = jnp.pad(x, ((0, 0), (0, whole - m), (0, whole - m))) + border
    return _inverse(padded, halvings)[:, :m, :m]


def _inverse(x: jax.Array, halvings: int) -> jax.Array:
    """Return inverses of matrices whose size is divisible by `2**halvings`.

    A loop of two iterations inverts both halves with the same code: separate code for
    every block of every size would take long to compile.
    """
    if not halvings:
        return _small_inverse(x)
    k = x.shape[-1] // 2
    p, q, s = x[:, :k, :k], x[:, :k, k:], x[:, k:, k:]

    def first(v: jax.Array, *_: jax.Array) -> tuple[jax.Array, ...]:
        t = matmul(v, q)
        # Multiplying by an inverse is less stable than solving; one refinement step
        # makes up for it.
        t += matmul(v, q - matmul(p, t))
        return s - matmul(adjoint(q), t), v, t

    def second(v: jax.Array, p: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
        return v, p, t

    def iteration(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block, p, t = carry
        v = _inverse(block, halvings - 1)
        return jax.lax.cond(i == 0, first, second, v, p, t)

    s, p, t = jax.lax.fori_loop(0, 2, iteration, (p, q, q))
    u = matmul(t, s)
    # A sum of padded blocks compiles twice as fast as a concatenation.
    head, tail = (0, k, 0), (k, 0, 0)

    def block(x: jax.Array, rows: tuple, columns: tuple) -> jax.Array:
        return jax.lax.pad(x, np.zeros((), x.dtype), ((0, 0, 0), rows, columns))

    diagonal = block(p + matmul(u, adjoint(t)), head, head) + block(s, tail, tail)
    return diagonal - block(u, head, tail) - block(adjoint(u), tail, head)


def _small_inverse(x: jax.Array) -> jax.Array:
    r"""Return inverses by one Cholesky factorisation each, without triangular solves.

    The factor of $((X, I), (I, 2I))$, positive definite for $X \geq I$, contains
    $L^{-H}$ below the factor L of X.
    """
    m = x.shape[-1]
    border = np.zeros((2 * m, 2 * m), x.dtype)
    border[m:, :m] = border[:m, m:] = np.eye(m)
    border[m:, m:] = 2 * np.eye(m)

    pad = ((0, 0, 0), (0, m, 0), (0, m, 0))
    bordered = jax.lax.pad(x, np.zeros((), x.dtype), pad) + border[None]
    u = cholesky(bordered)[:, m:, :m]
    return matmul(u, adjoint(u))
