"""The networks of the decorrelation experiments, and what their layers are given.

Ahmad: "Correlations Are Ruining Your Gradient Descent", 2024, arXiv 2407.10780: dense
layers, and a small convolutional network (3x3: 32, 32, pool, 64, 64, pool, dense),
LeakyReLU behind every layer but the last.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.convolution import convolve
from examples.models.initialisers import KAIMING_FAN_IN
from orthax import decorrelation, nn

Model = Literal["mlp", "conv"]
MODELS: tuple[Model, ...] = Model.__args__
_PLAIN = (nnx.Linear, nnx.Conv)


def make_network(
    model: Model,
    shape: tuple[int, int, int],
    classes: int,
    *,
    side: int,
    widths: Sequence[int],
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """Return a network of plain layers.

    Args:
      model: which.
      shape: height, width and channels of an image, square.
      classes: number of classes.
      side: pixels of the image, along a side, that the first layer is given; a divisor
        of the image's, which is averaged over squares.
      widths: of the MLP, features of every hidden layer; of the convolutional network,
        channels before the first pooling and behind it, and features of the dense
        layer.
      rngs: random streams of the initial weights.
    """
    dense = functools.partial(nnx.Linear, kernel_init=KAIMING_FAN_IN, rngs=rngs)
    layers: list[Callable] = [Averaged(side)]
    features = shape[-1]
    if model == "conv":
        for channels in widths[:2]:
            for _ in range(2):
                layers += [
                    nnx.Conv(
                        features,
                        channels,
                        (3, 3),
                        kernel_init=KAIMING_FAN_IN,
                        conv_general_dilated=convolve,
                        rngs=rngs,
                    ),
                    nnx.leaky_relu,
                ]
                features = channels
            layers.append(max_pooled)
            side //= 2
    layers.append(flattened)
    features *= side**2
    for width in widths if model == "mlp" else widths[2:]:
        layers += [dense(features, width), nnx.leaky_relu]
        features = width
    return nnx.Sequential(*layers, dense(features, classes))


@dataclasses.dataclass(frozen=True)  # equal to its like, as what is compiled asks
class Averaged:
    """The means of squares of an image, of which there are `side` along a side."""

    side: int

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return `(n, side, side, channels)`."""
        size = images.shape[1] // self.side
        return nnx.avg_pool(images, (size, size), (size, size)) if size > 1 else images


def max_pooled(x: jax.Array) -> jax.Array:
    """Return the largest of every two by two, half of each side."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def flattened(x: jax.Array) -> jax.Array:
    """Return one row for every image."""
    return x.reshape(len(x), -1)


def decorrelated(
    network: nnx.Sequential,
    rule: decorrelation.DecorrelationRule,
    *,
    sample: float,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """Return a network whose layers, all of them, get decorrelated input.

    Args:
      network: of plain layers.
      rule: how every R learns.
      sample: share of the patches that the R of a convolution learns from; that of a
        dense layer learns from all rows.
      rngs: random numbers for `sample` below 1.
    """
    for kind, share in ((nnx.Conv, sample), (nnx.Linear, 1.0)):
        if any(isinstance(layer, kind) for layer in network.layers):
            network = nn.decorrelate(
                network,
                rule,
                select=lambda _, layer, kind=kind: isinstance(layer, kind),
                sample=share,
                rngs=rngs,
            )
    return network


def is_layer(layer: Callable) -> bool:
    """Return whether part of a network has weights."""
    return isinstance(layer, nnx.Module)


def plain(layer: nnx.Module) -> nnx.Linear | nnx.Conv:
    """Return the layer with the weights, without what is wrapped around it."""
    while not isinstance(layer, _PLAIN):
        layer = layer.layer
    return layer


def inputs(network: nnx.Sequential, images: jax.Array) -> Iterator[jax.Array]:
    """Yield what the weights of every layer are multiplied with, `(samples, d)`.

    Of a convolution the patches. Decorrelated where the layer is, with the mean that
    the network's mode asks for in evaluation: the running one.
    """
    x = images
    for layer in network.layers:
        if is_layer(layer):
            yield _decorrelated_samples(layer, _samples(plain(layer), x))
        x = layer(x)


def _samples(layer: nnx.Linear | nnx.Conv, x: jax.Array) -> jax.Array:
    """Return the samples of a dense layer, or the patches of a 3x3 convolution."""
    if isinstance(layer, nnx.Linear):
        return x
    _, height, width, channels = x.shape
    framed = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        framed[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(taps, axis=-1).reshape(-1, 9 * channels)


def _decorrelated_samples(layer: nnx.Module, x: jax.Array) -> jax.Array:
    while not isinstance(layer, nn.Decorrelated | nnx.Linear | nnx.Conv):
        layer = layer.layer
    if not isinstance(layer, nn.Decorrelated):
        return x
    return decorrelation.apply_decorrelation(layer.state(), x, layer.rule)
