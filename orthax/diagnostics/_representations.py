"""Cosines between the representations of a layer's components."""

import math
import numbers
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from orthax._linalg import adjoint, matmul, norm, replicated, working


class RepresentationCosines(NamedTuple):
    """Statistics of |cosine| over all pairs of components.

    Attributes:
      mean: shape (batch,), or () over the batch; dimensionless, from 0 to 1.
      variance: of the same shape, over the pairs, divided by their number (and not, as
        `torch.var` does, by one less).
    """

    mean: jax.Array
    variance: jax.Array


def representation_cosines(
    activations: jax.typing.ArrayLike,
    *,
    component_axis: int = -1,
    per_sample: bool = True,
) -> RepresentationCosines:
    r"""Return how similar the representations of a layer's components are.

    Mean and variance of $\{|\langle x_i, x_j \rangle| / (\|x_i\| \|x_j\|) : i < j\}$,
    where $x_i$ is the feature map of component i: one vector over the spatial axes for
    each sample. Small values mean that the components carry different information.

    Args:
      activations: shape `(batch, *spatial, components)`, floating or complex. The
        authors take them after batch normalisation and ReLU, of the first 10 samples
        of every tenth batch.
      component_axis: the axis of the components, not 0, which is the batch.
      per_sample: whether every sample has its own vectors, as in the paper. With
        `False` a component has one vector, over the batch and all spatial positions:
        for dense layers, whose activations have no spatial axes, where the vectors of
        one sample have length one and every |cosine| is 1.

    Returns:
      The statistics, shape (batch,) each, or () with `per_sample=False`.

    Raises:
      TypeError: if `activations` are not floating or complex.
      ValueError: if `activations` have fewer than two axes or fewer than two
        components, `component_axis` is out of range or the batch, or the vectors
        have length one.

    Limits:
      After a ReLU all entries are non-negative, and so are all cosines: independent
      half-Gaussian maps have a cosine of 2 / pi = 0.64 if they are dense, and of
      1 / pi = 0.32 if half of the entries are zero, not 0. Compare with such a
      floor, or take the activations before the ReLU. Without it, independent
      vectors of length n have a mean of about `0.8 / sqrt(n)`; see `cosine_threshold`.
      A map that is zero everywhere has cosine 0 with every other, as in PyTorch: dead
      components pull the mean down. NaN or infinity gives NaN for this sample alone.
      Holds `batch * components ** 2` numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> maps = jnp.array([[[1.0, 1.0], [0.0, 1.0]]])  # one sample, two positions
      >>> diagnostics.representation_cosines(maps).mean.round(4).tolist()
      [0.7071]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 3.2 and Figure 8.
    """
    x = jnp.asarray(activations)
    _check_activations(x, component_axis)
    x = jnp.moveaxis(replicated(working(x)), component_axis, -1)
    batch, components = x.shape[0], x.shape[-1]
    positions = math.prod(x.shape[1:-1])
    stacks, length = (batch, positions) if per_sample else (1, batch * positions)
    if length < 2:
        raise ValueError(_no_direction(jnp.shape(activations), length, per_sample))
    x = x.reshape(stacks, length, components)
    found = _statistics(x)
    return found if per_sample else RepresentationCosines(*(v[0] for v in found))


def cosine_threshold(n: int, sigmas: float = 4.0) -> float:
    r"""Return the |cosine| above which two vectors are significantly similar.

    `sigmas / sqrt(n)`. The cosine of two independent Gaussian vectors of length n is,
    both being uniform in direction, an entry of a random unit vector: the n squared
    entries add up to one and are alike in distribution, so its variance is exactly
    $1 / n$, and its mean is zero. Four standard deviations are exceeded by chance in
    about 6 of 100 000 pairs.

    Args:
      n: length of the vectors compared. For filters the length of *one* filter, not of
        the layer's tensor, which is what the authors' plots use: it makes the threshold
        too small by the root of the number of filters.
      sigmas: standard deviations, dimensionless.

    Returns:
      The threshold, dimensionless.

    Raises:
      TypeError: if `n` is not an integer or `sigmas` not a number.
      ValueError: if `n` or `sigmas` is not positive.

    Limits:
      At 1 or more no cosine is significant: with four standard deviations for n of 16
      or less. Meant for entries of mean zero, so not after a ReLU. Among many pairs
      some exceed it by chance.

    Example:
      >>> from orthax import diagnostics
      >>> diagnostics.cosine_threshold(10_000)
      0.04

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Appendix A, equation (9). The result is
      theirs; the variances on the way are not (the dot product of n terms has variance
      $n \sigma^4$, not $\sigma^4 / n$).
    """
    try:
        length = operator.index(n)
    except TypeError:
        raise TypeError(
            f"`n` must be an integer, the length of the vectors, got {n!r} of type "
            f"{type(n).__name__}."
        ) from None
    if length < 1:
        raise ValueError(f"`n`, the length of the vectors, must be positive, got {n}.")
    if isinstance(sigmas, bool) or not isinstance(sigmas, numbers.Real):
        raise TypeError(
            f"`sigmas` must be a number, got {sigmas!r} of type "
            f"{type(sigmas).__name__}."
        )
    if not (math.isfinite(sigmas) and sigmas > 0):
        raise ValueError(f"`sigmas` must be finite and positive, got {sigmas}.")
    return float(sigmas) / math.sqrt(length)


@jax.jit
def _statistics(x: jax.Array) -> RepresentationCosines:
    """Return the statistics for vectors along axis 1 of `x`, (b, n, components)."""
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    x = x / jnp.where(largest == 0, 1, largest)
    length = norm(x, 1, keepdims=True)
    x = x / jnp.where(length == 0, 1, length)
    cosines = jnp.abs(matmul(adjoint(x), x))
    pairs = jnp.triu(jnp.ones((1, *cosines.shape[1:]), bool), 1)
    over = {"axis": (-2, -1), "where": pairs}
    return RepresentationCosines(jnp.mean(cosines, **over), jnp.var(cosines, **over))


def _check_activations(x: jax.Array, component_axis: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"`activations` must be floating or complex, got dtype {x.dtype}: convert "
            "them first."
        )
    if x.ndim < 2:
        raise ValueError(
            "`activations` must have shape (batch, *spatial, components), got shape "
            f"{x.shape}."
        )
    if not -x.ndim <= component_axis < x.ndim:
        raise ValueError(
            f"`component_axis` {component_axis} is out of range for activations of "
            f"shape {x.shape}."
        )
    if component_axis % x.ndim == 0:
        raise ValueError(
            "`component_axis` is axis 0 of activations of shape "
            f"{x.shape}, which is the batch: add an axis, activations[None], for a "
            "single sample."
        )
    if x.shape[component_axis] < 2:
        raise ValueError(
            f"Activations of shape {x.shape} have {x.shape[component_axis]} components "
            f"on axis {component_axis}; a pair needs two: is `component_axis` right?"
        )


def _no_direction(shape: tuple[int, ...], length: int, per_sample: bool) -> str:
    advice = "pass more samples"
    if per_sample:
        advice = (
            "pass per_sample=False, which takes the vectors over the batch (as for "
            "every dense layer)"
        )
    return (
        f"The vectors of activations of shape {shape} have length {length}, too short "
        f"for a direction (every |cosine| would be 1): {advice}."
    )


def off_diagonal_correlation(z: jax.typing.ArrayLike) -> jax.Array:
    r"""Return how correlated features are: the mean of |correlation| over all pairs.

    Args:
      z: samples, shape (*batch, d), floating, d at least 2; the mean is removed.

    Returns:
      A scalar, dimensionless, from 0 (uncorrelated) to 1.

    Raises:
      TypeError: if `z` is not floating.
      ValueError: if `z` has fewer than two features.

    Limits:
      A constant feature has correlation 0 with every other. Of n samples of independent
      Gaussian features it is about `0.8 / sqrt(n)`. NaN gives NaN. Holds d * d numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import diagnostics
      >>> z = jnp.array([[1.0, 2.0, 1.0], [-1.0, -2.0, 1.0], [0.0, 0.0, -2.0]])
      >>> diagnostics.off_diagonal_correlation(z[:, :2]).round(4).item()
      1.0
      >>> diagnostics.off_diagonal_correlation(z).round(4).item()  # one pair of three
      0.3333
    """
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"`z` must be floating, got dtype {z.dtype}: convert it first.")
    if z.ndim < 2 or z.shape[-1] < 2:
        raise ValueError(f"`z` must have shape (*batch, d), d > 1, got {z.shape}.")
    d = z.shape[-1]
    z = working(z).reshape(-1, d)
    largest = jnp.max(jnp.abs(z), axis=0)
    z = z - jnp.mean(z, axis=0)
    # Rounding of the mean leaves a constant feature near, not at, zero.
    size = jnp.max(jnp.abs(z), axis=0)
    constant = size <= 8 * jnp.finfo(z.dtype).eps * largest
    z = jnp.where(constant, 0, z / jnp.where(constant, 1, size))
    z = z / jnp.where(constant, 1, norm(z, 0))
    correlation = jnp.abs(matmul(z.T, z))
    return (jnp.sum(correlation) - jnp.trace(correlation)) / (d * (d - 1))
