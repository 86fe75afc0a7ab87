"""Rows to CSV files, and CSV files to the tables of the README.

A row is a dictionary of strings and numbers that says under which circumstances it was
measured. No number of the README is typed by hand.
"""

import argparse
import csv
import functools
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jaxlib
import optax

import orthax

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"

Row = dict[str, Any]
Case = TypeVar("Case")
# What makes a device another one, as the rows see it.
DEVICE = ("platform", "device", "lapack_threads")
_PACKAGES = ("jax", "jaxlib", "optax")


def circumstances() -> Row:
    """Return what every row carries: device, cores, threads, load, versions, commit."""
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
        "commit": commit(),
    }


@functools.cache
def commit() -> str:
    """Return the commit of what is measured, `+` behind it if `orthax/` has changed.

    A copy without git can be told by the environment variable `ORTHAX_COMMIT`.
    """
    told = os.environ.get("ORTHAX_COMMIT")
    if told is not None:
        return told
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and _git("status", "--porcelain", "orthax") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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

    Rows of other devices, trees or methods stay as they are. A run that is killed
    leaves the file as it was before or as it is after.
    """
    new = [{name: _text(value) for name, value in row.items()} for row in rows]
    replaced = {identity(row, key) for row in new}
    old = [row for row in read(path) if identity(row, key) not in replaced]
    columns = dict.fromkeys(name for row in new + old for name in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + new)
    unfinished.replace(path)


def identity(row: Row, key: Sequence[str]) -> tuple[str, ...]:
    """Return what tells a row from others; columns that it lacks count as empty."""
    return tuple(_text(row.get(name)) for name in key)


def missing(
    path: pathlib.Path,
    key: Sequence[str],
    cases: Iterable[Case],
    labels: Callable[[Case], Row] | None = None,
    *,
    again: bool = False,
    complete: Callable[[dict[str, str]], Any] = bool,
) -> list[Case]:
    """Return the cases of which a file has no row on this device; all with `again`.

    Args:
      path: a CSV file.
      key: the columns that tell its rows from each other.
      cases: what is asked for.
      labels: what a row says of a case, besides `circumstances`; default: the case
        holds the first columns of the key.
      again: whether what is there counts as missing.
      complete: whether a row of the file counts.
    """
    if again:
        return [*cases]
    labels = labels or (lambda case: dict(zip(key, case, strict=False)))
    there = {identity(row, key) for row in read(path) if complete(row)}
    around = circumstances()
    return [x for x in cases if identity(around | labels(x), key) not in there]


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Add where a script writes to."""
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS, help="folder of the CSV files"
    )
    parser.add_argument(
        "--readme",
        type=pathlib.Path,
        help="page whose tables are written; this folder's, or none with --results",
    )


def publish(args: argparse.Namespace, **texts: str) -> None:
    """Put texts between the markers of their names, where the arguments say."""
    page = args.readme or (README if args.results == RESULTS else None)
    if page is None:
        return
    text = page.read_text()
    for name, section in texts.items():
        text = put(section, name, text)
    page.write_text(text)


def _text(value: Any) -> str:
    """Return what stands in the file: floats to four digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(row: dict[str, str], name: str, form: str) -> str:
    """Return a number of a row as a table shows it, nothing if there is none."""
    value = row.get(name)
    return format(float(value), form) if value else ""


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table, first column left-aligned and the others right-aligned."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *body])


def by_device(
    rows: Sequence[dict[str, str]], table: Callable[[list[dict[str, str]]], str]
) -> str:
    """Return `table` of the rows of each device, under a line that names it."""
    parts = []
    for title, details, members in devices(rows):
        parts += [f"### {title}", details, table(members)]
    return "\n\n".join(parts)


def devices(
    rows: Sequence[dict[str, str]],
) -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """Yield title, details and rows of each device and set of versions."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        fixed = ("platform", "device", "cpus", "lapack_threads", *_PACKAGES)
        found.setdefault(tuple(row[name] for name in fixed), []).append(row)
    for (kind, device, cpus, threads, *versions), members in found.items():
        packages = zip(_PACKAGES, versions, strict=True)
        shown = ", ".join(f"{name} {version}" for name, version in packages)
        commits = dict.fromkeys(row.get("commit") for row in members)
        known = ", ".join(name for name in commits if name)
        at = f", commit {known}" if known else ""
        details = f"{cpus} CPU cores, {threads} LAPACK threads, {shown}{at}"
        yield f"{kind}: {device}", details, members


def put(text: str, name: str, into: str) -> str:
    """Return `into` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if into.count(begin) != 1 or into.count(end) != 1:
        raise ValueError(f"The README must hold {begin!r} and {end!r} once each.")
    head, rest = into.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"
