"""Memory and time of decorrelating one large convolution: `... decorrelation memory`.

A 3x3 convolution of 512 channels meets patches of 4608 features, so that R is a matrix
of 4608 x 4608. Measured are one update of R and one forward pass in evaluation, of the
compiled programs: what they are given, and what they hold besides.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import tables, timing
from examples.experiments.decorrelation.rules import MeanRemoval
from examples.training.report import RESULTS
from orthax import decorrelation, nn

NAME = "decorrelation_memory.csv"
_KEY = ("platform", "device", "features", "batch", "side", "case", "program")
_RATE = 1e-5  # of no consequence here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Memory and time of an update and of a forward pass of one convolution."""

    channels: int = 512
    """Of the input and of the output; the kernel is 3x3."""
    side: int = 8
    """Pixels along a side of the input."""
    batch: int = 32
    """Images; the patches are `batch * side**2`."""
    sample: float = 0.1
    """Share of the patches in the cases that say so."""
    fraction: float = 0.1
    """Columns of the factorised rule's U, as a share of the features."""
    rounds: int = 3
    """Timed calls of every program, in turn; the median counts."""
    polar: bool = False
    """Whether to time the polar rule too: an SVD of about features x features."""
    results: Path = RESULTS
    """Folder of decorrelation_memory.csv and decorrelation.md."""

    def __post_init__(self):
        for name in ("channels", "side", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected above 0")
        for name in ("sample", "fraction"):
            if not 0 < getattr(self, name) <= 1:
                found = getattr(self, name)
                raise ValueError(f"`{name}` is {found}; expected above 0, at most 1")

    def cases(self) -> dict[str, nnx.Module]:
        """Return the layers that are measured, by name, without arrays."""
        shape, scaled = (
            (self.channels, self.channels, (3, 3)),
            decorrelation.Scaled(_RATE),
        )
        factorised = decorrelation.Factorised(_RATE, fraction=self.fraction)
        share, part = f"{self.sample:g} of the patches", f"k = {self.fraction:g} d"
        chosen = {
            "mean removal": (MeanRemoval(), self.sample),
            "dense, all patches": (scaled, 1.0),
            f"dense, {share}": (scaled, self.sample),
            f"factorised, {part}, all patches": (factorised, 1.0),
            f"factorised, {part}, {share}": (factorised, self.sample),
            f"polar, {share}": (decorrelation.Polar(), self.sample),
        }
        layers = {
            name: nnx.eval_shape(
                lambda rule=rule, sample=sample: nn.DecorrelatedConv(
                    *shape, rule, sample=sample, rngs=nnx.Rngs(0)
                )
            )
            for name, (rule, sample) in chosen.items()
        }
        plain = nnx.eval_shape(lambda: nnx.Conv(*shape, rngs=nnx.Rngs(0)))
        return {"plain": plain, **layers}


def programs(layer: nnx.Module) -> dict[str, Callable[[nnx.State, jax.Array], Any]]:
    """Return what is measured of a layer, functions of its state and a batch."""
    graphdef = nnx.split(layer)[0]

    def update(state: nnx.State, x: jax.Array) -> nnx.State:
        layer = nnx.merge(graphdef, state, copy=True)
        layer(x)  # the output is not asked for, and so not computed
        return nnx.state(layer, nn.DecorrelationVariable)

    def forward(state: nnx.State, x: jax.Array) -> jax.Array:
        layer = nnx.merge(graphdef, state, copy=True)
        layer.eval()
        return layer(x)

    both = {"update": update, "forward": forward}
    return both if isinstance(layer, nn.Decorrelated) else {"forward": forward}


def filled(state: nnx.State) -> nnx.State:
    """Return arrays in place of shapes: of matrices I, of kernels small numbers."""

    def of(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if len(leaf.shape) == 2:
            return jnp.eye(*leaf.shape, dtype=leaf.dtype)
        return jnp.full(leaf.shape, 1e-3 if len(leaf.shape) > 2 else 0, leaf.dtype)

    return jax.tree.map(of, state)


def measure(config: Settings) -> None:
    """Compile and time every case, and write its rows."""
    shape = (config.batch, config.side, config.side, config.channels)
    x = jax.random.normal(jax.random.key(0), shape)
    circumstances = tables.circumstances() | {"flax": flax.__version__}
    for case, layer in config.cases().items():
        state = nnx.state(layer)
        rows, calls = [], {}
        for program, f in programs(layer).items():
            compiled = jax.jit(f).lower(state, x).compile()
            used = compiled.memory_analysis()
            kept = nnx.state(layer, nn.DecorrelationVariable)
            row = {"features": 9 * config.channels, "batch": config.batch}
            row |= {"side": config.side, "case": case, "program": program}
            row |= {"statistics_bytes": _bytes(kept)}
            row |= {"argument_bytes": used.argument_size_in_bytes}
            row |= {"output_bytes": used.output_size_in_bytes}
            row |= {"temporary_bytes": used.temp_size_in_bytes, "seconds": None}
            rows.append(row | circumstances)
            if config.polar or not case.startswith("polar") or program == "forward":
                calls[program] = compiled
        seconds = _timed(calls, filled(state), x, config.rounds)
        rows = [row | {"seconds": seconds.get(row["program"])} for row in rows]
        config.results.mkdir(parents=True, exist_ok=True)
        tables.write(config.results / NAME, rows, _KEY)
        print(f"{case}: {seconds}")


def _timed(
    compiled: dict[str, Callable], state: nnx.State, x: jax.Array, rounds: int
) -> dict[str, float]:
    calls = {name: lambda f=f: f(state, x) for name, f in compiled.items()}
    for call in calls.values():
        jax.block_until_ready(call())
    found = timing.interleaved(calls, dict.fromkeys(calls, rounds), timing.pause())
    return {name: statistics.median(x.values()) for name, x in found.items()}


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def read(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a folder."""
    return tables.read(folder / NAME)


def text(rows: Sequence[dict[str, str]]) -> str:
    """Return the section of the page, as Markdown."""
    parts = ["## Memory of a large convolution", _TEXT]
    if not rows:
        parts.append("not yet run: `python -m examples.decorrelation memory`")
        return "\n\n".join(parts)
    sizes: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        name = tuple(row[x] for x in ("features", "batch", "side"))
        sizes.setdefault(name, []).append(row)
    for (features, batch, side), found in sizes.items():
        patches = int(batch) * int(side) ** 2
        loads = ", ".join(dict.fromkeys(row["load"] for row in found))
        told = f"{features} features, {batch} images, {patches} patches"
        parts.append(f"{told}; load of the machine {loads}.")
        parts.append(tables.by_device(found, _table))
    return "\n\n".join(parts)


_TEXT = """\
One update of the statistics (in front of it, the gathering of the patches), and one
forward pass in evaluation, of a 3x3 convolution; SAME padding, float32. "Statistics" is
what the layer keeps from step to step, "arguments" and "output" what a program is given
and gives back, "temporary" what it holds besides, as XLA counts: without what LAPACK
takes for itself. `plain` is the convolution alone, which is also what `fuse` makes of
any of them."""


def _table(rows: list[dict[str, str]]) -> str:
    header = ["layer", "program", "statistics, MB", "arguments, MB", "output, MB"]
    header += ["temporary, MB", "seconds"]

    def cells(row: dict[str, str]) -> list[str]:
        names = ("statistics", "argument", "output", "temporary")
        sizes = [f"{float(row[f'{name}_bytes']) / 1e6:.4g}" for name in names]
        return [row["case"], row["program"], *sizes, row["seconds"] or "not timed"]

    return tables.markdown(header, map(cells, rows))
