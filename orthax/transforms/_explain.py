"""What will happen to every leaf of a tree, and why, and what it will cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthax import components, polar


class Row(NamedTuple):
    """What happens to one leaf.

    Attributes:
      path: the path of the leaf, joined by `"/"`.
      shape: its shape.
      rows: the axes of the parameters (fan-in), or None if the leaf is left alone.
      columns: the axes of the components (fan-out), or None.
      batch: all other axes, or None.
      matrices: shapes `(b, m, n)` of the stacks that it makes.
      reason: why.
      guess: whether the rule fell back on the rank alone: worth a look.
      error: the message that `orthogonalise` would raise for this leaf, or None.
    """

    path: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None
    batch: tuple[int, ...] | None
    matrices: tuple[tuple[int, int, int], ...]
    reason: str
    guess: bool
    error: str | None


class Stack(NamedTuple):
    """Matrices that are worked on together in one update.

    Attributes:
      shape: `(b, m, n)` of the stack, `m <= n` where tall ones are turned to join it.
      paths: the leaves that have matrices in it.
      dtype: what it is worked on in.
      at_once: how many of them, at most; the others wait for their turn.
      flops: operations of one update, floating-point multiplications and additions.
      bytes: size of all of them.
    """

    shape: tuple[int, int, int]
    paths: tuple[str, ...]
    dtype: str
    at_once: int
    flops: float
    bytes: int


class Explanation(NamedTuple):
    """What `explain` found; prints as tables.

    Attributes:
      rows: one for each leaf.
      stacks: one for each stack of matrices that are worked on together.
      method: the method that works on them.
      platform: where.
    """

    rows: tuple[Row, ...]
    stacks: tuple[Stack, ...]
    method: polar.PolarMethod
    platform: str

    def __str__(self) -> str:
        """Return two tables: a line for each leaf, and a line for each stack."""
        table = [("leaf", "shape", "rows", "columns", "batch", "matrices", "why")]
        lines = _aligned([*table, *map(_cells, self.rows)])
        errors = [row.error for row in self.rows if row.error]
        return "\n".join([*lines, "", self._summary(), *errors, *self._cost()])

    __repr__ = __str__

    def _summary(self) -> str:
        cut = [row for row in self.rows if row.matrices]
        count = sum(b for row in cut for b, _, _ in row.matrices)
        guesses = sum(row.guess for row in self.rows)
        errors = sum(row.error is not None for row in self.rows)
        text = f"{len(cut)} of {len(self.rows)} leaves cut into {count} matrices"
        if guesses:
            text += f"; {guesses} by a guess (marked ?)"
        if errors:
            text += f"; {errors} AMBIGUOUS, which raises:"
        return text + ("" if errors else ".")

    def _cost(self) -> list[str]:
        if not self.stacks:
            return []
        table = [("stack", "at once", "leaves", "dtype", "MFLOP", "MiB")]
        for s in self.stacks:
            counts = str(s.at_once), str(len(s.paths))
            table.append((_stack_text(s.shape), *counts, s.dtype, *_amounts([s])))
        table.append(("one update", "", "", "", *_amounts(self.stacks)))
        title = f"Worked on together on {self.platform} by {self.method}:"
        return ["", title, "", *_aligned(table)]


def explain(
    params: Any,
    rule: components.Rule = components.ByName(),
    *,
    method: polar.PolarMethod = polar.Auto(),
    stacking: components.Stacking = components.Stacking(),
    platform: str | None = None,
) -> Explanation:
    """Say what will happen to every leaf of a tree, and why, and what it will cost.

    Args:
      params: parameters or gradients, or a tree of `jax.ShapeDtypeStruct`.
      rule: how leaves are cut into matrices.
      method: how polar factors are computed.
      stacking: how equal matrices are worked on together.
      platform: where: `"cpu"`, `"gpu"`, `"tpu"`; default: where JAX computes now.

    Returns:
      A row for each leaf, and one for each stack that `orthogonalise` would make of
      them; prints as two tables. A leaf that the rule cannot decide is a row with the
      error that `orthogonalise` would raise. Operations are counted by the method, at
      most so many where it decides at run time.

    Raises:
      TypeError: if `rule` or `method` is none or a leaf is no array.
      ValueError: if `stacking.max_bytes` is smaller than one matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {
      ...     "conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)},
      ...     "embed": {"embedding": jnp.ones((100, 8))},
      ... }
      >>> print(orthax.explain(params))
      leaf             shape         rows   columns  batch  matrices    why
      conv/bias        (16,)         -      -        -      -           rank below 2
      conv/kernel      (3, 3, 8, 16) 0,1,2  3        -      1 x (72 x 16) convolution...
      embed/embedding  (100, 8)      -      -        -      -           'embedding'...
      <BLANKLINE>
      1 of 3 leaves cut into 1 matrices.
      <BLANKLINE>
      Worked on together on cpu by DWH(restart=True, polish=True):
      <BLANKLINE>
      stack          at once  leaves  dtype    MFLOP  MiB
      1 x (16 x 72)  1        1       float32  0.197  0.00439
      one update                               0.197  0.00439
    """
    polar.check_method(method)
    platform = jax.default_backend() if platform is None else platform
    if isinstance(method, polar.Auto):
        method = method.on(platform)
    leaves = components.decide_all(params, rule)
    rows = tuple(map(_row, leaves))
    stacks = []
    for leaf, row in zip(leaves, rows, strict=True):
        for shape in row.matrices:
            dtype = jnp.promote_types(leaf.value.dtype, jnp.float32)
            stacks.append((row.path, jax.ShapeDtypeStruct(shape, dtype)))
    how = polar.joining(method, platform)
    how.pop("in_turn", None)
    groups = stacking.groups([stack for _, stack in stacks], **how)
    found = tuple(_stack(group, stacks, method) for group in groups)
    return Explanation(rows, found, method, platform)


def _stack(
    group: components.Group,
    stacks: Sequence[tuple[str, jax.ShapeDtypeStruct]],
    method: polar.PolarMethod,
) -> Stack:
    b, m, n = group.shape
    dtype = stacks[group.members[0]][1].dtype
    return Stack(
        group.shape,
        tuple(dict.fromkeys(stacks[i][0] for i in group.members)),
        dtype.name,
        group.at_once,
        b * method.flops(m, n),
        b * m * n * dtype.itemsize,
    )


def _amounts(stacks: Sequence[Stack]) -> tuple[str, str]:
    flops = sum(stack.flops for stack in stacks)
    return f"{flops / 1e6:.3g}", f"{sum(stack.bytes for stack in stacks) / 2**20:.3g}"


def _stack_text(shape: tuple[int, int, int]) -> str:
    b, m, n = shape
    return f"{b} x ({m} x {n})"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in table
    ]


def _row(leaf: Any) -> Row:
    shape = tuple(getattr(leaf.value, "shape", ()))
    if leaf.error:
        reason, guess, cut = "AMBIGUOUS", False, None
    else:
        cut, reason, guess = leaf.decision
    if cut is None:
        return Row(leaf.path, shape, None, None, None, (), reason, guess, leaf.error)
    used = cut.rows + cut.columns
    batch = tuple(axis for axis in range(len(shape)) if axis not in used)
    return Row(
        leaf.path,
        shape,
        cut.rows,
        cut.columns,
        batch,
        cut.matrices(shape),
        reason,
        guess,
        None,
    )


def _cells(row: Row) -> tuple[str, ...]:
    def axes(part: tuple[int, ...] | None) -> str:
        return ",".join(map(str, part)) if part else "-"

    matrices = " + ".join(map(_stack_text, row.matrices))
    reason = f"? {row.reason}" if row.guess else row.reason
    return (
        row.path or "(root)",
        str(row.shape),
        axes(row.rows),
        axes(row.columns),
        axes(row.batch),
        matrices or "-",
        reason,
    )
