"""The worst matrix for the default methods: `python -m benchmarks.contract`.

Families of matrices in many shapes, then climbs: from the worst spectra that are known,
changes are kept where they make things worse. Every matrix is compared with
the float64 numpy SVD of what is stored (`benchmarks.polar.measure`). Writes
`results/contract.csv` and the table of `README.md`; `tests/test_search.py` enforces a
third of the promise.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks import tables
from benchmarks.polar import Reference, measure, reference
from orthax import polar

# What `polar_factor` promises of each direction on CPU, and how much may be used up.
PROMISE = {
    "kept_error": 1e-4,
    "small_min": -1e-3,
    "small_max": 1.001,
    "coupling": 1e-3,
    "null_norm": 1e-2,
}
BOUND = {
    "kept_error": 3.3e-5,
    "small_min": -3.3e-4,
    "small_max": 1.00033,
    "coupling": 3.3e-4,
    "null_norm": 3e-3,
}
HIGH = "NewtonSchulz(precision='high')"
METHODS = {"DWH()": polar.DWH(), HIGH: polar.NewtonSchulz(precision="high")}
# The default of accelerators promises to bring larger directions to within 1e-3 of one.
# Here its products are what they are there, sums of bfloat16 products in float32. They
# use up to 35 % of what is promised of couplings, more than a third: the bound is half.
LOOSER = {HIGH: {"kept_error": 10.0, "coupling": 1.5}}
DTYPES = ("float32", "bfloat16")
SHAPES = (
    (64, 4),
    (97, 97),
    (130, 128),
    (700, 192),
    (1024, 10),
    (4000, 3),
    (4000, 8),
    (8192, 16),
    (16384, 64),
    (65536, 16),
    (4608, 512),
)
# Where a search goes uphill: shapes whose float64 SVD takes milliseconds.
CLIMBED = SHAPES[:8]
KEY = ("method", "family", "dtype", "processor", "settings")


def with_spectrum(
    rng: np.random.Generator, m: int, n: int, s: np.ndarray, flat: bool = False
) -> np.ndarray:
    """Return a matrix with singular values `s`, of at most as many columns as rows.

    Where it is `flat`, all entries of its first direction have one magnitude.
    """
    sides = [rng.standard_normal((side, len(s))) for side in (m, n)]
    if flat:
        for side in sides:
            side[:, 0] = np.sign(side[:, 0])
    u, v = (np.linalg.qr(side)[0] for side in sides)
    return (u * s) @ v.T


Build = Callable[[np.random.Generator, int, int], np.ndarray]


def _spectrum(values: Callable[[int], np.ndarray], **kwargs: bool) -> Build:
    return lambda rng, m, n: with_spectrum(rng, m, n, values(min(m, n)), **kwargs)


def _cluster(at: float, last: float) -> Build:
    return _spectrum(lambda k: np.r_[1, np.full(k - 2, at), last][-k:])


def _gaussian(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((m, n))


def _scaled(build: Build, largest: float) -> Build:
    def scaled(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
        x = build(rng, m, n)
        return x * (largest / np.abs(x).max())

    return scaled


def _giant(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    x = rng.standard_normal((m, n))
    x[rng.integers(m), rng.integers(n)] = 10 ** rng.uniform(2, 5)
    return x


def _relu(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Return a gradient of a layer after a ReLU: activations times errors."""
    inputs = np.maximum(rng.standard_normal((64, m)), 0)
    return inputs.T @ (rng.standard_normal((64, n)) ** 3)


def _denormal(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Return entries over ten orders of magnitude, the smallest below 1e-38."""
    x = rng.standard_normal((m, n)) * 10 ** rng.uniform(-10, 0, (m, n))
    return x * (1e-30 / np.abs(x).max())


def _without_columns(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((m, n)) * (rng.permutation(n) >= n // 3)


FAMILIES: dict[str, Build] = {
    "gaussian": _gaussian,
    **{
        f"condition 1e{e}": _spectrum(lambda k, e=e: np.geomspace(1, 10.0**-e, k))
        for e in range(2, 7)
    },
    "half rank": _spectrum(lambda k: np.geomspace(1, 1e-2, -(-k // 2))),
    "rank one": _spectrum(lambda k: np.ones(1)),
    "repeated": _spectrum(lambda k: np.sort(np.resize([1, 1e-1, 1e-2], k))[::-1]),
    "cluster at 8e-3": _cluster(8e-3, 1e-5),
    "cluster at 3e-2": _cluster(3e-2, 1e-5),
    "cluster at 1.1e-3": _cluster(1.1e-3, 1e-5),
    "one flat giant": _spectrum(lambda k: np.r_[1, np.full(k - 1, 1.1e-3)], flat=True),
    "graded rows": lambda rng, m, n: (
        np.geomspace(1, 1e-6, m)[rng.permutation(m), None] * _gaussian(rng, m, n)
    ),
    "graded columns": lambda rng, m, n: (
        np.geomspace(1, 1e-6, n)[rng.permutation(n)] * _gaussian(rng, m, n)
    ),
    "giant entry": _giant,
    "signs": lambda rng, m, n: rng.choice([-1.0, 1.0], (m, n)),
    "one magnitude a column": lambda rng, m, n: (
        rng.choice([-1.0, 1.0], (m, n)) * np.linspace(1, 0.3, n)
    ),
    "after a ReLU": _relu,
    "denormals": _denormal,
    "max 1e-30": _scaled(_cluster(8e-3, 1e-4), 1e-30),
    "max 1e37": _scaled(_cluster(8e-3, 1e-4), 1e37),
    "duplicated columns": lambda rng, m, n: np.repeat(
        rng.standard_normal((m, -(-n // 2))), 2, axis=1
    )[:, :n],
    "zero columns": _without_columns,
}
CLIMB = "climb"


@functools.cache
def _factors(method: str) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: polar.polar_factor(x, METHODS[method]))


class Matrix(NamedTuple):
    """A matrix as it is stored, widened to float32, and its directions."""

    x: np.ndarray
    directions: Reference

    def transposed(self) -> "Matrix":
        """Return the transpose, without another decomposition."""
        u, vh, kept, null = self.directions
        return Matrix(self.x.T, Reference(vh.T, u.T, kept, null))


def stored(x: np.ndarray, dtype: str) -> Matrix:
    """Return a float64 matrix as a dtype holds it."""
    x = np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32)
    return Matrix(x, reference(x))


def errors(method: str, matrix: Matrix) -> tables.Row:
    """Return `benchmarks.polar.measure` of the worse of a matrix and its transpose."""
    both = (matrix, matrix.transposed())
    found = [measure(_factors(method)(jnp.asarray(a.x)), a.directions) for a in both]
    return max(found, key=lambda row: used(row, method))


def used(row: tables.Row, method: str = "DWH()") -> float:
    """Return the largest part of the promise that is used up; NaN counts as all."""
    parts = [
        _excess(name, row[name]) / _excess(name, promise) / _looser(method, name)
        for name, promise in PROMISE.items()
        if row[name] is not None
    ]
    return float("inf") if np.isnan(parts).any() else max(parts, default=0.0)


def broken(row: tables.Row, method: str = "DWH()") -> list[str]:
    """Return which bounds, a third of the promise, a row does not keep."""

    def keeps(name: str, bound: float) -> bool:
        if row[name] is None:
            return True
        part = _excess(name, row[name]) / _excess(name, bound)
        return part <= _looser(method, name)

    return [
        f"{name} {row[name]:.2g}"
        for name, bound in BOUND.items()
        if not keeps(name, bound)
    ]


def _excess(name: str, value: float) -> float:
    return value - (name == "small_max")  # which may be one


def _looser(method: str, name: str) -> float:
    return LOOSER.get(method, {}).get(name, 1.0)


def worst(rows: Sequence[tables.Row]) -> tables.Row:
    """Return the worst of every number over some matrices."""

    def most(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        pick = np.min if name == "small_min" else np.max  # which keep NaN
        return float(pick(values)) if values else None

    return {name: most(name) for name in PROMISE}


def family(
    method: str, name: str, dtype: str, shapes: Sequence[tuple[int, int]], seeds: int
) -> Iterator[tuple[str, tables.Row]]:
    """Yield what each matrix of a family is, and its errors."""
    for m, n in shapes:
        for seed in range(seeds if m * n < 2**20 else 1):
            rng = np.random.default_rng([seed, m, n])
            matrix = stored(FAMILIES[name](rng, m, n), dtype)
            yield f"{m}x{n}, seed {seed}", errors(method, matrix)


@dataclasses.dataclass(frozen=True)
class Climber:
    """A matrix of a search: logarithms of its singular values, and a seed."""

    shape: tuple[int, int]
    values: tuple[float, ...]
    seed: int
    flat: bool = False

    def build(self) -> np.ndarray:
        """Return the matrix in float64."""
        rng = np.random.default_rng(self.seed)
        return with_spectrum(rng, *self.shape, 10.0 ** np.array(self.values), self.flat)

    def changed(self, rng: np.random.Generator) -> "Climber":
        """Return it with other singular vectors, or with one change of its spectrum."""
        values, k = list(self.values), len(self.values)
        kind = rng.integers(4)
        if kind == 0:
            seed = int(rng.integers(2**31))
            return dataclasses.replace(self, seed=seed, flat=bool(rng.integers(2)))
        i = int(rng.integers(1, k)) if k > 1 else 0
        if kind == 1:
            values[i] += rng.normal() * 0.3
        elif kind == 2:
            values[i] = values[rng.integers(k)]
        else:
            values[i:] = [v + rng.normal() * 0.2 for v in values[i:]]
        values = [min(0.0, max(-6.5, v)) for v in values]
        return dataclasses.replace(self, values=(0.0, *values[1:]))

    def __str__(self) -> str:
        spectrum = " ".join(f"{10**v:.1e}" for v in sorted(self.values)[::-1][:8])
        return f"{self.shape[0]}x{self.shape[1]}, seed {self.seed}, s = {spectrum}"


def starts(shape: tuple[int, int]) -> list[Climber]:
    """Return the spectra at which a search in one shape begins."""
    k = shape[1]
    spectra = [np.linspace(0, -e, k) for e in (3, 4, 6)]
    for at in (-3, -2.1, -1.5, -1):
        spectra.append(np.r_[0, np.full(max(k - 2, 0), at), -5][:k])
    return [Climber(shape, tuple(map(float, s)), seed=6) for s in spectra]


def climb(
    method: str, shape: tuple[int, int], matrices: int, seed: int = 0
) -> Iterator[tuple[Climber, tables.Row]]:
    """Yield so many matrices, each start or a change of the worst so far."""
    rng = np.random.default_rng(seed)
    begin = starts(shape)
    best, most = begin[0], -1.0
    for i in range(matrices):
        tried = begin[i] if i < len(begin) else best.changed(rng)
        row = errors(method, stored(tried.build(), "float32"))
        if used(row, method) > most:
            best, most = tried, used(row, method)
        yield tried, row


def processor() -> str:
    """Return the widest vector instructions of this CPU, or its platform's name."""
    info = pathlib.Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4_2": "SSE4.2"}
    names = [name for flag, name in known.items() if flag in flags]
    return names[0] if names else os.uname().machine


def settings() -> str:
    """Return what the environment says of kernels: of XLA's and of OpenBLAS's."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    chosen = [f.removeprefix("--") for f in flags if "isa" in f or "ynn" in f]
    names = ("ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS")
    chosen += [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return " ".join(chosen) or "default"


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the worst of all families by method and processor, then by family."""
    if not rows:
        return "Not yet run: `python -m benchmarks.contract` fills this."
    where = dict.fromkeys((row["processor"], row["settings"]) for row in rows)
    summary, parts = [], []
    for method in METHODS:
        for processor, settings in where:
            chosen = [
                row
                for row in rows
                if row["method"] == method
                and (row["processor"], row["settings"]) == (processor, settings)
            ]
            if not chosen:
                continue
            total = str(sum(int(row["matrices"]) for row in chosen))
            label = [f"`{method}`", processor, f"`{settings}`", total]
            summary.append([*label, *_worst_cells(chosen)])
        body = []
        for name in dict.fromkeys(row["family"] for row in rows):
            chosen = [r for r in rows if (r["method"], r["family"]) == (method, name)]
            body.append([name, *_worst_cells(chosen)])
        heading = ["family", *(f"`{name}`" for name in PROMISE)]
        title = f"<summary>`{method}` by family, all processors</summary>"
        table = tables.markdown(heading, body)
        parts += ["<details>", title, table, "</details>"]
    heading = ["method", "processor", "settings", "matrices"]
    heading += [f"`{name}`" for name in PROMISE]
    return "\n\n".join([tables.markdown(heading, summary), *parts])


def _worst_cells(rows: Sequence[dict[str, str]]) -> list[str]:
    found = worst(
        [{n: float(row[n]) if row[n] else None for n in PROMISE} for row in rows]
    )
    forms = {name: ".5f" if name == "small_max" else ".1e" for name in PROMISE}
    return [
        "" if value is None else format(value, forms[name])
        for name, value in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, CLIMB])
    parser.add_argument("--seeds", type=int, default=3, help="matrices a shape")
    parser.add_argument("--climb", type=int, default=400, help="matrices a climb")
    parser.add_argument("--largest", type=int, default=2**22, help="entries at most")
    parser.add_argument("--processor", default=processor(), help="what to call it")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    path = args.results / "contract.csv"
    shapes = [(m, n) for m, n in SHAPES if m * n <= args.largest]
    climbed = [shape for shape in CLIMBED if shape in shapes]
    around = {"processor": args.processor, "settings": settings()}
    around |= tables.circumstances()
    chosen = args.families or [*FAMILIES, CLIMB]
    runs = [
        (name, d) for name in chosen for d in DTYPES if (name, d) != (CLIMB, DTYPES[1])
    ]
    for name, dtype in tqdm.tqdm(runs, desc="contract"):
        rows = []
        for method in args.methods:
            if name == CLIMB:
                found = [pair for s in climbed for pair in climb(method, s, args.climb)]
            else:
                found = [*family(method, name, dtype, shapes, args.seeds)]
            at, most = max(found, key=lambda pair: used(pair[1], method))
            labels = {"method": method, "family": name, "dtype": dtype}
            labels |= {"matrices": 2 * len(found)} | worst([row for _, row in found])
            rows.append(
                labels | {"worst_at": str(at), "used": used(most, method)} | around
            )
            if wrong := broken(worst([row for _, row in found]), method):
                tqdm.tqdm.write(f"{method}, {name}, {dtype}: {', '.join(wrong)} ({at})")
        tables.write(path, rows, KEY)
    tables.publish(args, contract=markdown(tables.read(path)))


if __name__ == "__main__":
    main()
