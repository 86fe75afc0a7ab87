"""Rows to CSV files, and CSV files to the tables of the README.

A row is a dictionary of strings and numbers that says under which circumstances it was
measured. No number of the README is typed by hand.
"""

import csv
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jaxlib
import optax

import orthax

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"

Row = dict[str, Any]
_PACKAGES = ("jax", "jaxlib", "optax")


def circumstances() -> Row:
    """Return what every row carries: device, cores, threads, load, versions."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cpus": len(os.sched_getaffinity(0)),
        "lapack_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "orthax": orthax.__version__,
    }


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor()


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: pathlib.Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Put rows into a CSV file, in place of those that agree with them in `key`.

    Rows of other devices, trees or methods stay as they are.
    """
    new = [{name: _text(value) for name, value in row.items()} for row in rows]
    replaced = {tuple(row[k] for k in key) for row in new}
    old = [row for row in read(path) if tuple(row[k] for k in key) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + new)


def _text(value: Any) -> str:
    """Return what stands in the file: floats to four digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table, first column left-aligned and the others right-aligned."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *body])


def by_device(
    rows: Sequence[dict[str, str]], table: Callable[[list[dict[str, str]]], str]
) -> str:
    """Return `table` of the rows of each device, under a line that names it."""
    devices: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        fixed = ("platform", "device", "cpus", "lapack_threads", *_PACKAGES)
        devices.setdefault(tuple(row[name] for name in fixed), []).append(row)
    parts = []
    for (kind, device, cpus, threads, *versions), members in devices.items():
        packages = zip(_PACKAGES, versions, strict=True)
        shown = ", ".join(f"{name} {version}" for name, version in packages)
        parts.append(f"### {kind}: {device}")
        parts.append(f"{cpus} CPU cores, {threads} LAPACK threads, {shown}")
        parts.append(table(members))
    return "\n\n".join(parts)


def put(text: str, name: str, into: str) -> str:
    """Return `into` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if into.count(begin) != 1 or into.count(end) != 1:
        raise ValueError(f"The README must hold {begin!r} and {end!r} once each.")
    head, rest = into.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"
