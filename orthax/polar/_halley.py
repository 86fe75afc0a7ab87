"""Coefficients of `DWH`: the weights of its Halley steps, its final polynomial."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthax.polar._coefficients import minimax

# Singular values from here up, relative to ||X||_F, are brought to one.
LOWER = 1e-3


class Weights(NamedTuple):
    """A Halley step: sigma (a + b sigma^2) / (1 + c sigma^2).

    In partial fractions, sigma (alpha + beta / (1 + c sigma^2)): X is multiplied by
    Q = alpha I + beta W, with W the inverse of I + c X X^H. `lower` is the image of the
    lower end of its interval.
    """

    a: float
    b: float
    c: float
    lower: float

    @property
    def alpha(self) -> float:
        return self.b / self.c

    @property
    def beta(self) -> float:
        return self.a - self.alpha


def halley_weights(steps: int, first: float | None = None) -> list[Weights]:
    """Return steps that each bring their interval as near to one as they can.

    The first may be weighted for a shorter interval, from `first` up: its c is smaller.
    """
    low, table = LOWER, []
    for _ in range(steps):
        w = _weighted(low if table or first is None else first)
        low = min(low * (w.a + w.b * low**2) / (1 + w.c * low**2), 1.0)
        table.append(w._replace(lower=low))
    return table


def _weighted(low: float) -> Weights:
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = (1 + d) ** 0.5
    a = root + (8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) ** 0.5 / 2
    b = (a - 1) ** 2 / 4
    return Weights(a, b, a + b - 1, low)


def final_polynomial(lower: float) -> tuple[float, ...]:
    """Return the best odd polynomial on [lower, 1], of degree five or nine.

    It leaves 5e-6 from 0.96 up, and 7e-6 from 0.81 up.
    """
    if lower > 0.9:
        return (*minimax(lower, 1.0), 0.0, 0.0)
    return minimax(lower, 1.0, 5)


def padded_tables(rows: Sequence, like: jax.Array) -> jax.Array:
    """Return two lists of numbers, or of rows, padded with zeros to one length."""
    table = np.zeros((2, max(map(len, rows)), *np.shape(rows[0][0])))
    for filled, row in zip(table, rows, strict=True):
        filled[: len(row)] = row
    return jnp.asarray(table, jnp.finfo(like.dtype).dtype)
