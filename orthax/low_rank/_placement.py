"""Where factors lie on the devices: as the rows and columns of the weight do."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from orthax import components, execution
from orthax._linalg import replicated

P = jax.sharding.PartitionSpec
_WITHOUT_VALUES = (jax.core.Tracer, jax.ShapeDtypeStruct)


def sharding_of(x: Any) -> jax.NamedSharding | None:
    """Return how an array lies on a mesh, None for a tracer or without a mesh."""
    if isinstance(x, jax.core.Tracer):
        return None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, jax.NamedSharding) else None


def full_spec(spec: P, ndim: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of the mesh axes over which each axis is sharded."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    return tuple(
        () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for entry in entries
    )


def explicit_spec(sharding: jax.NamedSharding | None, ndim: int) -> P | None:
    """Return how an array of explicit axes lies; None where the compiler decides."""
    if sharding is None:
        return None
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return P(*(names or None for names in full_spec(sharding.spec, ndim)))


def factor_specs(
    cut: components.Matricisation, shape: tuple[int, ...], sharding: jax.NamedSharding
) -> list[tuple[P, P, P]]:
    """Return how U, Sigma and V^T of every stack are to lie.

    The rows of U as the rows of the weight, the columns of V^T as its columns, a stack
    as the axes that make it, wherever the devices divide them evenly.
    """
    used = cut.rows + cut.columns
    batch = tuple(axis for axis in range(len(shape)) if axis not in used)
    spec = full_spec(sharding.spec, len(shape))

    def names(axes: tuple[int, ...], size: int) -> tuple[str, ...] | None:
        found = [name for axis in axes for name in spec[axis]]
        parts = math.prod(sharding.mesh.shape[name] for name in found)
        return tuple(found) if found and size % parts == 0 else None

    specs = []
    for b, m, n in cut.matrices(shape):
        stack = names(batch, b) if cut.is_whole else None
        rows, columns = names(cut.rows, m), names(cut.columns, n)
        specs.append((P(stack, rows), P(stack), P(stack, None, columns)))
    return specs


def placed(x: Any, sharding: jax.NamedSharding | None, spec: P) -> jax.Array:
    """Return an array on the mesh of `sharding`, if there is one."""
    if sharding is None:
        return x
    lies = jax.NamedSharding(sharding.mesh, spec)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)
    return jax.device_put(x, lies)


def by_compiler(
    f: Callable[..., jax.Array], spec: P | None, *xs: jax.Array
) -> jax.Array:
    """Return `f(*xs)`, sharded by the compiler also where axes are explicit.

    Args:
      f: a function of arrays.
      spec: how the result is to lie where axes are explicit, None: replicated.
      *xs: its arguments.
    """
    mesh = execution.mesh_of(xs)
    axes = mesh.explicit_axes
    if not axes:
        return f(*xs)
    lies = jax.sharding.NamedSharding(mesh, P() if spec is None else spec)
    return jax.sharding.auto_axes(f, axes=axes, out_sharding=lies)(*xs)


def not_finite(arrays: dict[str, Sequence[Any]]) -> list[str]:
    """Return the paths of the arrays that hold NaN or infinity, traced ones not."""
    seen = {
        path: [x for x in xs if not isinstance(x, _WITHOUT_VALUES)]
        for path, xs in arrays.items()
    }
    good = {path: [_is_finite(jnp.asarray(x)) for x in xs] for path, xs in seen.items()}
    return [path for path, flags in good.items() if not all(map(bool, flags))]


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(replicated(x)))
