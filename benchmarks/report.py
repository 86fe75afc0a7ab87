"""README and pictures from the results: `python -m benchmarks.report [--merge DIR]`.

Measures nothing. With `--merge`, the CSV files of a folder, as `benchmarks.queue` fills
it on another machine, are put into the results first.
"""

import argparse
import pathlib
from collections.abc import Sequence

from benchmarks import (
    compiled,
    contract,
    models,
    plots,
    polar,
    sharded,
    speed,
    step,
    summary,
    tables,
    tasks,
    training,
)

KEYS = {
    "polar": polar.KEY,
    "compiled": compiled.KEY,
    "contract": contract.KEY,
    "models": models.KEY,
    "step": step.KEY,
    "sharded": sharded.KEY,
    "speed": speed.KEY,
    "tasks": tasks.KEY,
    "training": training.KEY,
}


def merge(source: pathlib.Path, results: pathlib.Path) -> None:
    """Put the rows of one folder into another, in place of those that they repeat."""
    for name, key in KEYS.items():
        rows = tables.read(source / f"{name}.csv")
        if rows:
            tables.write(results / f"{name}.csv", rows, key)


def sections(results: pathlib.Path) -> dict[str, str]:
    """Return every generated part of the README by the name of its markers."""
    rows = {name: tables.read(results / f"{name}.csv") for name in KEYS}
    return {
        "summary": summary.markdown(results),
        "plots": plots.markdown(results),
        "step": tables.by_device(rows["step"], step.markdown),
        "sharded": sharded.report(rows["sharded"]),
        "speed": speed.report(rows["speed"]),
        "tasks": tasks.report(rows["tasks"]),
        "training": training.report(rows["training"]),
        "compiled": compiled.report(rows["compiled"]),
        "polar": tables.by_device(rows["polar"], polar.markdown),
        "contract": contract.markdown(rows["contract"]),
        "models": models.text(rows["models"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merge", nargs="*", type=pathlib.Path, default=[])
    parser.add_argument("--no-plots", action="store_true", help="without matplotlib")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    for source in args.merge:
        merge(source, args.results)
    if not args.no_plots:
        plots.draw(args.results)
    tables.publish(args, **sections(args.results))


if __name__ == "__main__":
    main()
