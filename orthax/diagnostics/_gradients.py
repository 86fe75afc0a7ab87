"""What can be said of the leaves of gradients and updates, whatever their rank."""

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthax._linalg import working
from orthax.diagnostics._trees import check_same_leaves, floating_leaves


class DeadParameters(NamedTuple):
    """How many entries of a leaf have hardly any gradient.

    Attributes:
      count: how many, shape (): a whole number, floating so that it can be NaN.
      fraction: which part of the leaf, from 0 to 1, shape ().
    """

    count: jax.Array
    fraction: jax.Array


def update_cosine(gradients: Any, updates: Any) -> dict[str, jax.Array]:
    r"""Return the cosine between the gradient and the update of every leaf.

    How to read it: 1 is the direction of the gradient itself. For the exact polar
    factor of one matrix G of rank r it is $\|G\|_* / (\|G\|_F \sqrt{r})$, the nuclear
    norm over the Frobenius norm and root r: 1 where all singular values are equal,
    down to almost $1 / \sqrt{r}$ where one is far above the rest. A small value says
    that the orthogonalisation has changed much; a value below $1 / \sqrt{\min(m, n)}$
    that the update is not a polar factor.

    Args:
      gradients: gradients, as given to a transformation (for Muon the momentum).
      updates: what it gave: a tree with the same leaves.

    Returns:
      By path, the cosine of every floating leaf, vectors included, from -1 to 1,
      shape (). Of complex leaves the real part of the inner product.

    Raises:
      TypeError: if a leaf is not an array.
      ValueError: if the trees differ in their floating leaves or shapes, or if two
        leaves have one path.

    Limits:
      The output of a whole optimiser has the opposite sign: plain SGD is at -1. A leaf
      of several matrices (stacked layers, heads, groups) has one cosine, over all. Two
      random vectors have a cosine of about `1 / sqrt(n)`, see `cosine_threshold`. If
      one side is zero the cosine is 0; NaN or infinity in a leaf gives NaN for it
      alone. Exact at every scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> gradients = {"kernel": jnp.diag(jnp.array([3.0, 4.0]))}
      >>> updates = {"kernel": jnp.eye(2)}  # its polar factor: 7 / (5 * sqrt(2))
      >>> diagnostics.update_cosine(gradients, updates)["kernel"].round(4).item()
      0.9899

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, equation (8).
    """
    given, result = floating_leaves(gradients), floating_leaves(updates)
    check_same_leaves("gradients", given, "updates", result)
    return {path: _cosine(value, result[path]) for path, value in given.items()}


def dead_parameters(
    gradients: Any, threshold: float = 1e-4, *, relative: bool = False
) -> dict[str, DeadParameters]:
    r"""Count the parameters of every leaf that have hardly any gradient.

    Those with $|g| \le$ `threshold`: in the paper parameters of zero gradient, in the
    authors' code those below 1e-4, taken from the raw gradient, before the optimiser.

    Args:
      gradients: raw gradients. An orthogonalised update tells nothing of this kind:
        its entries are about `1 / sqrt(max(m, n))`, whatever the gradient was.
      threshold: in the unit of the gradient; if `relative`, dimensionless and below 1.
      relative: measure against the largest absolute entry of the leaf.

    Returns:
      By path, a `DeadParameters` for every floating leaf, vectors included.

    Raises:
      TypeError: if `threshold` is not a Python number or a leaf is not an array.
      ValueError: if `threshold` is negative or not finite, or 1 or more if `relative`;
        or if two leaves have one path.

    Limits:
      An absolute threshold counts the scale of the gradient as much as dead
      parameters: a lower loss, a larger batch, weights growing before a batch
      normalisation, all make gradients smaller and the count larger. Of two optimisers
      compared at different losses it says little (the paper's Figure 9 may show this in
      part); `relative=True`, or a threshold of 0 after a ReLU, does not have this flaw.
      "Dead" holds for this batch: average over batches. In a leaf of zeros all are
      dead, in an empty one none. NaN or infinity in a leaf gives NaN for it alone.
      Exact up to 2^24 entries, then to float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> gradients = {"bias": jnp.array([0.0, 5e-5, -2e-2, 3e-2])}
      >>> dead = diagnostics.dead_parameters(gradients)["bias"]
      >>> dead.count.item(), dead.fraction.item()
      (2.0, 0.5)

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 3.3 and Figure 9.
    """
    _check_threshold(threshold, relative)
    leaves = floating_leaves(gradients)
    return {path: _dead(x, float(threshold), relative) for path, x in leaves.items()}


def _check_threshold(threshold: float, relative: bool) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(
            f"`threshold` must be a Python number, got {threshold!r} of type "
            f"{type(threshold).__name__}."
        )
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"`threshold` must be finite and not negative, got {threshold}: it is "
            "compared with absolute values."
        )
    if relative and threshold >= 1:
        raise ValueError(
            f"A relative `threshold` must be below 1, got {threshold}: no entry is "
            "above the largest, so that all would be dead."
        )


@functools.partial(jax.jit, static_argnums=2)
def _dead(x: Any, threshold: float, relative: bool) -> DeadParameters:
    size = jnp.abs(working(x))
    largest = jnp.max(size, initial=0)
    limit = threshold * largest if relative else threshold
    count = jnp.sum(size <= limit).astype(size.dtype)
    count = jnp.where(jnp.isfinite(largest), count, jnp.nan)
    return DeadParameters(count, count / max(size.size, 1))


@jax.jit
def _cosine(x: Any, y: Any) -> jax.Array:
    return jnp.sum((_unit(x).conj() * _unit(y)).real)


def _unit(x: Any) -> jax.Array:
    """Return an array with Euclidean norm one or zero, NaN if it is not finite."""
    x = working(x)
    # First by the largest entry: squares of small entries would vanish.
    largest = jnp.max(jnp.abs(x), initial=0)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(jnp.abs(x) ** 2))
    x = x / jnp.where(norm > 0, norm, 1)
    return jnp.where(jnp.isfinite(largest), x, jnp.nan)
