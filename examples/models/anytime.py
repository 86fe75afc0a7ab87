"""Anytime networks: one forward pass, an answer at the exit of every stage.

`MODELS` has four ways to grow, each as an MLP and as a residual convolutional network:
exits along a trunk, and stages nested in width, in depth (interlaced) or in both. They
follow Wan, Hoffmann, Lu, Maire: "Orthogonalized SGD and Nested Architectures for
Anytime Neural Networks", 2020, https://arxiv.org/abs/2008.06635, as far as its abstract
and the captions of its figures go: a reconstruction, sizes and layers are ours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.convolution import convolve
from examples.models.resnet import BasicBlock
from orthax.nn import (
    Branched,
    Interlaced,
    NestedConv,
    NestedLinear,
    NestedNorm,
    Step,
    doubling,
)

Model = Literal["branched", "width", "depth", "both"]
MODELS: tuple[Model, ...] = Model.__args__
_GROUPS = 3  # of residual blocks: each has half the pixels and twice the features

_relu = functools.partial(jax.tree.map, nnx.relu)
_join = functools.partial(jnp.concatenate, axis=-1)
_norm = functools.partial(nnx.BatchNorm, momentum=0.9)
_KERNEL = nnx.initializers.he_uniform()
_conv = functools.partial(
    NestedConv, kernel_size=(3, 3), use_bias=False, conv_general_dilated=convolve
)


def make_mlp(
    model: Model,
    inputs: int,
    classes: int,
    *,
    stages: int,
    width: int,
    depth: int,
    built: int | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return an anytime MLP: inputs `(n, inputs)` to a list of logits `(n, classes)`.

    Args:
      model: how it grows.
      inputs: features that come in.
      classes: features that go out at every exit.
      stages: of the whole network; with each the width, the depth or both double.
      width: hidden features of stage 0; where the width does not grow all stages have
        those of the last one that does, `width * 2**(stages - 1)`.
      depth: layers of stage 0 behind the first one; of every block of a trunk.
      built: how many of the stages are built, the same as in the whole network.
      rngs: random streams of the initial weights.
    """
    built, full = built or stages, width << (stages - 1)

    dense = functools.partial(nnx.Linear, kernel_init=_KERNEL, rngs=rngs)

    def layer(fan_in: int, fan_out: int) -> nnx.Module:
        norm = nnx.LayerNorm(fan_out, rngs=rngs)
        return nnx.Sequential(dense(fan_in, fan_out), norm, nnx.relu)

    def nested(before: int | Sequence[int]) -> list:
        linear = NestedLinear(before, widths, kernel_init=_KERNEL, rngs=rngs)
        return [linear, NestedNorm(widths, nnx.LayerNorm, rngs=rngs), _relu]

    if model == "branched":
        blocks = [
            [layer(full if k + i else inputs, full) for i in range(depth)]
            for k in range(built)
        ]
        exits = [dense(full, classes) for _ in blocks]
        return Branched([nnx.Sequential(*block) for block in blocks], exits)
    widths = _widths(model, stages, width)[:built]
    layers = nested(inputs)
    if model == "width":
        for _ in range(depth):
            layers += nested(widths)
    else:
        layers += [_interlaced(model, layer, widths, depth)]
    heads = NestedLinear(widths, (classes,) * built, kernel_init=_KERNEL, rngs=rngs)
    return nnx.Sequential(*layers, heads)


def make_resnet(
    model: Model,
    inputs: int,
    classes: int,
    *,
    stages: int,
    width: int,
    depth: int,
    built: int | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return an anytime residual network: images `(n, h, w, inputs)` to logits.

    Nested ones have three groups of residual blocks, with the features of `width` in
    the first and twice as many in each further one; a branched one has a group for
    every stage and an exit behind it. Arguments as of `make_mlp`, in channels, and
    `depth` in residual blocks of every group.
    """
    built, full = built or stages, width << (stages - 1)

    def block(fan_in: int, fan_out: int, stride: int = 1) -> nnx.Module:
        return BasicBlock(
            fan_in, fan_out, stride, projected=True, init=_KERNEL, rngs=rngs
        )

    if model == "branched":
        trunk = [[_ConvNormRelu(inputs, full, rngs=rngs)]] + [
            [] for _ in range(1, built)
        ]
        for k, group in enumerate(trunk):
            for i in range(depth):
                first = k > 0 and i == 0
                fan_in, stride = (full << (k - 1), 2) if first else (full << k, 1)
                group.append(block(fan_in, full << k, stride))
        exits = [
            nnx.Sequential(_pooled, nnx.Linear(full << k, classes, rngs=rngs))
            for k in range(built)
        ]
        return Branched([nnx.Sequential(*group) for group in trunk], exits)
    layers, before = [], inputs
    for group in range(_GROUPS):
        widths = [x << group for x in _widths(model, stages, width)[:built]]
        conv = _conv(before, widths, strides=2 if group else 1, rngs=rngs)
        layers += [conv, NestedNorm(widths, _norm, rngs=rngs), _relu]
        if model == "width":
            layers += [_NestedBlock(widths, rngs=rngs) for _ in range(depth)]
        else:
            layers += [_interlaced(model, block, widths, depth)]
        before = widths
    heads = NestedLinear(before, (classes,) * built, rngs=rngs)
    return nnx.Sequential(*layers, _all_pooled, heads)


def _widths(model: Model, stages: int, width: int) -> tuple[int, ...]:
    """Return the features that every stage has of its own."""
    if model == "depth":
        return (width << (stages - 1),) * stages
    return doubling(width, stages)


def _interlaced(
    model: Model, layer: Callable, widths: Sequence[int], depth: int
) -> Interlaced:
    """Return layers that lie between one another; those of one width are added."""

    def make(step: Step) -> nnx.Module:
        read = [widths[stage] for stage in step.reads]
        fan_in = sum(read) if model == "both" else widths[0]
        return layer(fan_in, widths[step.stage])

    how = {"widen": True, "combine": _join} if model == "both" else {}
    return Interlaced(make, depth, len(widths), inputs=len(widths), **how)


def _pooled(x: jax.Array) -> jax.Array:
    return x.mean((1, 2))


def _all_pooled(xs: Sequence[jax.Array]) -> list[jax.Array]:
    return jax.tree.map(_pooled, xs)


class _ConvNormRelu(nnx.Module):
    """A 3x3 convolution, its norm and a ReLU: the stem."""

    def __init__(self, fan_in: int, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            fan_in,
            width,
            (3, 3),
            use_bias=False,
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.norm = _norm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class _NestedBlock(nnx.Module):
    """Two nested 3x3 convolutions beside a shortcut, of every stage."""

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.conv1, self.conv2 = (_conv(widths, widths, rngs=rngs) for _ in range(2))
        self.norm1, self.norm2 = (
            NestedNorm(widths, _norm, rngs=rngs) for _ in range(2)
        )

    def __call__(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        ys = _relu(self.norm1(self.conv1(xs)))
        ys = self.norm2(self.conv2(ys))
        return _relu(jax.tree.map(jnp.add, xs, ys))
