"""Densely connected networks: DenseNet-121 and DenseNet-161."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.convolution import convolve
from examples.models.initialisers import KAIMING_FAN_IN, PYTORCH_KERNEL

_Conv = functools.partial(
    nnx.Conv,
    use_bias=False,
    kernel_init=KAIMING_FAN_IN,
    conv_general_dilated=convolve,
)
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

    The initial weights are torchvision's: of the convolutions He's by the fan-in, of
    the head PyTorch's kernel and a bias of zeros.

    Args:
      depths: number of layers in every dense block.
      growth: channels that every layer adds; the stem has twice as many.
      classes: number of classes.
      cifar_stem: whether the stem is a 3x3 convolution, for images of 32x32, or a 7x7
        one of stride 2 with a max-pool of stride 2 after it.
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
        cifar_stem: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        width = 2 * growth
        taps, stride = (3, 1) if cifar_stem else (7, 2)
        self.cifar_stem = cifar_stem
        self.stem = _Conv(
            3, width, (taps, taps), strides=stride, padding=taps // 2, **options
        )
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
        self.head = nnx.Linear(width, classes, kernel_init=PYTORCH_KERNEL, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, 3)`."""
        x = nnx.relu(self.stem_norm(self.stem(images)))
        if not self.cifar_stem:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = nnx.relu(self.norm(self.blocks(x)))
        return self.head(x.mean((1, 2)))


def densenet121(classes: int = 1000, **options: Any) -> DenseNet:
    """Return DenseNet-121: 7,978,856 parameters; options as in `DenseNet`."""
    return DenseNet((6, 12, 24, 16), 32, classes, **options)


def densenet161(classes: int = 1000, **options: Any) -> DenseNet:
    """Return DenseNet-161: 28,681,000 parameters; options as in `DenseNet`."""
    return DenseNet((6, 12, 36, 24), 48, classes, **options)
