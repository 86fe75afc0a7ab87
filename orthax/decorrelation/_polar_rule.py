"""Whitening by the polar factor of the batch."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthax import polar
from orthax._linalg import eigh, matmul
from orthax.decorrelation._rule import check_at_least_zero, check_number
from orthax.internal.polar import check_method

# One matrix after another under vmap: jaxlib's batched eigh can deadlock on CPU (three
# or more of them in one program).
_SVD = polar.SVD()


class PolarState(NamedTuple):
    """The state of `Polar`.

    Attributes:
      root: the square root of the running covariance, shape (d, d).
      matrix: R, shape (d, d).
      updates: batches in the running covariance, int32.
    """

    root: jax.Array
    matrix: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class Polar:
    r"""Exact zero-phase whitening, by the polar factor of the batch.

    $R = A^{-1/2}$, where A is the running covariance. Its square root S is kept, never
    A: the polar decomposition $Q H$ of the samples below the old root,
    $(\sqrt{1 - w}\, S;\ \sqrt{w / n}\, X)$, has for H the new root, and its singular
    values are those of the data, where A has their squares. With `momentum=1`, of one
    batch alone, $X R = \sqrt n Q$: whitening is the polar factor.

    Attributes:
      momentum: weight w of a new batch in the running covariance, above 0, at most 1,
        dimensionless. The first batches count equally: batch t has weight
        `max(momentum, 1 / t)`.
      floor: standard deviations (singular values of S) below `floor` times the largest
        are not amplified more than this one, 0 to 1, dimensionless: it bounds the
        condition number of R, and keeps noise noise where there are few samples.
      method: how the polar factor is computed, of `orthax.polar`.

    Raises:
      TypeError: if a number is not a Python number or `method` is not a method.
      ValueError: if a number is out of range.

    Limits:
      Directions without variance (constant features, more features than samples) are
      mapped to zero: those whose standard deviation is below `max(d, 100) * eps` of the
      largest, in which there is nothing but rounding.

      In float32, of covariances of condition 1e4 and 1e6, R has a relative error in
      spectral norm of 1e-5 and 3e-4 (d = 256; from the eigenvectors of the covariance,
      2e-3 and 1e-1). Methods other than `SVD` and `QDWH` are as good only for standard
      deviations above a thousandth of the Frobenius norm of S: with `polar.Auto()`,
      which is faster on accelerators, have `floor` at least `1e-3 * d**0.5`.

      A feature that is rarely there, such as a pixel near the rim, has little variance
      and a large value when it comes: with a small `floor` a network trained on it can
      diverge. Between 0.2 and 0.5, validation images of handwritten digits chose 0.5
      (`examples/results/decorrelation.md`).

      A polar factor of an (n + d, d) and the eigenvectors of a (d, d) matrix in every
      update.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from orthax import decorrelation, polar
      >>> rule = decorrelation.Polar(momentum=1.0)
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> z = rule.apply(rule.update(rule.init(4, "float32"), x), x)
      >>> bool(jnp.abs(z - 32**0.5 * polar.polar_factor(x)).max() < 1e-4)
      True

    References:
      Higham: "Functions of Matrices", SIAM 2008, Section 8 (the polar decomposition).
      Kessy, Lewin, Strimmer: "Optimal whitening and decorrelation", The American
      Statistician 72, 2018 (zero-phase whitening). The rule is ours.
    """

    momentum: float = 0.1
    floor: float = 1e-3
    method: polar.PolarMethod = _SVD

    def __post_init__(self):
        check_number("momentum", self.momentum, 1)
        check_at_least_zero("floor", self.floor, 1)
        check_method(self.method)

    def init(self, features: int, dtype: jax.typing.DTypeLike) -> PolarState:
        """Return no covariance yet and R = I."""
        return PolarState(
            jnp.zeros((features, features), dtype),
            jnp.eye(features, dtype=dtype),
            jnp.zeros((), jnp.int32),
        )

    def apply(self, state: PolarState, x: jax.Array) -> jax.Array:
        """Return `x @ R`, shape (n, d): R is symmetric."""
        return matmul(x, state.matrix)

    def fold(self, state: PolarState, kernel: jax.Array) -> jax.Array:
        """Return `R @ kernel`, shape (d, out)."""
        return matmul(state.matrix, kernel)

    def matrix(self, state: PolarState) -> jax.Array:
        """Return R."""
        return state.matrix

    def update(
        self, state: PolarState, x: jax.Array, *, axis_name: Any | None = None
    ) -> PolarState:
        """Return the root and R after centred samples x, shape (n, d)."""
        weight = jnp.maximum(self.momentum, 1 / (state.updates + 1).astype(x.dtype))
        samples = len(x)
        if axis_name is not None:
            # Fewer rows with the same covariance are sent.
            rows = self._root(x) if samples > x.shape[1] else x
            samples *= jax.lax.psum(1, axis_name)
            x = _gathered(rows, axis_name)
        root = self._root(
            jnp.concatenate(
                [jnp.sqrt(1 - weight) * state.root, jnp.sqrt(weight / samples) * x]
            )
        )
        return PolarState(root, self._inverse(root), state.updates + 1)

    def _root(self, x: jax.Array) -> jax.Array:
        """Return the Hermitian polar factor H of x = Q H, shape (d, d)."""
        h = matmul(polar.polar_factor(x, self.method).T, x)
        return (h + h.T) / 2

    def _inverse(self, root: jax.Array) -> jax.Array:
        values, vectors = eigh(root)
        largest = values[-1]
        null = max(100, len(values)) * float(jnp.finfo(root.dtype).eps) * largest
        alive = values > null
        bounded = jnp.maximum(values, self.floor * largest)
        inverse = jnp.where(alive, 1 / jnp.where(alive, bounded, 1), 0)
        return matmul(vectors * inverse[None], vectors.T)


def _gathered(x: jax.Array, axis_name: Any) -> jax.Array:
    """Return the rows of all devices.

    A sum of rows in their places, and not `all_gather`, of whose result shard_map does
    not know that it is the same on all devices.
    """
    devices = jax.lax.psum(1, axis_name)
    places = jnp.zeros((devices, *x.shape), x.dtype)
    mine = jnp.arange(devices)[:, None, None] == jax.lax.axis_index(axis_name)
    return jax.lax.psum(jnp.where(mine, x, places), axis_name).reshape(-1, x.shape[1])
