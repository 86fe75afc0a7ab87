"""Pictures of the results: `python -m benchmarks.plots`, which needs matplotlib.

Reads the CSV files of a folder and writes its PNG files; nothing is measured.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import summary, tables

Rows = list[dict[str, str]]

_BARS = (("speed_over_optax", "optax's Muon"), ("speed_over_svd", "SVD per leaf"))
_MOST_ASPECTS = 6


def updates(rows: Rows, path: pathlib.Path) -> bool:
    """Draw how much faster one update is than the peers', its error above the bars.

    Returns:
      Whether there was anything to draw.
    """
    chosen = [
        row
        for row in rows
        if row["method"] == summary.OURS
        and row.get("gradients") in ("gaussian", "", None)
        and all(row.get(name) for name, _ in _BARS)
    ]
    if not chosen:
        return False
    figure, axes = _axes(1, 1, (1.5 + 1.1 * len(chosen), 3.6))
    axis = axes[0]
    for k, (name, label) in enumerate(_BARS):
        places = [i + 0.4 * (k - 0.5) for i in range(len(chosen))]
        axis.bar(places, [float(row[name]) for row in chosen], 0.38, label=label)
    for i, row in enumerate(chosen):
        top = max(float(row[name]) for name, _ in _BARS)
        label = tables.cell(row, "worst_error", ".0e")
        axis.annotate(label, (i, top), (0, 2), textcoords="offset points", ha="center")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(chosen)), [row["tree"] for row in chosen], rotation=20)
    axis.set_ylabel("times as fast as")
    axis.margins(y=0.15)
    axis.set_title(f"{_title(chosen)}; above: relative error", fontsize=8)
    axis.legend(fontsize=8)
    _save(figure, path)
    return True


def sides(rows: Rows, path: pathlib.Path) -> bool:
    """Draw the time of every method against the short side, a panel for each aspect.

    Returns:
      Whether there was anything to draw.
    """
    if not rows:
        return False
    batch, dtype = _commonest((row["batch"], row["dtype"]) for row in rows)
    chosen = [row for row in rows if (row["batch"], row["dtype"]) == (batch, dtype)]
    aspect = {id(row): int(row["rows"]) / int(row["columns"]) for row in chosen}
    found = sorted({round(value, 2) for value in aspect.values()})[:_MOST_ASPECTS]
    figure, axes = _axes(1, len(found), (3 * len(found) + 1.8, 3.6))
    methods = list(dict.fromkeys(row["method"] for row in chosen))
    ticks = sorted({int(row["columns"]) for row in chosen})
    for axis, value in zip(axes, found, strict=True):
        for method in methods:
            points = sorted(
                (int(row["columns"]), float(row["median_ms"]))
                for row in chosen
                if row["method"] == method and round(aspect[id(row)], 2) == value
            )
            axis.plot(
                *zip(*points, strict=True), **_style(methods.index(method), method)
            )
        axis.set(xscale="log", yscale="log", xlabel="short side m")
        axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_title(f"aspect ratio {value:g}", fontsize=9)
    axes[0].set_ylabel(f"ms for {batch} matrices")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(f"{_title(chosen)}; stored in {dtype}", fontsize=9)
    _save(figure, path)
    return True


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def _style(k: int, method: str) -> dict[str, Any]:
    ours = method.startswith("Auto")
    return {
        "label": method,
        "marker": "osv^D*Px"[k % 8],
        "markersize": 4,
        "linewidth": 2.2 if ours else 1,
        "zorder": 3 if ours else 2,
    }


def _title(rows: Rows) -> str:
    row = rows[0]
    return f"{row['device']}, {row['cpus']} CPU cores, jax {row['jax']}"


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no backend is needed to write a file

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()


def _save(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without its version in the file, a picture changes only if the numbers do.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw(results: pathlib.Path) -> list[pathlib.Path]:
    """Draw all that the files of a folder hold, and return what was written."""
    written = []
    for drawing, name in ((updates, "step"), (sides, "speed")):
        rows = tables.read(results / f"{name}.csv")
        for kind in dict.fromkeys(row["platform"] for row in rows):
            members = [row for row in rows if row["platform"] == kind]
            # Devices and numbers of threads are not mixed in a picture.
            device = _commonest(tables.identity(row, tables.DEVICE) for row in members)
            members = [
                r for r in members if tables.identity(r, tables.DEVICE) == device
            ]
            path = results / f"{name}_{kind}.png"
            if drawing(members, path):
                written.append(path)
    return written


def markdown(results: pathlib.Path) -> str:
    """Return links to the pictures that are there, of both drawings."""
    captions = {
        "step": "Times as fast as the peers, one update of `orthogonalise()`",
        "speed": "Time by short side, by aspect ratio",
    }
    found = [
        f"![{caption}, {path.stem.split('_')[1]}]({results.name}/{path.name})"
        for name, caption in captions.items()
        for path in sorted(results.glob(f"{name}_*.png"))
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
