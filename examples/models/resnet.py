"""Residual networks: the form for CIFAR (ResNet-20, 44), those for ImageNet.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2016.
https://arxiv.org/abs/1512.03385. Of the wide and the grouped one the papers are below.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.convolution import convolve
from examples.models.initialisers import (
    KAIMING_FAN_IN,
    KAIMING_FAN_OUT,
    PYTORCH_KERNEL,
    pytorch_bias,
)

# PyTorch's momentum of 0.1 is flax's of 0.9; both have an epsilon of 1e-5.
_Norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class _Conv(nnx.Conv):
    """A square convolution without bias, padded as PyTorch pads it.

    Flax's "SAME" pads strided convolutions on one side only.
    """

    def __init__(self, fan_in: int, width: int, taps: int, stride: int = 1, **options):
        super().__init__(
            fan_in,
            width,
            (taps, taps),
            strides=stride,
            padding=taps // 2,
            use_bias=False,
            conv_general_dilated=convolve,
            **options,
        )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
      fan_in: channels that come in.
      width: channels of both convolutions, and those that go out.
      stride: stride of the first convolution and of the shortcut.
      projected: whether the shortcut is a 1x1 convolution with a norm where the shape
        changes (option B), or every `stride`-th pixel with channels of zeros around it
        (option A, no parameters).
      init: initialiser of the convolutions.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.

    References:
      He et al., 2016, Section 3.3 (the options) and Figure 5, left.
    """

    def __init__(
        self,
        fan_in: int,
        width: int,
        stride: int,
        *,
        projected: bool,
        init: Any,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_Conv, kernel_init=init, dtype=dtype, rngs=rngs)
        norm = functools.partial(_Norm, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(fan_in, width, 3, stride), norm(width)
        self.conv2, self.norm2 = conv(width, width, 3), norm(width)
        self.shortcut = _shortcut(fan_in, width, stride, projected, conv, norm)
        self.channels = width

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(n, height / stride, width / stride, width)`, of images."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class Bottleneck(nnx.Module):
    """A 1x1, a 3x3 and a 1x1 convolution of four times the width, beside a shortcut.

    The stride is that of the 3x3 convolution, as in every current implementation (the
    paper's is that of the first 1x1).

    Args:
      fan_in: channels that come in.
      width: a quarter of the channels that go out.
      stride: stride of the 3x3 convolution and of the shortcut.
      widening: channels of the 3x3 convolution are `widening * width`.
      groups: groups of the 3x3 convolution, which divide its channels.
      projected: as in `BasicBlock`.
      init: initialiser of the convolutions.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.

    References:
      He et al., 2016, Figure 5, right. `widening`: Zagoruyko and Komodakis, 2016,
      Section 2. `groups`: Xie et al., 2017, Figure 3 (c).
    """

    def __init__(
        self,
        fan_in: int,
        width: int,
        stride: int,
        *,
        widening: int = 1,
        groups: int = 1,
        projected: bool,
        init: Any,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_Conv, kernel_init=init, dtype=dtype, rngs=rngs)
        norm = functools.partial(_Norm, dtype=dtype, rngs=rngs)
        grouped = functools.partial(conv, feature_group_count=groups)
        inner, out = widening * width, 4 * width
        self.conv1, self.norm1 = conv(fan_in, inner, 1), norm(inner)
        self.conv2, self.norm2 = grouped(inner, inner, 3, stride), norm(inner)
        self.conv3, self.norm3 = conv(inner, out, 1), norm(out)
        self.shortcut = _shortcut(fan_in, out, stride, projected, conv, norm)
        self.channels = out

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(n, height / stride, width / stride, 4 width)`, of images."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + self.shortcut(x))


class _PaddedShortcut(nnx.Module):
    """Every `stride`-th pixel, with channels of zeros on both sides: option A."""

    def __init__(self, stride: int, more: int):
        self.stride = stride
        self.padding = (more // 2, more - more // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.padding))


def _shortcut(
    fan_in: int, width: int, stride: int, projected: bool, conv: Any, norm: Any
) -> nnx.Module:
    if projected and (fan_in != width or stride != 1):
        return nnx.Sequential(conv(fan_in, width, 1, stride), norm(width))
    return _PaddedShortcut(stride, width - fan_in)


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, the mean over pixels, a dense head.

    Args:
      depths: number of blocks in every stage; the first block of every stage but the
        first one has a stride of 2.
      widths: width of the blocks of every stage.
      classes: number of classes.
      block: `BasicBlock` or `Bottleneck`, or a partial one.
      projected: shortcuts of option B, see `BasicBlock`.
      cifar_stem: whether the stem is a 3x3 convolution, for images of 32x32, or a 7x7
        one of stride 2 with a max-pool of stride 2 after it.
      init: initialiser of the convolutions.
      head_init: initialiser of the head's kernel; that of its bias is PyTorch's.
      dtype: dtype of the activations; parameters and logits are float32.
      rngs: random streams of the initial weights.

    References:
      He et al., 2016, Table 1 and Section 4.2.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        classes: int,
        *,
        block: Callable[..., BasicBlock | Bottleneck] = BasicBlock,
        projected: bool = True,
        cifar_stem: bool = False,
        init: Any = KAIMING_FAN_OUT,
        head_init: Any = PYTORCH_KERNEL,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        taps, stride = (3, 1) if cifar_stem else (7, 2)
        self.cifar_stem = cifar_stem
        self.stem = _Conv(3, widths[0], taps, stride, kernel_init=init, **options)
        self.norm = _Norm(widths[0], **options)
        blocks, fan_in = [], widths[0]
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                made = block(
                    fan_in, width, stride, projected=projected, init=init, **options
                )
                blocks.append(made)
                fan_in = made.channels
        self.blocks = nnx.Sequential(*blocks)
        self.head = nnx.Linear(
            fan_in,
            classes,
            kernel_init=head_init,
            bias_init=pytorch_bias(fan_in),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, 3)`."""
        x = nnx.relu(self.norm(self.stem(images)))
        if not self.cifar_stem:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = self.blocks(x)
        return self.head(x.mean((1, 2)))


def _cifar(depth: int, classes: int, dtype: Any, rngs: nnx.Rngs) -> ResNet:
    return ResNet(
        (depth,) * 3,
        (16, 32, 64),
        classes,
        projected=False,
        cifar_stem=True,
        init=KAIMING_FAN_IN,
        head_init=KAIMING_FAN_IN,
        dtype=dtype,
        rngs=rngs,
    )


def resnet20(classes: int = 10, *, dtype: Any = None, rngs: nnx.Rngs) -> ResNet:
    """Return ResNet-20 of Section 4.2: 269,722 parameters for ten classes."""
    return _cifar(3, classes, dtype, rngs)


def resnet44(classes: int = 10, *, dtype: Any = None, rngs: nnx.Rngs) -> ResNet:
    """Return ResNet-44 of Section 4.2: 658,586 parameters for ten classes."""
    return _cifar(7, classes, dtype, rngs)


_WIDTHS = (64, 128, 256, 512)


def resnet18(classes: int = 1000, **options: Any) -> ResNet:
    """Return ResNet-18 of Table 1: 11,689,512 parameters; options as in `ResNet`."""
    return ResNet((2, 2, 2, 2), _WIDTHS, classes, **options)


def resnet34(classes: int = 1000, **options: Any) -> ResNet:
    """Return ResNet-34 of Table 1: 21,797,672 parameters; options as in `ResNet`."""
    return ResNet((3, 4, 6, 3), _WIDTHS, classes, **options)


def resnet50(classes: int = 1000, **options: Any) -> ResNet:
    """Return ResNet-50 of Table 1: 25,557,032 parameters; options as in `ResNet`."""
    return ResNet((3, 4, 6, 3), _WIDTHS, classes, block=Bottleneck, **options)


def resnext50_32x4d(classes: int = 1000, **options: Any) -> ResNet:
    """Return ResNeXt-50 (32x4d): 25,028,904 parameters; options as in `ResNet`.

    The kernel of a grouped convolution is cut into one matrix for all groups by the
    default rule, `components.ByName()`, which sees its name and shape only:
    `(3, 3, in / 32, out)` into `9 in / 32` rows and `out` columns. `from_model(model)`
    cuts it into one for every group: 32 of `9 in / 32` rows and `out / 32` columns.

    References:
      Xie, Girshick, Dollár, Tu, He: "Aggregated residual transformations for deep
      neural networks", 2017. https://arxiv.org/abs/1611.05431. Table 1.
    """
    block = functools.partial(Bottleneck, widening=2, groups=32)
    return ResNet((3, 4, 6, 3), _WIDTHS, classes, block=block, **options)


def wide_resnet50_2(classes: int = 1000, **options: Any) -> ResNet:
    """Return WRN-50-2-bottleneck: 68,883,240 parameters; options as in `ResNet`.

    References:
      Zagoruyko, Komodakis: "Wide residual networks", 2016.
      https://arxiv.org/abs/1605.07146. Table 8.
    """
    block = functools.partial(Bottleneck, widening=2)
    return ResNet((3, 4, 6, 3), _WIDTHS, classes, block=block, **options)
