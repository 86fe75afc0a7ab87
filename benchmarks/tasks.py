"""What it costs to keep tasks apart: `python -m benchmarks.tasks`.

The gradient of a network with several exits: of the sum of all losses, and by the rules
of `orthax.combine_tasks`, side by side and in two passes. Writes `results/tasks.csv`
and the table of `README.md`. Rows that are there are left out (`--again`).
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tqdm

from benchmarks import tables, timing
from orthax import tasks

KEY = ("network", "tasks", "way", *tables.DEVICE)
TASKS = (2, 4, 8)
SUM = "sum of losses"
# Of the networks: features, examples in a batch, classes.
_WIDTH, _BATCH, _CLASSES = 512, 256, 10
_CHANNELS, _IMAGES, _SIDE = 32, 32, 32

Tree = Any
Losses = Callable[[Tree, Tree], jax.Array]


# ----------------------------------------------------------- networks with many exits


def _loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def _drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) * (2 / max(1, shape[-2])) ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def dense(tasks: int) -> tuple[Losses, Tree, Tree]:
    """Return the losses of an MLP with an exit after every second layer."""
    shapes = {f"layer{i}": (_WIDTH, _WIDTH) for i in range(2 * tasks)}
    shapes |= {f"head{i}": (_WIDTH, _CLASSES) for i in range(tasks)}

    def losses(params: Tree, batch: Tree) -> jax.Array:
        x, labels = batch
        found = []
        for i in range(tasks):
            for j in (2 * i, 2 * i + 1):
                x = jax.nn.relu(x @ params[f"layer{j}"])
            found.append(_loss(x @ params[f"head{i}"], labels))
        return jnp.stack(found)

    return losses, _drawn(shapes), _batch((_BATCH, _WIDTH))


def convolutional(tasks: int) -> tuple[Losses, Tree, Tree]:
    """Return the losses of a convolutional network, exits behind pairs of layers."""
    kernel = (3, 3, _CHANNELS, _CHANNELS)
    shapes = {f"conv{i}": kernel for i in range(2 * tasks)}
    shapes |= {f"head{i}": (_CHANNELS, _CLASSES) for i in range(tasks)}

    def losses(params: Tree, batch: Tree) -> jax.Array:
        x, labels = batch
        found = []
        for i in range(tasks):
            for j in (2 * i, 2 * i + 1):
                layout = ("NHWC", "HWIO", "NHWC")
                y = jax.lax.conv_general_dilated(
                    x, params[f"conv{j}"] / 3, (1, 1), "SAME", dimension_numbers=layout
                )
                x = jax.nn.relu(y)
            found.append(_loss(x.mean((1, 2)) @ params[f"head{i}"], labels))
        return jnp.stack(found)

    return losses, _drawn(shapes), _batch((_IMAGES, _SIDE, _SIDE, _CHANNELS))


def _batch(shape: tuple[int, ...]) -> Tree:
    keys = jax.random.split(jax.random.key(1))
    labels = jax.random.randint(keys[1], shape[:1], 0, _CLASSES)
    return jax.random.normal(keys[0], shape), labels


NETWORKS = {"dense": dense, "convolutional": convolutional}


# ------------------------------------------------------------------- ways to a gradient


def _summed(losses: Losses) -> Callable[[Tree, Tree], Tree]:
    return jax.grad(lambda params, batch: losses(params, batch).sum())


def _side_by_side(
    rule: tasks.TaskRule,
) -> Callable[[Losses], Callable[[Tree, Tree], Tree]]:
    def way(losses: Losses) -> Callable[[Tree, Tree], Tree]:
        tx = tasks.combine_tasks(rule)

        def gradient(params: Tree, batch: Tree) -> Tree:
            _, grads = tasks.task_value_and_grad(losses)(params, batch)
            return tx.update(grads, tx.init(params), params)[0]

        return gradient

    return way


def _two_passes(losses: Losses) -> Callable[[Tree, Tree], Tree]:
    combined = tasks.combined_value_and_grad(losses)
    return lambda params, batch: combined(params, batch)[1]


WAYS = {
    SUM: _summed,
    "OSGD()": _side_by_side(tasks.OSGD()),
    "OSGD(), two passes": _two_passes,
    "PCGrad()": _side_by_side(tasks.PCGrad()),
    "CAGrad()": _side_by_side(tasks.CAGrad()),
    "Symmetric()": _side_by_side(tasks.Symmetric()),
}


def measure(network: str, tasks: int, calls: int) -> list[tables.Row]:
    """Return a row for every way, all called in the same rounds."""
    losses, params, batch = NETWORKS[network](tasks)
    programs, compiling = {}, {}
    for name, way in WAYS.items():
        start = time.perf_counter()
        programs[name] = jax.jit(way(losses)).lower(params, batch).compile()
        compiling[name] = time.perf_counter() - start
        jax.block_until_ready(programs[name](params, batch))
    seconds = timing.interleaved(
        {name: lambda p=p: p(params, batch) for name, p in programs.items()},
        dict.fromkeys(programs, calls),
        timing.pause(),
    )
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    rows = []
    for name, program in programs.items():
        low, median, high = timing.quartiles(seconds[name].values())
        times = timing.quartiles(timing.ratios(seconds[name], seconds[SUM]))
        memory = program.memory_analysis()
        rows.append(
            {
                "network": network,
                "tasks": tasks,
                "way": name,
                "median_ms": median * 1e3,
                "quartile1_ms": low * 1e3,
                "quartile3_ms": high * 1e3,
                "calls": calls,
                "times_sum": times[1],
                "times_sum_quartile1": times[0],
                "times_sum_quartile3": times[2],
                "compile_s": compiling[name],
                "parameters_mib": size / 2**20,
                "temporary_mib": memory.temp_size_in_bytes / 2**20,
            }
        )
    return rows


# ------------------------------------------------------------------------- what is told


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the table of one device."""
    header = ["network", "tasks", "gradient", "ms (quartiles)", "times the sum"]
    header += ["temporary MiB", "over parameters", "compile s"]
    body = []
    for each in rows:
        sides = [tables.cell(each, f"quartile{i}_ms", ".3g") for i in (1, 3)]
        spread = [tables.cell(each, f"times_sum_quartile{i}", ".2f") for i in (1, 3)]
        over = float(each["temporary_mib"]) / float(each["parameters_mib"])
        body.append(
            [
                each["network"],
                each["tasks"],
                f"`{each['way']}`" if each["way"] != SUM else SUM,
                f"{tables.cell(each, 'median_ms', '.3g')} ({', '.join(sides)})",
                f"{tables.cell(each, 'times_sum', '.2f')} ({', '.join(spread)})",
                tables.cell(each, "temporary_mib", ".1f"),
                f"{over:.1f}",
                tables.cell(each, "compile_s", ".1f"),
            ]
        )
    return tables.markdown(header, body)


def report(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables of all devices, and what would fill those that are missing."""
    text = tables.by_device(rows, markdown)
    if any(each["platform"] == "gpu" for each in rows):
        return text
    return f"{text}\n\nOn a GPU: not yet run; `python -m benchmarks.tasks`."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS))
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--again", action="store_true", help="also what is there")
    tables.add_paths(parser)
    args = parser.parse_args(argv)
    path = args.results / "tasks.csv"
    device = tables.circumstances()
    rows = tables.missing(
        path,
        KEY,
        itertools.product(args.networks, args.tasks, WAYS),
        again=args.again,
    )
    cases = [*dict.fromkeys(row[:2] for row in rows)]
    for network, count in tqdm.tqdm(cases, desc="tasks"):
        rows = measure(network, count, args.calls)
        tables.write(path, [row | device for row in rows], KEY)
    tables.publish(args, tasks=report(tables.read(path)))


if __name__ == "__main__":
    main()
