"""The page of the ImageNet trainer: `python -m examples.streaming.report`.

Writes `examples/results/imagenet.md` from `imagenet.csv`, one row a finished run, and
`imagenet_rates.csv`, one row a measured rate (`examples/streaming/rates.py`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import tables
from examples.streaming.imagenet import Imagenet
from examples.streaming.results import KEY, Rows, key
from examples.training.report import RESULTS, Row, curve, mean_and_error, spread

NOT_YET = "not yet run"
IMAGES = 1_281_167  # of ImageNet's training split
# What the paper reports (arXiv 2202.07052, Section 3), and what else there is to run.
FULL = (
    ("61.9", {"optimiser": "sgd"}),
    ("67.5", {"optimiser": "orthogonal_sgd", "method": "svd"}),
    ("", {"optimiser": "orthogonal_sgd"}),
    ("", {"optimiser": "sgd", "model": "resnet50"}),
    ("", {"optimiser": "orthogonal_sgd", "model": "resnet50"}),
    ("", {"optimiser": "orthogonal_sgd", "model": "vit_s16"}),
)

_PAGE = """\
# ImageNet

Written by `python -m examples.streaming.report` from `imagenet.csv`, one row a run, and
`imagenet_rates.csv`, one row a measured rate; nothing is typed by hand.

## Trained on a part of Tiny-ImageNet

Accuracy on the validation split, per cent, after the last epoch, mean and one standard
error of n runs. Nothing was tuned: every optimiser has the settings of the table. The
command, in one line and for each optimiser; killed, it goes on where it was:

    python -m examples.train imagenet --data-dir TREE --model resnet18 --image-size 64
    --resize 64 --dtype float32 --workers 0 --batch-size 250 --epochs 3 --optimiser sgd
    --output runs/imagenet/tiny-sgd --results examples/results/imagenet.csv

{runs}

## Rates

`input` reads, decodes, cuts and batches, and trains nothing; `step` trains on the same
random images and reads nothing. The overhead is over SGD's step of the same batch.
"load" is how many other programs there were for the cores: images per second are of
what those left, images a CPU second (of one process) are not.

{rates}

## All of ImageNet

The commands, for as many devices as there are: the mesh is all of them, data parallel,
unless `--mesh DATA FSDP` says otherwise. The estimate is of the steps alone, on the
device and with the batch of the rate that it is computed from, which is scaled to 1024
images: the passes over the network with the images, the rest of the optimiser's step,
its time over SGD's, not at all.

{full}
"""


def page(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return the page."""
    return _PAGE.format(
        runs=run_table(rows) or NOT_YET,
        rates=rate_tables(rates) or NOT_YET,
        full=full_table(rows, rates),
    )


def arms(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Yield the rows that differ in their seeds alone, behind the first of them."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in KEY if k != "seed"), []).append(row)
    for group in found.values():
        yield group[0], group


def numbers(group: Sequence[Row], name: str) -> np.ndarray:
    """Return a column of some rows."""
    return np.array([float(row[name]) for row in group])


def run_table(rows: Sequence[Row]) -> str:
    """Return the table of the runs on smaller sets than ImageNet, and their figure."""
    body, small = [], [row for row in rows if row["classes"] != "1000"]
    for row, group in arms(small):
        settings = (
            f"{row['images']} images of {row['classes']} classes, {row['image_size']} "
            f"pixels, {row['epochs']} epochs, batch {row['batch_size']}, "
            f"{row['schedule']} rate {row['learning_rate']}, {row['dtype']}"
        )
        accuracy = (
            100 * numbers(group, f"validation_{k}") for k in ("accuracy", "top5")
        )
        body.append(
            [
                f"{row['model']}, `{row['optimiser']}` {row['method']}",
                settings,
                *(spread(x, 1) for x in accuracy),
                spread(numbers(group, "train_loss"), 2),
                str(len(group)),
                f"{numbers(group, 'seconds').mean():.0f}",
                f"{numbers(group, 'images_per_s').mean():.0f}",
                f"{numbers(group, 'waited').mean():.1%}",
                f"{row['device']}, load {row['load']}, jax {row['jax']}",
            ]
        )
    if not body:
        return ""
    header = ["", "settings", "top-1", "top-5", "training loss", "n"]
    header += ["s a run", "images/s", "waiting for data", "device"]
    text = "\n\n![loss and accuracy by epoch](imagenet.png)"
    return tables.markdown(header, body) + text


def rate_tables(rates: Sequence[Row]) -> str:
    """Return a table for every device of what was measured on it."""

    def table(rows: list[Row]) -> str:
        header = ["", "images of", "pixels", "batch", "images/s", "ms a batch"]
        header += ["over SGD", "images a CPU second", "load"]
        body = []
        for row in rows:
            plain = sgd_of(row, rates)
            over = ""
            if plain and row["optimiser"] != "sgd":
                ratio = float(row["seconds"]) / float(plain["seconds"])
                over = f"{ratio - 1:+.0%}"
            what = f"input, {row.get('workers')} workers"
            if row["kind"] == "step":
                what = f"step, {row['model']}, `{row['optimiser']}` {row['method']}"
                what += f", {row['dtype']}, {row['devices']} devices"
            cells = row.get("data") or "noise", row["image_size"], row["batch_size"]
            speed = float(row["images_per_s"]), 1e3 * float(row["seconds"])
            texts = *cells, *(f"{x:.4g}" for x in speed), over
            alone = tables.cell(row, "images_per_cpu_s", ".0f")
            body.append([what, *texts, alone, row["load"]])
        return tables.markdown(header, body)

    return tables.by_device(rates, table)


def steps_of(rates: Sequence[Row]) -> list[Row]:
    """Return the rows of steps; those of input have not all of their columns."""
    return [row for row in rates if row["kind"] == "step"]


def sgd_of(row: Row, rates: Sequence[Row]) -> Row | None:
    """Return SGD's row for the same network, batch and device as another one's."""
    if row["kind"] != "step":
        return None
    same = "kind", "model", "dtype", "image_size", "batch_size", "devices"
    for other in steps_of(rates):
        equal = all(other[name] == row[name] for name in (*same, *tables.DEVICE))
        if equal and other["optimiser"] == "sgd":
            return other
    return None


def full_table(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return what there is to run on all of ImageNet, with what it would take."""
    body = []
    for paper, settings in FULL:
        config = Imagenet(**settings)
        name = "-".join(settings[k] for k in sorted(settings, reverse=True))
        words = " ".join(f"--{k} {x}" for k, x in settings.items())
        command = (
            f"`python -m examples.train imagenet --data-dir DIR {words} --output "
            f"runs/imagenet/{name} --results examples/results/imagenet.csv`"
        )
        wanted = key(config, _Whole())
        known = [k for k in KEY if k not in ("seed", "images")]
        ours = [row for row in rows if all(row[k] == wanted[k] for k in known)]
        found = NOT_YET
        if ours:
            found = spread(100 * numbers(ours, "validation_accuracy"), 1)
        costs = "; ".join(estimates(config, rates)) or "no rate measured"
        body.append([command, paper, found, str(len(ours)), costs])
    return tables.markdown(["", "paper, %", "top-1, %", "n", "estimate"], body)


class _Whole:
    """ImageNet, of which no image is needed to tell a run."""

    classes = 1000

    def __len__(self) -> int:
        return IMAGES


def estimates(config: Imagenet, rates: Sequence[Row]) -> Iterator[str]:
    """Yield what the steps of a training would take on each device with a rate."""
    steps = config.epochs * (IMAGES // config.batch_size)
    for row in steps_of(rates):
        plain = sgd_of(row, rates)
        method = config.method if config.takes_method else ""
        shown = config.model, config.optimiser, method, str(config.image_size)
        found = [row[k] for k in ("model", "optimiser", "method", "image_size")]
        if plain is None or tuple(found) != shown:
            continue
        passes = float(plain["seconds"]) * config.batch_size / int(row["batch_size"])
        rest = float(row["seconds"]) - float(plain["seconds"])
        hours = steps * (passes + max(rest, 0.0)) / 3600
        yield (
            f"{steps} steps: {hours:.3g} h on {row['devices']} of {row['device']} "
            f"({row['dtype']}, measured with batch {row['batch_size']})"
        )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw training loss and validation accuracy of the smaller runs by epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    names = "train_loss", "validation_accuracy"
    small = [row for row in rows if row["classes"] != "1000"]
    for i, (row, group) in enumerate(arms(small)):
        label = f"{row['model']}, {row['optimiser']} {row['method']}"
        for axis, name in zip(panels, names, strict=True):
            curves = np.array([curve(member, name) for member in group])
            mean, error = mean_and_error(curves)
            x = np.arange(1, len(mean) + 1)
            axis.plot(x, mean, marker=".", color=f"C{i}", label=label)
            low, high = mean - error, mean + error
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    for axis, name in zip(panels, names, strict=True):
        axis.set(xlabel="epoch", title=name.replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Write the page and its figure."""
    rows = Rows(RESULTS / "imagenet.csv").rows()
    rates = tables.read(RESULTS / "imagenet_rates.csv")
    (RESULTS / "imagenet.md").write_text(page(rows, rates))
    if any(row["classes"] != "1000" for row in rows):
        plot(rows, RESULTS / "imagenet.png")


if __name__ == "__main__":
    main()
