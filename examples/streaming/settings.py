"""What the trainers that stream images can be told alike, and what they do first."""

import abc
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jax
import numpy as np

from examples.data.records import Records
from examples.training.checked import Checked
from examples.training.optimisers import WITHOUT_METHOD, Layers, Method

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
class Streamed(Checked, abc.ABC):
    """Settings of a training on images that are read while it trains."""

    model: str
    """The network: one of `examples.models.IMAGENET`."""
    optimiser: str
    """Which optimiser."""
    method: Method = "auto"
    """Polar factor: auto is the library's default, svd the exact U V^T of the paper."""
    layers: Layers = "all"
    """The layers whose gradients are orthogonalised."""
    epochs: int
    """Passes over the training images."""
    batch_size: int = 1024
    """Images in a step, on all devices together."""
    learning_rate: float
    """The rate, or the highest."""
    warmup_epochs: float = 0.0
    """Epochs in which the rate grows from zero, linearly."""
    momentum: float = 0.9
    """Momentum of the optimiser."""
    weight_decay: float
    """L2 added to the gradient."""
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
    output: Path
    """Folder of checkpoints, CSV files, TensorBoard and curves.png; of all hosts."""
    results: Path | None = None
    """File to which a finished run adds its row; default: results.csv in `output`."""
    checkpoint_steps: int = 1000
    """Steps between two checkpoints; there is one after every epoch, too."""
    keep: int = 3
    """How many of the last checkpoints to keep; the best one is kept as well."""
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
        for name, kind in get_type_hints(type(self)).items():
            if known := [x for x in get_args(kind) if isinstance(x, str)]:
                found, wanted = getattr(self, name), ", ".join(known)
                self.expect(found in known, name, f"one of {wanted}")
        counts = "epochs", "batch_size", "image_size", "threads", "keep"
        self.expect_at_least(1, *counts, "checkpoint_steps", "log_steps", "processes")
        self.expect_at_least(0, "workers", "profile_steps")
        self.expect_at_least(0, "warmup_epochs", "weight_decay")
        self.expect_share("momentum")
        self.expect_positive("learning_rate")
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
            self.coordinator is not None or self.processes == 1,
            "coordinator",
            "HOST:PORT, or auto, where there are several processes",
        )
        self.expect(0 <= self.process < self.processes, "process", "below `processes`")

    @property
    def takes_method(self) -> bool:
        """Whether the optimiser takes polar factors."""
        return self.optimiser not in WITHOUT_METHOD

    @abc.abstractmethod
    def rates(self, steps: int) -> np.ndarray:
        """Return the learning rate of every step, given how many make an epoch."""

    def identity(self, records: Records) -> dict[str, Any]:
        """Return all upon which numbers depend; a checkpoint is of these."""
        values = dataclasses.asdict(self)
        if not self.takes_method:
            del values["method"], values["layers"]
        size = {"images": len(records), "classes": records.classes}
        return {k: x for k, x in values.items() if k not in _SAME_NUMBERS} | size


def half_cosine(total: int, warmup: float = 0.0) -> np.ndarray:
    """Return what falls from one to zero as half a cosine, behind a warm-up of ones."""
    done = np.arange(total)
    share = (done - warmup).clip(0) / max(total - warmup, 1)
    return (1 + np.cos(np.pi * share)) / 2


def join(config: Streamed) -> None:
    """Join the other processes, if there are any; before JAX computes anything."""
    if config.coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if config.coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def check_batches(config: Streamed, records: Records, mesh: jax.sharding.Mesh) -> int:
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
