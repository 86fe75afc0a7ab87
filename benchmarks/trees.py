"""Gradient trees of real networks: shapes under the names that Flax would give them."""

from typing import Any

import jax
import numpy as np

Tree = Any


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32")


def _norm(width: int) -> Tree:
    return {"scale": _array(width), "bias": _array(width)}


def _block(fan_in: int, width: int, shortcut: bool) -> Tree:
    """Return a residual block of two 3x3 convolutions, biases left to the norms."""
    block = {
        "conv0": {"kernel": _array(3, 3, fan_in, width)},
        "norm0": _norm(width),
        "conv1": {"kernel": _array(3, 3, width, width)},
        "norm1": _norm(width),
    }
    if shortcut:
        block["shortcut_conv"] = {"kernel": _array(1, 1, fan_in, width)}
        block["shortcut_norm"] = _norm(width)
    return block


def _resnet(
    taps: int, widths: tuple[int, ...], depth: int, classes: int, projected: bool
) -> Tree:
    """Return a residual network: a stem, stages of `depth` blocks, a dense head."""
    tree = {
        "stem_conv": {"kernel": _array(taps, taps, 3, widths[0])},
        "stem_norm": _norm(widths[0]),
    }
    fan_in = widths[0]
    for i, width in enumerate(widths):
        blocks = {}
        for j in range(depth):
            blocks[f"block{j}"] = _block(fan_in, width, projected and fan_in != width)
            fan_in = width
        tree[f"stage{i}"] = blocks
    head = {"kernel": _array(fan_in, classes), "bias": _array(classes)}
    return tree | {"head": head}


def resnet18() -> Tree:
    """Return ResNet-18 for ImageNet: 11 689 512 parameters in 21 matrices and vectors.

    He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2016, Table 1;
    1x1 projections where the width changes (option B).
    """
    return _resnet(7, (64, 128, 256, 512), 2, 1000, projected=True)


def resnet20() -> Tree:
    """Return ResNet-20 for CIFAR-10: 269 722 parameters in 20 matrices and vectors.

    Ibid., Section 4.2; shortcuts without parameters (option A).
    """
    return _resnet(3, (16, 32, 64), 3, 10, projected=False)


TREES = {"resnet18": resnet18, "resnet20": resnet20}


def gaussian(tree: Tree, seed: int = 0) -> Tree:
    """Fill a tree of shapes with independent standard normal gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
        tree,
    )
