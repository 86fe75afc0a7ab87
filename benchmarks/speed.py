"""The time of single stacks, method by shape by batch: `python -m benchmarks.speed`.

Writes `results/speed.csv`, row by row, and the tables of `README.md`. Rows that are
there already are left out (`--again`), so that a run can be stopped and continued.
"""

import argparse
import functools
import inspect
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks import errors, gemm, tables, timing
from orthax import polar

KEY = ("method", "rows", "columns", "batch", "dtype", *tables.DEVICE)


def _methods() -> dict[str, polar.PolarMethod]:
    """Return the methods by name, with all that the library exports among them."""
    chosen = {
        "Auto()": polar.Auto(),
        'Auto("fast")': polar.Auto("fast"),
        "NewtonSchulz(gram=False)": polar.NewtonSchulz(gram=False),
        "NewtonSchulz(gram=True)": polar.NewtonSchulz(gram=True),
        'NewtonSchulz(dtype="bfloat16")': polar.NewtonSchulz(dtype="bfloat16"),
    }
    kinds = {type(method) for method in chosen.values()}
    for name, kind in inspect.getmembers(polar, inspect.isclass):
        if hasattr(kind, "factor") and kind not in {*kinds, polar.PolarMethod}:
            chosen[f"{name}()"] = kind()
    return chosen


METHODS = _methods()
SIDES = (16, 32, 64, 128, 192, 256, 512, 768, 1024)
ASPECTS = (1, 1.5, 2, 4, 9)
BATCHES = (1, 8, 32)
# What is measured unless more is asked for: minutes on two cores.
_SIDES, _ASPECTS, _BATCHES = (16, 64, 128, 256, 512), (1, 2, 4, 9), (8,)
_LARGE_SIDES, _LARGE_ASPECTS = (1024, 2048, 4096), (1, 4)


class Stack(NamedTuple):
    """A stack of tall matrices, and the dtype that it is stored in."""

    side: int
    aspect: float
    batch: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, rows, columns."""
        return self.batch, round(self.side * self.aspect), self.side


@functools.lru_cache(maxsize=1)
def _stored(stack: Stack) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(stack.shape, np.float32), stack.dtype)


@functools.lru_cache(maxsize=1)
def _directions(stack: Stack) -> errors.Directions:
    return errors.directions(np.asarray(_stored(stack)[0], np.float64))


def labels(name: str, stack: Stack) -> tables.Row:
    """Return what tells a row from others on its device."""
    batch, rows, columns = stack.shape
    shape = {"rows": rows, "columns": columns, "batch": batch}
    return {"method": name} | shape | {"dtype": stack.dtype}


class Limits(NamedTuple):
    """How many calls, for how many seconds."""

    rounds: int
    patience: float


def measure(name: str, stack: Stack, limits: Limits) -> tables.Row:
    """Return what a method took for a stack, and the error of its first matrix."""
    method, x = METHODS[name], _stored(stack)
    start = time.perf_counter()
    lowered = jax.jit(lambda x: polar.polar_factor(x, method)).lower(x)
    program = lowered.compile()
    compiling = time.perf_counter() - start
    o = np.asarray(program(x)[0], np.float64)
    seconds = _seconds(program, x, limits)
    low, median, high = timing.quartiles(seconds)
    batch, m, n = stack.shape
    products = gemm.inputs_of_products(lowered.as_text())
    flops, peak = batch * float(method.flops(m, n)), gemm.peak(products)
    return labels(name, stack) | {
        "products": products,
        "median_ms": median * 1e3,
        "quartile1_ms": low * 1e3,
        "quartile3_ms": high * 1e3,
        "calls": len(seconds),
        "compile_s": compiling,
        "gflop": flops / 1e9,
        "gflop_per_s": flops / 1e9 / median,
        "peak_gflop_per_s": peak / 1e9,
        "fraction_of_peak": flops / median / peak,
        "error": errors.relative(o, _directions(stack)),
        "kept_error": errors.kept(o, _directions(stack)),
    }


def _seconds(program: Any, x: jax.Array, limits: Limits) -> list[float]:
    """Call until there are enough calls or no patience is left, at least once."""
    seconds: list[float] = []
    while not seconds or (
        len(seconds) < limits.rounds and sum(seconds) < limits.patience
    ):
        start = time.perf_counter()
        program(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return seconds


def selection(args: argparse.Namespace) -> Iterator[tuple[str, Stack]]:
    """Yield every method and stack that is asked for, and not too much work."""
    sizes = itertools.product(args.sides, args.aspects, args.batches, args.dtypes)
    for stack in itertools.starmap(Stack, sizes):
        batch, m, n = stack.shape
        for name in args.methods:
            if batch * METHODS[name].flops(m, n) <= args.most_gflop * 1e9:
                yield name, stack


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the tables of one device, folded: one for each batch and dtype."""
    parts = []
    for case in dict.fromkeys((row["batch"], row["dtype"]) for row in rows):
        chosen = [row for row in rows if (row["batch"], row["dtype"]) == case]
        chosen.sort(key=lambda row: (int(row["columns"]), int(row["rows"])))
        shapes = dict.fromkeys((row["rows"], row["columns"]) for row in chosen)
        found = {(r["method"], r["rows"], r["columns"]): r for r in chosen}
        names = [n for n in METHODS if any(row["method"] == n for row in chosen)]
        body = [
            [f"{m} x {n}", *(_cell(found.get((name, m, n))) for name in names)]
            for m, n in shapes
        ]
        header = ["shape", *(f"`{name}`" for name in names)]
        title = f"batch {case[0]}, stored in {case[1]}: ms (of the GEMM peak; error)"
        parts += ["<details>", f"<summary>{title}</summary>"]
        parts += [tables.markdown(header, body), "</details>"]
    return "\n\n".join(parts)


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    time, of_peak, error = (
        tables.cell(row, name, form)
        for name, form in (
            ("median_ms", ".3g"),
            ("fraction_of_peak", ".0%"),
            ("error", ".0e"),
        )
    )
    return f"{time} ({of_peak}; {error})"


def report(rows: list[dict[str, str]]) -> str:
    """Return the tables of every device, and what no GPU has been asked yet."""
    parts = [tables.by_device(rows, markdown)] if rows else []
    if not any(row["platform"] == "gpu" for row in rows):
        parts.append(
            "### gpu\n\nNot yet run: `python -m benchmarks.speed` and "
            "`python -m benchmarks.speed --large` fill this."
        )
    return "\n\n".join(parts)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS)
    add("--sides", nargs="+", type=int, help="short sides m")
    add("--aspects", nargs="+", type=float, help="long side over m")
    add("--batches", nargs="+", type=int)
    add("--dtypes", nargs="+", help="what the stack is stored in; default float32")
    add("--full", action="store_true", help=f"m of {SIDES}, all aspects and batches")
    add("--large", action="store_true", help=f"m of {_LARGE_SIDES}, for GPUs: bfloat16")
    add("--most-gflop", type=float, help="of a stack; more is left out")
    add("--rounds", type=int, default=21, help="calls of fast methods")
    add("--patience", type=float, default=1.0, help="seconds for the calls of a row")
    add("--again", action="store_true", help="measure what is there already, too")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    defaults = {
        "methods": list(METHODS),
        "sides": _SIDES,
        "aspects": _ASPECTS,
        "batches": _BATCHES,
        "dtypes": ("float32",),
        "most_gflop": 60.0 if jax.default_backend() == "cpu" else 1e5,
    }
    if args.full:
        defaults |= {"sides": SIDES, "aspects": ASPECTS, "batches": BATCHES}
    if args.large:
        defaults |= {"sides": _LARGE_SIDES, "aspects": _LARGE_ASPECTS}
        defaults |= {"dtypes": ("bfloat16", "float32"), "most_gflop": 1e5}
        defaults["methods"] = ["Auto()", 'Auto("fast")', *_products(METHODS)]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _products(methods: dict[str, polar.PolarMethod]) -> list[str]:
    """Return the names of those that consist of matrix products only."""
    return [n for n, m in methods.items() if isinstance(m, polar.NewtonSchulz)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    path, around = args.results / "speed.csv", tables.circumstances()
    cells = tables.missing(
        path, KEY, selection(args), lambda x: labels(*x), again=args.again
    )
    limits = Limits(args.rounds, args.patience)
    for name, stack in tqdm.tqdm(cells, desc="speed"):
        tables.write(path, [measure(name, stack, limits) | around], KEY)
    publish(args)


def publish(args: argparse.Namespace) -> None:
    """Write the tables of what has been measured."""
    text = report(tables.read(args.results / "speed.csv"))
    tables.publish(args, speed=text)


if __name__ == "__main__":
    main()
