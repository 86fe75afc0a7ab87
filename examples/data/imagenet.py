"""ImageNet, or any tree of folders of images, as batches; no TensorFlow.

Every batch is a function of the records, the seed and its number alone: not of the
number of hosts, worker processes or threads, nor of where an earlier run was stopped.
So the position of a training in its data is the number of its step, which stands in
every checkpoint, and the next batch is one that has not been seen in this epoch.

Images are decoded and cut here, on the CPUs of the host, and stay uint8; the device
normalises them (`normalised`). A view is a function of an image and a generator of
random numbers: one crop for classification, or several under one axis.

Russakovsky et al.: "ImageNet large scale visual recognition challenge", 2015.
https://arxiv.org/abs/1409.0575.
"""

import contextlib
import dataclasses
import functools
import io
import math
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from examples.data.records import Records

# -------------------------------------------------------------------------- the views

View = Callable[[Image.Image, np.random.Generator], np.ndarray]


def random_view(
    image: Image.Image,
    random: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """Return a random part of an image, resized to `(size, size, 3)`, perhaps mirrored.

    Args:
      image: of any size.
      random: source of the random numbers.
      size: height and width of what is returned, pixels.
      area: least and largest share of the image's area; uniform.
      aspect: least and largest width over height; its logarithm is uniform.
      resampling: the filter; smaller images are averages (antialiased).

    References:
      Szegedy et al.: "Going deeper with convolutions", 2015, Section 6.
      https://arxiv.org/abs/1409.4842.
    """
    full_width, full_height = image.size
    for _ in range(10):
        pixels = full_width * full_height * random.uniform(*area)
        ratio = math.exp(random.uniform(*np.log(aspect)))
        width, height = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if width <= full_width and height <= full_height:
            left = random.uniform(0, full_width - width)
            top = random.uniform(0, full_height - height)
            break
    else:  # a very long image: its middle, no longer than allowed
        width = min(full_width, full_height * aspect[1])
        height = min(full_height, full_width / aspect[0])
        left, top = (full_width - width) / 2, (full_height - height) / 2
    cut = _resized(image, (left, top, left + width, top + height), size, resampling)
    return cut[:, ::-1] if random.random() < 0.5 else cut


def two_views(
    image: Image.Image, random: np.random.Generator, *, size: int
) -> np.ndarray:
    """Return two random views, bicubic, of one image: `(2, size, size, 3)`."""
    view = functools.partial(random_view, resampling=Image.Resampling.BICUBIC)
    return np.stack([view(image, random, size=size) for _ in range(2)])


def centre_view(image: Image.Image, *, size: int, resize: int) -> np.ndarray:
    """Return the middle `(size, size, 3)` of an image whose shorter side is `resize`.

    Resizing and cutting are one operation, of the part that is kept.
    """
    side = min(image.size) * size / resize
    left, top = ((length - side) / 2 for length in image.size)
    return _resized(image, (left, top, left + side, top + side), size)


def _resized(
    image: Image.Image,
    box: Sequence[float],
    size: int,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """Return a part of an image in another size."""
    return np.asarray(image.resize((size, size), resampling, box))


# Mean and standard deviation of the colours of ImageNet, of pixels between 0 and 1.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: jax.Array) -> jax.Array:
    """Return images, uint8 or floating from 0 to 1, as the networks get them."""
    mean, deviation = jnp.asarray(_MEAN), jnp.asarray(_DEVIATION)
    if images.dtype == jnp.uint8:
        images = images / jnp.float32(255)
    return (images - mean) / deviation


# ------------------------------------------------------------------------ the batches

Batch = dict[str, np.ndarray]
Unreadable = Literal["stop", "skip"]
_TRIES = 100


class UnreadableImageError(ValueError):
    """A record is not an image, or not a whole one."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are made, and which part of them by this host.

    Attributes:
      batch_size: images in a batch, on all hosts together.
      workers: processes that make batches; 0 for the calling one.
      threads: of each of these processes; each makes a batch at a time.
      unreadable: whether to stop at what is not a whole image, or take the next record
        in its place (training) or count it as missing (validation).
      host: which part is made here.
      hosts: how many parts a batch has.
    """

    batch_size: int
    workers: int = 0
    threads: int = 2
    unreadable: Unreadable = "stop"
    host: int = 0
    hosts: int = 1


def training_batches(
    records: Records,
    view: View,
    reading: Reading,
    *,
    seed: int,
    epochs: int,
    first: int = 0,
) -> Generator[Batch, None, None]:
    """Yield this host's part of every batch, shuffled, from a number on.

    An epoch has as many whole batches as the records make; those that are left over are
    others in every epoch. A batch has "image" `(n, ...)`, of what `view` returns,
    "label" `(n,)`, int32, "seed" `(n,)`, uint32: of what the device does to an image at
    random, and "unreadable" `(n,)`, int32: which record could not be read, where
    another one took its place, and else -1.

    Args:
      records: what to read.
      view: what of an image is in the batch.
      reading: how.
      seed: of the order and of the views; below 2**32.
      epochs: how many.
      first: batches to leave out.

    Raises:
      UnreadableImageError: names the record; see `Reading`.
    """
    size, n = reading.batch_size, len(records)
    order = grain.MapDataset.range(n).seed(seed).shuffle()
    order = order.slice(slice(n // size * size)).repeat(epochs)
    load = functools.partial(_load, records=records, view=view, reading=reading)
    return _stream(order.random_map(load), reading, first)


def validation_batches(
    records: Records, view: Callable[[Image.Image], np.ndarray], reading: Reading
) -> Iterator[Batch]:
    """Yield this host's part of every batch, in order, filled up with black images.

    As `training_batches`, without "seed"; the label of what fills up, or could not be
    read, is -1.
    """
    whole = -(-len(records) // reading.batch_size) * reading.batch_size
    load = functools.partial(_load_or_pad, records=records, view=view, reading=reading)
    return _stream(grain.MapDataset.range(whole).map(load), reading)


def _load(
    i: int, random: np.random.Generator, records: Records, view: View, reading: Reading
) -> Batch:
    """Return an example, or in its place the next one that can be read."""
    for j in range(_TRIES):
        image, label = _decode(records, (i + j) % len(records), reading)
        if image is not None:
            bad = -1 if j == 0 else i
            return {
                "image": view(image, random),
                "label": np.int32(label),
                "seed": random.integers(2**32, dtype=np.uint32),
                "unreadable": np.int32(bad),
            }
    raise UnreadableImageError(
        f"{records.name(i)} and the {_TRIES - 1} records behind it are no whole images"
    )


def _load_or_pad(
    i: int,
    records: Records,
    view: Callable[[Image.Image], np.ndarray],
    reading: Reading,
) -> Batch:
    """Return an example, or a black image without a label."""
    image, label, bad = None, -1, -1
    if i < len(records):
        image, label = _decode(records, i, reading)
        bad = i if image is None else -1
    if image is None:
        label, image = -1, Image.new("RGB", (8, 8))
    return {
        "image": view(image),
        "label": np.int32(label),
        "unreadable": np.int32(bad),
    }


def _decode(
    records: Records, i: int, reading: Reading
) -> tuple[Image.Image | None, int]:
    """Return an image of three colours and its label; None for one to be skipped."""
    # What Pillow raises about damaged files of all formats.
    damaged = (OSError, SyntaxError, ValueError, struct.error)
    try:
        content, label = records.read(i)
        image = Image.open(io.BytesIO(content))
        return image.convert("RGB"), label  # from grey, CMYK, palettes, transparency
    except (*damaged, Image.DecompressionBombError) as error:
        if reading.unreadable == "skip":
            return None, -1
        raise UnreadableImageError(
            f"{records.name(i)} is not a whole image ({error}); replace it, or go on "
            "without such files, which are counted: unreadable=skip"
        ) from None


def _stream(
    images: Any, reading: Reading, first: int = 0
) -> Generator[Batch, None, None]:
    """Yield batches of this host's examples, made ahead by threads or processes."""
    # Every so manieth example, so that a batch is the same whatever the hosts.
    own = images.slice(slice(reading.host, None, reading.hosts))
    batches = own.batch(reading.batch_size // reading.hosts)
    batches = batches.slice(slice(first, None))
    # The default would have 500 batches ahead of the device.
    ahead = grain.ReadOptions(reading.threads, prefetch_buffer_size=reading.threads)
    stream = batches.to_iter_dataset(ahead)
    if reading.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks for flags of a program of absl
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(reading.workers))
    iterator = iter(stream)
    with contextlib.ExitStack() as stack:
        # Ends the worker processes; older versions of grain leave it to deletion.
        stack.callback(getattr(iterator, "close", lambda: None))
        yield from iterator
