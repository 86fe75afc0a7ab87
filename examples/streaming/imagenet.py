"""Train on ImageNet, or any tree of images: `python -m examples.train imagenet`.

The settings, the learning rates and the program. The data are in
`examples/data/imagenet.py`; in this folder are the loss (`task.py`), what a step
computes (`program.py`) and the loop (`training.py`).

On several hosts the same command runs on each, with `--coordinator auto` where SLURM, a
TPU pod or Kubernetes says who is who, and otherwise, here on the first of two:

    python -m examples.train imagenet --coordinator HOST:PORT --processes 2 --process 0
"""

import dataclasses
import math
import operator
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from examples.data.records import Records, load_imagenet
from examples.training.optimisers import WITHOUT_METHOD, Layers, Method, Optimiser

# What numbers do not depend on, but for rounding: a checkpoint goes on with others.
_SAME_NUMBERS = (
    "data_dir",
    "output",
    "results",
    "mesh",
    "workers",
    "threads",
    "unreadable",
    "checkpoint_steps",
    "keep",
    "log_steps",
    "profile_steps",
    "coordinator",
    "processes",
    "process",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imagenet:
    """Train a network on ImageNet, with the settings of arXiv 2202.07052 by default.

    Killed and started again with the same command, it goes on from the last checkpoint
    and ends with the same numbers; so it does on another mesh, up to rounding.
    """

    model: Literal["resnet18", "resnet34", "resnet50", "vit_s16"] = "resnet34"
    """The network: one of `examples.models.IMAGENET`."""
    optimiser: Optimiser = "orthogonal_sgd"
    """Which optimiser."""
    method: Method = "auto"
    """Polar factor: auto is the library's default, svd the exact U V^T of the paper."""
    layers: Layers = "all"
    """The layers whose gradients are orthogonalised."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 1024
    """Images in a step, on all devices together."""
    learning_rate: float = 1e-2
    """The rate, or the highest."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the rate, after the warm-up; cosine ends at zero."""
    warmup_epochs: float = 0.0
    """Epochs in which the rate grows from zero, linearly."""
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
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the activations; parameters and all that is kept are float32."""
    image_size: int = 224
    """Height and width of what the network sees, pixels."""
    resize: int | None = None
    """Shorter side of an image before the evaluation's crop; default 8/7 image_size."""
    seed: int = 0
    """Of the weights, the order of the images and their crops."""
    data_dir: Path | None = None
    """Folder of train/<class>/* and val/<class>/*, or of prepared TFDS sets; default:
    the environment variable ORTHAX_DATA."""
    unreadable: Literal["stop", "skip"] = "stop"
    """At what is not a whole image: stop, or skip, with its name and a count."""
    workers: int = 8
    """Processes of a host that make batches; 0 for threads of the program."""
    threads: int = 1
    """Of each of these processes, which holds as many batches and two more."""
    mesh: tuple[int, int] | None = None
    """Devices along "data" (copies of the parameters) and along "fsdp" (parts of them);
    default: all along "data"."""
    output: Path = Path("runs/imagenet")
    """Folder of checkpoints, CSV files, TensorBoard and curves.png; of all hosts."""
    results: Path | None = None
    """File to which a finished run adds its row; default: results.csv in `output`."""
    checkpoint_steps: int = 1000
    """Steps between two checkpoints; there is one after every epoch, too."""
    keep: int = 3
    """How many of the last checkpoints to keep; the best by top-1 is kept as well."""
    log_steps: int = 50
    """Steps between two writings of what the steps said."""
    profile_steps: int = 0
    """Steps to profile with jax.profiler, from the tenth on."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, or auto where a cluster says it."""
    processes: int = 1
    """How many processes train together, unless auto."""
    process: int = 0
    """Which of them this is, unless auto."""

    def __post_init__(self):
        choices = "model", "optimiser", "method", "layers", "schedule", "dtype"
        for name in (*choices, "unreadable"):
            known = get_args(Imagenet.__annotations__[name])
            self.expect(
                getattr(self, name) in known, name, f"one of {', '.join(known)}"
            )
        counts = "epochs", "batch_size", "image_size", "threads", "keep"
        for name in (*counts, "checkpoint_steps", "log_steps", "processes"):
            self.expect(getattr(self, name) >= 1, name, "at least 1")
        for name in ("workers", "profile_steps", "warmup_epochs", "weight_decay"):
            self.expect(getattr(self, name) >= 0, name, "at least 0")
        for name in ("momentum", "b2", "label_smoothing"):
            self.expect(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        self.expect(self.ema is None or 0 < self.ema < 1, "ema", "between 0 and 1")
        rate = self.learning_rate
        self.expect(0 < rate < math.inf, "learning_rate", "a positive number")
        self.expect(
            self.warmup_epochs <= self.epochs, "warmup_epochs", "at most `epochs`"
        )
        self.expect(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32")
        self.expect(
            self.resize is None or self.resize >= self.image_size,
            "resize",
            f"at least `image_size`, {self.image_size}",
        )
        self.expect(
            self.model != "vit_s16" or self.image_size % 16 == 0,
            "image_size",
            "a multiple of 16, the size of a patch",
        )
        self.expect(
            self.coordinator is not None or self.processes == 1,
            "coordinator",
            "HOST:PORT, or auto, where there are several processes",
        )
        self.expect(0 <= self.process < self.processes, "process", "below `processes`")

    def expect(self, holds: bool, name: str, expected: str) -> None:
        """Raise ValueError about a setting unless something holds."""
        if not holds:
            found = getattr(self, name)
            raise ValueError(f"`{name}` is {found!r}; expected {expected}")

    @property
    def takes_method(self) -> bool:
        """Whether the optimiser takes polar factors."""
        return self.optimiser not in WITHOUT_METHOD

    def identity(self, records: Records) -> dict[str, Any]:
        """Return all upon which numbers depend; a checkpoint is of these."""
        values = dataclasses.asdict(self)
        if self.schedule == "constant":
            del values["epochs"]  # may go on for longer
        if not self.takes_method:
            del values["method"], values["layers"]
        size = {"images": len(records), "classes": records.classes}
        return {k: x for k, x in values.items() if k not in _SAME_NUMBERS} | size

    def rates(self, steps: int) -> np.ndarray:
        """Return the learning rate of every step, given how many make an epoch."""
        total, warmup = self.epochs * steps, self.warmup_epochs * steps
        done = np.arange(total)
        grown = np.minimum((done + 1) / max(warmup, 1), 1.0)
        if self.schedule == "constant":
            return self.learning_rate * grown
        share = (done - warmup).clip(0) / max(total - warmup, 1)
        return self.learning_rate * grown * (1 + np.cos(np.pi * share)) / 2


# ------------------------------------------------------------------------- the program


def join(config: Imagenet) -> None:
    """Join the other processes, if there are any; before JAX computes anything."""
    if config.coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if config.coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def check_batches(config: Imagenet, records: Records, mesh: jax.sharding.Mesh) -> int:
    """Return the steps of an epoch.

    Raises:
      ValueError: if the batches do not divide over the devices, or there is not one.
    """
    n = len(records)
    config.expect(
        config.batch_size % mesh.size == 0,
        "batch_size",
        f"a multiple of {mesh.size}, the number of devices",
    )
    config.expect(
        config.batch_size <= n,
        "batch_size",
        f"at most {n}, the number of training images, so that every host has a batch",
    )
    return n // config.batch_size


def run_or_exit(config: Imagenet) -> None:
    """Train as the settings say, or end the program with what is wrong."""
    try:
        run(config)
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
    from examples.streaming.training import Plan, train

    join(config)
    training, validation = load_imagenet(config.data_dir)
    mesh = make_mesh(config.mesh)
    steps = check_batches(config, training, mesh)
    plan = Plan(
        config.rates(steps),
        steps,
        config.seed,
        config.identity(training),
        config.output,
        operator.itemgetter("top1"),
        config.checkpoint_steps,
        config.keep,
        config.log_steps,
        config.profile_steps,
    )
    task = make_task(config, training.classes)
    state = train(task, Images(config, training, validation), plan, mesh)
    if jax.process_index() == 0:
        rows = Rows(config.results or config.output / "results.csv")
        if rows.find(key(config, training)) is None:
            rows.append(make_row(config, training, mesh))
        print(f"{rows.path}: one row a run\n{config.output}: all of this run")
    return state
