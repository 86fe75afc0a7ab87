"""The polar factor on the device at hand, measured against float64 numpy."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthax import polar

# Singular values from here up, relative to the Frobenius norm, are brought to one.
_KEPT = 1e-3
# Relative to the largest: what float32 cannot tell from zero.
_NULL = float(np.finfo(np.float32).eps)


class Errors(NamedTuple):
    """What is off in a polar factor, or how much of it may be; all dimensionless.

    Attributes:
      to_one: largest distance from one of a singular value that is at least 1e-3 of
        the Frobenius norm.
      outside: how far one of the smaller ones is outside [0, 1].
      coupling: largest part of one singular direction in another.
      null: spectral norm of what there is without a direction of the input.
    """

    to_one: float
    outside: float
    coupling: float
    null: float


# What `polar.Auto()` promises of matrices in float32.
PROMISED = Errors(1e-4, 1e-3, 1e-3, 1e-2)


class Check(NamedTuple):
    """One matrix: what its factor's errors are, and what they may be."""

    name: str
    shape: tuple[int, int]
    dtype: str
    measured: Errors
    promised: Errors

    @property
    def broken(self) -> bool:
        """Whether an error is above what is promised, or is NaN."""
        pairs = zip(self.measured, self.promised, strict=True)
        return not all(error <= bound for error, bound in pairs)


class Found(NamedTuple):
    """What was measured.

    Attributes:
      checks: one for each matrix.
      nan_stays: whether NaN in a matrix gives NaN in all of it.
      first: seconds of the first call, compilation included.
      second: seconds of the second.
    """

    checks: tuple[Check, ...]
    nan_stays: bool
    first: float
    second: float

    @property
    def broken(self) -> bool:
        """Whether a promise is."""
        return not self.nan_stays or any(check.broken for check in self.checks)


def self_check(method: polar.PolarMethod = polar.Auto()) -> Found:
    """Measure a polar method on the default device, on a dozen small matrices."""
    stacks = [[*_tall().values()], *([x] for x in _others().values())]
    spoilt = stacks[0][0].copy()
    spoilt[3, 5] = np.nan
    stacks[0].append(spoilt)
    arrays = [jnp.asarray(np.stack(stack)) for stack in stacks]

    @jax.jit
    def factors_of(arrays: list[jax.Array]) -> list[jax.Array]:
        return [polar.polar_factor(x, method) for x in arrays]

    def timed() -> tuple[float, list[jax.Array]]:
        start = time.perf_counter()
        out = jax.block_until_ready(factors_of(arrays))
        return time.perf_counter() - start, out

    (first, _), (second, out) = timed(), timed()
    factors = jax.device_get(out)
    names = [*_tall(), *_others()]
    inputs = [x for stack in stacks for x in stack if x is not spoilt]
    results = [*factors[0][:-1], *(stack[0] for stack in factors[1:])]
    checks = map(_check, names, inputs, results)
    stays = bool(np.all(np.isnan(factors[0][-1])))
    return Found(tuple(checks), stays, first, second)


def errors(factor: np.ndarray, x: np.ndarray) -> Errors:
    """Compare a factor of `x` with the float64 singular directions of `x`."""
    o, x = np.asarray(factor, np.float64), np.asarray(x, np.float64)
    u, s, vh = np.linalg.svd(x / (np.abs(x).max() or 1), full_matrices=False)
    rank = int(np.sum(s > _NULL * s[0]))
    kept = s[:rank] >= _KEPT * np.linalg.norm(s)
    u, vh = u[:, :rank], vh[:rank]
    d = u.T @ o @ vh.T
    values = np.diagonal(d)
    small = values[~kept]
    # What leads into the range from outside of it, or out of it.
    into, out_of = o @ vh.T - u @ d, u.T @ o - d @ vh
    rest = o - u @ d @ vh - into @ vh - u @ out_of
    coupled = [np.abs(d - np.diag(values)).ravel()]
    coupled += [np.linalg.norm(into, axis=0), np.linalg.norm(out_of, axis=1)]
    return Errors(
        _most(np.abs(values[kept] - 1)),
        _most(np.maximum(-small, small - 1)),
        _most(np.concatenate(coupled)),
        # A matrix with NaN has no singular values that numpy would return.
        float(np.linalg.norm(rest, 2)) if np.all(np.isfinite(o)) else float("nan"),
    )


def _check(name: str, x: np.ndarray, factor: np.ndarray) -> Check:
    promised = PROMISED
    if not np.any(x):
        promised = Errors(0, 0, 0, 0)  # zero stays zero
    elif x.dtype != np.float32:
        # The result is rounded to the dtype of the input, at most by so much in all.
        rounding = float(jnp.finfo(x.dtype).eps) / 2 * min(x.shape) ** 0.5
        promised = Errors(*(bound + rounding for bound in promised))
    return Check(name, x.shape, x.dtype.name, errors(factor, x), promised)


def _tall() -> dict[str, np.ndarray]:
    """Return matrices that are one stack."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 64))
    unit = x / np.abs(x).max()
    slope, half = np.geomspace(1, 1e-4, 64), np.arange(64) < 32
    made = {
        "Gaussian": x,
        "max 1e-30": 1e-30 * unit,
        "max 1e37": 1e37 * unit,
        "cond 1e4": _with_spectrum(rng, slope),
        "rank 32": _with_spectrum(rng, half * np.geomspace(1, 1e-2, 64)),
        "zero": np.zeros((256, 64)),
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


def _others() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"wide": (64, 256), "square": (64, 64), "one column": (64, 1)}
    made = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return made | {"rounded": rng.standard_normal((256, 64)).astype(jnp.bfloat16)}


def _with_spectrum(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    u, v = (np.linalg.qr(rng.standard_normal((side, 64)))[0] for side in (256, 64))
    return (u * values) @ v.T


def _most(values: Sequence[float] | np.ndarray) -> float:
    # Nothing is off where there is nothing; NaN stays NaN.
    return float(np.max(values, initial=0))
