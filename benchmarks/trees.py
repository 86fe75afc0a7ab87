"""Gradients of real networks: shapes under Flax's names, the rule, and numbers in them.

Two kinds of numbers, because the time of some methods depends on them: independent
normals, and matrices whose singular values decay as those of real gradients do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from examples.models import basic_cnn, densenet, gpt, moe, resnet, vit
from orthax import components

Tree = Any

# Power of the decay of the singular values, and the noise below them, relative to the
# root mean square of a matrix.
_DECAY = 2.0
_NOISE = 1e-6


class Model(NamedTuple):
    """How to make a network, of what size by default, and the rule that cuts it.

    The size is that of an image, or the length of a sequence; `make` takes it, the
    dtype of the activations and random streams.
    """

    make: Callable[[int, Any, nnx.Rngs], nnx.Module]
    size: int
    rule: components.Rule = components.ByName()


class Network(NamedTuple):
    """Shapes of the gradients of a network, and the rule that cuts them."""

    params: Tree
    rule: components.Rule


def _any_size(make: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    return lambda size, dtype, rngs: make(dtype=dtype, rngs=rngs)


def _of_size(make: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    return lambda size, dtype, rngs: make(size, dtype=dtype, rngs=rngs)


def _basic_cnn(size: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    return basic_cnn.BasicCNN((size, size, 3), 10, dtype=dtype, rngs=rngs)


MODELS = {
    "basic_cnn": Model(_basic_cnn, 32),
    "resnet20": Model(_any_size(resnet.resnet20), 32),
    "resnet18": Model(_any_size(resnet.resnet18), 224),
    "resnet50": Model(_any_size(resnet.resnet50), 224),
    "densenet121": Model(_any_size(densenet.densenet121), 224),
    "vit_ti16": Model(_of_size(vit.vit_ti16), 224),
    "vit_b16": Model(_of_size(vit.vit_b16), 224),
    "gpt2_small": Model(_any_size(gpt.GPT), 1024),
    "moe32": Model(
        _any_size(moe.MixtureOfExperts), 1024, components.ByName(stacked=("experts",))
    ),
}


def _network(model: Model) -> Network:
    made = nnx.eval_shape(lambda: model.make(model.size, None, nnx.Rngs(0)))
    return Network(nnx.to_pure_dict(nnx.state(made, nnx.Param)), model.rule)


NETWORKS: dict[str, Callable[[], Network]] = {
    name: functools.partial(_network, model) for name, model in MODELS.items()
}


def gaussian(params: Tree, seed: int = 0) -> Tree:
    """Fill a tree of shapes with independent standard normal gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(
            rng.standard_normal(leaf.shape, np.float32), leaf.dtype
        ),
        params,
    )


def decaying(network: Network, seed: int = 0) -> Tree:
    """Fill a network with gradients that are nearly of low rank.

    A matrix of k singular values is the sum of k / 2 outer products of standard normal
    vectors, the j-th of them scaled by 1 / j², and of normal noise of 1e-6 of its root
    mean square. Condition numbers result of 5e6 (16 columns) to 5e7 (512), for square
    ones up to 1e10; half to nine tenths of the singular values lie below 1e-3 of the
    Frobenius norm. So it is in transformers (measured on a small one, on digits); the
    convolutions of BasicCNN lie between this and `gaussian`.

    Vectors and tables are standard normals.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def stack(b: int, m: int, n: int) -> np.ndarray:
        rank = -(-min(m, n) // 2)
        scales = np.arange(1, rank + 1, dtype=np.float32) ** -_DECAY
        x = (normal(b, m, rank) * scales) @ normal(b, rank, n)
        return x + _NOISE * np.sqrt(np.mean(x**2)) * normal(b, m, n)

    filled = []
    for _, leaf, cut in components.resolve(network.params, network.rule):
        if cut is None:
            value = normal(*leaf.shape)
        else:
            stacks = [stack(*shape) for shape in cut.matrices(leaf.shape)]
            value = cut.unfold(stacks, leaf.shape)
        filled.append(jax.numpy.asarray(value, leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(network.params), filled)
