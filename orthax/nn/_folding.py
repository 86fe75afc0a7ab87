"""Folding a decorrelating map into the kernel and bias of the layer after it."""

import jax
from flax import nnx

from orthax._linalg import matmul
from orthax.internal.decorrelation import DecorrelationRule, DecorrelationState


def folded(
    layer: nnx.Linear | nnx.Conv,
    rule: DecorrelationRule,
    state: DecorrelationState,
    mean: jax.Array,
) -> nnx.Linear | nnx.Conv:
    """Return a layer with the kernel R^T W and the bias b - mu R^T W.

    Everything else (strides, precision, dtypes) is copied from the layer. Its outputs
    for x are those of `layer` for z = R (x - mu).
    """
    new = nnx.clone(layer)
    kernel = layer.kernel[...]
    if (mask := getattr(layer, "mask", None)) is not None:
        kernel, new.mask = kernel * mask, None
    transform = jax.lax.stop_gradient(state.transform)
    # Rows are the features of a patch, taps before channels.
    rows = kernel.astype(mean.dtype).reshape(len(mean), kernel.shape[-1])
    rows = rule.fold(transform, rows)
    bias = -matmul(mean, rows)
    new.kernel[...] = rows.reshape(kernel.shape).astype(kernel.dtype)
    if layer.bias is None:
        new.bias, new.use_bias = nnx.Param(bias.astype(kernel.dtype)), True
    else:
        old = layer.bias[...]
        new.bias[...] = (old.astype(mean.dtype) + bias).astype(old.dtype)
    return new
