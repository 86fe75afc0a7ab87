"""One whole step of training: `python -m benchmarks.training`.

Forward, loss, backward and update of a network (`trainers.py`), and what an optimiser
costs beyond SGD with momentum: the median, over rounds, of the ratio inside a round.
Writes `results/training.csv` and the table of `README.md`.

A call makes several steps in a row. What a step leaves behind - threads that spin, work
that the host has yet to send - slows down its own successor, as it does in training.
"""

import argparse
import itertools
from collections.abc import Sequence

import jax

from benchmarks import tables, timing, trees
from benchmarks.trainers import (
    CASES,
    OPTIMISERS,
    SGD,
    Setting,
    Trainer,
    initialise,
    program,
    setting,
)

KEY = ("network", "optimiser", "batch", "size", "dtype", *tables.DEVICE)

# A CPU is given less to do.
CPU_NETWORKS, CPU_BATCH = ("basic_cnn", "resnet20"), 128


def measure(
    chosen: Setting,
    optimisers: Sequence[str],
    rounds: int,
    slow_rounds: int,
    steps: int,
) -> list[tables.Row]:
    """Return a row for every optimiser, SGD first."""
    batch = CASES[chosen.network].feed(chosen.batch, chosen.size)
    rule, start = trees.MODELS[chosen.network].rule, initialise(chosen)
    programs = {
        name: program(start, OPTIMISERS[name](rule), batch) for name in optimisers
    }
    trainers = {name: Trainer(made, batch, steps) for name, made in programs.items()}
    first = {name: timing.seconds_of(trainer) for name, trainer in trainers.items()}
    slow = min(first.values()) > timing.SLOW_SECONDS
    counts = dict.fromkeys(trainers, min(slow_rounds, rounds) if slow else rounds)
    seconds = timing.interleaved(trainers, counts, timing.pause())
    found = []
    for name, made in programs.items():
        low, median, high = timing.quartiles(seconds[name].values())
        over = [r - 1 for r in timing.ratios(seconds[name], seconds[SGD])]
        over_low, over_median, over_high = timing.quartiles(over)
        temporary = made.temporary_bytes
        row = {
            "median_ms": median * 1e3 / steps,
            "quartile1_ms": low * 1e3 / steps,
            "quartile3_ms": high * 1e3 / steps,
            "calls": len(seconds[name]),
            "steps_per_call": steps,
            "overhead_percent": over_median * 100,
            "overhead_quartile1": over_low * 100,
            "overhead_quartile3": over_high * 100,
            "compile_s": made.compile_seconds,
            "temporary_mib": None if temporary is None else temporary / 2**20,
            "loss": float(trainers[name].loss),
        }
        found.append(chosen._asdict() | {"optimiser": name} | row)
    return found


def report(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables of every device, and what no GPU has been asked yet."""
    parts = [tables.by_device(rows, markdown)] if rows else []
    done = {tuple(row[k] for k in Setting._fields) for row in rows if _on_gpu(row)}
    planned = [setting(name) for name in CASES]
    missing = [each for each in planned if tuple(map(str, each)) not in done]
    if missing:
        names = " ".join(each.network for each in missing)
        command = f"`python -m benchmarks.training --networks {names}`"
        parts += ["### gpu", f"Not yet run: {command}."]
    return "\n\n".join(parts)


def _on_gpu(row: dict[str, str]) -> bool:
    return row["platform"] == "gpu"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables of one device."""
    header = ["optimiser", "ms a step (quartiles)", "over SGD, % (quartiles)"]
    header += ["calls x steps", "compile s", "temporary MiB"]
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in Setting._fields), []).append(row)
    parts = []
    for (network, batch, size, dtype), members in found.items():
        loads = ", ".join(sorted({row["load"] for row in members}))
        parts.append(
            f"#### {network}, batch {batch}, size {size}, {dtype}, "
            f"load before the run {loads}"
        )
        parts.append(tables.markdown(header, map(_cells, members)))
    return "\n\n".join(parts)


def _cells(row: dict[str, str]) -> list[str]:
    def three(names: Sequence[str], form: str) -> str:
        median, low, high = (tables.cell(row, name, form) for name in names)
        return f"{median} ({low}, {high})"

    over = ("overhead_percent", "overhead_quartile1", "overhead_quartile3")
    return [
        f"`{row['optimiser']}`",
        three(("median_ms", "quartile1_ms", "quartile3_ms"), ".4g"),
        "" if row["optimiser"] == SGD else three(over, ".1f"),
        f"{row['calls']} x {row['steps_per_call']}",
        tables.cell(row, "compile_s", ".1f"),
        tables.cell(row, "temporary_mib", ".0f"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    networks = CPU_NETWORKS if on_cpu else tuple(CASES)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=networks)
    parser.add_argument(
        "--optimisers", nargs="+", choices=OPTIMISERS, default=list(OPTIMISERS)
    )
    parser.add_argument(
        "--batch", type=int, default=CPU_BATCH if on_cpu else None, help="examples"
    )
    parser.add_argument("--size", type=int, help="of an image, or of a sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="activations")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of fast calls")
    parser.add_argument(
        "--slow-rounds", type=int, default=7, help="rounds of calls over 0.5 s"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3 if on_cpu else 10,
        help="steps of one call, one after the other without a pause",
    )
    parser.add_argument("--again", action="store_true", help="also what is there")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    path = args.results / "training.csv"
    optimisers = list(dict.fromkeys([SGD, *args.optimisers]))
    settings = [setting(x, args.batch, args.size, args.dtype) for x in args.networks]
    missing = tables.missing(
        path,
        KEY,
        itertools.product(settings, optimisers),
        lambda case: case[0]._asdict() | {"optimiser": case[1]},
        again=args.again,
    )
    for chosen in dict.fromkeys(chosen for chosen, _ in missing):
        around = tables.circumstances()
        rows = measure(chosen, optimisers, args.rounds, args.slow_rounds, args.steps)
        tables.write(path, [row | around for row in rows], KEY)
        for row in rows:
            print(
                *chosen,
                row["optimiser"],
                f"{row['median_ms']:.1f} ms, {row['overhead_percent']:+.1f} %",
            )
    tables.publish(args, training=report(tables.read(path)))


if __name__ == "__main__":
    main()
