"""Figures 8 and 9 of the paper: what happens inside a network while it is trained."""

import csv
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from examples.data import Dataset, Split
from examples.paper.studies import run_of
from examples.training.report import KEY, Row
from examples.training.runs import Limits, OutOfTime
from examples.training.supervised import (
    Recipe,
    Run,
    State,
    forward,
    normalised,
    score,
    train_together,
)
from orthax import diagnostics

COLUMNS = ("probe", *KEY, "epoch", "name", "value")
_IMAGES = 256


@functools.partial(jax.jit, static_argnames="recipe")
def cosines(state: State, images: Split, recipe: Recipe) -> dict[str, jax.Array]:
    """Return how much alike the feature maps of every layer are (Section 3.2).

    The mean |cosine| of all pairs, behind batch normalisation and ReLU, over images.
    """
    model = nnx.merge(state.graphdef, state.params, state.statistics, copy=True)
    model.eval()
    layers = model.representations(normalised(images.images, recipe))
    means = (diagnostics.representation_cosines(x).mean.mean() for x in layers)
    return {f"layer {i}": mean for i, mean in enumerate(means, 1)}


# layer2[1].conv2 in PyTorch's names: three blocks are in front of its stage.
_DEAD_IN = "blocks/layers/4/conv2/kernel"


@functools.partial(jax.jit, static_argnames="recipe")
def dead(state: State, images: Split, recipe: Recipe) -> dict[str, jax.Array]:
    """Return how many parameters of one layer have hardly any gradient (Section 3.3).

    As in the authors' code those of at most 1e-4, and those of at most a thousandth of
    the largest in the layer, which the scale of the gradient does not change.
    """

    def objective(params: nnx.State) -> jax.Array:
        inputs = normalised(images.images, recipe)
        logits, _ = forward(state, params, inputs, recipe.norm_groups)
        return score(logits, images.labels)[0].mean()

    grads = jax.grad(objective)(state.params)
    found = {}
    for name, threshold, relative in (
        ("at most 1e-4", 1e-4, False),
        ("at most a thousandth of the largest", 1e-3, True),
    ):
        by_path = diagnostics.dead_parameters(grads, threshold, relative=relative)
        found[name] = by_path[_DEAD_IN].count
    return found


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is measured after every epoch of some runs.

    Attributes:
      title: what it is.
      unit: of the numbers.
      measure: from the state, some images and the recipe to numbers by name.
      part: the images: those to train on, or those to validate.
      runs: the runs, with seed 0.
    """

    title: str
    unit: str
    measure: Callable[[State, Split, Recipe], dict[str, jax.Array]]
    part: str
    runs: tuple[Run, ...]


PROBES = {
    "figure8": Probe(
        "Figure 8: mean |cosine| between the representations of a layer's components",
        "mean |cosine|",
        cosines,
        "validation",
        tuple(run_of("basic_cnn", name) for name in ("sgd", "orthogonal_sgd")),
    ),
    "figure9": Probe(
        "Figure 9: parameters of layer2[1].conv2 with hardly any gradient",
        "parameters",
        dead,
        "train",
        tuple(run_of("resnet50", name) for name in ("sgd", "orthogonal_sgd")),
    ),
}


def read(path: Path) -> list[Row]:
    """Return the rows of a file of probes, the last of every epoch."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return list(
        {tuple(row[name] for name in COLUMNS[:-1]): row for row in rows}.values()
    )


def finish(
    name: str, runs: Sequence[Run], data: Dataset, path: Path, limits: Limits
) -> bool:
    """Train and measure what the file does not hold; return if there was time."""
    probe = PROBES[name]
    images = jax.tree.map(lambda x: x[:_IMAGES], getattr(data, probe.part))
    for run in runs:
        key = run.key()
        there = {
            int(row["epoch"])
            for row in read(path)
            if row["probe"] == name and all(row[k] == key[k] for k in KEY)
        }
        if len(there) == run.epochs:
            continue

        def watch(epoch: int, state: State, run: Run = run) -> None:
            single = jax.tree.map(lambda x: x[0], state)
            found = probe.measure(single, images, run.recipe)
            _append(path, name, run, epoch + 1, found)

        own = dataclasses.replace(limits, folder=limits.folder / name)
        try:
            train_together([run], data.train, data.validation, limits=own, watch=watch)
        except OutOfTime:
            return False
    return True


def _append(
    path: Path, probe: str, run: Run, epoch: int, found: dict[str, jax.Array]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for name, value in found.items():
            row = {"probe": probe, "epoch": epoch, "name": name}
            writer.writerow(row | run.key() | {"value": f"{float(value):.6g}"})


def draw(name: str, rows: Sequence[Row], path: Path) -> bool:
    """Draw a probe by epoch, mean over seeds; return whether there is anything."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["probe"] == name:
            series = found.setdefault((row["name"], row["optimiser"]), {})
            series.setdefault(int(row["epoch"]), []).append(float(row["value"]))
    if not found:
        return False
    names = list(dict.fromkeys(name for name, _ in found))
    figure = Figure(figsize=(1 + 4 * len(names), 4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, part in zip(axes, names, strict=True):
        for (measured, optimiser), series in found.items():
            if measured == part:
                epochs = sorted(series)
                label = f"{optimiser} (n = {len(series[epochs[0]])})"
                axis.plot(epochs, [np.mean(series[x]) for x in epochs], label=label)
        axis.set(title=part, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel(PROBES[name].unit)
    figure.suptitle(PROBES[name].title)
    figure.savefig(path, dpi=120)
    return True
