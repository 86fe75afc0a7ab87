"""Reductions over the axes of matrices, where the leaf lies."""

from collections.abc import Callable

import jax

from orthax.components._matricisation import Matricisation
from orthax.components._sharded import by_compiler

Axes = tuple[int, ...]


def along_axes(
    f: Callable[..., jax.Array], cut: Matricisation, *xs: jax.Array
) -> jax.Array:
    """Call a function that only reduces over the axes of matrices, without folding.

    What needs no more than sums over rows or columns needs no matrix: a sharded leaf
    stays where it is, and sums alone travel.

    Args:
      f: called as `f(rows, columns, *xs)` with the axes of the rows and of the columns;
        returns an array of the shape of each `x`.
      cut: how the leaf is cut. Where that makes several matrices of one kernel, `f` is
        called on its stacks instead.
      *xs: leaves of one shape.

    Returns:
      A leaf of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> cut = components.Matricisation(rows=(0,), columns=(1,))
      >>> def centred(rows, columns, x):
      ...     return x - x.mean(rows + columns, keepdims=True)
      >>> components.along_axes(centred, cut, jnp.array([[1.0, 3.0]])).tolist()
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
