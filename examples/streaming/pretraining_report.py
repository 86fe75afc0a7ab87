"""The page of Barlow Twins: `python -m examples.streaming.pretraining_report`.

Writes `examples/results/barlow_twins.md` from `barlow_twins.csv`, one row a finished
run, and `barlow_twins_rates.csv`, one row a measured rate
(`examples/streaming/rates.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import tables
from examples.barlow_twins import Pretraining
from examples.streaming.report import (
    COST,
    HOW,
    MEASURED,
    Whole,
    arms,
    command,
    estimates,
    like,
    numbers,
    rate_tables,
    smaller,
)
from examples.streaming.results import PRETRAINING_KEY, key
from examples.training.report import NOT_YET, RESULTS, Row, curve, draw_curves, spread

# What the paper trains, with its exact U V^T, and what else there is to run.
FULL = (
    {"optimiser": "lars"},
    {"optimiser": "orthogonal_lars", "method": "svd"},
    {"optimiser": "orthogonal_lars"},
    {"optimiser": "orthogonal_lars", "layers": "all"},
)
FILE = "examples/results/barlow_twins.csv"

_PAGE = """\
# Barlow Twins

Written by `python -m examples.streaming.pretraining_report` from `barlow_twins.csv`,
one row a run, and `barlow_twins_rates.csv`, one row a measured rate; nothing is typed
by hand.

LARS beside Orthogonal-LARS, the same chain behind polar factors of the convolutions'
gradients. The paper (arXiv 2202.07052, Figure 7) shows the loss in pre-training on
ImageNet, lower with Orthogonal-LARS, and neither numbers nor a linear probe. The code
of Zbontar et al. (arXiv 2103.03230) comes with a probe's top-1 of 73.5 % and top-5 of
91.0 %, with LARS, after 1000 epochs with batches of 2048.

## Trained on a part of Tiny-ImageNet

The loss after the last epoch, of its training and on the whole batches of the
validation images; of a linear layer on the features of the encoder, which stays as it
was, accuracy on the validation images, per cent. Mean and one standard error of n runs.
Nothing was tuned: both optimisers have the settings of the command. Killed, it goes on
where it was.

{runs}

## Rates

{how}
An image is two views: both are read, and both are trained on.

{rates}

## All of ImageNet

{cost}

{full}
"""


def page(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return the page."""
    return _PAGE.format(
        runs=run_table(rows) or NOT_YET,
        how=HOW.format(plain="LARS"),
        rates=rate_tables(rates, "LARS") or NOT_YET,
        cost=COST.format(plain="LARS"),
        full=full_table(rows, rates),
    )


def run_command(row: Row, data: str, more: str = "") -> str:
    """Return the command of a run."""
    usual = Pretraining(optimiser=row["optimiser"])
    if row.get("probe_epochs"):
        probe = f"--probe --probe-epochs {row['probe_epochs']}"
        probe += f" --probe-learning-rate {row['probe_learning_rate']}"
        more = f"{probe} {more}".strip()
    names = PRETRAINING_KEY
    program = f"examples.barlow_twins --data-dir {data}"
    return command(program, row, key(usual, Whole(), names), names, more)


def run_table(rows: Sequence[Row]) -> str:
    """Return the table of the runs on smaller sets than ImageNet, and their figure."""
    body = []
    for row, group in arms(smaller(rows), PRETRAINING_KEY):
        probed = [member for member in group if member["probe_accuracy"]]
        accuracy = (
            spread(100 * numbers(probed, f"probe_{k}"), 1) if probed else NOT_YET
            for k in ("accuracy", "top5")
        )
        seconds = f"{numbers(group, 'seconds').mean():.0f}"
        body.append(
            [
                run_command(row, "TREE"),
                f"{row['images']} of {row['classes']} classes",
                spread(numbers(group, "train_loss"), 1),
                spread(numbers(group, "validation_loss"), 1),
                *accuracy,
                str(len(group)),
                seconds,
                f"{numbers(group, 'images_per_s').mean():.0f}",
                f"{numbers(group, 'waited').mean():.1%}",
                f"{row['device']}, load {row['load']}, jax {row['jax']}",
            ]
        )
    if not body:
        return ""
    header = ["", "images", "training loss", "validation loss", "top-1", "top-5", "n"]
    header += ["s before the probe", "images/s", "waiting for data", "device"]
    text = "\n\n![loss by step](barlow_twins.png)"
    return tables.markdown(header, body) + text


def full_table(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """Return what there is to run on all of ImageNet, with what it would take."""
    body = []
    for settings in FULL:
        config = Pretraining(**settings)
        wanted = key(config, Whole(), PRETRAINING_KEY)
        ours = like(rows, wanted, but=("seed", "images"))
        probed = [row for row in ours if row["probe_accuracy"]]
        name = "-".join(settings.values())
        where = f"--output runs/barlow_twins/{name} --results {FILE}"
        costs = estimates(config, rates, (*MEASURED, "projector"))
        body.append(
            [
                run_command(wanted, "DIR", f"--probe {where}"),
                spread(numbers(ours, "train_loss"), 1) if ours else NOT_YET,
                spread(100 * numbers(probed, "probe_accuracy"), 1) if probed else "",
                str(len(ours)),
                "; ".join(costs) or "no rate measured",
            ]
        )
    header = ["", "training loss", "top-1, %", "n", "estimate"]
    return tables.markdown(header, body)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss of the smaller runs by step, and on validation images by epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (row, group) in enumerate(arms(smaller(rows), PRETRAINING_KEY)):
        rate = f"rate {row['learning_rate']}"
        label = f"{row['model']}, {row['optimiser']} {row['method']}, {rate}"
        epochs = int(row["epochs"])
        for axis, name in ((left, "loss"), (right, "validation_loss")):
            curves = np.array([curve(member, name) for member in group])
            points = curves.shape[1]
            x = np.arange(1, points + 1) * epochs / points
            draw_curves(axis, curves, x, marker=".", color=f"C{i}", label=label)
    left.set(xlabel="epoch", title="training loss")
    right.set(xlabel="epoch", title="loss on validation images")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Write the page and its figure."""
    rows = tables.read(RESULTS / "barlow_twins.csv")
    rates = tables.read(RESULTS / "barlow_twins_rates.csv")
    (RESULTS / "barlow_twins.md").write_text(page(rows, rates))
    if smaller(rows):
        plot(rows, RESULTS / "barlow_twins.png")


if __name__ == "__main__":
    main()
