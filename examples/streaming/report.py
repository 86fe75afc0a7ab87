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
from examples.streaming.settings import Streamed
from examples.training.report import NOT_YET, RESULTS, Row, curve, draw_curves, spread

FILE = "examples/results/imagenet.csv"
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

# What to run on a GPU before that.
TIMED = ("resnet34", "resnet50")
TINY = {"model": "resnet18", "epochs": 30, "image_size": 64, "resize": 64}
TINY |= {"batch_size": 256}
SEEDS = 3

_PAGE = """\
# ImageNet

Written by `python -m examples.streaming.report` from `imagenet.csv`, one row a run, and
`imagenet_rates.csv`, one row a measured rate; nothing is typed by hand.

## Trained on a part of Tiny-ImageNet

Accuracy on the validation split, per cent, after the last epoch, mean and one standard
error of n runs. Nothing was tuned. Killed, a command goes on where it was.

{runs}

## Rates

{how}

{rates}

## On a GPU

{gpu}

## All of ImageNet

{cost}

{full}
"""
HOW = """\
`input` reads, decodes, cuts and batches, and trains nothing; `step` trains on the same
random images and reads nothing. The overhead is over {plain}'s step of the same batch.
"load" is how many other programs there were for the cores: images per second are of
what those left, images a CPU second (of one process) are not."""
COST = """\
The commands, for as many devices as there are: the mesh is all of them, data parallel,
unless `--mesh DATA FSDP` says otherwise. The estimate is of the steps alone, on the
device and with the batch of the rate that it is computed from, which is scaled to 1024
images: the passes over the network with the images, the rest of the optimiser's step,
its time over {plain}'s, not at all."""


def page(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return the page."""
    return _PAGE.format(
        runs=run_table(rows) or NOT_YET,
        how=HOW.format(plain="SGD"),
        rates=rate_tables(rates, "SGD") or NOT_YET,
        gpu=gpu_table(rows, rates),
        cost=COST.format(plain="SGD"),
        full=full_table(rows, rates),
    )


def arms(
    rows: Sequence[Row], names: Sequence[str] = KEY
) -> Iterator[tuple[Row, list[Row]]]:
    """Yield the rows that differ in their seeds alone, behind the first of them."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in names if k != "seed"), []).append(row)
    for group in found.values():
        yield group[0], group


def smaller(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of runs on smaller sets than ImageNet."""
    return [row for row in rows if row["classes"] != "1000"]


def like(rows: Sequence[Row], wanted: Row, *, but: Sequence[str]) -> list[Row]:
    """Return the rows that are as wanted, but for some of its columns."""
    known = {name: value for name, value in wanted.items() if name not in but}
    return [row for row in rows if known.items() <= row.items()]


def numbers(group: Sequence[Row], name: str) -> np.ndarray:
    """Return a column of some rows."""
    return np.array([float(row[name]) for row in group])


def command(
    program: str, row: Row, usual: Row, names: Sequence[str], more: str = ""
) -> str:
    """Return the command of a run: what differs from the settings by default.

    Args:
      program: what is called, with the folder of the data.
      row: the settings, as `examples.streaming.results.key` has them.
      usual: those by default.
      names: which there are.
      more: further words.
    """
    words = [
        f"--{name.replace('_', '-')} {row[name]}"
        for name in names
        if name not in ("classes", "images")
        and (row[name] != usual[name] or name == "optimiser")
    ]
    return f"`{' '.join(['python -m', program, *words, more]).strip()}`"


def run_command(row: Row, data: str, more: str = "") -> str:
    """Return the command of a run of the ImageNet trainer."""
    usual = key(Imagenet(optimiser=row["optimiser"]), Whole())
    return command(f"examples.train imagenet --data-dir {data}", row, usual, KEY, more)


def run_table(rows: Sequence[Row]) -> str:
    """Return the table of the runs on smaller sets than ImageNet, and their figure."""
    body = []
    for row, group in arms(smaller(rows)):
        accuracy = (
            100 * numbers(group, f"validation_{k}") for k in ("accuracy", "top5")
        )
        body.append(
            [
                run_command(row, "TREE"),
                f"{row['images']} of {row['classes']} classes",
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
    header = ["", "images", "top-1", "top-5", "training loss", "n"]
    header += ["s a run", "images/s", "waiting for data", "device"]
    text = "\n\n![loss and accuracy by epoch](imagenet.png)"
    return tables.markdown(header, body) + text


def rate_tables(rates: Sequence[Row], plain: str) -> str:
    """Return a table for every device of what was measured on it."""

    def table(rows: list[Row]) -> str:
        header = ["", "images of", "pixels", "batch", "images/s", "ms a batch"]
        header += [f"over {plain}", "images a CPU second", "load"]
        body = []
        for row in rows:
            least, over = plain_of(row, rates), ""
            if least and least is not row:
                ratio = float(row["seconds"]) / float(least["seconds"])
                over = f"{ratio - 1:+.0%}"
            what = f"input, {row.get('workers')} workers"
            if row["kind"] == "step":
                what = f"step, {row['model']} {row.get('projector', '')}, "
                what += f"`{row['optimiser']}` {row['method']}, {row['dtype']}, "
                what += f"{row['devices']} devices"
            cells = row.get("data") or "noise", row["image_size"], row["batch_size"]
            speed = float(row["images_per_s"]), 1e3 * float(row["seconds"])
            texts = *cells, *(f"{x:.4g}" for x in speed), over
            alone = tables.cell(row, "images_per_cpu_s", ".0f")
            body.append([what, *texts, alone, row["load"]])
        return tables.markdown(header, body)

    return tables.by_device(rates, table)


def gpu_table(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return what there is to run on a GPU, and what it showed."""
    body = []
    for model in TIMED:
        timed = [
            f"{row['optimiser']} {float(row['images_per_s']):.4g} images/s"
            for row in steps_of(rates)
            if (row["platform"], row["model"]) == ("gpu", model)
        ]
        told = f"`python -m examples.streaming.rates step --model {model}`"
        body.append([told, "; ".join(timed) or NOT_YET])
    for optimiser in ("sgd", "orthogonal_sgd"):
        wanted = key(Imagenet(optimiser=optimiser, **TINY), Whole())
        ours = like(rows, wanted, but=("seed", "images", "classes"))
        found = NOT_YET
        if ours:
            accuracy = spread(100 * numbers(ours, "validation_accuracy"), 1)
            found = f"top-1 {accuracy} %, n = {len(ours)}"
        seeds = ", ".join(map(str, range(SEEDS)))
        where = f"--output runs/imagenet/tiny-{optimiser}-SEED --results {FILE}"
        told = run_command(wanted, "TREE", f"{where} --seed SEED")
        body.append([f"{told}, Tiny-ImageNet, for SEED in {seeds}", found])
    return tables.markdown(["", "measured"], body)


def steps_of(rates: Sequence[Row]) -> list[Row]:
    """Return the rows of steps; those of input have not all of their columns."""
    return [row for row in rates if row["kind"] == "step"]


def plain_of(row: Row, rates: Sequence[Row]) -> Row | None:
    """Return the row of SGD, or LARS, for the same network, batch and device."""
    if row["kind"] != "step":
        return None
    same = "model", "projector", "dtype", "image_size", "batch_size", "devices"
    for other in steps_of(rates):
        equal = all(other.get(x) == row.get(x) for x in (*same, *tables.DEVICE))
        if equal and other["optimiser"] in ("sgd", "lars"):
            return other
    return None


def full_table(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return what there is to run on all of ImageNet, with what it would take."""
    body = []
    for paper, settings in FULL:
        config = Imagenet(**settings)
        name = "-".join(settings[k] for k in sorted(settings, reverse=True))
        where = f"--output runs/imagenet/{name} --results {FILE}"
        wanted = key(config, Whole())
        ours = like(rows, wanted, but=("seed", "images"))
        found = NOT_YET
        if ours:
            found = spread(100 * numbers(ours, "validation_accuracy"), 1)
        costs = "; ".join(estimates(config, rates)) or "no rate measured"
        told = run_command(wanted, "DIR", where)
        body.append([told, paper, found, str(len(ours)), costs])
    return tables.markdown(["", "paper, %", "top-1, %", "n", "estimate"], body)


class Whole:
    """ImageNet, of which no image is needed to tell a run."""

    classes = 1000

    def __len__(self) -> int:
        return IMAGES


MEASURED = ("model", "optimiser", "method", "image_size")


def estimates(
    config: Streamed, rates: Sequence[Row], names: Sequence[str] = MEASURED
) -> Iterator[str]:
    """Yield what the steps of a training would take on each device with a rate."""
    steps = config.epochs * (IMAGES // config.batch_size)
    wanted = key(config, Whole(), names)
    for row in steps_of(rates):
        plain = plain_of(row, rates)
        if plain is None or any(row[name] != wanted[name] for name in names):
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
    for i, (row, group) in enumerate(arms(smaller(rows))):
        label = f"{row['model']}, {row['optimiser']} {row['method']}"
        for axis, name in zip(panels, names, strict=True):
            curves = np.array([curve(member, name) for member in group])
            draw_curves(axis, curves, marker=".", color=f"C{i}", label=label)
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
    if smaller(rows):
        plot(rows, RESULTS / "imagenet.png")


if __name__ == "__main__":
    main()
