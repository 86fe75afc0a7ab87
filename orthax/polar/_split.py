"""Products of float32 matrices by bfloat16 ones, sixteen bits of every factor."""

import jax
import jax.numpy as jnp


def split_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product of two stacks by three products of their parts.

    The fourth, of the two low parts, is left out: for matrices with short sides of 192
    and more it makes no difference to a polar factor (`benchmarks/README.md`).
    """
    (a_high, a_low), (b_high, b_low) = _parts(a), _parts(b)
    return _product(a_high, b_high) + _product(a_high, b_low) + _product(a_low, b_high)


def split_gram(x: jax.Array, wide: bool) -> jax.Array:
    """Return `x x^T`, or `x^T x` where `x` is not wide, by two products of its parts.

    Of the mixed products one is the transpose of the other.
    """
    high, low = _parts(x)
    if wide:
        square, mixed = _product(high, high.mT), _product(high, low.mT)
    else:
        square, mixed = _product(high.mT, high), _product(high.mT, low)
    return square + mixed + mixed.mT


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
