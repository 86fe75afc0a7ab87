"""LAPACK-style decompositions of stacks, one matrix after another on CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def one_by_one(f: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Lift `f`, a decomposition of one matrix, to a stack of shape `(b, m, n)`.

    On CPU the matrices are worked on in turn, whatever `vmap` the call stands under:
    jaxlib's batched `eigh`, `qr` and `cholesky` wait there for workers of the very
    thread pool they run on, and a few independent batched calls in one program never
    return on a small machine (seen with jaxlib 0.10.2 and two cores). Elsewhere the
    call is batched.
    """
    in_turn = jax.vmap(jax.custom_batching.sequential_vmap(f))
    batched = jax.vmap(f)

    def stacked(x: jax.Array) -> Any:
        return jax.lax.platform_dependent(x, cpu=in_turn, default=batched)

    return stacked


def thin_svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `u, s, vh` of every matrix of a stack, singular values descending."""
    return one_by_one(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))(x)


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ascending eigenvalues, and vectors, of a stack of Hermitian matrices."""
    return one_by_one(lambda a: tuple(jnp.linalg.eigh(a)))(x)
