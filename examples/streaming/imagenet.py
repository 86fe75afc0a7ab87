"""Train on ImageNet, or any tree of images: `python -m examples.train imagenet`.

The settings, the learning rates and the program; what it shares with other trainings
on streamed images is in `settings.py`. The data are in `examples/data/imagenet.py`; in
this folder are the loss (`task.py`), what a step computes (`program.py`) and the loop
(`training.py`).

On several hosts the same command runs on each, with `--coordinator auto` where SLURM, a
TPU pod or Kubernetes says who is who, and otherwise, here on the first of two:

    python -m examples.train imagenet --coordinator HOST:PORT --processes 2 --process 0
"""

import dataclasses
import operator
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from examples.data.records import Records, load_imagenet
from examples.streaming.settings import Streamed, check_batches, half_cosine, join
from examples.training.optimisers import Optimiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imagenet(Streamed):
    """Train a network on ImageNet, with the settings of arXiv 2202.07052 by default.

    Killed and started again with the same command, it goes on from the last checkpoint
    and ends with the same numbers; so it does on another mesh, up to rounding.
    """

    model: Literal["resnet18", "resnet34", "resnet50", "vit_s16"] = "resnet34"
    """The network: one of `examples.models.IMAGENET`."""
    optimiser: Optimiser = "orthogonal_sgd"
    """Which optimiser."""
    epochs: int = 100
    """Passes over the training images."""
    learning_rate: float = 1e-2
    """The rate, or the highest."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the rate, after the warm-up; cosine ends at zero."""
    momentum: float = 0.9
    """Momentum of the SGD and Muon families, b1 of the Adam family."""
    b2: float = 0.999
    """Of the Adam family."""
    weight_decay: float = 5e-4
    """On every parameter: L2 added to the gradient; decoupled in Muon and AdamW."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    ema: float | None = None
    """Decay of a moving average of the model, a step; it is what is evaluated."""
    output: Path = Path("runs/imagenet")
    """Folder of checkpoints, CSV files, TensorBoard and curves.png; of all hosts."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_share("b2", "label_smoothing")
        self.expect(self.ema is None or 0 < self.ema < 1, "ema", "between 0 and 1")
        self.expect(
            self.model != "vit_s16" or self.image_size % 16 == 0,
            "image_size",
            "a multiple of 16, the size of a patch",
        )

    def identity(self, records: Records) -> dict[str, Any]:
        """Return all upon which numbers depend; a checkpoint is of these."""
        values = super().identity(records)
        if self.schedule == "constant":
            del values["epochs"]  # may go on for longer
        return values

    def rates(self, steps: int) -> np.ndarray:
        """Return the learning rate of every step, given how many make an epoch."""
        total, warmup = self.epochs * steps, self.warmup_epochs * steps
        grown = np.minimum((np.arange(total) + 1) / max(warmup, 1), 1.0)
        if self.schedule == "constant":
            return self.learning_rate * grown
        return self.learning_rate * grown * half_cosine(total, warmup)


# ------------------------------------------------------------------------- the program


def run_or_exit(config: Imagenet) -> None:
    """Train as the settings say, or end the program with what is wrong."""
    try:
        run(config)
    except ModuleNotFoundError as error:
        sys.exit(f'{error}: pip install -e ".[imagenet]"')
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


def run(config: Imagenet) -> Any:
    """Train as the settings say; return the last state.

    The first process adds a row to the results.

    Raises:
      FileNotFoundError: if there are no images.
      ValueError: if settings, data, devices and checkpoint do not go together.
    """
    # Here, because the other subcommands need neither grain nor TensorBoard.
    from examples.streaming.program import make_mesh
    from examples.streaming.results import Rows, key, make_row
    from examples.streaming.task import Images, make_task
    from examples.streaming.training import make_plan, train

    join(config)
    training, validation = load_imagenet(config.data_dir)
    mesh = make_mesh(config.mesh)
    steps = check_batches(config, training, mesh)
    plan = make_plan(config, training, steps, operator.itemgetter("top1"))
    task = make_task(config, training.classes)
    images = Images(config, config.epochs, training, validation)
    state = train(task, images, plan, mesh)
    if jax.process_index() == 0:
        rows = Rows(config.results or config.output / "results.csv")
        if rows.find(key(config, training)) is None:
            rows.append(make_row(config, training, mesh))
        print(f"{rows.path}: one row a run\n{config.output}: all of this run")
    return state
