"""Sharding: bases like the rows and columns of the weight, Sigma like its batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthax import components
from orthax._linalg import replicated
from orthax.internal.execution import mesh_of

P = jax.sharding.PartitionSpec


def sharding_of(x: Any) -> jax.NamedSharding | None:
    """Return the sharding of an array, with a spec that has an entry for every axis.

    None for a tracer or without a mesh.
    """
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return None
    spec = P(*sharding.spec, *(None,) * (len(x.shape) - len(sharding.spec)))
    return jax.NamedSharding(sharding.mesh, spec)


def explicit_spec(sharding: jax.NamedSharding | None) -> P | None:
    """Return the spec on a mesh with explicit axes; None where XLA decides."""
    if sharding is None:
        return None
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding.spec if explicit else None


def factor_specs(
    cut: components.Matricisation, shape: tuple[int, ...], sharding: jax.NamedSharding
) -> tuple[P, P, P]:
    """Return the specs of U, Sigma, `(b, r, r)`, and V^T of a leaf.

    The rows of U are sharded like the rows of the weight, the columns of V^T like its
    columns and batches like its batch axes, wherever the devices divide them evenly.
    """
    used = cut.rows + cut.columns
    batch = tuple(axis for axis in range(len(shape)) if axis not in used)
    spec = sharding.spec

    def names(axes: tuple[int, ...], size: int) -> tuple[str, ...] | None:
        entries = [spec[axis] for axis in axes if spec[axis]]
        flat = [x for e in entries for x in (e if isinstance(e, tuple) else (e,))]
        devices = math.prod(sharding.mesh.shape[name] for name in flat)
        return tuple(flat) if flat and size % devices == 0 else None

    ((b, m, n),) = cut.matrices(shape)
    stack = names(batch, b) if cut.is_whole else None
    rows, columns = names(cut.rows, m), names(cut.columns, n)
    return P(stack, rows), P(stack), P(stack, None, columns)


def placed(x: Any, mesh: jax.sharding.Mesh, spec: P) -> Any:
    """Return an array, or its shape, with a sharding on a mesh."""
    sharding = jax.NamedSharding(mesh, spec)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.device_put(x, sharding)


def auto_sharded(
    f: Callable[..., jax.Array], spec: P | None, *xs: jax.Array
) -> jax.Array:
    """Return `f(*xs)`, sharded inside by XLA even where mesh axes are explicit.

    Args:
      f: a function of arrays.
      spec: of the result where axes are explicit; None: replicated.
      *xs: its arguments.
    """
    mesh = mesh_of(xs)
    axes = mesh.explicit_axes
    if not axes:
        return f(*xs)
    sharding = jax.sharding.NamedSharding(mesh, P() if spec is None else spec)
    return jax.sharding.auto_axes(f, axes=axes, out_sharding=sharding)(*xs)


def not_finite(arrays: dict[str, Any]) -> list[str]:
    """Return the paths of arrays with NaN or infinity; those without values pass."""
    without_values = (jax.core.Tracer, jax.ShapeDtypeStruct)
    flags = {
        path: _is_finite(jnp.asarray(x))
        for path, x in arrays.items()
        if not isinstance(x, without_values)
    }
    return [path for path, is_finite in flags.items() if not bool(is_finite)]


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(replicated(x)))
