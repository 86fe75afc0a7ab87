"""The numbers that the targets are about, and which of them are still missing."""

import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import peers, tables

Rows = Sequence[dict[str, str]]

OURS = "orthogonalise()"
FAST = 'orthogonalise(Auto("fast"))'
NOT_YET = "not yet run"


class Target(NamedTuple):
    """How much faster than a peer the default is to be, on two CPU cores in float32.

    `realistic` is what was thought to be in reach before anything was built.
    """

    optax: float
    realistic: float | None
    svd: float


TARGETS = {
    "resnet20": Target(4, 3, 6),
    "resnet18": Target(6, 5, 4),
    "resnet50": Target(3.3, 3, 4),
    "vit_ti16": Target(1.5, None, 4),
    "gpt2_small": Target(2.5, None, 6),
}
COMPILE_TARGET, MEMORY_TARGET, FAST_TARGET = 0.7, 1.5, 1.3


def markdown(results: pathlib.Path) -> str:
    """Return the tables of all devices, and what no GPU has been asked yet."""
    found, training, speed = (
        tables.read(results / f"{name}.csv") for name in ("step", "training", "speed")
    )
    parts = []
    for title, details, rows in tables.devices(found):
        planned = list(TARGETS) if rows[0]["platform"] == "cpu" else []
        body = _body(rows, planned)
        if body:
            parts += [f"### {title}", details, tables.markdown(_HEADER, body)]
    on_gpu = [
        [row for row in rows if row["platform"] == "gpu"]
        for rows in (found, training, speed)
    ]
    body = [
        [each.what, each.target, each.measured(*on_gpu) or NOT_YET, f"`{each.command}`"]
        for each in _ON_GPU
    ]
    header = ["on a GPU", "target", "measured", "filled by"]
    return "\n\n".join([*parts, "### gpu", tables.markdown(header, body)])


_HEADER = [
    "gradients of",
    "x optax Muon",
    "target (realistic)",
    "x SVD per leaf",
    "target",
    "x `fast`",
    "compile / optax",
    "memory / matrices",
    "error",
    "error, square",
]


def _body(rows: Rows, planned: Sequence[str]) -> list[list[str]]:
    gaussian = [row for row in rows if row.get("gradients") in ("gaussian", None, "")]
    ours = {row["tree"]: row for row in gaussian if row["method"] == OURS}
    fast = {row["tree"]: row for row in gaussian if row["method"] == FAST}
    names = dict.fromkeys([*planned, *ours])
    return [_line(name, ours.get(name), fast.get(name)) for name in names]


def _line(
    tree: str, row: dict[str, str] | None, fast: dict[str, str] | None
) -> list[str]:
    optax, svd = _targets(tree)
    if row is None or not row.get("median_ms"):
        return [tree, NOT_YET, optax, "", svd, "", "", "", "", ""]
    over = float(row["median_ms"]) / float(fast["median_ms"]) if fast else None
    return [
        tree,
        tables.cell(row, "speed_over_optax", ".2f"),
        optax,
        tables.cell(row, "speed_over_svd", ".2f"),
        svd,
        f"{over:.2f}" if over else "",
        tables.cell(row, "compile_over_optax", ".2f"),
        tables.cell(row, "temporary_over_matrices", ".2f"),
        tables.cell(row, "worst_error", ".1e"),
        tables.cell(row, "worst_error_square", ".1e"),
    ]


def _targets(tree: str) -> tuple[str, str]:
    if tree not in TARGETS:
        return "", ""
    target = TARGETS[tree]
    realistic = f" ({target.realistic:g})" if target.realistic else ""
    return f"{target.optax:g}{realistic}", f"{target.svd:g}"


# ------------------------------------------------------------------------ on a GPU


class OnGpu(NamedTuple):
    """A target on a GPU, what shows it (of rows of step, training, speed), and how."""

    what: str
    target: str
    measured: Callable[[Rows, Rows, Rows], str]
    command: str


def _overhead(step: Rows, training: Rows, speed: Rows) -> str:
    found = [
        row["overhead_percent"]
        for row in training
        if (row["network"], row["batch"]) == ("resnet20", "1024")
        and row["optimiser"] == f"{OURS}, sgd"
    ]
    return f"{float(found[-1]):.1f} %" if found else ""


def _over_optax(step: Rows, training: Rows, speed: Rows) -> str:
    found = {
        row["tree"]: f"{row['tree']} {float(row['speed_over_optax']):.1f}x"
        for row in step
        if row["method"] == OURS
        and row["gradients"] == "gaussian"
        and row["tree"].startswith("resnet")
        and row["speed_over_optax"]
    }
    return ", ".join(found.values())


def _at_equal_error(step: Rows, training: Rows, speed: Rows) -> str:
    gpt = {
        row["method"]: float(row["median_ms"])
        for row in step
        if row["tree"] == "gpt2_small"
        and row["gradients"] == "gaussian"
        and row["median_ms"]
    }
    if not {OURS, peers.OPTAX_EXACT} <= set(gpt):
        return ""
    return f"{gpt[peers.OPTAX_EXACT] / gpt[OURS]:.2f}x"


def _of_the_peak(step: Rows, training: Rows, speed: Rows) -> str:
    found = [
        float(row["fraction_of_peak"])
        for row in speed
        if row["method"] == 'Auto("fast")'
        and row["products"] == "bfloat16"
        and min(int(row["rows"]), int(row["columns"])) >= 1024
    ]
    if not found:
        return ""
    middle = statistics.median(found)
    return f"{middle:.0%} ({min(found):.0%} to {max(found):.0%})"


_ON_GPU = (
    OnGpu(
        "a training step of ResNet-20, batch 1024: `orthogonalise()` over SGD",
        "at most 2 % (paper: 15.5 %)",
        _overhead,
        "python -m benchmarks.training --networks resnet20",
    ),
    OnGpu(
        "ResNet trees: times optax's Muon",
        "at least 5x",
        _over_optax,
        "python -m benchmarks.step --trees resnet20 resnet18 resnet50",
    ),
    OnGpu(
        "GPT-2 small: times optax's Muon with the steps of `polar_express()`",
        "at least 1.5x",
        _at_equal_error,
        "python -m benchmarks.step --trees gpt2_small",
    ),
    OnGpu(
        'stacks of m >= 1024, bfloat16 products, `Auto("fast")`: of the GEMM peak',
        "at least 70 %",
        _of_the_peak,
        "python -m benchmarks.speed --large",
    ),
)
