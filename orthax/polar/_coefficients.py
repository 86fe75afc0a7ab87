"""Coefficients of odd matrix polynomials that drive singular values to one.

A row `(a, b, c)` is the step `p(x) = a x + b x^3 + c x^5`, a row `(a, b)` the step
`p(x) = a x + b x^3`; a table is the composition of its rows, first row first, on
singular values in `[0, 1]`. Every number is dimensionless.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np

Row = tuple[float, ...]
Table = tuple[Row, ...]

# Newton-Schulz in its classical form: the Taylor polynomials of x (x^2)^(-1/2) around
# one. Higham: "Functions of Matrices", SIAM 2008, eq. (8.20) (cubic), and the Pade
# family [l/0] of Section 8.4 (quintic). The numbers of steps bring 1e-3 to within 1e-6.
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
    $[l, u]$ to which the earlier rows map the singular values, found by Remez exchange
    in float64 and rescaled so that the image of the interval is symmetric around one.
    The composition is optimal for its length (Theorem 3.1 of the paper).

    Args:
      lower: smallest singular value, relative to the largest, that the table brings to
        one; in (0, 1), dimensionless. Smaller ones stay below one.
      steps: number of rows; default: as many as bring `[lower, 1]` to within 1e-7 of
        one.
      safety: relative margin, in every row but the last, for singular values that
        rounding pushes above the interval, dimensionless.
      cushion: a lower end below `cushion` times the upper end is raised to it when a
        row is fitted, so that no row dips far below one inside the interval; in [0, 1),
        dimensionless.

    Returns:
      `steps` rows `(a, b, c)`, a tuple of tuples of floats.

    Raises:
      ValueError: if an argument lies outside its interval, or `steps` is not a positive
        integer.

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
    if not (0 < lower < 1 and 0 <= cushion < 1 and safety >= 0):
        raise ValueError(
            "expected 0 < lower < 1, 0 <= cushion < 1 and safety >= 0, got "
            f"lower={lower}, cushion={cushion}, safety={safety}."
        )
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"`steps` must be a positive integer or None, got {steps!r}.")
    return _compose(float(lower), steps, float(safety), float(cushion))


@functools.lru_cache(maxsize=64)
def _compose(lower: float, steps: int | None, safety: float, cushion: float) -> Table:
    low, high, rows = lower, 1.0, []
    for count in range(1, (steps or _MOST_STEPS) + 1):
        a, b, c = minimax(max(low, cushion * high), high)
        if low < cushion * high:
            # Fitted on a shorter interval: recentre on the whole one.
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
    # Remez: the error alternates at `length + 1` points, the inner ones of which are
    # exchanged for the polynomial's stationary points until they no longer move.
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
    """Return the expression for a table: its name, the call that makes it, or rows."""
    for name in _NAMED:
        if table == globals()[name]:
            return name
    if len({*table}) == 1:
        return f"({table[0]},) * {len(table)}"
    for options in ({}, {"safety": 0.02}):
        if table == polar_express(steps=len(table), **options):
            shown = "".join(f", {name}={value}" for name, value in options.items())
            return f"polar_express(steps={len(table)}{shown})"
    return repr(table)


def checked_table(coefficients: Sequence[Sequence[float]]) -> Table:
    """Return a table as tuples of floats, or raise if it is malformed."""
    expected = (
        "`coefficients` must have one row (a, b, c) or (a, b) of finite Python numbers "
        "per step, such as polar.JORDAN, polar.polar_express(steps=5) or "
        "((1.5, -0.5),) * 10"
    )
    try:
        rows = tuple(tuple(float(c) for c in row) for row in coefficients)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(f"{expected}, got {coefficients!r} ({error}).") from None
    if {*map(len, rows)} not in ({2}, {3}) or not np.all(np.isfinite(rows)):
        raise ValueError(f"{expected}, got {rows}.")
    return rows
