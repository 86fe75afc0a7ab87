"""An update on thousands of devices, on paper: `python -m benchmarks.scaling`.

Writes `docs/scaling.md` and its picture. Shapes of published models are laid on meshes
of devices that are not there, and `orthax.explain` says what each of them would do:
every number of the page is its own, or a product of those and of the assumptions here.
"""

import argparse
import functools
import math
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import tqdm

import orthax
from benchmarks import published, tables
from benchmarks.published import MODELS, P
from orthax import components, execution, polar

PAGE = tables.HERE.parent / "docs" / "scaling.md"
RULE = components.ByPath([("kernel", components.Matricisation((-2,), (-1,)))])
DEVICES = (8, 64, 256, 1024, 4096)
# What a device does while it trains: bfloat16 products, and the share of them that
# counts (38 to 43 % in The Llama 3 Herd of Models, Table 4).
PEAK, USED = 1e15, 0.4


class Way(NamedTuple):
    """A method, and the machine that its operations run on."""

    name: str
    products: str
    method: polar.PolarMethod
    machine: execution.Machine


EXACT = Way("the default", "float32", polar.Auto().on("gpu"), execution.Machine())
FAST = Way(
    '`Auto("fast")`',
    "bfloat16",
    polar.Auto("fast").on("gpu"),
    execution.Machine(flops=PEAK * USED),
)


# ------------------------------------------------------------------- what it would cost


class Cost(NamedTuple):
    """One update on the busiest device."""

    plans: tuple[str, ...]
    collectives: int
    sent: float
    flops: float
    seconds: float


def cost(params: Any, lies: Any, way: Way) -> Cost:
    """Return what `explain` says of an update."""
    stacking = execution.Stacking(machine=way.machine)
    shares = orthax.explain(
        params,
        RULE,
        method=way.method,
        stacking=stacking,
        platform="gpu",
        shardings=lies,
    ).shares
    return Cost(
        tuple(dict.fromkeys(share.plan for share in shares)),
        sum(len(share.collectives) for share in shares),
        sum(share.bytes for share in shares),
        sum(share.flops for share in shares),
        sum(share.seconds for share in shares),
    )


@functools.cache
def update(name: str, devices: int, way: Way) -> Cost:
    """Return the cost of one update of a model on a mesh."""
    model = MODELS[name]
    lies = published.shardings(model, published.mesh(model, devices))
    return cost(published.matrices(model), lies, way)


@functools.cache
def alone(name: str, way: Way) -> Cost:
    """Return the cost where every device works on all matrices."""
    params = published.matrices(MODELS[name])
    return cost(params, _everywhere(params, 1), way)


def _everywhere(params: Any, devices: int) -> Any:
    on = published.explicit_mesh((devices,), ("data",))
    return jax.tree.map(lambda _: jax.NamedSharding(on, P()), params)


def step(model: published.Model, devices: int) -> float:
    """Return the seconds of a training step without the update."""
    return 6 * published.active(model) * model.tokens / (devices * PEAK * USED)


def pays_from(bandwidth: float, devices: int, way: Way) -> int | None:
    """Return the smallest side from which work on replicated matrices is divided.

    There are as many square matrices as devices, their side a power of two.
    """
    machine = way._replace(
        machine=execution.Machine(way.machine.flops, bandwidth, way.machine.latency)
    )
    for power in range(4, 16):
        params = {"x": published.leaf(devices, 2**power, 2**power)}
        lies = _everywhere(params, devices)
        if cost(params, lies, machine).plans != ("local",):
            return 2**power
    return None


# ------------------------------------------------------------------------ what is shown

_HEAD = """\
# An update on thousands of devices, on paper

Nothing on this page has been measured. `python -m benchmarks.scaling` writes it:
`orthax.explain` is asked what each device would do in one update of
`orthax.orthogonalise()`, on a `jax.sharding.AbstractMesh` of devices that are not
there, and answers with the plans that the same call would carry out on real ones, where
types or `execution.Stacking(shardings=...)` say how leaves are sharded.

![The update over the training step by the number of devices](scaling.png)
"""


def page() -> str:
    """Return the whole page."""
    parts = [_HEAD, _flow(_says()), "## Assumptions", _flow(_assumptions())]
    parts += ["## Models", _models()]
    for way in (EXACT, FAST):
        title = f"## With {way.name}: products in {way.products}"
        parts += [title, _share_of_step(way)]
        for name in MODELS:
            parts += [f"### {name}", _meshes(name, way)]
    parts += ["## Slower networks", _bandwidths(), "## Where dividing pays"]
    parts += [_break_even(), "## What this leaves out", _flow(_limits())]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _flow(text: str) -> str:
    """Return a paragraph or a list in lines of one width, whatever was filled in."""
    lines = []
    for part in re.split(r"\n(?=- )", text):
        indent = "  " * part.startswith("- ")
        lines += textwrap.wrap(
            " ".join(part.split()),
            width=92,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _says() -> str:
    most = [
        f"{name} {max(_percent(name, n, way) for n in DEVICES):.1f} %"
        for way in (EXACT, FAST)
        for name in MODELS
    ]
    return f"""\
- As long as there are many more matrices of each shape than devices, the work is
  divided evenly (see **evenness**), and the share of a training step hardly depends on
  the number of devices.
- Beyond, one whole matrix of each shape for one device is the floor: the update takes
  as long on 4,096 devices as on the first mesh with as many devices as matrices of a
  shape, while a training step of as many tokens goes on shrinking.
- At its worst in these tables the update takes, of a training step:
  {"; ".join(most[: len(MODELS)])} in float32, {"; ".join(most[len(MODELS) :])} in
  bfloat16.
- Where experts are many and tokens meet few of them, the update is a larger part:
  its work follows all parameters, that of the training step those that a token
  meets."""


def _percent(name: str, devices: int, way: Way) -> float:
    return 100 * update(name, devices, way).seconds / step(MODELS[name], devices)


def _assumptions() -> str:
    exact, fast = EXACT.machine, FAST.machine
    return f"""\
- **Device** (`execution.Machine`, its defaults): {exact.flops / 1e12:g} TFLOP/s in
  float32, {fast.flops / 1e12:g} where products are in bfloat16, at the rate of the
  training step; {exact.bandwidth / 1e9:g} GB/s that it sends while it receives as
  many, the same to every other device; {exact.latency * 1e6:g} microseconds for a
  collective. Nothing overlaps.
- **Methods**: the default on a GPU, `{EXACT.method}` with
  {len(EXACT.method.coefficients)} steps, and `Auto("fast")`, with
  {len(FAST.method.coefficients)} steps on rounded factors.
- **Matrices** are float32, and so is what is sent. All layers are one leaf with a
  leading axis; experts are another such axis. Tables of tokens, the head, routers
  and norms are left to another optimiser.
- **Meshes**: tensor parallel over 8 devices from 64 devices up, columns of first
  projections (query, key, value, gate, up) and rows of second ones (out, down); the
  other side over the other devices (FSDP). Experts lie over an axis of their own, of
  as many devices as there are experts where there are enough.
- **Training step**: 6 N operations for a token, N the parameters that it meets, at
  {USED * 100:g} % of {PEAK / 1e12:g} TFLOP/s (38 to 43 % in The Llama 3 Herd of
  Models, Table 4). The number of tokens in a step is fixed: more devices, fewer
  tokens for each.
- **GiB** counts 12 bytes a parameter (parameter, gradient and momentum in float32)
  evenly over the devices, without activations: where it exceeds the memory of a
  device, the row is there for comparison only.
- **Sent, TFLOP, seconds** are those of the busiest device, padding included, summed
  over the shares that `explain` lists. **Evenness** is the work of all matrices over
  that of the busiest device times the number of devices: 1 if nobody waits.
- **Undivided** is the time in which one device works on all matrices, as each does
  where the work is replicated; gathering them first is not counted. **Pays above**:
  the bandwidth at which the same plan would take as long as that."""


def _models() -> str:
    header = ["model", "parameters", "published", "a token meets", "orthogonalised"]
    header += ["matrices", "tokens in a step", "shapes from"]
    body = []
    for name, model in MODELS.items():
        tree = published.matrices(model)
        count = sum(math.prod(leaf.shape[:-2]) for leaf in jax.tree.leaves(tree))
        amounts = [published.parameters(model), model.parameters]
        amounts += [published.active(model), published.size(tree)]
        cells = [f"{n / 1e9:.4g} B" for n in amounts]
        body.append([name, *cells, str(count), f"{model.tokens:,}", model.source])
    return tables.markdown(header, body)


def _share_of_step(way: Way) -> str:
    header = ["update over training step, %", *(f"{n:,} devices" for n in DEVICES)]
    body = []
    for name in MODELS:
        body.append([name, *(f"{_percent(name, n, way):.2f}" for n in DEVICES)])
    return tables.markdown(header, body)


def _meshes(name: str, way: Way) -> str:
    model = MODELS[name]
    header = ["devices", "mesh", "GiB", "plans", "collectives", "MiB sent", "TFLOP"]
    header += ["evenness", "update, s", "training step, s", "undivided, s"]
    header += ["pays above, GB/s"]
    one = alone(name, way)
    body = []
    for devices in DEVICES:
        on, each = published.mesh(model, devices), update(name, devices, way)
        moving = each.sent / way.machine.bandwidth
        spare = one.seconds - (each.seconds - moving)
        body.append(
            [
                f"{devices:,}",
                " x ".join(f"{n} {axis}" for axis, n in on.shape.items()),
                _short(12 * published.parameters(model) / devices / 2**30),
                ", ".join(each.plans),
                str(each.collectives),
                _short(each.sent / 2**20),
                _short(each.flops / 1e12),
                f"{one.flops / devices / each.flops:.2f}",
                _short(each.seconds),
                _short(step(model, devices)),
                _short(one.seconds),
                _short(each.sent / spare / 1e9),
            ]
        )
    return tables.markdown(header, body)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


_BANDWIDTHS = (5e9, 1e10, 2.5e10, 5e10, 1e11, 4e11)


def _bandwidths() -> str:
    devices = 1024
    header = [f"update over training step, %, {devices:,} devices"]
    header += [f"{bandwidth / 1e9:g} GB/s" for bandwidth in _BANDWIDTHS]
    body = []
    for name, model in MODELS.items():
        cells = []
        for bandwidth in _BANDWIDTHS:
            machine = execution.Machine(bandwidth=bandwidth)
            each = update(name, devices, EXACT._replace(machine=machine))
            cells.append(f"{each.seconds / step(model, devices) * 100:.2f}")
        body.append([name, *cells])
    text = "The default, on the same machine but for the network; plans may change."
    return f"{text}\n\n{tables.markdown(header, body)}"


def _break_even() -> str:
    text = """\
Replicated matrices, as many squares as devices: every device can work on all of
them, or on its own one with an all-gather at the end. The smallest side, of the
powers of two from 16 to 32,768, from which `explain` divides:"""
    parts = [_flow(text)]
    for way in (EXACT, FAST):
        header = [f"with {way.name}", *(f"{n:,} devices" for n in DEVICES)]
        body = []
        for bandwidth in _BANDWIDTHS:
            sides = [pays_from(bandwidth, n, way) for n in DEVICES]
            cells = [f"{side:,}" if side else "never" for side in sides]
            body.append([f"{bandwidth / 1e9:g} GB/s", *cells])
        parts.append(tables.markdown(header, body))
    return "\n\n".join(parts)


def _limits() -> str:
    return """\
- One bandwidth for the whole mesh. Within a machine it is higher and between
  machines lower: read the rows for slower networks for large meshes.
- Collectives cost the same latency on 8 and on 4,096 devices; contention is not
  known.
- Memory for what is exchanged, and time to copy it before and after.
- Overlap with the backward pass, which would hide some of it.
- Products run at one rate, however small they are."""


def draw(path: pathlib.Path) -> bool:
    """Draw the share of a step by the number of devices; no picture, no matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        return False
    figure = matplotlib.figure.Figure((8, 4), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(MODELS):
        for way, style in ((EXACT, "o-"), (FAST, "s--")):
            shares = [_percent(name, n, way) for n in DEVICES]
            label = f"{name}, {way.products}"
            axis.plot(DEVICES, shares, style, color=f"C{i}", label=label)
    axis.set(xscale="log", yscale="log", xlabel="devices")
    axis.set_ylabel("update over training step, %")
    axis.set_xticks(DEVICES, [f"{n:,}" for n in DEVICES])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    parser.add_argument("--no-plots", action="store_true", help="without matplotlib")
    args = parser.parse_args(argv)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page())
    tqdm.tqdm.write(f"{args.page.name} written")
    if not args.no_plots:
        draw(args.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
