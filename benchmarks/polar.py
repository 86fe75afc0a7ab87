"""The error of every method on every matrix: `python -m benchmarks.polar`.

Matrices are built in float64 with a prescribed spectrum, rounded to the dtype that they
are stored in, and compared with the float64 numpy SVD of what is stored, before any
final cast. Writes `results/polar.csv` and the tables of `README.md`. Methods whose rows
are there already are left out (`--again`).
"""

import argparse
import functools
import itertools
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks import tables
from benchmarks.errors import KEPT
from orthax import polar

METHODS = {
    "Auto()": polar.Auto(),
    'Auto("fast")': polar.Auto("fast"),
    "DWH()": polar.DWH(),
    "SVD()": polar.SVD(),
    'SVD(null_space="complete")': polar.SVD(null_space="complete"),
    "QDWH()": polar.QDWH(),
    "GramEigh()": polar.GramEigh(),
    "NewtonSchulz(gram=False)": polar.NewtonSchulz(gram=False),
    "NewtonSchulz(gram=True)": polar.NewtonSchulz(gram=True),
    "NewtonSchulz(tolerance=1e-5)": polar.NewtonSchulz(tolerance=1e-5),
    'NewtonSchulz(dtype="bfloat16")': polar.NewtonSchulz(dtype="bfloat16"),
    "NewtonSchulz(CLASSIC_CUBIC)": polar.NewtonSchulz(polar.CLASSIC_CUBIC),
    "NewtonSchulz(CLASSIC_QUINTIC)": polar.NewtonSchulz(polar.CLASSIC_QUINTIC),
    "NewtonSchulz(DEEPSEEK_V4)": polar.NewtonSchulz(polar.DEEPSEEK_V4),
    "NewtonSchulz(CANS)": polar.NewtonSchulz(polar.CANS),
    "NewtonSchulz(DION)": polar.NewtonSchulz(polar.DION),
    "NewtonSchulz(JORDAN)": polar.NewtonSchulz(polar.JORDAN),
}
DTYPES = ("float32", "bfloat16")
KEY = ("method", "case", "dtype", "platform", "device")

# Relative to the largest singular value: what float32 cannot tell from zero. Rounding a
# matrix of lower rank to float32 leaves singular values below this.
NULL = float(np.finfo(np.float32).eps)


class Case(NamedTuple):
    """A matrix of the set: how it is built, which table shows it.

    The numbers of slow ones are enforced by a slow test.
    """

    build: Callable[[np.random.Generator], np.ndarray]
    kind: str = "full"
    slow: bool = False


def gaussian(
    m: int, n: int, largest: float | None = None, *, slow: bool = False
) -> Case:
    def build(rng: np.random.Generator) -> np.ndarray:
        x = rng.standard_normal((m, n))
        return x if largest is None else x * (largest / np.abs(x).max())

    return Case(build, "square" if m == n else "full", slow)


def spectrum(m: int, n: int, s: np.ndarray, kind: str = "full") -> Case:
    def build(rng: np.random.Generator) -> np.ndarray:
        k = min(m, n)
        u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in (m, n))
        return (u * s) @ v.T

    return Case(build, kind)


def condition(m: int, n: int, kappa: float) -> Case:
    return spectrum(m, n, np.geomspace(1, 1 / kappa, min(m, n)))


def half_rank(m: int, n: int) -> Case:
    k = min(m, n)
    return spectrum(
        m, n, np.r_[np.geomspace(1, 1e-2, k // 2), np.zeros(k // 2)], "null"
    )


def twins(m: int, n: int) -> Case:
    """Every column (row, if wide) twice: of half rank in every dtype."""

    def build(rng: np.random.Generator) -> np.ndarray:
        if m < n:
            return np.repeat(rng.standard_normal((m // 2, n)), 2, axis=0)
        return np.repeat(rng.standard_normal((m, n // 2)), 2, axis=1)

    return Case(build, "null")


def rank_one(m: int, n: int) -> Case:
    """Powers of two, so that no dtype rounds them."""

    def build(rng: np.random.Generator) -> np.ndarray:
        u, v = (
            rng.choice([-1.0, 1.0], side) * 2.0 ** rng.integers(-3, 4, side)
            for side in (m, n)
        )
        return np.outer(u, v)

    return Case(build, "null")


CASES = {
    "tall": gaussian(256, 64),
    "wide": gaussian(64, 256),
    "aspect 16": gaussian(1024, 64, slow=True),
    "aspect 64": gaussian(4096, 64, slow=True),
    "one row": gaussian(1, 64),
    "one column": gaussian(64, 1),
    "max 1e-30": gaussian(256, 64, 1e-30),
    "max 1e37": gaussian(256, 64, 1e37),
    "condition 1e2": condition(256, 64, 1e2),
    "condition 1e4": condition(256, 64, 1e4),
    "condition 1e6": condition(256, 64, 1e6),
    "tall, large": gaussian(1024, 256, slow=True),
    "square": gaussian(64, 64),
    "square, large": gaussian(256, 256, slow=True),
    "half rank": half_rank(256, 64),
    "twin columns": twins(256, 64),
    "twin rows": twins(64, 256),
    "rank one": rank_one(256, 64),
    "zero": Case(lambda rng: np.zeros((256, 64)), "null"),
}
ERRORS = (
    "kept_error",
    "small_min",
    "small_max",
    "coupling",
    "null_norm",
    "relative_error",
)


@functools.cache
def stored(case: str, dtype: str) -> np.ndarray:
    """Return the matrix of a case, rounded to the dtype that it is stored in."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    return np.asarray(CASES[case].build(rng)).astype(jnp.dtype(dtype))


class Reference(NamedTuple):
    """The float64 singular directions of a matrix, those that are not null."""

    u: np.ndarray
    vh: np.ndarray
    kept: np.ndarray
    null: int


def reference(x: np.ndarray) -> Reference:
    """Return the directions of `x`, and which the default method brings to one."""
    x = np.asarray(x, np.float64)
    x = x / (np.abs(x).max() or 1)
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    rank = int(np.sum(s > NULL * s[0]))
    kept = s[:rank] >= KEPT * np.linalg.norm(x)
    return Reference(u[:, :rank], vh[:rank], kept, s.size - rank)


def measure(o: np.ndarray, ref: Reference) -> tables.Row:
    """Compare `o` with the float64 polar factor, direction by direction.

    Every part of `o`, in the singular basis of the reference, counts in one number:

    - `kept_error`: largest `|u_i^T O v_i - 1|` where sigma_i >= 1e-3 ||X||_F;
    - `small_min`, `small_max`: range of `u_i^T O v_i` over the other directions that
      are not null;
    - `coupling`: largest `|u_i^T O v_j|`, i != j, and the largest part of a direction
      that lands in, or comes from, the null space or the complement of the range;
    - `null_norm`: spectral norm of what is left: null directions (sigma_i not above
      eps of float32 times sigma_1) on both sides;
    - `relative_error`: Frobenius error of all but the last, relative to the factor.

    Numbers over no direction at all are None.
    """
    o, u, vh, rank = np.asarray(o, np.float64), ref.u, ref.vh, ref.kept.size
    d = u.T @ o @ vh.T
    left, right = o @ vh.T - u @ d, u.T @ o - d @ vh
    null = o - u @ d @ vh - left @ vh - u @ right
    values = np.diagonal(d)
    small = values[~ref.kept]
    off = np.abs(d - np.diag(values)).ravel()
    leaks = [*np.linalg.norm(left, axis=0), *np.linalg.norm(right, axis=1)]
    wrong = np.hypot.reduce([*map(np.linalg.norm, (d - np.eye(rank), left, right))])
    return {
        "kept": int(ref.kept.sum()),
        "small": small.size,
        "null": ref.null,
        "kept_error": _most(np.abs(values[ref.kept] - 1)),
        "small_min": -_most(-small) if small.size else None,
        "small_max": _most(small),
        "coupling": _most([*off, *leaks]),
        "null_norm": float(np.linalg.norm(null, 2)) if ref.null else None,
        "relative_error": float(wrong) / rank**0.5 if rank else None,
    }


@functools.cache
def _reference(case: str, dtype: str) -> Reference:
    return reference(stored(case, dtype))


def _most(values: Sequence[float]) -> float | None:
    # NaN must come out as NaN, which `max` would lose.
    return float(np.max(values)) if len(values) else None


def errors(
    method: polar.PolarMethod, cases: Sequence[tuple[str, str]]
) -> list[tables.Row]:
    """Return `measure` for pairs of a case and a dtype, in one program.

    Matrices of equal shape are one stack, as they are in an optimiser.
    """
    groups: dict[tuple[int, ...], list[np.ndarray]] = {}
    places = []
    for case, dtype in cases:
        x = stored(case, dtype)
        group = groups.setdefault(x.shape, [])
        places.append((x.shape, len(group)))
        group.append(x.astype(np.float32))
    stacks = {shape: jnp.stack(group) for shape, group in groups.items()}

    @jax.jit
    def factors(stacks: dict) -> dict:
        return {k: polar.polar_factor(x, method) for k, x in stacks.items()}

    out = jax.device_get(factors(stacks))
    return [
        {"rows": shape[0], "columns": shape[1]}
        | measure(out[shape][i], _reference(*case))
        for case, (shape, i) in zip(cases, places, strict=True)
    ]


def milliseconds(method: polar.PolarMethod, x: np.ndarray, calls: int) -> float | None:
    """Return the median time of one call on one matrix, compilation not counted."""
    f = _compiled(method, x.shape)
    x = jnp.asarray(x.astype(np.float32))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        f(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3 if seconds else None


@functools.cache
def _compiled(method: polar.PolarMethod, shape: tuple[int, ...]) -> Callable:
    shapes = jax.ShapeDtypeStruct(shape, "float32")
    f = jax.jit(lambda x: polar.polar_factor(x, method)).lower(shapes).compile()
    f(jnp.ones(shape)).block_until_ready()
    return f


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the tables of one device."""
    parts = []
    for dtype in DTYPES:
        chosen = [row for row in rows if row["dtype"] == dtype]
        title = f"<summary>Input stored in {dtype}, matrix by matrix</summary>"
        parts += [f"#### Input stored in {dtype}", _worst(chosen), "<details>", title]
        for kind, number, title in (
            ("full", "relative_error", "Relative Frobenius error"),
            ("square", "relative_error", "The same, square matrices"),
            ("null", "null_norm", "Largest singular value in the null space"),
        ):
            parts += [f"{title}:", _wide(chosen, kind, number)]
        parts.append("</details>")
    return "\n\n".join(parts)


def _worst(rows: list[dict[str, str]]) -> str:
    names = [name for name in ERRORS if name != "relative_error"]

    def worst(method: str, name: str) -> str:
        values = [row[name] for row in rows if row["method"] == method and row[name]]
        if not values:
            return ""
        most = np.min if name == "small_min" else np.max  # which keep NaN
        worst = most([float(value) for value in values])
        # Near one, 1.001 would matter.
        return f"{worst:.4f}" if name == "small_max" else f"{worst:.1e}"

    body = [[f"`{m}`", *(worst(m, name) for name in names)] for m in METHODS]
    table = tables.markdown(["method", *(f"`{name}`" for name in names)], body)
    return f"Per singular direction, the worst of all matrices:\n\n{table}"


def _wide(rows: list[dict[str, str]], kind: str, number: str) -> str:
    cases = [case for case in CASES if CASES[case].kind == kind]
    found = {(row["method"], row["case"]): row[number] for row in rows}

    def cell(method: str, case: str) -> str:
        value = found.get((method, case), "")
        return f"{float(value):.1e}" if value else ""

    body = [[f"`{m}`", *(cell(m, case) for case in cases)] for m in METHODS]
    return tables.markdown(["method", *cases], body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--calls", type=int, default=5, help="timed calls per matrix")
    parser.add_argument("--again", action="store_true", help="also what is there")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    path, around = args.results / "polar.csv", tables.circumstances()
    pairs = [(case, dtype) for case in args.cases for dtype in DTYPES]
    missing = tables.missing(
        path,
        KEY,
        itertools.product(args.methods, args.cases, DTYPES),
        again=args.again,
    )
    for name in tqdm.tqdm(dict.fromkeys(name for name, *_ in missing), desc="polar"):
        rows = []
        found = errors(METHODS[name], pairs)
        for (case, dtype), numbers in zip(pairs, found, strict=True):
            spent = milliseconds(METHODS[name], stored(case, dtype), args.calls)
            labels = {"method": name, "case": case, "dtype": dtype}
            rows.append(labels | numbers | {"median_ms": spent} | around)
        tables.write(path, rows, KEY)
    tables.publish(args, polar=tables.by_device(tables.read(path), markdown))


if __name__ == "__main__":
    main()
