"""The results files of what is trained on streamed images: one row a finished run."""

import csv
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import grain
import jax
import numpy as np

from benchmarks import tables
from examples.data.records import Records
from examples.streaming.settings import Streamed
from examples.training.report import CIRCUMSTANCES, Results, Row, circumstances, joined

KEY = (
    "classes",
    "images",
    "model",
    "optimiser",
    "method",
    "layers",
    "epochs",
    "batch_size",
    "learning_rate",
    "schedule",
    "warmup_epochs",
    "momentum",
    "b2",
    "weight_decay",
    "label_smoothing",
    "ema",
    "dtype",
    "image_size",
    "resize",
    "seed",
)
CURVES = {
    "train_loss_curve": "train_loss",
    "validation_loss_curve": "validation_loss",
    "validation_accuracy_curve": "validation_top1",
}
COLUMNS = (
    *KEY,
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "validation_top5",
    "best_accuracy",
    "validation_images",
    "unreadable",
    "seconds",
    "images_per_s",
    "waited",
    "mesh",
    "workers",
    "processes",
    "cpus",
    "load",
    *CIRCUMSTANCES,
    "grain",
    *CURVES,
)
# Barlow Twins: what tells its runs apart. Its rows are replaced, not only added: the
# linear probe may come later.
PRETRAINING_KEY = (
    "classes",
    "images",
    "model",
    "projector",
    "optimiser",
    "method",
    "layers",
    "epochs",
    "batch_size",
    "learning_rate",
    "bias_learning_rate",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "trust_coefficient",
    "redundancy",
    "dtype",
    "image_size",
    "seed",
)
POINTS = 200  # at most, of the curve over steps, each the mean of as many


class Rows(Results):
    """The rows of finished runs; see `examples.training.report.Results`."""

    columns = COLUMNS
    key = KEY


Numbers = Sequence[dict[str, float]]


def make_row(config: Streamed, training: Records, mesh: jax.sharding.Mesh) -> Row:
    """Return the row of a finished run of the ImageNet trainer."""
    epochs = read(config.output, "epochs")
    last = epochs[-1]
    values = {
        **spent(epochs),
        "train_loss": last["train_loss"],
        "validation_loss": last["validation_loss"],
        "validation_accuracy": last["validation_top1"],
        "validation_top5": last["validation_top5"],
        "best_accuracy": max(epoch["validation_top1"] for epoch in epochs),
        "validation_images": last["validation_images"],
    }
    row = {
        **key(config, training),
        **{name: f"{value:.6g}" for name, value in values.items()},
        **surroundings(config, mesh),
        **{
            name: joined([epoch[column] for epoch in epochs])
            for name, column in CURVES.items()
        },
    }
    return {name: row[name] for name in COLUMNS}


def make_pretraining_row(
    config: Streamed, training: Records, mesh: jax.sharding.Mesh
) -> tables.Row:
    """Return the row of a finished run of Barlow Twins, and of its probe if any."""
    epochs, probe = read(config.output, "epochs"), None
    if config.probe:
        probe = read(config.output / "probe", "epochs")
    last, losses = epochs[-1], [row["loss"] for row in read(config.output, "steps")]
    parts = np.array_split(losses, min(POINTS, len(losses)))
    return {
        **key(config, training, PRETRAINING_KEY),
        "train_loss": last["train_loss"],
        "validation_loss": last["validation_loss"],
        "validation_images": int(last["validation_images"]),
        **spent(epochs),
        "probe_epochs": config.probe_epochs if probe else None,
        "probe_learning_rate": config.probe_learning_rate if probe else None,
        "probe_accuracy": probe[-1]["validation_top1"] if probe else None,
        "probe_top5": probe[-1]["validation_top5"] if probe else None,
        "probe_train_loss": probe[-1]["train_loss"] if probe else None,
        "probe_images": int(probe[-1]["validation_images"]) if probe else None,
        "probe_seconds": spent(probe)["seconds"] if probe else None,
        **surroundings(config, mesh),
        "loss_curve": joined([part.mean() for part in parts]),
        "train_loss_curve": joined([epoch["train_loss"] for epoch in epochs]),
        "validation_loss_curve": joined([epoch["validation_loss"] for epoch in epochs]),
    }


def key(
    config: Streamed, training: Records, names: Sequence[str] = KEY
) -> dict[str, str]:
    """Return the columns that tell a run from others."""
    values = dataclasses.asdict(config)
    values |= {"classes": training.classes, "images": len(training)}
    if not config.takes_method:
        values |= {"method": "", "layers": ""}
    return {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in ((name, values[name]) for name in names)
    }


def read(folder: Path, what: str) -> Numbers:
    """Return the steps or the epochs of a finished training, as it has written them."""
    with (folder / f"{what}.csv").open(newline="") as file:
        return [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]


def spent(epochs: Numbers) -> dict[str, float]:
    """Return what all epochs took, and what they could not read."""
    seconds = sum(epoch["seconds"] for epoch in epochs)
    waited = sum(epoch["waited"] * epoch["seconds"] for epoch in epochs)
    return {
        "unreadable": sum(epoch["train_unreadable"] for epoch in epochs),
        "seconds": seconds,
        "images_per_s": sum(epoch["train_images"] for epoch in epochs) / seconds,
        "waited": waited / seconds,
    }


def surroundings(config: Streamed, mesh: jax.sharding.Mesh) -> Row:
    """Return the columns that say where and with what a row came about."""
    return {
        "mesh": " x ".join(str(n) for n in mesh.shape.values()),
        "workers": str(config.workers),
        "processes": str(jax.process_count()),
        "cpus": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        **circumstances(),
        "grain": grain.__version__,
    }
