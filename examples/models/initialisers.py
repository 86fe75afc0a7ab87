"""Initial weights as PyTorch and torchvision have them.

The fans are PyTorch's, of grouped convolutions too: fan-in counts the channels of one
group, fan-out all that go out.
"""

from typing import Any

import jax
from flax import nnx

# "Delving deep into rectifiers", He, Zhang, Ren, Sun, 2015, Section 2.2: normal of
# variance 2 / fan, untruncated.
KAIMING_FAN_IN = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
KAIMING_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

# What PyTorch's layers have when they are told nothing: uniform between the two signs
# of fan-in ** -0.5, kernel and bias alike.
PYTORCH_KERNEL = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def pytorch_bias(fan_in: int) -> jax.nn.initializers.Initializer:
    """Return PyTorch's initialiser of the bias of a layer with that fan-in."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = float) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
