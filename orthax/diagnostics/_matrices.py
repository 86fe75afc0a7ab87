"""What can be said of every matrix of a tree: how orthogonal, how near, what rank."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthax import _linalg, components, polar
from orthax._linalg import adjoint, matmul, norm, replicated, working
from orthax.diagnostics._trees import by_path, check_same_leaves

_MATRIX = (-2, -1)


class SingularValues(NamedTuple):
    """The singular values of each matrix of a leaf, in six numbers, shape (matrices,).

    Attributes:
      largest: the spectral norm, unit of the entries.
      smallest: the last of the min(m, n) singular values, unit of the entries.
      median: their median, unit of the entries.
      frobenius_norm: the root of the sum of their squares, unit of the entries.
      nuclear_norm: their sum, unit of the entries.
      stable_rank: squared Frobenius norm over squared spectral norm, dimensionless,
        from 1 to min(m, n); 0 for a zero matrix.
    """

    largest: jax.Array
    smallest: jax.Array
    median: jax.Array
    frobenius_norm: jax.Array
    nuclear_norm: jax.Array
    stable_rank: jax.Array


def orthogonality_error(
    tree: Any, rule: components.RuleOrTree = components.ByName()
) -> dict[str, jax.Array]:
    r"""Return how far every matrix is from having an orthonormal short side.

    $\|X^H X - I\|_F / \sqrt{k}$ with $k = \min(m, n)$, of $X X^H$ where X is wide: the
    root mean square over singular values of $\sigma^2 - 1$. A value of e means that
    singular values are off by about e / 2.

    Args:
      tree: updates (the output of `orthogonalise`) or weights.
      rule: how leaves form matrices; leaves that it leaves alone are left out.

    Returns:
      By path, the errors of the matrices of a leaf, dimensionless, shape (matrices,).

    Raises:
      TypeError: if `rule` is not a rule or a leaf is not an array.
      ValueError: if the rule cannot decide a leaf or cuts none, or if two leaves have
        one path.

    Limits:
      It sees orthonormality alone, not whether this is the polar factor of anything:
      see `polar_residual`. A matrix of rank r < k whose other singular values are one,
      which is what the methods give with a null space at zero, has the error
      sqrt((k - r) / k), and a zero matrix 1: look at `rank_estimate` first. NaN or
      infinity in a matrix gives NaN for it alone; the error of entries beyond 1e9
      overflows to infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> updates = {"kernel": jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])}
      >>> diagnostics.orthogonality_error(updates)["kernel"].tolist()
      [0.0]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, equation (4): the constraint, here of
      the short side.
    """
    return _measured(_orthogonality_error, (_cut_leaves(tree, rule),))


def polar_residual(
    updates: Any, gradients: Any, rule: components.RuleOrTree = components.ByName()
) -> dict[str, jax.Array]:
    r"""Return how far every update is from the exact polar factor of its gradient.

    $\|O - U\|_F / \|U\|_F$, with U the polar factor of the gradient by a singular value
    decomposition, its numerical null space at zero.

    Args:
      updates: what `orthogonalise` gave.
      gradients: what it was given (for Muon the momentum, not the gradient): a tree
        with the same leaves.
      rule: how leaves form matrices; leaves that it leaves alone are left out.

    Returns:
      By path, the residuals of the matrices of a leaf, dimensionless, shape
      (matrices,).

    Raises:
      TypeError: if `rule` is not a rule or a leaf is not an array.
      ValueError: if the trees differ in their leaves or shapes; if the rule cannot
        decide a leaf or cuts none; or if two leaves have one path.

    Limits:
      The scale counts: an update that was multiplied by a learning rate or by
      `scale_by_shape` is far away, at -lr it is 1 + lr. An update that fills the null
      space (`null_space="complete"`) of a gradient of rank r < k has the residual
      sqrt((k - r) / r). A method with a threshold, as the default, is far off for
      ill-conditioned gradients, large square ones above all, although every direction
      that it promises is right. An update in bfloat16 has 2e-3 of rounding. Of a zero
      gradient a zero update has residual 0, any other infinity. NaN or infinity in
      either matrix gives NaN for this pair alone. As slow as the SVD of every leaf.

    Example:
      >>> import jax
      >>> import orthax
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> tx = orthax.orthogonalise()
      >>> updates, _ = tx.update(gradients, tx.init(gradients))
      >>> residual = orthax.diagnostics.polar_residual(updates, gradients)
      >>> bool(residual["kernel"][0] < 1e-4)
      True

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, equation (5). Higham: "Functions of
      Matrices", SIAM 2008, Theorem 8.1.
    """
    cut, of = _cut_leaves(updates, rule), _cut_leaves(gradients, rule)
    values = [
        {path: leaf.value for path, leaf in leaves.items()} for leaves in (cut, of)
    ]
    check_same_leaves("updates", values[0], "gradients", values[1])
    return _measured(_residual, (cut, of))


def rank_estimate(
    tree: Any,
    rule: components.RuleOrTree = components.ByName(),
    rank_tol: float | None = None,
) -> dict[str, jax.Array]:
    """Return the numerical rank of every matrix.

    How many singular values are above `rank_tol` times the largest: counted as the
    squared Frobenius norm of the polar factor `polar.SVD(rank_tol=rank_tol)`, so that
    it is the rank by which that method works.

    Args:
      tree: gradients, updates or weights.
      rule: how leaves form matrices; leaves that it leaves alone are left out.
      rank_tol: relative threshold, dimensionless, positive; default
        `max(m, n) * eps` of the dtype worked in (float32 for lower ones), as numpy and
        LAPACK have it.

    Returns:
      By path, the ranks of the matrices of a leaf, shape (matrices,): whole numbers,
      floating so that NaN can stand among them.

    Raises:
      TypeError: if `rule` is not a rule, or a leaf is not an array.
      ValueError: if `rank_tol` is not positive; if the rule cannot decide a leaf or
        cuts none; or if two leaves have one path.

    Limits:
      Rounding fills null spaces: a matrix of rank one that was stored in bfloat16 has
      full rank by the default threshold, and gradients that were summed in float32
      often do; ask with `rank_tol=1e-2` or 1e-5. The gradient of a dense layer has at
      most the rank of its batch size. A zero matrix has rank 0. NaN or infinity in a
      matrix gives NaN for it alone. As slow as the SVD of every leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> tree = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1e-9]))}
      >>> diagnostics.rank_estimate(tree)["kernel"].tolist()
      [2.0]

    References:
      Golub, Van Loan: "Matrix Computations", 4th edition, Section 5.4.1.
    """
    method = polar.SVD(rank_tol=rank_tol)
    return _measured(_rank, (_cut_leaves(tree, rule),), method)


def singular_values(
    tree: Any, rule: components.RuleOrTree = components.ByName()
) -> dict[str, SingularValues]:
    """Return a summary of the singular values of every matrix.

    Args:
      tree: gradients, updates or weights.
      rule: how leaves form matrices; leaves that it leaves alone are left out.

    Returns:
      By path, a `SingularValues` of arrays of shape (matrices,), in float32 for lower
      dtypes.

    Raises:
      TypeError: if `rule` is not a rule or a leaf is not an array.
      ValueError: if the rule cannot decide a leaf or cuts none, or if two leaves have
        one path.

    Limits:
      Singular values below `max(m, n) * eps` of the largest are rounding noise:
      `smallest` of a rank-deficient matrix is such noise and seldom zero. Exact at
      every scale. NaN or infinity in a matrix gives NaN for it alone. As slow as the
      singular values of every leaf, one matrix after another.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> tree = {"kernel": jnp.diag(jnp.array([3.0, 4.0]))}
      >>> found = diagnostics.singular_values(tree)["kernel"]
      >>> found.largest.tolist(), found.nuclear_norm.tolist()
      ([4.0], [7.0])
      >>> found.frobenius_norm.tolist(), found.stable_rank.tolist()
      ([5.0], [1.5625])

    References:
      Rudelson, Vershynin: "Sampling from large matrices", Journal of the ACM 54(4),
      2007 (the stable rank).
    """
    return _measured(_summary, (_cut_leaves(tree, rule),))


def _orthogonality_error(x: jax.Array) -> jax.Array:
    k = min(x.shape[1:])
    x = x if x.shape[1] >= x.shape[2] else x.mT
    gram = matmul(adjoint(x), x)
    return norm(gram - jnp.eye(k, dtype=x.dtype)[None], _MATRIX) / math.sqrt(k)


def _residual(update: jax.Array, gradient: jax.Array) -> jax.Array:
    exact = polar.polar_factor(gradient, polar.SVD())
    distance = norm(update - exact, _MATRIX)
    return jnp.where(distance == 0, 0, distance / norm(exact, _MATRIX))


def _rank(x: jax.Array, method: polar.SVD) -> jax.Array:
    return jnp.round(norm(polar.polar_factor(x, method), _MATRIX) ** 2)


def _summary(x: jax.Array) -> SingularValues:
    scale = jnp.max(jnp.abs(x), axis=_MATRIX)
    unit = x / jnp.where(scale > 0, scale, 1)[:, None, None]
    s = _linalg.singular_values(unit)
    frobenius = norm(s, -1)
    largest, k = s[:, 0], s.shape[1]
    return SingularValues(
        largest=largest * scale,
        smallest=s[:, -1] * scale,
        median=jnp.mean(s[:, (k - 1) // 2 : k // 2 + 1], axis=-1) * scale,
        frobenius_norm=frobenius * scale,
        nuclear_norm=jnp.sum(s, axis=-1) * scale,
        stable_rank=(frobenius / jnp.where(largest > 0, largest, 1)) ** 2,
    )


def _cut_leaves(tree: Any, rule: components.Rule) -> dict[str, components.Leaf]:
    """Return the leaves of a tree that the rule cuts, by path."""
    leaves = components.resolve(tree, rule)
    return by_path((leaf.path, leaf) for leaf in leaves if leaf.cut)


def _measured(
    f: Callable[..., Any], trees: tuple[dict[str, components.Leaf], ...], *options: Any
) -> dict[str, Any]:
    """Call `f` on the stacks of every leaf, and join what it says of their matrices."""
    found = {}
    for path in trees[0]:
        leaves = [tree[path] for tree in trees]
        folded = (leaf.cut.fold(replicated(working(leaf.value))) for leaf in leaves)
        stacks = zip(*folded, strict=True)
        answers = [_where_finite(f, options, *stack) for stack in stacks]
        found[path] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *answers)
    return found


# Compiled once for each shape: called eagerly, a decomposition is compiled every time.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _where_finite(
    f: Callable[..., Any], options: tuple[Any, ...], *stacks: jax.Array
) -> Any:
    """Call `f` on stacks, with NaN for matrices that are not finite in all of them."""
    finite = jnp.stack([jnp.all(jnp.isfinite(x), axis=_MATRIX) for x in stacks])
    finite = jnp.all(finite, axis=0)
    # No decomposition ever meets a NaN: some never return from one.
    answer = f(*(jnp.where(finite[:, None, None], x, 0) for x in stacks), *options)
    return jax.tree.map(lambda value: jnp.where(finite, value, jnp.nan), answer)
