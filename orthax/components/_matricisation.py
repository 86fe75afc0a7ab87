"""How the axes of a leaf make matrices: pure data, and the folding that acts on it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Matricisation:
    r"""Which axes of a leaf make the rows and which the columns of its matrices.

    In the paper's terms the matrix is $G \in \mathbb{R}^{P \times N}$: one column for
    each of the N components (filters, units), one row for each of its P parameters.
    Axes that are neither are batch axes: one matrix for each of their positions.

    Attributes:
      rows: axes of the parameters of a component (fan-in). Negative axes count from
        the end.
      columns: axes of the components (fan-out).
      groups: the columns are this many contiguous groups of equal size, each a matrix
        of its own: a grouped convolution.
      blocks: the columns are fused outputs (the gates of an LSTM, query, key and value
        in one kernel), each a matrix of its own: how many, if equal, or their sizes.
      split: `"columns"`, or `"rows"` if `groups` or `blocks` cut the rows instead (the
        fused heads that an attention output reads).
      spatial: those of the row axes that are the taps of a convolution kernel.

    Raises:
      ValueError: if an axis stands in both `rows` and `columns`, `rows` or `columns` is
        empty or repeats an axis, a count is not positive, `groups` and `blocks` are
        both given, or `spatial` is not part of `rows`.
      TypeError: if an axis or a count is not an integer.

    Example:
      >>> cut = Matricisation(rows=(0, 1, 2), columns=(3,))  # a Flax convolution
      >>> cut.matrices((3, 3, 16, 32))  # one matrix, 144 x 32
      ((1, 144, 32),)
      >>> Matricisation((0,), (1,), blocks=4).matrices((6, 32))  # four fused gates
      ((4, 6, 8),)

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, equation (3).
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    groups: int = dataclasses.field(default=1, kw_only=True)
    blocks: int | tuple[int, ...] = dataclasses.field(default=1, kw_only=True)
    split: str = dataclasses.field(default="columns", kw_only=True)
    spatial: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self):
        for name in ("rows", "columns", "spatial"):
            object.__setattr__(self, name, _axes(name, getattr(self, name)))
        if not isinstance(self.blocks, int):
            if not isinstance(self.blocks, Sequence):
                raise TypeError(
                    "`blocks` must be an integer, or the sizes of the blocks, got "
                    f"{self.blocks!r}."
                )
            object.__setattr__(self, "blocks", _axes("blocks", self.blocks))
        self._check()

    def __repr__(self) -> str:
        """Return what one types, without defaults."""
        said = [repr(self.rows), repr(self.columns)]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            said += [] if value == field.default else [f"{field.name}={value!r}"]
        return f"{type(self).__name__}({', '.join(said)})"

    def _check(self) -> None:
        if not self.rows or not self.columns:
            raise ValueError(
                f"{self}: `rows` and `columns` need at least one axis each; for a leaf "
                "that is no matrix write None instead of a Matricisation."
            )
        axes = self.rows + self.columns
        if len(set(axes)) < len(axes):
            raise ValueError(
                f"{self}: every axis may stand once, in `rows` or in `columns`."
            )
        if not set(self.spatial) <= set(self.rows):
            raise ValueError(f"{self}: `spatial` axes must be among `rows`.")
        if self.split not in ("columns", "rows"):
            raise ValueError(f'{self}: `split` must be "columns" or "rows".')
        if not isinstance(self.groups, int):
            raise TypeError(f"{self}: `groups` must be an integer.")
        sizes = (self.blocks,) if isinstance(self.blocks, int) else self.blocks
        if self.groups < 1 or not sizes or min(sizes) < 1:
            raise ValueError(f"{self}: `groups` and `blocks` must be positive.")
        if self.groups > 1 and self.blocks != 1:
            raise ValueError(
                f"{self}: `groups` and `blocks` both cut the {self.split}; give one."
            )

    def on(self, ndim: int) -> "Matricisation":
        """Return the same with non-negative axes, for a leaf of `ndim` axes."""
        axes = self.rows + self.columns
        if any(not -ndim <= axis < ndim for axis in axes):
            raise ValueError(f"{self} names an axis that a leaf of rank {ndim} lacks.")
        rows, columns, spatial = (
            tuple(axis % ndim for axis in part)
            for part in (self.rows, self.columns, self.spatial)
        )
        return dataclasses.replace(self, rows=rows, columns=columns, spatial=spatial)

    def behind_axis(self) -> "Matricisation":
        """Return the same for leaves with one more axis in front, a batch axis."""
        rows, columns, spatial = (
            tuple(axis + (axis >= 0) for axis in part)
            for part in (self.rows, self.columns, self.spatial)
        )
        return dataclasses.replace(self, rows=rows, columns=columns, spatial=spatial)

    @property
    def is_whole(self) -> bool:
        """Whether every position of the batch axes makes one matrix."""
        return self.groups == 1 and self.blocks == 1

    def matrices(self, shape: Shape) -> tuple[tuple[int, int, int], ...]:
        """Return the shapes `(b, m, n)` of the stacks that a leaf folds into.

        One stack, or one for each of the sizes that `blocks` gives.
        """
        _, m, n = self.on(len(shape))._layout(shape)
        b = math.prod(shape) // max(m * n, 1)
        count, sizes = self._pieces(n if self.split == "columns" else m, shape)
        if self.split == "columns":
            return tuple((b * count, m, piece) for piece in sizes)
        return tuple((b * count, piece, n) for piece in sizes)

    def taps(self, shape: Shape) -> int:
        """Return how many taps the kernel has: the product of its spatial axes."""
        return math.prod(shape[axis] for axis in self.on(len(shape)).spatial)

    def fold(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return the stacks of matrices of a leaf, each of shape `(b, m, n)`."""
        cut = self.on(x.ndim)
        order, m, n = cut._layout(x.shape)
        x = x.transpose(order).reshape(-1, m, n)
        axis, size = (2, n) if self.split == "columns" else (1, m)
        count, sizes = self._pieces(size, x.shape)
        if count > 1:
            x = x.reshape(*x.shape[:axis], count, size // count, *x.shape[axis + 1 :])
            x = jnp.moveaxis(x, axis, 1)
            return (x.reshape(-1, *x.shape[2:]),)
        if len(sizes) == 1:
            return (x,)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        return tuple(jnp.split(x, ends, axis=axis))

    def unfold(self, stacks: Sequence[jax.Array], shape: Shape) -> jax.Array:
        """Return the leaf of the given shape that folds into `stacks`."""
        cut = self.on(len(shape))
        order, m, n = cut._layout(shape)
        axis, size = (2, n) if self.split == "columns" else (1, m)
        count, _ = self._pieces(size, shape)
        x = jnp.concatenate(stacks, axis=axis) if len(stacks) > 1 else stacks[0]
        if count > 1:
            x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, axis)
        x = x.reshape([shape[axis] for axis in order])
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return x.transpose(inverse)

    def _layout(self, shape: Shape) -> tuple[tuple[int, ...], int, int]:
        """Return batch, row and column axes in order, and the matrix's two sides."""
        used = self.rows + self.columns
        batch = tuple(axis for axis in range(len(shape)) if axis not in used)
        m = math.prod(shape[axis] for axis in self.rows)
        n = math.prod(shape[axis] for axis in self.columns)
        return batch + used, m, n

    def _pieces(self, size: int, shape: Shape) -> tuple[int, Shape]:
        """Return how many pieces ride in one stack, and the size in each stack."""
        if isinstance(self.blocks, tuple):
            if sum(self.blocks) != size:
                raise ValueError(
                    f"{self}: the blocks add up to {sum(self.blocks)}, but the "
                    f"{self.split} of shape {shape} are {size}."
                )
            return 1, self.blocks
        name = "groups" if self.groups > 1 else "blocks"
        count = self.groups * self.blocks
        if size % count:
            raise ValueError(
                f"{self}: the {size} {self.split} of shape {shape} cannot be divided "
                f"into {name} of equal size."
            )
        return count, (size // count,)


class Decision(NamedTuple):
    """A cut with its reason: what the rules of this room decide, for `explain`.

    Attributes:
      cut: the axes, or None for a leaf that is left alone.
      reason: why, for people.
      guess: whether the name leaves room for something else.
    """

    cut: Matricisation | None
    reason: str
    guess: bool = False


def _axes(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, int):
        axes = (value,)
    elif isinstance(value, Sequence):
        axes = tuple(value)
    else:
        raise TypeError(
            f"`{name}` must be axes, integers such as (0, 1), got {value!r}; for a "
            "leaf that is no matrix write None instead of a Matricisation."
        )
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        raise TypeError(f"`{name}` must be integers, got {value!r}.")
    return axes
