"""What a device can do at most: the rate of large matrix products, in the same run."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

# Large enough for the peak, small enough to be measured in seconds.
_SIDES = {"cpu": (1024, 2048), "gpu": (4096, 8192), "tpu": (4096, 8192)}
_CALLS = 10

_PRODUCT = re.compile(r"stablehlo\.dot_general .*")
_KERNEL = re.compile(r"custom_call.*(triton|mosaic).*tensor<\S*xbf16>", re.IGNORECASE)
_HALF = re.compile(r"tensor<\S*xbf16>")
_PRECISION = re.compile(r"precision = \[(\w+)")
_LOWEST_FIRST = ("DEFAULT", "HIGH", "HIGHEST")


@functools.cache
def peak(products: str = "float32") -> float:
    """Return the best rate of a product of square matrices, in FLOP/s.

    Best of ten calls for each of a few sides, of numbers that are not zero.

    Args:
      products: what is multiplied, as `inputs_of_products` calls it.
    """
    dtype, _, precision = products.partition(" at ")
    sides = _SIDES.get(jax.default_backend(), _SIDES["cpu"])
    return max(_rate(side, dtype, precision or "highest") for side in sides)


def _rate(side: int, dtype: str, precision: str) -> float:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((side, side)), dtype) for _ in range(2))
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def inputs_of_products(program: str) -> str:
    """Return what a lowered program multiplies: `bfloat16`, `float32` or lower.

    A method may choose it for the platform; the program shows what was chosen. On an
    accelerator, float32 at the default precision is rounded (TF32 on GPU): that is
    `float32 at default`, and its peak is another one.
    """
    found = _PRODUCT.findall(program)
    if any(map(_HALF.search, found)) or _KERNEL.search(program):
        return "bfloat16"
    asked = [_PRECISION.search(product) for product in found]
    precisions = {match[1] if match else "DEFAULT" for match in asked}
    lowest = next((p for p in _LOWEST_FIRST if p in precisions), "HIGHEST")
    if lowest == "HIGHEST" or jax.default_backend() == "cpu":
        return "float32"
    return f"float32 at {lowest.lower()}"
