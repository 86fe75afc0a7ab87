"""What whole updates cost by the compilers' word: `python -m benchmarks.compiled`.

The compilers of TPUs and of GPUs compile ahead of time for a chip that is described to
them: nothing here needs a device, and nothing is a measurement on one. Every update is
compiled in a process of its own, one after another, so that neither the time of another
compilation nor an abort of the compiler falls on it. Writes `results/compiled.csv` row
by row; rows that are there already are left out (`--again`).

Both compilers come with `pip install -e ".[compilers]"` and can share an environment;
`--chips` chooses rows where there is only one of them.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import tqdm

from benchmarks import layouts, tables, trees
from benchmarks.aot import ARMS, MACHINES, Case, Machine, measured

KEY = ("chip", "layout", "tree", "arm")
REFERENCE = "optax"
AXES = {
    "explicit": "explicit axes",
    "given": "automatic axes, shardings given",
    "automatic": "automatic axes",
}
# The smallest first.
TREES: dict[str, Callable[[], trees.Network]] = {
    **{
        name: trees.NETWORKS[name]
        for name in ("resnet20", "vit_ti16", "resnet18", "resnet50", "vit_b16")
    },
    **{name: layouts.NETWORKS[name] for name in ("moe32", "gpt2_small_scanned")},
    "gpt2_small": trees.NETWORKS["gpt2_small"],
}


# -------------------------------------------------------------------- the two compilers


class Compiler(NamedTuple):
    """Where a compiler is found, and what says its version."""

    modules: tuple[str, ...]
    distribution: str


COMPILERS = {
    "tpu": Compiler(("libtpu",), "libtpu"),
    "cuda": Compiler(
        ("jax_plugins.xla_cuda12", "jax_cuda12_plugin"), "jax-cuda12-plugin"
    ),
}
# Of the child's environment: no device is looked for, libtpu takes the machine for one
# with chips, another process may have loaded it, and the plugin does without CUDA's own
# libraries. They go before what is set already, because where libtpu is installed,
# importing JAX here sets some of them to a warning.
VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


def missing(platform: str) -> str | None:
    """Return what to do where the compiler of a platform is not installed."""
    compiler = COMPILERS[platform]
    if all(map(_there, compiler.modules)):
        return None
    chips = ", ".join(name for name, x in MACHINES.items() if x.platform == platform)
    return (
        f"The compiler for {chips} is not installed: run `pip install -e "
        f'".[compilers]"`, or leave these out with --chips.'
    )


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


# ------------------------------------------------------------------- one row, one child


def row(case: Case, limit: float) -> tables.Row:
    """Return what a child process finds out about a case, or why it found nothing."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", "--child", *case, str(limit)],
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode == -signal.SIGALRM:
        return {"note": f"did not finish in {limit:g} s"}
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["nothing said"])[-1]
        ended = f"ended with status {child.returncode}"
        return {"note": f"the compiler {ended}: {last[:200]}"}
    return json.loads(child.stdout.splitlines()[-1])


def in_child(arguments: Sequence[str]) -> None:
    """Print the row of a case, as JSON."""
    case, limit = Case(*arguments[:-1]), float(arguments[-1])
    try:
        found = measured(case, TREES[case.tree](), limit)
    except Exception as error:
        # Its first line: those behind it name files of this machine.
        said = (str(error).splitlines() or [""])[0]
        found = {"note": f"raises {type(error).__name__}: {said[:200]}"}
    print(json.dumps(found))


def circumstances(machine: Machine) -> tables.Row:
    """Return what every row carries: cores and load here, versions, the commit."""
    names = ("cpus", "load", "jax", "jaxlib", "optax", "orthax", "commit")
    around = tables.circumstances()
    distribution = COMPILERS[machine.platform].distribution
    version = importlib.metadata.version(distribution)
    return {name: around[name] for name in names} | {
        "compiler": f"{distribution} {version}"
    }


# ------------------------------------------------------------------------ what is shown


def report(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables of every machine and layout, folded."""
    if not rows:
        return "Not yet run: `python -m benchmarks.compiled`."
    versions = [
        f"{name} {', '.join(dict.fromkeys(row[name] for row in rows))}"
        for name in ("jax", "optax", "compiler", "commit")
    ]
    parts = [
        "These numbers are the compiler's word, not a measurement on a device: "
        + "; ".join(versions)
        + ". Cycles are those that the TPU compiler writes beside its instructions; a "
        "GPU's time is a model (`costs.H100`). Seconds to compile are of a machine of "
        f"{_range(rows, 'cpus')} cores under a load of {_range(rows, 'load')}."
    ]
    for name, machine in MACHINES.items():
        for layout in machine.layouts:
            chosen = [r for r in rows if (r["chip"], r["layout"]) == (name, layout)]
            if chosen:
                axes = f", {AXES[layout]}" if machine.count > 1 else ""
                parts += [
                    "<details>",
                    f"<summary>{machine.title}{axes}: the compiler's word</summary>",
                    _table(chosen, machine),
                    "</details>",
                ]
    return "\n\n".join(parts)


def _range(rows: Sequence[dict[str, str]], name: str) -> str:
    found = sorted({float(row[name]) for row in rows})
    ends = f"{found[0]:g} to {found[-1]:g}"
    return ends if len(found) > 1 else f"{found[0]:g}"


def _table(rows: Sequence[dict[str, str]], machine: Machine) -> str:
    tpu = machine.platform == "tpu"
    header = ["gradients of", "update", "compile s (lower)", f"/ {REFERENCE}"]
    header += ["thousand cycles" if tpu else "ms by model", f"/ {REFERENCE}"]
    header += ["code MiB" if tpu else "kernels launched", "temporary MiB"]
    header += ["collectives"] * (machine.count > 1) + ["large products"]
    body = (_cells(each, rows, machine) for each in sorted(rows, key=_place))
    return tables.markdown(header, body)


def _place(row: dict[str, str]) -> tuple[int, int]:
    return list(TREES).index(row["tree"]), list(ARMS).index(row["arm"])


def _cells(
    row: dict[str, str], rows: Sequence[dict[str, str]], machine: Machine
) -> Iterator[str]:
    tpu, several = machine.platform == "tpu", machine.count > 1
    yield row["tree"]
    yield f"`{row['arm']}`"
    if row.get("note"):
        yield row["note"].split(":")[0]
        yield from [""] * (6 + several)
        return
    cost = "cycles" if tpu else "model_ms"
    scale, form = (1e-3, ",.0f") if tpu else (1, ".3g")
    yield f"{float(row['compile_s']):.1f} ({float(row['lower_s']):.1f})"
    yield _ratio(row, rows, "compile_s")
    yield format(float(row[cost]) * scale, form) + _open(row)
    yield _ratio(row, rows, cost)
    yield (_mib(row["code_bytes"]) if tpu else f"{int(row['kernels']):,}")
    yield _mib(row["temporary_bytes"])
    if several:
        yield row["collectives"]
    yield row["products"]


def _open(row: dict[str, str]) -> str:
    loops = int(row["endless_loops"])
    return f" (+ {loops} loops of unknown length)" if loops else ""


def _mib(size: str) -> str:
    return f"{float(size) / 2**20:.1f}"


def _ratio(row: dict[str, str], rows: Sequence[dict[str, str]], name: str) -> str:
    """Return a number over that of the reference with the same tree."""
    theirs = [r for r in rows if (r["tree"], r["arm"]) == (row["tree"], REFERENCE)]
    if not theirs or not theirs[0].get(name) or not float(theirs[0][name]):
        return ""
    return f"{float(row[name]) / float(theirs[0][name]):.2f}"


# --------------------------------------------------------------------------- the script


def cases(args: argparse.Namespace) -> list[Case]:
    """Return what is missing of what is asked for."""
    asked = [
        Case(chip, layout, tree, arm)
        for chip in args.chips
        for layout in MACHINES[chip].layouts
        for tree in args.trees
        for arm in args.arms
    ]
    path = args.results / _FILE
    return tables.missing(path, KEY, asked, Case._asdict, again=args.again)


_FILE = "compiled.csv"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, known in {"chips": MACHINES, "trees": TREES, "arms": ARMS}.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), metavar=name
        )
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds for one compilation"
    )
    parser.add_argument("--again", action="store_true", help="also what is there")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    if args.limit <= 0:
        parser.error(f"--limit must be positive seconds, found {args.limit:g}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        in_child(argv[1:])
        return
    args = parsed(argv)
    jax.config.update("jax_platforms", "cpu")
    wanted = {MACHINES[name].platform for name in args.chips}
    if told := [sentence for sentence in map(missing, sorted(wanted)) if sentence]:
        raise SystemExit("\n".join(told))
    path = args.results / _FILE
    for case in tqdm.tqdm(cases(args), desc="compiled"):
        found = row(case, args.limit)
        around = circumstances(MACHINES[case.chip])
        tables.write(path, [case._asdict() | {"note": None} | found | around], KEY)
        told = found.get("note") or f"compiled in {found['compile_s']:.1f} s"
        tqdm.tqdm.write(f"{', '.join(case)}: {told}")
    text = report(tables.read(path))
    print(text)
    tables.publish(args, compiled=text)


if __name__ == "__main__":
    main()
