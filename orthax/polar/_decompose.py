"""LAPACK-style decompositions of stacks, one matrix after another on CPU."""

from collections.abc import Callable
from typing import Any

import jax


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
