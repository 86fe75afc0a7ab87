"""How much of the orthogonal basis of a weight stays between two moments."""

from typing import Any

import jax
import jax.numpy as jnp

from orthax import components, polar
from orthax._linalg import norm, replicated, working
from orthax.diagnostics._trees import by_path, check_same_leaves


def basis_stability(
    before: Any, after: Any, rule: components.RuleOrTree = components.ByName()
) -> dict[str, jax.Array]:
    r"""Return how far the orthogonal bases of weights agree at two times.

    $\frac{1}{k} \sum_j \cos(E_j, F_j)$ over the k columns of $E = U V^T$ before and F
    after, the polar factors of a weight whose matrix is turned to have k columns, not
    more than rows. One for a basis that stayed, zero on average for unrelated ones of
    many rows.

    Args:
      before: weights at one time.
      after: weights at another: a tree with the same leaves.
      rule: how leaves form matrices; leaves that it leaves alone are left out.

    Returns:
      By path, the stability of the matrices of a leaf, dimensionless, from -1 to 1,
      shape (matrices,).

    Raises:
      TypeError: if `rule` is not a rule or a leaf is not an array.
      ValueError: if the trees differ in their leaves or shapes; if the rule cannot
        decide a leaf or cuts none; or if two leaves have one path.

    Limits:
      Scale-free. A direction whose singular value is zero to rounding has no basis:
      the factor of a rank-deficient weight has shorter columns, of which the cosine is
      taken, and a column of zeros, as all of a zero weight's, has the cosine 0 with
      any other. Just above that threshold a basis is that of rounding noise. NaN or
      infinity in either matrix gives NaN for this pair alone. As slow as the SVD of
      every leaf, twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> before = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])}
      >>> after = {"kernel": jnp.array([[9.0, 0.0], [0.0, 0.0], [0.0, 1.0]])}
      >>> diagnostics.basis_stability(before, after)["kernel"].tolist()
      [0.5]

    References:
      Coquelin et al.: "Harnessing Orthogonality to Train Low-Rank Neural Networks",
      2024, arXiv 2401.08505, Section 3, and the authors' code.
    """
    cuts = [
        by_path(
            (leaf.path, leaf) for leaf in components.resolve(tree, rule) if leaf.cut
        )
        for tree in (before, after)
    ]
    values = [{path: leaf.value for path, leaf in cut.items()} for cut in cuts]
    check_same_leaves("before", values[0], "after", values[1])
    found = {}
    for path in cuts[0]:
        folded = [
            cut[path].cut.fold(replicated(working(cut[path].value))) for cut in cuts
        ]
        pairs = zip(*folded, strict=True)
        found[path] = jnp.concatenate([_stability(*pair) for pair in pairs])
    return found


# Compiled once for each shape: called eagerly, a decomposition is compiled every time.
@jax.jit
def _stability(before: jax.Array, after: jax.Array) -> jax.Array:
    """Return the mean cosine of the columns of the factors of two stacks."""
    e, f = (_columns(polar.polar_factor(x, polar.SVD())) for x in (before, after))
    inner = jnp.sum(e.conj() * f, axis=1).real
    lengths = [norm(x, 1) for x in (e, f)]
    # Shorter columns are rounding noise of the factor.
    tol = e.shape[1] * jnp.finfo(e.dtype).eps
    there = (lengths[0] > tol) & (lengths[1] > tol)
    cosines = jnp.where(there, inner / jnp.where(there, lengths[0] * lengths[1], 1), 0)
    finite = jnp.all(jnp.isfinite(inner), axis=-1)
    return jnp.where(finite, jnp.mean(cosines, axis=-1), jnp.nan)


def _columns(x: jax.Array) -> jax.Array:
    return x if x.shape[1] >= x.shape[2] else x.mT
