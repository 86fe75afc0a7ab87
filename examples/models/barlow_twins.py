"""Barlow Twins: an encoder, a projector, the loss of two views, a linear probe.

Zbontar, Jing, Misra, LeCun, Deny: "Barlow Twins: Self-Supervised Learning via
Redundancy Reduction", 2021, https://arxiv.org/abs/2103.03230.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.initialisers import PYTORCH_KERNEL
from examples.models.resnet import Bottleneck, ResNet

_Norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class _Features(nnx.Module):
    """The head of a network without classes."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class BarlowTwins(nnx.Module):
    """A residual network without its head, and dense layers behind it.

    The last norm of every residual block starts at zero, so that every block starts as
    its shortcut.

    Args:
      encoder: a `ResNet`, whose head is taken off: it gives features then.
      widths: features of the projector's layers; batch norm and ReLU behind all but the
        last, no biases.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the projector's weights.

    Attributes:
      features: how many the encoder gives.
    """

    def __init__(
        self,
        encoder: ResNet,
        widths: Sequence[int] = (8192, 8192, 8192),
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.features = encoder.head.in_features
        encoder.head = _Features()
        for block in encoder.blocks.layers:
            last = block.norm3 if isinstance(block, Bottleneck) else block.norm2
            last.scale[...] = jnp.zeros_like(last.scale[...])
        self.encoder = encoder
        layers, before = [], self.features
        for i, width in enumerate(widths):
            init, own = PYTORCH_KERNEL, {"dtype": dtype, "rngs": rngs}
            dense = nnx.Linear(before, width, use_bias=False, kernel_init=init, **own)
            layers.append(dense)
            if i + 1 < len(widths):
                layers += [_Norm(width, **own), nnx.relu]
            before = width
        self.projector = nnx.Sequential(*layers)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the embeddings `(n, widths[-1])` of images `(n, height, width, 3)`."""
        return self.projector(self.encoder(images))


class LinearProbe(nnx.Module):
    """A dense layer behind an encoder that stays as it is: what its features know.

    Args:
      twins: what the encoder is taken from; it is in evaluation mode from then on.
      classes: how many.
      rngs: random streams of the dense layer's weights, whose deviation is 0.01.

    Attributes:
      LEARNED: the variables of the dense layer, for `nnx.split`.
    """

    LEARNED = nnx.All(nnx.Param, nnx.PathContains("head"))

    def __init__(self, twins: BarlowTwins, classes: int, *, rngs: nnx.Rngs):
        twins.encoder.eval()
        self.encoder = twins.encoder
        init = nnx.initializers.normal(0.01)
        self.head = nnx.Linear(twins.features, classes, kernel_init=init, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, 3)`."""
        return self.head(jax.lax.stop_gradient(self.encoder(images)))


def barlow_twins_loss(
    one: jax.Array, other: jax.Array, *, redundancy: float = 0.0051, eps: float = 1e-5
) -> jax.Array:
    r"""Return how far the cross-correlation of two embeddings is from the identity.

    $\sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2$, where $C$ is the
    correlation over the batch between feature i of one view and j of the other. Under
    `jit` the batch is the whole one, on however many devices it lies.

    Args:
      one: embeddings of one view, shape `(n, d)`.
      other: those of the other view, of the same images.
      redundancy: $\lambda$, dimensionless.
      eps: added to the variances.

    References:
      Zbontar et al. 2021, equations 1 and 2; $\lambda$ and eps of the authors' code.
    """

    def standardised(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (x - x.mean(0)) / jnp.sqrt(x.var(0) + eps)

    a, b = standardised(one), standardised(other)
    c = jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) / len(a)
    diagonal = jnp.diagonal(c)
    off = (c**2).sum() - (diagonal**2).sum()
    return ((1 - diagonal) ** 2).sum() + redundancy * off
