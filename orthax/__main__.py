"""The contents of a bug report: `python -m orthax`.

Prints versions, devices, the method of `polar.Auto()` on this platform, and the errors
of its polar factors on this device beside the stated bounds. Exits with 1 if a bound is
exceeded.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import jax

try:
    from orthax import __version__, _self_check, polar
except ImportError as error:
    raise SystemExit(
        f"{error}. The distribution 'orthax' (orthogonal polynomials) has probably "
        "overwritten files of 'orthax-optim'. To fix this, run: pip uninstall -y "
        "orthax orthax-optim && pip install orthax-optim"
    ) from None

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
# A square one, a 3 x 3 convolution, two dense layers.
_SHAPES = ((64, 64), (576, 64), (768, 3072), (4096, 4096))
_SETTINGS = ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m orthax",
        description="Versions, devices, default methods and a check of the polar "
        "factor on this device: what a bug report needs.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out the check, which takes seconds"
    )
    quick = parser.parse_args(arguments).quick
    for lines in (_versions(), _devices(), _methods()):
        print(*lines, "", sep="\n")
    if quick:
        return 0
    found = _self_check.self_check()
    print(*_result(found), sep="\n")
    return int(found.broken)


def _versions() -> Iterator[str]:
    yield f"orthax {__version__}"
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} not installed"
    yield f"Python {platform.python_version()}, {platform.platform()}"


def _devices() -> Iterator[str]:
    kinds = Counter((d.platform, d.device_kind) for d in jax.devices())
    for (name, kind), count in kinds.items():
        yield f"{count} x {name} ({kind})"
    yield f"default backend {jax.default_backend()}, processes: {jax.process_count()}"
    for name in ("jax_enable_x64", "jax_default_matmul_precision"):
        yield f"{name} {getattr(jax.config, name)}"
    for name in _SETTINGS:
        if name in os.environ:
            yield f"{name} {os.environ[name]}"


def _methods() -> Iterator[str]:
    here = jax.default_backend()
    exact, fast = polar.Auto().on(here), polar.Auto("fast").on(here)
    yield f"polar.Auto() is {exact}"
    yield f'polar.Auto("fast") is {fast}'
    yield ""
    table: list[tuple[str, ...]] = [("matrix", "MFLOP", "MFLOP, fast")]
    for m, n in _SHAPES:
        counts = (f"{method.flops(m, n) / 1e6:.3g}" for method in (exact, fast))
        table.append((f"{m} x {n}", *counts))
    yield from _aligned(table)


def _result(found: _self_check.Found) -> Iterator[str]:
    yield "Errors of polar.Auto() against float64, and what is promised:"
    yield ""
    names = (name.replace("_", " ") for name in _self_check.Errors._fields)
    table: list[tuple[str, ...]] = [("matrix", "shape", "dtype", *names, "")]
    for check in found.checks:
        m, n = check.shape
        pairs = zip(check.measured, check.promised, strict=True)
        errors = (f"{error:.1e}/{bound:.0e}" for error, bound in pairs)
        verdict = "BROKEN" if check.broken else ""
        table.append((check.name, f"{m} x {n}", check.dtype, *errors, verdict))
    yield from _aligned(table)
    yield ""
    stays = "stays in its matrix" if found.nan_stays else "does not spread: BROKEN"
    yield f"NaN {stays}. First call {found.first:.2f} s, second {found.second:.4f} s."
    if found.broken:
        yield "A promise is BROKEN on this device: please report all of the above."
    else:
        yield "All promises are kept."


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


if __name__ == "__main__":
    sys.exit(main())
