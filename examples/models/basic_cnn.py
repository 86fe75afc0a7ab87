"""The small convolutional network of the paper, BasicCNN."""

from typing import Any

import jax
from flax import nnx

from examples.models.convolution import convolve
from examples.models.initialisers import PYTORCH_KERNEL, pytorch_bias


class BasicCNN(nnx.Module):
    """Three convolutions with batch normalisation, and a dense head.

    With three channels, 32x32 images and strides of 2 it is the BasicCNN of the paper
    (24,714 parameters for ten classes), with PyTorch's initial weights. Batch
    normalisation keeps nine tenths of its running statistics at every step, PyTorch's
    default: flax's own, 99 hundredths, is too slow for evaluation after the few steps
    of one epoch on a small data set.

    Args:
      shape: height, width and channels of an image.
      classes: number of classes.
      strides: strides of the three convolutions.
      features: channels of every convolution.
      dtype: dtype of the activations; parameters and logits are float32.
      rngs: random streams of the initial weights.

    References:
      Tuddenham, Prügel-Bennett, Hare: "Orthogonalising gradients to speed up neural
      network optimisation", 2022. https://arxiv.org/abs/2202.07052. Section 3.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int = 10,
        *,
        strides: tuple[int, int, int] = (2, 2, 2),
        features: int = 32,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        height, width, channels = shape
        for stride in strides:
            height, width = -(-height // stride), -(-width // stride)

        options = {"dtype": dtype, "rngs": rngs}

        def convolution(channels: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                features,
                (3, 3),
                strides=stride,
                padding=1,
                kernel_init=PYTORCH_KERNEL,
                bias_init=pytorch_bias(9 * channels),
                conv_general_dilated=convolve,
                **options,
            )

        def norm() -> nnx.BatchNorm:
            return nnx.BatchNorm(features, momentum=0.9, **options)

        self.conv1 = convolution(channels, strides[0])
        self.norm1 = norm()
        self.conv2 = convolution(features, strides[1])
        self.norm2 = norm()
        self.conv3 = convolution(features, strides[2])
        self.norm3 = norm()
        fan_in = height * width * features
        self.head = nnx.Linear(
            fan_in,
            classes,
            kernel_init=PYTORCH_KERNEL,
            bias_init=pytorch_bias(fan_in),
            rngs=rngs,
        )

    def representations(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Return what every convolution gives, behind its norm and the ReLU."""
        first = nnx.relu(self.norm1(self.conv1(images)))
        second = nnx.relu(self.norm2(self.conv2(first)))
        return first, second, nnx.relu(self.norm3(self.conv3(second)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, channels)`."""
        *_, x = self.representations(images)
        return self.head(x.reshape(x.shape[0], -1))
