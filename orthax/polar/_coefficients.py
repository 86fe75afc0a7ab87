"""Coefficients of odd matrix polynomials that drive singular values to one.

A row `(a, b, c)` is the step `p(x) = a x + b x^3 + c x^5`, a row `(a, b)` the step
`p(x) = a x + b x^3`; a table is the composition of its rows, first row first, on
singular values in `[0, 1]`. Every number is dimensionless.
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

Row = tuple[float, ...]
Table = tuple[Row, ...]

# Newton-Schulz in its classical form: the Taylor polynomials of x (x^2)^(-1/2) around
# one. Higham: "Functions of Matrices", SIAM 2008, eq. (8.20) (cubic), and the Pade
# family [l/0] of Section 8.4 (quintic). As many steps as bring 1e-3 to within 1e-6.
CLASSIC_CUBIC: Table = ((1.5, -0.5),) * 21
CLASSIC_QUINTIC: Table = ((15 / 8, -10 / 8, 3 / 8),) * 14

# Jordan: "Muon: An optimizer for hidden layers in neural networks", 2024,
# https://kellerjordan.github.io/posts/muon. Fast at zero; never converges: singular
# values end anywhere in about [0.68, 1.13].
JORDAN: Table = ((3.4445, -4.7750, 2.0315),) * 5

# You, as published by Ahn et al.: "Dion: Distributed Orthonormalized Updates", 2025,
# arXiv 2504.05295, and shipped by optax as the preset "dion".
DION: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Grishina, Smirnov, Rakhuba: "Accelerating Newton-Schulz Iteration for
# Orthogonalization via Chebyshev-type Polynomials", 2025, arXiv 2506.10935.
CANS: Table = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# DeepSeek-V4, as implemented by NVIDIA Emerging-Optimizers and MaxText: eight of
# Jordan's steps, then two that converge.
DEEPSEEK_V4: Table = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2

_NAMED = ("CLASSIC_CUBIC", "CLASSIC_QUINTIC", "JORDAN", "DION", "CANS", "DEEPSEEK_V4")

# Below this relative width of the interval the minimax polynomial and the Taylor
# polynomial agree to double precision, and the exchange below is singular.
_NARROW = 5e-6
_REACHED = 1e-7
_MOST_STEPS = 64


def polar_express(
    lower: float = 1e-3,
    steps: int | None = None,
    *,
    safety: float = 0.01,
    cushion: float = 0.02,
) -> Table:
    r"""Return the Polar Express table: the optimal quintic for every step in turn.

    Each row is the odd quintic that minimises $\max |1 - p(x)|$ over the interval
    $[l, u]$ in which the earlier rows have left the singular values, found by the
    Remez exchange in float64 and recentred so that the image of the interval is
    symmetric around one. The composition is the optimal one of its length (Theorem
    3.1 of the paper).

    Args:
      lower: smallest singular value, relative to the largest, that the table brings to
        one; in (0, 1), dimensionless. Smaller ones stay below one.
      steps: number of rows; default the smallest number whose composition is within
        1e-7 of one on `[lower, 1]`.
      safety: relative margin of every row but the last against singular values that
        rounding has pushed above the interval, dimensionless.
      cushion: lower ends below `cushion` times the upper end are raised to it when a
        row is fitted, so that no row dips far below one in the middle of the
        interval; in [0, 1), dimensionless.

    Returns:
      `steps` rows `(a, b, c)`, a tuple of tuples of floats.

    Raises:
      ValueError: if `lower` or `cushion` lies outside its interval, `steps` is not a
        positive integer, or `safety` is negative.

    Limits:
      Singular values below `lower` are multiplied by the slope of the table at zero,
      the product of the leading coefficients: about 3.5e3 for the default.

    Example:
      >>> table = polar_express(1e-3)
      >>> len(table)
      7
      >>> x = 1e-3
      >>> for a, b, c in table:
      ...     x = a * x + b * x**3 + c * x**5
      >>> abs(x - 1) < 1e-7
      True

    References:
      Amsel, Persson, Musco, Gower: "The Polar Express: Optimal Matrix Sign Methods and
      Their Application to the Muon Algorithm", 2025, arXiv 2505.16932, Algorithm 1 and
      Section 3.4 (finite precision).
    """
    if not 0 < lower < 1:
        raise ValueError(f"`lower` must lie strictly between 0 and 1, got {lower}.")
    if not 0 <= cushion < 1:
        raise ValueError(f"`cushion` must lie in [0, 1), got {cushion}.")
    if safety < 0:
        raise ValueError(f"`safety` must not be negative, got {safety}.")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"`steps` must be a positive integer or None, got {steps!r}.")
    return _compose(float(lower), steps, float(safety), float(cushion))


@functools.lru_cache(maxsize=64)
def _compose(lower: float, steps: int | None, safety: float, cushion: float) -> Table:
    low, high, rows = lower, 1.0, []
    for count in range(1, (steps or _MOST_STEPS) + 1):
        a, b, c = minimax(max(low, cushion * high), high)
        if low < cushion * high:
            # Fitted on a shorter interval: recentre on the one that there is.
            centre = (_value((a, b, c), low) + _value((a, b, c), high)) / 2
            a, b, c = a / centre, b / centre, c / centre
        last = count == steps
        if steps is None:
            last = abs(1 - _value((a, b, c), low)) < _REACHED
        if not last:
            margin = 1 + safety
            a, b, c = a / margin, b / margin**3, c / margin**5
        rows.append((a, b, c))
        if last:
            break
        low = _value((a, b, c), low)
        high = 2 - low
    return tuple(rows)


def _value(row: Row, x: float) -> float:
    return sum(c * x ** (2 * k + 1) for k, c in enumerate(row))


def minimax(low: float, high: float, length: int = 3) -> Row:
    """Return the odd polynomial nearest to one on `[low, high]` in the maximum norm.

    It has `length` coefficients, at least three: degree `2 length - 1`.
    """
    powers = 2 * np.arange(length) + 1
    if low >= high * (1 - _NARROW):
        quintic = np.array(CLASSIC_QUINTIC[0]) / high ** powers[:3]
        return (*map(float, quintic), *[0.0] * (length - 3))
    # As many points of equal and alternating error and one more, the inner ones
    # exchanged for the stationary points of the polynomial until they no longer move.
    nodes = np.cos(np.pi * np.arange(length, -1, -1) / length)
    points = low + (high - low) * (1 + nodes) / 2
    for _ in range(100):
        system = np.c_[points[:, None] ** powers, (-1.0) ** np.arange(length + 1)]
        row = np.linalg.solve(system, np.ones(length + 1))[:-1]
        moved = np.sort(np.sqrt(np.roots((row * powers)[::-1]).real))
        done = np.max(np.abs(moved - points[1:-1])) < 1e-14 * high
        points[1:-1] = moved
        if done:
            break
    return tuple(map(float, row))


def table_text(table: Table) -> str:
    """Return what one types for a table: its name, what makes it, or its rows."""
    for name in _NAMED:
        if table == globals()[name]:
            return name
    if len({*table}) == 1:
        return f"({table[0]},) * {len(table)}"
    for options in ({}, {"safety": 0.02}):
        if table == polar_express(steps=len(table), **options):
            said = "".join(f", {name}={value}" for name, value in options.items())
            return f"polar_express(steps={len(table)}{said})"
    return repr(table)


def checked_table(coefficients: Sequence[Sequence[float]]) -> Table:
    """Return a table as tuples of floats, or raise at what is malformed."""
    advice = (
        "expected one row (a, b, c) or (a, b) of Python numbers per step, such as "
        "polar.JORDAN or ((1.5, -0.5),) * 10"
    )
    if isinstance(coefficients, str):
        raise TypeError(
            f"`coefficients` is {coefficients!r}; {advice}. A table is an object, not "
            "its name."
        )
    if isinstance(coefficients, int):
        raise TypeError(
            f"`coefficients` is {coefficients}; {advice}. So many steps of the optimal "
            f"table: polar.polar_express(steps={coefficients})."
        )
    try:
        rows = tuple(tuple(float(c) for c in row) for row in coefficients)
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(f"`coefficients` is malformed: {advice} ({error}).") from None
    except ValueError as error:
        raise ValueError(f"`coefficients` is malformed: {advice} ({error}).") from None
    lengths = {len(row) for row in rows}
    if lengths not in ({2}, {3}):
        raise ValueError(
            f"`coefficients` has rows of length {sorted(lengths)}; {advice}."
        )
    for i, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"`coefficients` row {i} is {row}, which is not finite.")
    return rows
