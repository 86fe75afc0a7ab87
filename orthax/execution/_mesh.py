"""The mesh of arrays, and functions that the compiler shards."""

from collections.abc import Callable, Sequence

import jax

from orthax.components import Matricisation

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]


def mesh_of(xs: Sequence[jax.Array]) -> jax.sharding.AbstractMesh:
    """Return the mesh in the types of arrays, or one without axes.

    Args:
      xs: arrays, traced or not.

    Returns:
      The mesh, with the names, sizes and kinds of its axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax.internal.execution import mesh_of
      >>> mesh_of([jnp.ones(2)]).explicit_axes
      ()
    """
    meshes = [jax.typeof(x).sharding.mesh for x in xs]
    return next((m for m in meshes if not m.empty), meshes[0])


def by_compiler(
    g: Callable[..., Arrays], xs: Sequence[jax.Array]
) -> Callable[..., Arrays]:
    """Let the compiler shard a function even on explicit mesh axes.

    Args:
      g: maps leaves to as many leaves; each result is sharded like its argument.
      xs: the arguments it will be called with.

    Returns:
      A function of as many leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax.internal.execution import by_compiler
      >>> x = jnp.ones((2, 3))
      >>> flat = by_compiler(lambda x: (x.ravel().reshape(2, 3) * 2,), [x])
      >>> float(flat(x)[0][0, 0])
      2.0
    """
    axes = mesh_of(xs).explicit_axes
    if not axes:
        return g

    def called(*xs: jax.Array) -> Arrays:
        like = tuple(jax.typeof(x).sharding for x in xs)
        return jax.sharding.auto_axes(g, axes=axes, out_sharding=like)(*xs)

    return called


def along_axes(
    f: Callable[..., jax.Array], cut: Matricisation, *xs: jax.Array
) -> jax.Array:
    """Call a function that only reduces over the axes of matrices.

    The leaf need not be reshaped to matrices: if it is sharded, it stays where it is,
    and only the sums are communicated.

    Args:
      f: called as `f(rows, columns, *xs)` with the axes of the rows and of the columns;
        returns an array of the shape of each `x`.
      cut: the matricisation. If one kernel holds several matrices, `f` is called on its
        batches instead.
      *xs: leaves of one shape.

    Returns:
      A leaf of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> from orthax.internal.execution import along_axes
      >>> cut = components.Matricisation(rows=(0,), columns=(1,))
      >>> def centred(rows, columns, x):
      ...     return x - x.mean(rows + columns, keepdims=True)
      >>> along_axes(centred, cut, jnp.array([[1.0, 3.0]])).tolist()
      [[-1.0, 1.0]]
    """
    cut = cut.on(xs[0].ndim)
    if cut.is_whole:
        return f(cut.rows, cut.columns, *xs)

    def on_stacks(*xs: jax.Array) -> tuple[jax.Array, ...]:
        stacks = zip(*map(cut.fold, xs), strict=True)
        out = cut.unfold([f((1,), (2,), *parts) for parts in stacks], xs[0].shape)
        return (out, *xs[1:])

    return by_compiler(on_stacks, xs)(*xs)[0]
