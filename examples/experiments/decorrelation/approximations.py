"""Approximations of backpropagation: feedback alignment and node perturbation.

Both are functions of a network that is an `nnx.Sequential` of layers (modules) and
functions without weights, and give gradients for an ordinary optimiser.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.decorrelation import is_layer, plain

Loss = Callable[[jax.Array], jax.Array]  # logits to the loss of every image, `(n,)`


# -------------------------------------------------------------- feedback alignment


class Feedback(nnx.Variable):
    """A kernel of the way back, drawn once and never trained."""


class FeedbackAligned(nnx.Module):
    """A layer that sends errors back through a fixed random kernel, not its own.

    The forward pass, and the gradient of the layer's own weights for the error that
    arrives, are the layer's. Where its input is decorrelated, `z = R (x - mu)`, R stays
    on the way back: the error of x is `R^T B` times that of the output.

    Args:
      layer: an `nnx.Linear`, an `nnx.Conv`, or an `orthax.nn.Decorrelated` of one.
      kernel_init: initialiser of B.
      rngs: random numbers, of the stream "feedback".

    References:
      Lillicrap, Cownden, Tweed, Akerman: "Random synaptic feedback weights support
      error backpropagation for deep learning", Nature Communications 7, 2016.
    """

    def __init__(
        self,
        layer: nnx.Module,
        *,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.layer = layer
        kernel = plain(layer).kernel
        self.feedback = Feedback(
            kernel_init(rngs.feedback(), kernel.shape, kernel.dtype)
        )
        self.use_running_average = False  # set by `model.train()` and `.eval()`
        self.updating = True

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the layer's output."""
        if self.use_running_average:
            return self.layer(x)
        graphdef, weights, rest = nnx.split(self.layer, nnx.Param, ...)
        y = _aligned(graphdef, weights, self.feedback[...], rest, x)
        if self.updating:
            # What the layer learns from its input; its output is not computed again.
            self.layer(jax.lax.stop_gradient(x))
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _aligned(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    feedback: jax.Array,
    rest: nnx.State,
    x: jax.Array,
) -> jax.Array:
    return _output(graphdef, weights, None, rest, x)


def _output(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    kernel: jax.Array | None,
    rest: nnx.State,
    x: jax.Array,
) -> jax.Array:
    """Return the output of a layer, perhaps with another kernel; it learns nothing."""
    layer = nnx.merge(graphdef, weights, rest, copy=True)
    if kernel is not None:
        plain(layer).kernel[...] = kernel
    layer.set_attributes(updating=False, raise_if_not_found=False)
    return layer(x)


def _aligned_forward(
    graphdef: nnx.GraphDef, *kept: jax.Array
) -> tuple[jax.Array, tuple]:
    return _aligned(graphdef, *kept), kept


def _aligned_backward(graphdef: nnx.GraphDef, kept: tuple, error: jax.Array) -> tuple:
    weights, feedback, rest, x = kept
    _, to_weights = jax.vjp(lambda w: _output(graphdef, w, None, rest, x), weights)
    _, to_input = jax.vjp(lambda x: _output(graphdef, weights, feedback, rest, x), x)
    return *to_weights(error), None, None, *to_input(error)


_aligned.defvjp(_aligned_forward, _aligned_backward)


def feedback_aligned(
    network: nnx.Sequential, *, kernel_init: nnx.Initializer, rngs: nnx.Rngs
) -> nnx.Sequential:
    """Return a network, every layer of which sends errors back through fixed kernels.

    Args:
      network: its layers are those of the new one.
      kernel_init: initialiser of the kernels of the way back.
      rngs: random numbers, of the stream "feedback".
    """
    return nnx.Sequential(
        *(
            FeedbackAligned(layer, kernel_init=kernel_init, rngs=rngs)
            if is_layer(layer)
            else layer
            for layer in network.layers
        )
    )


# --------------------------------------------------------------- node perturbation


def node_perturbation(
    network: nnx.Sequential,
    images: jax.Array,
    loss: Loss,
    key: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits, losses, and a number whose gradient estimates that of the loss.

    A second forward pass has Gaussian noise added to the output of every layer. For
    each image the difference of its two losses, over the size of the noise and times
    the noise, estimates the gradient of its loss in these outputs, and from there, one
    layer at a time, that of the weights: nothing is sent back.

    Args:
      network: in training mode; its statistics learn from the pass without noise.
      images: shape `(n, ...)`.
      loss: of every image, from the logits.
      key: of the noise.
      scale: standard deviation of the noise, in units of a layer's output. The
        estimate is that of the slope: unbiased as `scale` goes to zero, but the
        difference of two losses must not drown in rounding.

    Returns:
      The logits and the losses without noise, `(n,)`, and a scalar of whose value only
      the gradient in the parameters means anything: that of the mean loss.

    Limits:
      Where a batch mean is removed, one image's noise reaches the others through it;
      that part of the gradient is left out, as the loss is each image's own. Products
      are at full precision, also where the default is lower. The variance grows with
      the number of outputs: two times as many need two times as many images.

    References:
      Werfel, Xie, Seung: "Learning curves for stochastic gradient descent in linear
      feedforward networks", Neural Computation 17, 2005 (node perturbation).
    """
    noisy = nnx.clone(network)  # before anything is learnt from the pass without noise
    noisy.set_attributes(updating=False, raise_if_not_found=False)
    with jax.default_matmul_precision("highest"):
        logits, outputs = _outputs(network, images, [])
        keys = jax.random.split(key, len(outputs))
        noise = [
            jax.random.normal(key, y.shape, y.dtype)
            for key, y in zip(keys, outputs, strict=True)
        ]
        others, _ = _outputs(noisy, images, [scale * xi for xi in noise])
    losses = loss(logits)
    difference = jax.lax.stop_gradient(loss(others) - losses) / scale
    total = sum(
        jnp.vdot(y, xi * difference.reshape(-1, *(1,) * (y.ndim - 1)))
        for y, xi in zip(outputs, noise, strict=True)
    )
    return logits, losses, total / len(images)


def _outputs(
    network: nnx.Sequential, images: jax.Array, noise: Sequence[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the logits and the output of every layer, of its own weights alone."""
    x, outputs, left = images, [], list(noise)
    for layer in network.layers:
        x = layer(jax.lax.stop_gradient(x))
        if is_layer(layer):
            outputs.append(x)
            x = x + left.pop(0) if left else x
    return x, outputs
