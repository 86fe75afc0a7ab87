"""The picture of whole updates: `python -m benchmarks.plots`, which needs matplotlib.

Reads `step.csv` of a folder and writes its PNG files; nothing is measured.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import peers, summary, tables

Rows = list[dict[str, str]]

_PEERS = {
    peers.OPTAX: "optax's Muon",
    peers.OPTAX_ROWS: "optax's Muon, coefficients as a table",
    peers.TORCH: "torch's Muon",
    peers.SVD_PER_LEAF: "an SVD of each leaf",
}


def updates(rows: Rows, path: pathlib.Path) -> bool:
    """Draw the time of one update relative to each peer's, a panel for each gradient.

    Returns:
      Whether there was anything to draw.
    """
    times: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.get("median_ms"):
            kind = times.setdefault(row.get("gradients") or "gaussian", {})
            kind.setdefault(row["tree"], {})[row["method"]] = float(row["median_ms"])
    kinds = {
        kind: {
            tree: found
            for tree, found in trees.items()
            if summary.OURS in found and _PEERS.keys() & found.keys()
        }
        for kind, trees in times.items()
    }
    kinds = {kind: kinds[kind] for kind in sorted(kinds, reverse=True) if kinds[kind]}
    if not kinds:
        return False
    widths = [len(trees) for trees in kinds.values()]
    figure, axes = _axes(widths, (2.2 + 1.0 * sum(widths), 3.8))
    for axis, (kind, trees) in zip(axes, kinds.items(), strict=True):
        for k, (peer, label) in enumerate(_PEERS.items()):
            there = [i for i, found in enumerate(trees.values()) if peer in found]
            found = [[*trees.values()][i] for i in there]
            heights = [each[summary.OURS] / each[peer] for each in found]
            axis.bar([i + 0.2 * (k - 1.5) for i in there], heights, 0.19, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(trees)), trees, rotation=35, ha="right", fontsize=8)
        axis.set_title(f"{kind} gradients", fontsize=9)
    axes[0].set_ylabel("time of orthogonalise() / theirs\n(shorter is faster)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    row = rows[0]
    figure.suptitle(
        f"{row['device']}, {row['cpus']} CPU cores, jax {row['jax']}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without its version in the file, a picture changes only if the numbers do.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _axes(widths: Sequence[int], size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no backend is needed to write a file

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        1, len(widths), squeeze=False, sharey=True, width_ratios=widths
    )
    return figure, axes.ravel()


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def draw(results: pathlib.Path) -> list[pathlib.Path]:
    """Draw all that the file of a folder holds, and return what was written."""
    written = []
    rows = tables.read(results / "step.csv")
    for kind in dict.fromkeys(row["platform"] for row in rows):
        members = [row for row in rows if row["platform"] == kind]
        # Devices and numbers of threads are not mixed in a picture.
        device = _commonest(tables.identity(row, tables.DEVICE) for row in members)
        members = [r for r in members if tables.identity(r, tables.DEVICE) == device]
        path = results / f"step_{kind}.png"
        if updates(members, path):
            written.append(path)
    return written


def markdown(results: pathlib.Path) -> str:
    """Return links to the pictures that are there."""
    caption = "Time of one update of `orthogonalise()` relative to others"
    found = [
        f"![{caption}, {path.stem.split('_')[1]}]({results.name}/{path.name})"
        for path in sorted(results.glob("step_*.png"))
    ]
    return "\n\n".join(found) or "No picture yet: `python -m benchmarks.plots`."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    for path in draw(args.results):
        print(path)
    tables.publish(args, plots=markdown(args.results))


if __name__ == "__main__":
    main()
