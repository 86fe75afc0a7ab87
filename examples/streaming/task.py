"""Classification: the network, the loss and the images of `imagenet.py`."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.data.imagenet import (
    Batch,
    Reading,
    centre_view,
    normalised,
    random_view,
    training_batches,
    validation_batches,
)
from examples.data.records import Records
from examples.models import IMAGENET
from examples.streaming.imagenet import Imagenet
from examples.streaming.program import Sums, Task
from examples.streaming.settings import Streamed
from examples.training.optimisers import make_optimiser


def make_task(config: Imagenet, classes: int) -> Task:
    """Return classification with the network and the optimiser of the settings."""
    make, dtype = IMAGENET[config.model], jnp.dtype(config.dtype)
    size = config.image_size
    return Task(
        lambda key: make(size, classes, dtype=dtype, rngs=nnx.Rngs(key)),
        functools.partial(classification_loss, smoothing=config.label_smoothing),
        classification_score,
        lambda rate: make_optimiser(
            config.optimiser,
            rate,
            momentum=config.momentum,
            b2=config.b2,
            weight_decay=config.weight_decay,
            method=config.method if config.takes_method else "",
            layers=config.layers if config.takes_method else "all",
        ),
        config.ema,
    )


def classification_loss(
    model: nnx.Module, batch: dict[str, jax.Array], *, smoothing: float
) -> tuple[jax.Array, Sums]:
    """Return the mean cross-entropy with smoothed labels, and what is logged."""
    logits = model(normalised(batch["image"]))
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    targets = optax.smooth_labels(targets, smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    return losses.mean(), _sums(logits, losses, batch)


def classification_score(model: nnx.Module, batch: dict[str, jax.Array]) -> Sums:
    """Return what is logged of the images that have a label."""
    logits = model(normalised(batch["image"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return _sums(logits, losses, batch)


def _sums(logits: jax.Array, losses: jax.Array, batch: dict[str, jax.Array]) -> Sums:
    labels = batch["label"]
    known = labels >= 0
    true = jnp.take_along_axis(logits, labels.clip(0)[:, None], axis=1)
    # How many classes stand before the right one, as in a stable sort; what is not a
    # number stands before all.
    before = jnp.arange(logits.shape[1]) < labels[:, None]
    rank = (~(logits <= true) | ((logits == true) & before)).sum(1)
    sums = {"loss": losses, "top1": rank < 1, "top5": rank < 5}
    return {name: jnp.where(known, x, 0).sum() for name, x in sums.items()} | {
        "images": known.sum(),
        "unreadable": (batch["unreadable"] >= 0).sum(),
    }


@dataclasses.dataclass(frozen=True)
class Images:
    """The batches of the settings, for `examples.streaming.training.train`.

    Attributes:
      config: the settings.
      epochs: how many passes over the training images.
      train: the training images.
      held: the validation images.
      view: what a training image is cut into, given it, a generator of random numbers
        and `size`.
    """

    config: Streamed
    epochs: int
    train: Records
    held: Records
    view: Callable[..., np.ndarray] = random_view

    @property
    def reading(self) -> Reading:
        """How this host makes its part of a batch."""
        return Reading(
            self.config.batch_size,
            self.config.workers,
            self.config.threads,
            self.config.unreadable,
            jax.process_index(),
            jax.process_count(),
        )

    def training(self, first: int) -> Generator[Batch, None, None]:
        """Yield the batches of all epochs, from a number on."""
        return training_batches(
            self.train,
            functools.partial(self.view, size=self.config.image_size),
            self.reading,
            seed=self.config.seed,
            epochs=self.epochs,
            first=first,
        )

    def validation(self) -> Iterator[Batch]:
        """Yield the batches to evaluate with."""
        size = self.config.image_size
        resize = self.config.resize or round(size * 8 / 7)
        view = functools.partial(centre_view, size=size, resize=resize)
        return validation_batches(self.held, view, self.reading)

    def name(self, i: int, *, training: bool) -> str:
        """Return what to call a record."""
        return (self.train if training else self.held).name(i)
