"""`orthax.orthogonalise()` in thirty lines: to be read first, and compared with.

One leaf after another, one matrix after another, by a singular value decomposition. The
library gives the same update, without an SVD, on batches of matrices and many devices.
"""

import jax
import jax.numpy as jnp
import optax

from orthax import components


def polar_factor(x: jax.Array) -> jax.Array:
    """Return U V^T for a matrix X = U S V^T, without its null directions."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    there = s > max(x.shape) * jnp.finfo(x.dtype).eps * s[0]
    return (u * there) @ vt


def orthogonalise(
    rule: components.Rule = components.ByName(),
) -> optax.GradientTransformation:
    """Replace every gradient matrix by its polar factor, as a rule cuts the leaves."""

    def of_leaf(path: str, g: jax.Array) -> jax.Array:
        cut = rule.resolve(path, g) if g.ndim > 1 and g.size > 1 else None
        if cut is None:  # Biases, norms, embeddings.
            return g
        batches = cut.fold(g)  # Of shape (b, m, n), mostly one.
        factors = [jnp.stack([polar_factor(x) for x in batch]) for batch in batches]
        return cut.unfold(factors, g.shape)

    def update(updates, state, params=None):
        def on_path(keys, g):
            return of_leaf(jax.tree_util.keystr(keys, simple=True, separator="/"), g)

        return jax.tree_util.tree_map_with_path(on_path, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
