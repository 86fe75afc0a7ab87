"""One whole update on eight devices: `python -m benchmarks.sharded [--run]`.

Every update is compiled for eight devices, on CPU fake ones, and what its program does
on each is counted (`hlo.py`). Nothing is called unless `--run` asks for it, on devices
that are there. Writes `results/sharded.csv` and the tables of `README.md`. Rows that
are there already are left out (`--again`).
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
import tqdm

import orthax
from benchmarks import hlo, peers, tables, timing, trees
from benchmarks.layouts import AXES, DEVICES, LAYOUTS, NETWORKS, Layout, shardings
from orthax import components, polar
from orthax.execution import Stacking

KEY = ("tree", "layout", "axes", "update", *tables.DEVICE)
_FAKE = "--xla_force_host_platform_device_count"
_COMMAND = "python -m benchmarks.sharded --run --trees {tree}"
_PLACES = {"gpu": "one machine of 8 GPUs", "tpu": "a slice of 8 TPU chips"}


# ------------------------------------------------------------------------- what is done


class Entry(NamedTuple):
    """What is compiled, and the method whose operations it performs.

    Where `planned`, `explain` says what each device does.
    """

    make: Callable[[trees.Network, Stacking], optax.GradientTransformation]
    method: polar.PolarMethod
    planned: bool = False


def _ours(method: polar.PolarMethod) -> Entry:
    def make(net: trees.Network, stacking: Stacking) -> optax.GradientTransformation:
        return orthax.orthogonalise(method, rule=net.rule, stacking=stacking)

    return Entry(make, method, True)


UPDATES = {
    "orthogonalise(NewtonSchulz())": _ours(polar.NewtonSchulz()),
    "orthogonalise()": _ours(polar.Auto()),
    peers.OPTAX: Entry(
        lambda net, _: peers.optax_muon(net.params, net.rule),
        polar.NewtonSchulz(polar.JORDAN, gram=False),
    ),
    peers.SVD_PER_LEAF: Entry(
        lambda net, _: peers.per_leaf(peers.svd, net.rule), polar.SVD()
    ),
}


class Program(NamedTuple):
    """An update compiled for a mesh, and what it took to make it."""

    call: jax.stages.Compiled
    shapes: Any
    seconds: tables.Row


def compiled(
    entry: Entry, network: trees.Network, layout: Layout, axes: str
) -> Program:
    """Trace, lower and compile an update, with nothing remembered from before.

    Updates are sharded like the gradients. The state is made inside of the program: no
    momentum is read or written.
    """
    names, sizes = zip(*layout.mesh, strict=True)
    mesh = jax.make_mesh(
        sizes,
        names,
        axis_types=(AXES[axes],) * len(names),
        devices=jax.devices()[:DEVICES],
    )
    lies = shardings(network, layout, mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        network.params,
        lies,
    )
    transform = entry.make(network, _stacking(axes, lies))

    def update(grads: Any) -> Any:
        return transform.update(grads, transform.init(grads), grads)[0]

    jax.clear_caches()
    with jax.set_mesh(mesh):
        clock = [time.perf_counter()]
        traced = jax.jit(update, out_shardings=lies).trace(shapes)
        clock.append(time.perf_counter())
        lowered = traced.lower()
        clock.append(time.perf_counter())
        program = lowered.compile()
        clock.append(time.perf_counter())
    stages = ("trace_s", "lower_s", "compile_s")
    spent = [end - start for start, end in itertools.pairwise(clock)]
    return Program(program, shapes, dict(zip(stages, spent, strict=True)))


def _stacking(axes: str, lies: Any) -> Stacking:
    return Stacking(shardings=lies if axes == "given" else None)


def row(
    entry: Entry, network: trees.Network, layout: Layout, axes: str, runs: int
) -> tables.Row:
    """Return what an update does on each device, or why it cannot be compiled."""
    found = _whole(entry, network) | _plan(entry, network, layout, axes)
    try:
        program = compiled(entry, network, layout, axes)
    except Exception as error:
        said = " ".join(str(error).split())
        return found | {"note": f"raises {type(error).__name__}: {said[:200]}"}
    counts = hlo.count(program.call.as_text())
    kinds = [f"{n} {kind}" for kind, n in sorted(counts.collectives.items())]
    memory = program.call.memory_analysis()
    found |= {
        "collectives": ", ".join(kinds) or "none",
        "moved_mib": counts.moved / 2**20,
        "sent_mib": counts.sent / 2**20,
        "product_gflop": counts.flops / 1e9,
        "endless_loops": counts.endless,
        "temporary_mib": memory.temp_size_in_bytes / 2**20 if memory else None,
    }
    return found | program.seconds | (_times(program, runs) if runs else {})


def _whole(entry: Entry, network: trees.Network) -> tables.Row:
    """Return the operations of all matrices, and the bytes of all."""
    leaves = [x for x in components.resolve(network.params, network.rule) if x.cut]
    method = entry.method.on(jax.default_backend())
    flops = sum(
        float(b * method.flops(m, n))
        for leaf in leaves
        for b, m, n in leaf.cut.matrices(leaf.value.shape)
    )
    size = sum(leaf.value.size * leaf.value.dtype.itemsize for leaf in leaves)
    return {"undivided_gflop": flops / 1e9, "matrices_mib": size / 2**20}


def _plan(
    entry: Entry, network: trees.Network, layout: Layout, axes: str
) -> tables.Row:
    """Return what `explain` says that each device does."""
    if not entry.planned:
        return {}
    names, sizes = zip(*layout.mesh, strict=True)
    kinds = (AXES[axes],) * len(names)
    mesh = jax.sharding.AbstractMesh(sizes, names, axis_types=kinds)
    lies = shardings(network, layout, mesh)
    shares = orthax.explain(
        network.params,
        network.rule,
        method=entry.method,
        stacking=_stacking(axes, lies),
        shardings=lies,
    ).shares
    return {
        "plan": ", ".join(dict.fromkeys(share.plan for share in shares)),
        "plan_collectives": sum(len(share.collectives) for share in shares),
        "plan_sent_mib": sum(share.bytes for share in shares) / 2**20,
        "plan_gflop": sum(share.flops for share in shares) / 1e9,
    }


def _times(program: Program, runs: int) -> tables.Row:
    """Return the time of a call on standard normal gradients."""

    def normal(x: jax.ShapeDtypeStruct) -> jax.Array:
        value = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
        return jax.device_put(value, x.sharding)

    grads = jax.tree.map(normal, program.shapes)
    timing.seconds_of(lambda: program.call(grads))
    calls = {"": lambda: program.call(grads)}
    seconds = timing.interleaved(calls, {"": runs}, timing.pause())
    low, median, high = timing.quartiles(seconds[""].values())
    named = {"median_ms": median, "quartile1_ms": low, "quartile3_ms": high}
    return {name: value * 1e3 for name, value in named.items()} | {"calls": runs}


# ------------------------------------------------------------------------ what is shown


def report(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables of every device, and what has not been run yet."""
    parts = [tables.by_device(rows, markdown)] if rows else []
    done = {(row["platform"], row["tree"]) for row in rows if row.get("median_ms")}
    for platform, where in _PLACES.items():
        missing = " ".join(tree for tree in NETWORKS if (platform, tree) not in done)
        if missing:
            command = f"`{_COMMAND.format(tree=missing)}`"
            parts.append(f"The time on {where} is not yet run: {command}.")
    return "\n\n".join(parts)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables of one device."""
    header = ["update", "axes", "collectives", "MiB sent", "by plan", "GFLOP products"]
    header += ["by plan", "undivided", "temporary MiB", "compile s", "ms (quartiles)"]
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for each in rows:
        found.setdefault((each["tree"], each["layout"]), []).append(each)
    parts = []
    for (tree, layout), members in found.items():
        mesh = " x ".join(f"{n} {name}" for name, n in LAYOUTS[layout].mesh)
        size = tables.cell(members[0], "matrices_mib", ".0f")
        loads = sorted({float(each["load"]) for each in members})
        parts += [
            f"#### {tree}, {layout}: mesh {mesh}, {size} MiB of matrices; "
            f"load before a row {loads[0]:g} to {loads[-1]:g}",
            tables.markdown(header, map(_cells, members)),
        ]
    return "\n\n".join(parts)


def _cells(each: dict[str, str]) -> list[str]:
    def number(name: str, form: str) -> str:
        return tables.cell(each, name, form)

    name, axes = f"`{each['update']}`", each["axes"]
    whole = number("undivided_gflop", ",.1f")
    if each.get("note"):
        note = each["note"].split(":")[0]
        return [name, axes, note, *[""] * 4, whole, "", "", ""]
    endless = int(each["endless_loops"])
    more = f" (+ {endless} loops of unknown length)" if endless else ""
    times = [number(f"quartile{i}_ms", ".3g") for i in (1, 3)]
    timed = f"{number('median_ms', '.3g')} ({', '.join(times)})"
    return [
        name,
        axes,
        each["collectives"] + more,
        number("sent_mib", ".1f"),
        number("plan_sent_mib", ".1f"),
        number("product_gflop", ",.1f"),
        number("plan_gflop", ",.1f"),
        whole,
        number("temporary_mib", ".0f"),
        number("compile_s", ".1f"),
        timed if each.get("median_ms") else "",
    ]


# --------------------------------------------------------------------------- the script


def cases(args: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return what is missing of what is asked for, the smallest networks first."""
    asked = [
        (tree, layout, axes, update)
        for tree in args.trees
        for layout in args.layouts
        for update in args.updates
        for axes in args.axes
        # What optax does with the shardings that it is given is the compiler's.
        if axes != "given" or UPDATES[update].planned
    ]
    return tables.missing(
        args.results / "sharded.csv",
        KEY,
        asked,
        again=args.again,
        complete=lambda row: not args.run or row.get("median_ms") or row.get("note"),
    )


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    choose: Mapping[str, Mapping[str, Any]] = {
        "trees": NETWORKS,
        "layouts": LAYOUTS,
        "axes": AXES,
        "updates": UPDATES,
    }
    for name, known in choose.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), metavar=name
        )
    parser.add_argument("--run", action="store_true", help="measure the time, too")
    parser.add_argument("--calls", type=int, default=11, help="of each, with --run")
    parser.add_argument("--again", action="store_true", help="also what is there")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    if jax.device_count() < DEVICES:
        parser.error(f"needs {DEVICES} devices, there are {jax.device_count()}")
    if args.run and jax.default_backend() == "cpu":
        parser.error("--run needs devices that are there, not parts of one CPU")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    # Before anything asks JAX for its devices.
    fake, flags = f"{_FAKE}={DEVICES}", os.environ.get("XLA_FLAGS", "")
    if _FAKE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {fake}".strip()
    args = parsed(argv)
    path = args.results / "sharded.csv"
    for case in tqdm.tqdm(cases(args), desc="sharded"):
        tree, layout, axes, update = case
        around = tables.circumstances() | {"devices": DEVICES}
        network, runs = NETWORKS[tree](), args.calls if args.run else 0
        found = row(UPDATES[update], network, LAYOUTS[layout], axes, runs)
        labels = dict(zip(KEY, case, strict=False))
        tables.write(path, [labels | {"note": None} | found | around], KEY)
        told = (
            found.get("note") or f"{found['collectives']}; {found['compile_s']:.1f} s"
        )
        tqdm.tqdm.write(f"{', '.join(case)}: {told}")
    tables.publish(args, sharded=report(tables.read(path)))


if __name__ == "__main__":
    main()
