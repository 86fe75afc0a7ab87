"""How fast the ImageNet trainer is: `python -m examples.streaming.rates`.

`input` reads images as the trainer does and trains nothing; `step` trains on the same
random images again and again and reads nothing. What is measured becomes rows of
`examples/results/imagenet_rates.csv`.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from benchmarks import tables, timing
from examples.data.imagenet import Reading, random_view, training_batches
from examples.data.records import load_imagenet
from examples.streaming.imagenet import Imagenet
from examples.streaming.program import make_mesh, make_program, place
from examples.streaming.task import make_task
from examples.training.optimisers import Method, Optimiser
from examples.training.report import RESULTS

FILE = RESULTS / "imagenet_rates.csv"
KEY = (
    "kind",
    "data",
    "model",
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
    results: Path = FILE
    """File of the rows."""

    def rows(self) -> Iterator[tables.Row]:
        """Yield a row for every number of workers."""
        records, _ = load_imagenet(self.data_dir)
        view = functools.partial(random_view, size=self.image_size)
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
class Step:
    """Measure seconds of a step of training, for several optimisers side by side."""

    model: Literal["resnet18", "resnet34", "resnet50", "vit_s16"] = "resnet34"
    """The network."""
    optimisers: tuple[Optimiser, ...] = ("sgd", "orthogonal_sgd")
    """Which optimisers."""
    method: Method = "auto"
    """Polar factor, where the optimiser takes one."""
    classes: int = 1000
    """Width of the head."""
    image_size: int = 224
    """Height and width of an image, pixels."""
    batch_size: int = 256
    """Images in a step, on all devices together."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the activations."""
    rounds: int = 10
    """Steps to time of every optimiser, in turns."""
    results: Path = FILE
    """File of the rows."""

    def rows(self) -> Iterator[tables.Row]:
        """Yield a row for every optimiser."""
        mesh = make_mesh()
        calls, takes_method = {}, {}
        for name in self.optimisers:
            config = self._settings(name)
            takes_method[name] = config.takes_method
            calls[name] = self._stepper(config, mesh)
            calls[name]()
        counts = dict.fromkeys(calls, self.rounds)
        times = timing.interleaved(calls, counts, timing.pause())
        for name, seconds in times.items():
            low, median, high = timing.quartiles(seconds.values())
            yield {
                "kind": "step",
                "model": self.model,
                "optimiser": name,
                "method": self.method if takes_method[name] else "",
                "dtype": self.dtype,
                "image_size": self.image_size,
                "batch_size": self.batch_size,
                "devices": mesh.size,
                "classes": self.classes,
                "seconds": median,
                "seconds_q1": low,
                "seconds_q3": high,
                "images_per_s": self.batch_size / median,
            }

    def _settings(self, optimiser: Optimiser) -> Imagenet:
        names = "model", "method", "image_size", "batch_size", "dtype"
        given = {name: getattr(self, name) for name in names}
        return Imagenet(optimiser=optimiser, **given)

    def _stepper(self, config: Imagenet, mesh: jax.sharding.Mesh):
        """Return a function that trains a step, and returns something to wait for."""
        program = make_program(make_task(config, self.classes), mesh)
        random, n = np.random.default_rng(0), self.batch_size
        shape = (n, self.image_size, self.image_size, 3)
        batch = {
            "image": random.integers(0, 256, shape, np.uint8),
            "label": random.integers(0, self.classes, n, np.int32),
            "unreadable": np.full(n, -1, np.int32),
        }
        batch = place(batch, mesh)
        state = program.initialise(jax.random.key(0))
        rate, number = np.float32(config.learning_rate), np.int32(0)

        def step():
            nonlocal state
            state, sums = program.step(state, batch, rate, number)
            return sums

        return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line says, and write it down."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"input": Input, "step": Step},
        prog="python -m examples.streaming.rates",
        args=arguments,
    )
    try:
        for row in config.rows():
            row = row | tables.circumstances()
            tables.write(config.results, [row], KEY)
            what = row.get("optimiser") or f"{row['workers']} workers"
            print(f"{what}: {row['images_per_s']:.4g} images/s")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
