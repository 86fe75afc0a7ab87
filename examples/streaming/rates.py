"""How fast trainings on streamed images are: `python -m examples.streaming.rates`.

`input` reads images as the trainers do and trains nothing; `step` (ImageNet) and
`pretraining` (Barlow Twins) train on the same random images again and again and read
nothing. What is measured becomes rows of `imagenet_rates.csv` and
`barlow_twins_rates.csv` in `examples/results/`.
"""

import abc
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from benchmarks import tables, timing
from examples.barlow_twins import Pretraining, make_task as make_pretraining_task
from examples.data.imagenet import Reading, random_view, training_batches, two_views
from examples.data.records import load_imagenet
from examples.streaming.imagenet import Imagenet
from examples.streaming.program import Task, make_mesh, make_program, place
from examples.streaming.settings import Streamed
from examples.streaming.task import make_task
from examples.training.optimisers import Method, Optimiser
from examples.training.report import RESULTS

FILE = RESULTS / "imagenet_rates.csv"
PRETRAINING_FILE = RESULTS / "barlow_twins_rates.csv"
KEY = (
    "kind",
    "data",
    "model",
    "projector",
    "optimiser",
    "method",
    "dtype",
    "image_size",
    "batch_size",
    "workers",
    "devices",
    *tables.DEVICE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """Measure images per second of reading, by number of worker processes."""

    data_dir: Path
    """Folder of train/<class>/* and val/<class>/*, or of prepared TFDS sets."""
    called: str
    """What to call these images in the file."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of processes to try; 0 is one thread of the program itself."""
    image_size: int = 224
    """Height and width of what the network would see, pixels."""
    batch_size: int = 64
    """Images in a batch."""
    batches: int = 10
    """Batches to time, after as many as start the processes."""
    views: Literal[1, 2] = 1
    """Crops of an image: one for ImageNet, two for Barlow Twins."""
    results: Path | None = None
    """File of the rows; default: that of the trainer which takes so many views."""

    @property
    def file(self) -> Path:
        """Where the rows go."""
        return self.results or (FILE if self.views == 1 else PRETRAINING_FILE)

    def rows(self) -> Iterator[tables.Row]:
        """Yield a row for every number of workers."""
        records, _ = load_imagenet(self.data_dir)
        view = random_view if self.views == 1 else two_views
        view = functools.partial(view, size=self.image_size)
        for workers in self.workers:
            reading = Reading(self.batch_size, workers, threads=1, unreadable="skip")
            # One ahead and one under way, in every process: not of the timed ones.
            ahead = 2 * max(workers, 1)
            epochs = -(-self.batch_size * (ahead + self.batches) // len(records)) + 1
            found = training_batches(records, view, reading, seed=0, epochs=epochs)
            for _ in itertools.islice(found, ahead):
                pass
            begun, worked = time.perf_counter(), time.process_time()
            for _ in itertools.islice(found, self.batches):
                pass
            seconds = (time.perf_counter() - begun) / self.batches
            worked = (time.process_time() - worked) / self.batches
            found.close()
            yield {
                "kind": "input",
                "data": self.called,
                "image_size": self.image_size,
                "batch_size": self.batch_size,
                "workers": workers,
                "seconds": seconds,
                "images_per_s": self.batch_size / seconds,
                # Known of this process alone, and the same on a busy machine.
                "images_per_cpu_s": None if workers else self.batch_size / worked,
            }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(abc.ABC):
    """Measure seconds of a step of training, for several optimisers side by side."""

    model: str
    """The network."""
    optimisers: tuple[str, ...]
    """Which optimisers."""
    method: Method = "auto"
    """Polar factor, where the optimiser takes one."""
    image_size: int = 224
    """Height and width of an image, pixels."""
    batch_size: int = 256
    """Images in a step, on all devices together."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the activations."""
    rounds: int = 10
    """Steps to time of every optimiser, in turns."""
    results: Path
    """File of the rows."""

    @abc.abstractmethod
    def prepared(self, **given: Any) -> tuple[Streamed, Task]:
        """Return settings and what is learned, given some of the settings."""

    @abc.abstractmethod
    def batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Return a batch of noise."""

    @abc.abstractmethod
    def own(self) -> tables.Row:
        """Return the columns that other steps have not."""

    @property
    def file(self) -> Path:
        """Where the rows go."""
        return self.results

    def rows(self) -> Iterator[tables.Row]:
        """Yield a row for every optimiser."""
        mesh = make_mesh()
        batch = place(self.batch(np.random.default_rng(0)), mesh)
        calls, methods = {}, {}
        same = "model", "method", "image_size", "batch_size", "dtype"
        for name in self.optimisers:
            given = {name: getattr(self, name) for name in same}
            config, task = self.prepared(optimiser=name, **given)
            methods[name] = self.method if config.takes_method else ""
            calls[name] = stepper(task, batch, config.learning_rate, mesh)
            calls[name]()
        counts = dict.fromkeys(calls, self.rounds)
        times = timing.interleaved(calls, counts, timing.pause())
        for name, seconds in times.items():
            low, median, high = timing.quartiles(seconds.values())
            yield {
                **self.own(),
                "model": self.model,
                "optimiser": name,
                "method": methods[name],
                "dtype": self.dtype,
                "image_size": self.image_size,
                "batch_size": self.batch_size,
                "devices": mesh.size,
                "seconds": median,
                "seconds_q1": low,
                "seconds_q3": high,
                "images_per_s": self.batch_size / median,
            }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Steps):
    """Measure seconds of a step of training on ImageNet."""

    model: Literal["resnet18", "resnet34", "resnet50", "vit_s16"] = "resnet34"
    """The network."""
    optimisers: tuple[Optimiser, ...] = ("sgd", "orthogonal_sgd")
    """Which optimisers."""
    classes: int = 1000
    """Width of the head."""
    results: Path = FILE
    """File of the rows."""

    def prepared(self, **given: Any) -> tuple[Streamed, Task]:
        """Return settings and what is learned, given some of the settings."""
        config = Imagenet(**given)
        return config, make_task(config, self.classes)

    def batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Return a batch of noise."""
        n, size = self.batch_size, self.image_size
        return {
            "image": random.integers(0, 256, (n, size, size, 3), np.uint8),
            "label": random.integers(0, self.classes, n, np.int32),
            "unreadable": np.full(n, -1, np.int32),
        }

    def own(self) -> tables.Row:
        """Return the columns that other steps have not."""
        return {"kind": "step", "classes": self.classes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingStep(Steps):
    """Measure seconds of a step of Barlow Twins, two views of every image."""

    model: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    """The encoder."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Features of the layers behind it."""
    optimisers: tuple[Literal["lars", "orthogonal_lars"], ...] = (
        "lars",
        "orthogonal_lars",
    )
    """Which optimisers."""
    results: Path = PRETRAINING_FILE
    """File of the rows."""

    def prepared(self, **given: Any) -> tuple[Streamed, Task]:
        """Return settings and what is learned, given some of the settings."""
        config = Pretraining(projector=self.projector, **given)
        return config, make_pretraining_task(config)

    def batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Return a batch of noise."""
        n, size = self.batch_size, self.image_size
        return {
            "image": random.integers(0, 256, (n, 2, size, size, 3), np.uint8),
            "seed": random.integers(0, 2**32, n, np.uint32),
            "unreadable": np.full(n, -1, np.int32),
        }

    def own(self) -> tables.Row:
        """Return the columns that other steps have not."""
        return {"kind": "step", "projector": " ".join(map(str, self.projector))}


def stepper(task: Task, batch: Any, rate: float, mesh: jax.sharding.Mesh):
    """Return a function that trains a step, and returns something to wait for."""
    program = make_program(task, mesh)
    state = program.initialise(jax.random.key(0))

    def step():
        nonlocal state
        state, sums = program.step(state, batch, np.float32(rate), np.int32(0))
        return sums

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line says, and write it down."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"input": Input, "step": Step, "pretraining": PretrainingStep},
        prog="python -m examples.streaming.rates",
        args=arguments,
    )
    try:
        for row in config.rows():
            row = row | tables.circumstances()
            tables.write(config.file, [row], KEY)
            what = row.get("optimiser") or f"{row['workers']} workers"
            print(f"{what}: {row['images_per_s']:.4g} images/s")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
