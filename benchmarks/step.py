"""One whole update of a network's gradients: `python -m benchmarks.step`.

Every method is compiled once and then called in turn with the others, in a new order
every round; ratios are taken inside a round. Writes `results/step.csv` and the tables
of `README.md`. Networks whose rows are there already are left out (`--again`).
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import tqdm

from benchmarks import gemm, peers, summary, tables, timing, trees
from benchmarks.updates import (
    ENTRIES,
    KINDS,
    METHODS,
    Limits,
    Measured,
    Program,
    compiled,
    measure,
)
from orthax import components, polar

KEY = ("tree", "gradients", "method", *tables.DEVICE)
OPTAX, PER_LEAF = peers.OPTAX, peers.SVD_PER_LEAF


def rows(
    network: trees.Network,
    programs: Mapping[str, Program],
    found: Mapping[str, Measured],
) -> Iterator[tables.Row]:
    """Yield one row for every entry that was called."""
    leaves = [x for x in components.resolve(network.params, network.rule) if x.cut]
    matrices = sum(leaf.value.size * leaf.value.dtype.itemsize for leaf in leaves)
    for name, measured in found.items():
        program = programs.get(name)
        low, median, high = timing.quartiles(measured.seconds.values())
        row = {
            "method": name,
            "median_ms": median * 1e3,
            "quartile1_ms": low * 1e3,
            "quartile3_ms": high * 1e3,
            "calls": len(measured.seconds),
            "speed_over_optax": _ratio(found, OPTAX, name),
            "speed_over_svd": _ratio(found, PER_LEAF, name),
        }
        row |= measured.errors
        method = ENTRIES[name].method if name in ENTRIES else ENTRIES[OPTAX].method
        row |= _rates(leaves, method, median, program)
        yield row | _memory(program, programs, matrices)


def _rates(
    leaves: Sequence[components.Leaf],
    method: polar.PolarMethod | None,
    seconds: float,
    program: Program | None,
) -> tables.Row:
    """Return the operations of a method by its own count, and how fast they were."""
    flops = sum(
        float(b * method.flops(m, n))
        for leaf in leaves
        for b, m, n in (leaf.cut.matrices(leaf.value.shape) if method else ())
    )
    row = {"gflop": flops / 1e9, "gflop_per_s": flops / 1e9 / seconds}
    if program is None:
        return row
    peak = gemm.peak(program.numbers["products"])
    fraction = flops / seconds / peak
    return row | {"peak_gflop_per_s": peak / 1e9, "fraction_of_peak": fraction}


def _memory(
    program: Program | None, programs: Mapping[str, Program], matrices: int
) -> tables.Row:
    """Return the time to compile, and the memory needed besides the gradients."""
    if program is None:
        return {}
    row = dict(program.numbers)
    if OPTAX in programs:
        theirs = programs[OPTAX].numbers
        stages = ("trace_s", "lower_s", "compile_s")
        row["compile_over_optax"] = row["compile_s"] / theirs["compile_s"]
        row["start_over_optax"] = sum(row[stage] for stage in stages) / sum(
            theirs[stage] for stage in stages
        )
    if program.temporary_bytes is not None:
        row["temporary_mib"] = program.temporary_bytes / 2**20
        row["temporary_over_matrices"] = program.temporary_bytes / matrices
    return row


def _ratio(found: Mapping[str, Measured], other: str, name: str) -> float | None:
    """Return the median, over common rounds, of how much longer `other` took."""
    if other not in found:
        return None
    return timing.ratio(found[other].seconds, found[name].seconds)


def markdown(found: list[dict[str, str]]) -> str:
    """Return the tables of one device, folded."""
    parts = []
    cases = dict.fromkeys((row["tree"], row.get("gradients", "")) for row in found)
    for tree, kind in cases:
        case = (tree, kind)
        chosen = [r for r in found if (r["tree"], r.get("gradients", "")) == case]
        loads = ", ".join(sorted({row["load"] for row in chosen}))
        compared = ", ".join(
            {row["checked"]: 0 for row in chosen if row.get("checked")}
        )
        title = f"{tree}, {kind or 'gaussian'} gradients; load before the run {loads}"
        if compared:
            title += f"; errors of {compared} matrices"
        parts += [
            "<details>",
            f"<summary>{title}</summary>",
            _table(chosen),
            "</details>",
        ]
    return "\n\n".join(parts)


def _table(chosen: list[dict[str, str]]) -> str:
    header = ["update", "median ms (quartiles)", "calls", "x optax", "x SVD"]
    header += ["trace s", "compile s", "temporary MiB (/ matrices)", "GFLOP"]
    header += ["GFLOP/s (/ GEMM)", "error", "error, square", "error, kept"]
    return tables.markdown(header, [_cells(row) for row in chosen])


def _cells(row: dict[str, str]) -> list[str]:
    number = functools.partial(tables.cell, row)
    if row.get("note"):
        return [f"`{row['method']}`", row["note"], *[""] * 11]
    times = [number(f"{part}_ms", ".4g") for part in ("quartile1", "quartile3")]
    return [
        f"`{row['method']}`",
        f"{number('median_ms', '.4g')} ({', '.join(times)})",
        row["calls"],
        number("speed_over_optax", ".2f"),
        number("speed_over_svd", ".2f"),
        number("trace_s", ".2f"),
        number("compile_s", ".2f"),
        _both(number("temporary_mib", ".1f"), number("temporary_over_matrices", ".2f")),
        number("gflop", ".3g"),
        _both(number("gflop_per_s", ".0f"), number("fraction_of_peak", ".2f")),
        number("worst_error", ".1e"),
        number("worst_error_square", ".1e"),
        number("worst_kept_error", ".1e"),
    ]


def _both(one: str, other: str) -> str:
    return f"{one} ({other})" if other else one


def run(tree: str, kinds: Sequence[str], args: argparse.Namespace) -> None:
    """Measure one network with some kinds of gradients, and write its rows."""
    path, around = args.results / "step.csv", tables.circumstances()
    network = trees.NETWORKS[tree]()
    limits = Limits(args.rounds, args.slow_rounds, args.patience, args.most_gib)
    programs, notes = {}, {}
    names = [name for name in args.methods if name in ENTRIES]
    for name in tqdm.tqdm(names, desc=f"{tree}: compiling"):
        program = compiled(ENTRIES[name], network)
        gib = (program.temporary_bytes or 0) / 2**30
        if gib > limits.most_gib:
            notes[name] = f"not called: needs {gib:.1f} GiB of temporary memory"
        else:
            programs[name] = program
    for kind in kinds:
        labels = {"tree": tree, "gradients": kind}
        grads = KINDS[kind](network)
        found, checked = measure(network, grads, programs, limits, args.torch)
        new = [labels | row for row in rows(network, programs, found)]
        new += [labels | {"method": name, "note": note} for name, note in notes.items()]
        new = [{**row, "checked": checked, "note": row.get("note")} for row in new]
        around["torch"] = args.torch_version
        new = [row | around for row in new]
        tables.write(path, new, KEY)
        for row in new:
            spent = row.get("note") or f"{row['median_ms']:.4g} ms"
            tqdm.tqdm.write(f"{tree}, {kind}: {row['method']}: {spent}")


def missing(tree: str, args: argparse.Namespace) -> list[str]:
    """Return the kinds of gradients of which a row is missing."""
    names = [n for n in args.methods if n in ENTRIES or args.torch]
    rows = tables.missing(
        args.results / "step.csv",
        KEY,
        itertools.product((tree,), args.gradients, names),
        again=args.again,
    )
    return [*dict.fromkeys(kind for _, kind, _ in rows)]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--trees", nargs="+", choices=trees.NETWORKS, default=list(trees.NETWORKS))
    add("--gradients", nargs="+", choices=KINDS, default=list(KINDS))
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--rounds", type=int, default=21, help="calls of fast methods")
    add("--slow-rounds", type=int, default=7, help="calls of those over 0.5 s")
    add("--patience", type=float, default=40.0, help="seconds for one method's calls")
    add("--most-gib", type=float, default=8.0, help="temporary memory of one method")
    add("--again", action="store_true", help="measure what is there already, too")
    add("--torch-python", default=sys.executable, help="interpreter that has torch")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    args.torch = args.torch_version = None
    if peers.TORCH in args.methods and jax.default_backend() == "cpu":
        args.torch_version = peers.find_torch(args.torch_python)
        args.torch = args.torch_python if args.torch_version else None
        told = args.torch_version or "not there, its rows are left out"
        tqdm.tqdm.write(f"torch: {told}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    for tree in args.trees:
        kinds = missing(tree, args)
        if kinds:
            run(tree, kinds, args)
    publish(args)


def publish(args: argparse.Namespace) -> None:
    """Write the tables of what has been measured."""
    found = tables.read(args.results / "step.csv")
    text = tables.by_device(found, markdown)
    tables.publish(args, step=text, summary=summary.markdown(args.results))


if __name__ == "__main__":
    main()
