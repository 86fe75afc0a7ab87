"""What will happen to every leaf of a tree, and why."""

from typing import Any, NamedTuple

from orthax import components


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


class Explanation(NamedTuple):
    """The rows of `explain`; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """Return the table: one line for each leaf, then a summary."""
        table = [("leaf", "shape", "rows", "columns", "batch", "matrices", "why")]
        table += [_cells(row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in table
        ]
        errors = [row.error for row in self.rows if row.error]
        return "\n".join([*lines, "", self._summary(), *errors])

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


def explain(params: Any, rule: components.Rule = components.ByName()) -> Explanation:
    """Say what will happen to every leaf of a tree, and why.

    Args:
      params: parameters or gradients, or a tree of `jax.ShapeDtypeStruct`.
      rule: how leaves are cut into matrices.

    Returns:
      One row for each leaf; prints as a table. A leaf that the rule cannot decide is a
      row with the error that `orthogonalise` would raise.

    Raises:
      TypeError: if `rule` is no rule or a leaf is no array.

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
    """
    return Explanation(
        tuple(_row(leaf) for leaf in components.decide_all(params, rule))
    )


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

    matrices = " + ".join(f"{b} x ({m} x {n})" for b, m, n in row.matrices)
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
