"""Densely connected networks: DenseNet-121 and DenseNet-161."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# "Delving deep into rectifiers", He, Zhang, Ren, Sun, 2015, Section 2.2, which the
# paper takes: normal of variance 2 / fan-in, untruncated.
_INIT = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

_Conv = functools.partial(nnx.Conv, use_bias=False, kernel_init=_INIT)
# PyTorch's momentum of 0.1 is flax's of 0.9; both have an epsilon of 1e-5.
_Norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class DenseLayer(nnx.Module):
    """A 1x1 and a 3x3 convolution, whose channels join those that came in.

    Args:
      fan_in: channels that come in.
      growth: channels that join them.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.

    References:
      Huang et al., 2017, Section 3: the composite function, with bottleneck.
    """

    def __init__(self, fan_in: int, growth: int, *, dtype: Any = None, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = _Norm(fan_in, **options)
        self.conv1 = _Conv(fan_in, 4 * growth, (1, 1), **options)
        self.norm2 = _Norm(4 * growth, **options)
        self.conv2 = _Conv(4 * growth, growth, (3, 3), padding=1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(n, height, width, fan_in + growth)`, of images."""
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class Transition(nnx.Module):
    """A 1x1 convolution to half the channels, and a mean over 2x2 pixels.

    Args:
      fan_in: channels that come in, an even number.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.

    References:
      Huang et al., 2017, Section 3: pooling layers, compression.
    """

    def __init__(self, fan_in: int, *, dtype: Any = None, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm = _Norm(fan_in, **options)
        self.conv = _Conv(fan_in, fan_in // 2, (1, 1), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(n, height / 2, width / 2, fan_in / 2)`, of images."""
        x = self.conv(nnx.relu(self.norm(x)))
        return nnx.avg_pool(x, (2, 2), (2, 2))


class DenseNet(nnx.Module):
    """A stem, dense blocks with transitions between them, a dense head.

    Args:
      depths: number of layers in every dense block.
      growth: channels that every layer adds; the stem has twice as many.
      classes: number of classes.
      dtype: dtype of the activations; parameters and logits are float32.
      rngs: random streams of the initial weights.

    References:
      Huang, Liu, van der Maaten, Weinberger: "Densely connected convolutional
      networks", 2017. https://arxiv.org/abs/1608.06993. Table 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        growth: int,
        classes: int = 1000,
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        width = 2 * growth
        self.stem = _Conv(3, width, (7, 7), strides=2, padding=3, **options)
        self.stem_norm = _Norm(width, **options)
        layers = []
        for i, depth in enumerate(depths):
            if i > 0:
                layers.append(Transition(width, **options))
                width //= 2
            for _ in range(depth):
                layers.append(DenseLayer(width, growth, **options))
                width += growth
        self.blocks = nnx.Sequential(*layers)
        self.norm = _Norm(width, **options)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.head = nnx.Linear(width, classes, kernel_init=uniform, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, 3)`."""
        x = nnx.relu(self.stem_norm(self.stem(images)))
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = nnx.relu(self.norm(self.blocks(x)))
        return self.head(x.mean((1, 2)))


def densenet121(classes: int = 1000, *, dtype: Any = None, rngs: nnx.Rngs) -> DenseNet:
    """Return DenseNet-121: 7,978,856 parameters for a thousand classes."""
    return DenseNet((6, 12, 24, 16), 32, classes, dtype=dtype, rngs=rngs)


def densenet161(classes: int = 1000, *, dtype: Any = None, rngs: nnx.Rngs) -> DenseNet:
    """Return DenseNet-161: 28,681,000 parameters for a thousand classes."""
    return DenseNet((6, 12, 36, 24), 48, classes, dtype=dtype, rngs=rngs)
