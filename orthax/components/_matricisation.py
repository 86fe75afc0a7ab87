"""Which axes of a leaf form matrices, and the reshaping that follows from it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Matricisation:
    r"""Which axes of a leaf are the rows and which the columns of its matrices.

    In the paper's terms the matrix is $G \in \mathbb{R}^{P \times N}$: one column for
    each of the N components (filters, units), one row for each of its P parameters.
    All other axes are batch axes: one matrix for each of their positions.

    Attributes:
      rows: axes of the parameters of a component (fan-in). Negative axes count from
        the end.
      columns: axes of the components (fan-out).
      groups: number of contiguous, equal groups of columns that are separate matrices:
        a grouped convolution.
      blocks: number, if equal, or sizes of contiguous blocks of columns that are
        separate matrices: fused outputs (the gates of an LSTM; query, key and value in
        one kernel).
      split: `"columns"`, or `"rows"` if `groups` or `blocks` divide the rows instead
        (the fused heads that an attention output reads).
      spatial: the row axes that are spatial axes of a convolution kernel.

    Raises:
      ValueError: if an axis is in both `rows` and `columns`, `rows` or `columns` is
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
            object.__setattr__(self, "blocks", _axes("blocks", self.blocks))
        self._check()

    def __repr__(self) -> str:
        """Return the expression that makes it, without defaults."""
        arguments = [repr(self.rows), repr(self.columns)]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            arguments += [] if value == field.default else [f"{field.name}={value!r}"]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _check(self) -> None:
        if not self.rows or not self.columns:
            raise ValueError(
                f"{self}: `rows` and `columns` need at least one axis each; for a leaf "
                "that is not a matrix, use None instead of a Matricisation."
            )
        axes = self.rows + self.columns
        if len(set(axes)) < len(axes) or not set(self.spatial) <= set(self.rows):
            raise ValueError(
                f"{self}: an axis may occur once, in `rows` or in `columns`, and "
                "`spatial` axes must be among `rows`."
            )
        if self.split not in ("columns", "rows"):
            raise ValueError(f'{self}: `split` must be "columns" or "rows".')
        sizes = (self.blocks,) if isinstance(self.blocks, int) else self.blocks
        if not sizes or min(self.groups, *sizes) < 1:
            raise ValueError(f"{self}: `groups` and `blocks` must be positive.")
        if self.groups > 1 and self.blocks != 1:
            raise ValueError(
                f"{self}: `groups` and `blocks` both divide the {self.split}; give one."
            )

    def on(self, ndim: int) -> "Matricisation":
        """Return the same with non-negative axes, for a leaf with `ndim` axes."""
        axes = self.rows + self.columns
        if any(not -ndim <= axis < ndim for axis in axes):
            raise ValueError(f"{self} names an axis that a leaf of rank {ndim} lacks.")
        rows, columns, spatial = (
            tuple(axis % ndim for axis in part)
            for part in (self.rows, self.columns, self.spatial)
        )
        return dataclasses.replace(self, rows=rows, columns=columns, spatial=spatial)

    def batched(self) -> "Matricisation":
        """Return the same for leaves with another batch axis, the first."""
        rows, columns, spatial = (
            tuple(axis + (axis >= 0) for axis in part)
            for part in (self.rows, self.columns, self.spatial)
        )
        return dataclasses.replace(self, rows=rows, columns=columns, spatial=spatial)

    @property
    def is_whole(self) -> bool:
        """Whether there is one matrix for each position of the batch axes."""
        return self.groups == 1 and self.blocks == 1

    def matrices(self, shape: Shape) -> tuple[tuple[int, int, int], ...]:
        """Return the shapes `(b, m, n)` of the batches that `fold` returns.

        One batch, or one for each of the sizes in `blocks`.
        """
        _, m, n = self.on(len(shape))._layout(shape)
        b = math.prod(shape) // max(m * n, 1)
        count, sizes = self._pieces(n if self.split == "columns" else m, shape)
        if self.split == "columns":
            return tuple((b * count, m, piece) for piece in sizes)
        return tuple((b * count, piece, n) for piece in sizes)

    def taps(self, shape: Shape) -> int:
        """Return the number of taps of the kernel, the product of its spatial axes."""
        return math.prod(shape[axis] for axis in self.on(len(shape)).spatial)

    def fold(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return the matrices of a leaf, in batches of shape `(b, m, n)`."""
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
        """Return the leaf of the given shape of which `stacks` are the matrices."""
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
        """Return the number of pieces in one batch, and their size in each batch."""
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
    """The decision of a rule on a leaf, for `explain`.

    Attributes:
      cut: the matricisation, or None for a leaf that is left alone.
      reason: why, in words.
      guess: whether the decision is uncertain.
    """

    cut: Matricisation | None
    reason: str
    guess: bool = False


def _axes(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    axes = (value,) if not isinstance(value, Sequence) else tuple(value)
    if not all(isinstance(axis, int) for axis in axes):
        raise TypeError(
            f"`{name}` must be integers, such as (0, 1), got {value!r}; for a leaf "
            "that is not a matrix, use None instead of a Matricisation."
        )
    return axes
