"""One whole update of a network's gradients: `python -m benchmarks.step`.

Every method is compiled once and then called in turn with the others, in a new order
every round, so that whatever else the machine does falls on all of them; ratios are
taken inside a round. Writes `results/step.csv` and the table of `README.md`.
"""

import argparse
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import orthax
from benchmarks import tables, trees
from orthax import components, polar

KEY = ("tree", "method", "platform", "device", "lapack_threads")
OPTAX = "optax.contrib.scale_by_muon()"
PER_LEAF = "jnp.linalg.svd per leaf"
# Calls longer than this are made in the first rounds only.
_SLOW_SECONDS = 0.5


class Entry(NamedTuple):
    """What is timed, and the method whose operations it performs."""

    transform: optax.GradientTransformation
    method: polar.PolarMethod | None


class Timing(NamedTuple):
    """What was measured of one entry."""

    compile_seconds: float
    temporary_bytes: int | None
    seconds: dict[int, float]
    updates: Any


def _orthogonalise(method: polar.PolarMethod) -> Entry:
    return Entry(orthax.orthogonalise(method), method)


def _svd_per_leaf() -> optax.GradientTransformation:
    def orthogonal(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        matrix = x.reshape(-1, x.shape[-1])
        u, _, vh = jnp.linalg.svd(matrix, full_matrices=False)
        return (u @ vh).reshape(x.shape)

    return optax.stateless(lambda updates, _: jax.tree.map(orthogonal, updates))


def _optax_muon() -> optax.GradientTransformation:
    """Return optax's Muon with every kernel cut as we cut it, vectors left alone."""

    def dimension_numbers(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(
                tuple(range(x.ndim - 1)), (x.ndim - 1,)
            ),
            tree,
        )

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=dimension_numbers)
    return optax.masked(muon, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))


def _with_momentum() -> optax.GradientTransformation:
    momentum = orthax.transforms.nesterov_ema(0.95)
    return optax.chain(momentum, orthax.orthogonalise())


ENTRIES: dict[str, Callable[[], Entry]] = {
    "identity": lambda: Entry(optax.identity(), None),
    "orthogonalise()": lambda: _orthogonalise(polar.Auto()),
    'orthogonalise(Auto("fast"))': lambda: _orthogonalise(polar.Auto("fast")),
    "orthogonalise(GramEigh())": lambda: _orthogonalise(polar.GramEigh()),
    "orthogonalise(SVD())": lambda: _orthogonalise(polar.SVD()),
    "nesterov_ema(), orthogonalise()": lambda: Entry(_with_momentum(), polar.Auto()),
    OPTAX: lambda: Entry(_optax_muon(), polar.NewtonSchulz(polar.JORDAN, gram=False)),
    PER_LEAF: lambda: Entry(_svd_per_leaf(), polar.SVD()),
}


def measure(
    tree: Any, names: Sequence[str], rounds: int, slow_rounds: int
) -> dict[str, Timing]:
    """Return what every entry took, and gave, on Gaussian gradients of a tree."""
    grads = trees.gaussian(tree)
    calls, found = {}, {}
    for name in names:
        transform = ENTRIES[name]().transform
        state = transform.init(grads)
        start = time.perf_counter()
        # Bound early: `transform` is another one in the next turn of the loop.
        f = jax.jit(lambda g, s, t=transform: t.update(g, s, g)[0])
        compiled = f.lower(grads, state).compile()
        spent = time.perf_counter() - start
        updates = jax.block_until_ready(compiled(grads, state))
        calls[name] = (compiled, state)
        memory = compiled.memory_analysis()
        temporary = memory.temp_size_in_bytes if memory else None
        found[name] = Timing(spent, temporary, {}, updates)
    shuffle = random.Random(0).shuffle
    for turn in range(rounds):
        order = list(names)
        shuffle(order)
        for name in order:
            seconds = found[name].seconds
            if turn >= max(slow_rounds, 1) and min(seconds.values()) > _SLOW_SECONDS:
                continue
            compiled, state = calls[name]
            start = time.perf_counter()
            jax.block_until_ready(compiled(grads, state))
            seconds[turn] = time.perf_counter() - start
    return found


def rows(tree: Any, found: dict[str, Timing]) -> list[tables.Row]:
    """Return one row for every entry."""
    worst = _errors(tree, {name: timing.updates for name, timing in found.items()})
    out = []
    for name, (compiling, temporary, seconds, _) in found.items():
        flops = _flops(tree, ENTRIES[name]().method)
        low, median, high = _quartiles(seconds.values())
        row = {
            "median_ms": median * 1e3,
            "quartile1_ms": low * 1e3,
            "quartile3_ms": high * 1e3,
            "calls": len(seconds),
            "speed_over_optax": _ratio(found, OPTAX, name),
            "speed_over_svd": _ratio(found, PER_LEAF, name),
            "compile_s": compiling,
            "temporary_mib": None if temporary is None else temporary / 2**20,
            "gflop": flops / 1e9,
            "gflop_per_s": flops / 1e9 / median,
            "worst_error": worst[name],
        }
        out.append({"method": name} | row)
    return out


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = np.quantile([*values], (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def _ratio(found: dict[str, Timing], other: str, name: str) -> float | None:
    """Return the median, over common rounds, of how much longer `other` took."""
    if other not in found:
        return None
    ours, theirs = found[name].seconds, found[other].seconds
    return statistics.median(theirs[i] / ours[i] for i in ours.keys() & theirs.keys())


def _flops(tree: Any, method: polar.PolarMethod | None) -> float:
    leaves = components.resolve(tree, components.ByName()) if method else []
    return sum(
        float(b * method.flops(m, n))
        for leaf in leaves
        if leaf.cut
        for b, m, n in leaf.cut.matrices(leaf.value.shape)
    )


def _errors(tree: Any, updates: dict[str, Any]) -> dict[str, float]:
    """Return the worst relative Frobenius error of each tree of updates, in float64.

    Square matrices are left out: their smallest singular values decide alone.
    """
    worst = dict.fromkeys(updates, 0.0)
    kernels = {name: jax.tree.leaves(found) for name, found in updates.items()}
    for i, grad in enumerate(jax.tree.leaves(trees.gaussian(tree))):
        if grad.ndim < 2:
            continue
        x = np.asarray(grad, np.float64).reshape(-1, grad.shape[-1])
        if x.shape[0] == x.shape[1]:
            continue
        u, _, vh = np.linalg.svd(x, full_matrices=False)
        for name, leaves in kernels.items():
            o = np.asarray(leaves[i], np.float64).reshape(x.shape)
            error = np.linalg.norm(o - u @ vh) / min(x.shape) ** 0.5
            worst[name] = max(worst[name], float(error))
    return worst


def markdown(found: list[dict[str, str]]) -> str:
    """Return the tables of one device."""
    parts = []
    for tree in dict.fromkeys(row["tree"] for row in found):
        chosen = [row for row in found if row["tree"] == tree]
        loads = {row["load"] for row in chosen}
        header = ["update", "median ms (quartiles)", "calls", "x optax", "x SVD"]
        header += ["compile s", "temporary MiB", "GFLOP/s", "worst error"]
        body = [_cells(row) for row in chosen]
        parts.append(f"#### {tree}, load before the run {', '.join(sorted(loads))}")
        parts.append(tables.markdown(header, body))
    return "\n\n".join(parts)


def _cells(row: dict[str, str]) -> list[str]:
    def number(name: str, form: str) -> str:
        return format(float(row[name]), form) if row[name] else ""

    times = [number(f"{part}_ms", ".4g") for part in ("quartile1", "quartile3")]
    return [
        f"`{row['method']}`",
        f"{number('median_ms', '.4g')} ({', '.join(times)})",
        row["calls"],
        number("speed_over_optax", ".2f"),
        number("speed_over_svd", ".2f"),
        number("compile_s", ".2f"),
        number("temporary_mib", ".1f"),
        number("gflop_per_s", ".0f"),
        number("worst_error", ".1e"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trees", nargs="+", choices=trees.TREES, default=list(trees.TREES)
    )
    parser.add_argument("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--rounds", type=int, default=21, help="calls of fast methods")
    parser.add_argument(
        "--slow-rounds", type=int, default=7, help="calls of those over 0.5 s"
    )
    parser.add_argument("--results", type=pathlib.Path, default=tables.RESULTS)
    parser.add_argument("--readme", type=pathlib.Path, default=tables.README)
    args = parser.parse_args(argv)
    path = args.results / "step.csv"
    for name in args.trees:
        around = tables.circumstances()
        tree = trees.TREES[name]()
        found = measure(tree, args.methods, args.rounds, args.slow_rounds)
        new = [{"tree": name} | row | around for row in rows(tree, found)]
        tables.write(path, new, KEY)
        for row in new:
            print(name, row["method"], f"{row['median_ms']:.1f} ms")
    text = tables.by_device(tables.read(path), markdown)
    args.readme.write_text(tables.put(text, "step", args.readme.read_text()))


if __name__ == "__main__":
    main()
