"""Which vectors of a matrix are meant: its columns, its rows, or the short ones."""

import math

Axes = tuple[int, ...]
_AXES = ("columns", "rows", "short")


def check_axis(axis: str) -> None:
    """Raise unless `axis` is a known option."""
    if axis not in _AXES:
        raise ValueError(f"`axis` must be one of {_AXES}, got {axis!r}.")


def reduced_axes(axis: str, rows: Axes, columns: Axes, shape: tuple[int, ...]) -> Axes:
    """Return the axes along which the vectors lie, over which they are summed.

    Args:
      axis: `"columns"`, `"rows"`, or `"short"`, the columns of wide and square
        matrices and the rows of tall ones.
      rows: the axes of the rows.
      columns: the axes of the columns.
      shape: of the array.
    """
    m, n = (math.prod(shape[i] for i in side) for side in (rows, columns))
    return columns if axis == "rows" or (axis == "short" and m > n) else rows
