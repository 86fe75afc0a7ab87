"""The results file of the ImageNet trainer: one row a finished run."""

import csv
import dataclasses
import os

import grain
import jax

from examples.data.records import Records
from examples.streaming.imagenet import Imagenet
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


class Rows(Results):
    """The rows of finished runs; see `examples.training.report.Results`."""

    columns = COLUMNS
    key = KEY


def make_row(config: Imagenet, training: Records, mesh: jax.sharding.Mesh) -> Row:
    """Return the row of a finished run, from its epochs.csv."""
    with (config.output / "epochs.csv").open(newline="") as file:
        epochs = [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]
    last, seconds = epochs[-1], sum(epoch["seconds"] for epoch in epochs)
    images = sum(epoch["train_images"] for epoch in epochs)
    waited = sum(epoch["waited"] * epoch["seconds"] for epoch in epochs)
    accuracies = [epoch["validation_top1"] for epoch in epochs]
    values = {
        "train_loss": last["train_loss"],
        "validation_loss": last["validation_loss"],
        "validation_accuracy": accuracies[-1],
        "validation_top5": last["validation_top5"],
        "best_accuracy": max(accuracies),
        "validation_images": last["validation_images"],
        "unreadable": sum(epoch["train_unreadable"] for epoch in epochs),
        "seconds": seconds,
        "images_per_s": images / seconds,
        "waited": waited / seconds,
    }
    row = {
        **key(config, training),
        **{name: f"{value:.6g}" for name, value in values.items()},
        "mesh": " x ".join(str(n) for n in mesh.shape.values()),
        "workers": str(config.workers),
        "processes": str(jax.process_count()),
        "cpus": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        **circumstances(),
        "grain": grain.__version__,
        **{
            name: joined([epoch[column] for epoch in epochs])
            for name, column in CURVES.items()
        },
    }
    return {name: row[name] for name in COLUMNS}


def key(config: Imagenet, training: Records) -> Row:
    """Return the columns that tell a run from others."""
    values = dataclasses.asdict(config)
    values |= {"classes": training.classes, "images": len(training)}
    if not config.takes_method:
        values |= {"method": "", "layers": ""}
    return {name: str(values[name]) for name in KEY}
