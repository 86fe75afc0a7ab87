"""Products at a stated precision, decompositions that cannot hang, dtypes, norms.

Every package may use this module, and no other code here calls `jnp.linalg`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def working_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype to compute in: float32 or complex64 for narrower ones."""
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def working(x: jax.typing.ArrayLike) -> jax.Array:
    """Return an array in the dtype to compute in."""
    x = jnp.asarray(x)
    return x.astype(working_dtype(x.dtype))


def replicated(x: jax.Array) -> jax.Array:
    """Return an array that is replicated on explicit mesh axes.

    There a decomposition, or a product over a sharded axis, is an error; on automatic
    axes the compiler gathers what it needs.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    spec = jax.sharding.PartitionSpec()
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, spec))


def matmul(
    a: jax.Array,
    b: jax.Array,
    precision: jax.lax.Precision | None = HIGHEST,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Multiply at full precision, even where JAX's default is lower.

    Args:
      a: shape `(..., m, k)`.
      b: shape `(..., k, n)`.
      precision: of the products.
      dtype: of the sums; default: that of the factors.
    """
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)


def adjoint(x: jax.Array) -> jax.Array:
    """Return the conjugate transpose of every matrix of a batch."""
    return x.mT.conj() if jnp.iscomplexobj(x) else x.mT


def norm(
    x: jax.Array, axis: int | tuple[int, ...], *, keepdims: bool = False
) -> jax.Array:
    """Return the root of a sum of squares, which must not overflow the dtype."""
    return jnp.linalg.norm(x, axis=axis, keepdims=keepdims)


def frobenius(x: jax.Array, axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array]:
    """Return two factors of every matrix's Frobenius norm, or of one for zero.

    Both of shape `(b, 1, 1)`; the second is NaN for a matrix that is not finite. Sums
    of squares are taken of the matrix as it is, scaled up and scaled down: in float32,
    squares of entries above 1e19 or below 1e-23 are out of range. The columns may be
    sharded over named `axes`.
    """
    most = jnp.finfo(x.dtype).maxexp
    scales = [1.0, 2.0 ** (5 * most // 8), 2.0 ** (-5 * most // 8)]
    squares = [jnp.square(x.real * s) + jnp.square(x.imag * s) for s in scales]
    sums = [jnp.sum(square, axis=(-2, -1), keepdims=True) for square in squares]
    plain, small, large = over(axes, jax.lax.psum, jnp.stack(sums))
    cases = [plain < 2.0 ** (-most // 2), plain < 2.0 ** (3 * most // 4)]
    square = jnp.select(cases, [small, plain], large)
    scale = jnp.select(cases, [1 / s for s in (scales[1], scales[0])], 1 / scales[2])
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return scale.astype(norm.dtype), jnp.where(jnp.isfinite(large), norm, jnp.nan)


def over(
    axes: tuple[str, ...], reduce: Callable[..., jax.Array], x: jax.Array
) -> jax.Array:
    """Return `reduce(x, axes)` over the devices, or `x` where there are not axes."""
    return reduce(x, axes) if axes else x


def one_by_one(f: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Lift `f`, a decomposition of one matrix, to batches of shape `(*batch, m, n)`.

    On CPU the matrices are decomposed one by one, even under `vmap`: jaxlib's batched
    `eigh`, `qr` and `cholesky` wait for workers of the thread pool they run on, and a
    few independent batched calls in one program deadlock on a small machine (seen with
    jaxlib 0.10.2 and two cores). On other platforms the call is batched.
    """

    def lifted(x: jax.Array) -> Any:
        in_turn, batched = jax.custom_batching.sequential_vmap(f), f
        for _ in range(x.ndim - 2):
            in_turn, batched = jax.vmap(in_turn), jax.vmap(batched)
        return jax.lax.platform_dependent(x, cpu=in_turn, default=batched)

    return lifted


def thin_svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `u, s, vh` of every matrix of a batch, singular values descending."""
    return one_by_one(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))(x)


def singular_values(x: jax.Array) -> jax.Array:
    """Return the singular values of every matrix of a batch, descending."""
    return one_by_one(lambda a: jnp.linalg.svd(a, compute_uv=False))(x)


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ascending eigenvalues, and eigenvectors, of Hermitian matrices."""
    return one_by_one(lambda a: tuple(jnp.linalg.eigh(a)))(x)


def orthonormal(x: jax.Array) -> jax.Array:
    """Return orthonormal bases of the columns of matrices, by QR."""
    return one_by_one(lambda a: jnp.linalg.qr(a)[0])(x)


def inverse(x: jax.Array) -> jax.Array:
    """Return the inverses of square matrices."""
    return one_by_one(jnp.linalg.inv)(x)


def cholesky(x: jax.Array) -> jax.Array:
    """Return lower Cholesky factors; only the lower triangles are read."""
    return one_by_one(lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False))(x)


def qdwh(x: jax.Array, max_iterations: int) -> jax.Array:
    """Return the polar factors of tall matrices by `jax.lax.linalg.qdwh`."""
    return one_by_one(
        lambda a: jax.lax.linalg.qdwh(a, max_iterations=max_iterations)[0]
    )(x)
