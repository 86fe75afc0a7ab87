"""Random changes of images, on the device that trains on them."""

import jax
import jax.numpy as jnp

_BORDER = 4


def augmented(images: jax.Array, key: jax.Array) -> jax.Array:
    """Return a random crop of every image, framed in black, half of them mirrored.

    Args:
      images: shape `(n, height, width, colours)`, zero is black; any dtype, kept.
      key: of the random numbers.
    """
    n, height, width, colours = images.shape
    frame = (_BORDER, _BORDER)
    framed = jnp.pad(images, ((0, 0), frame, frame, (0, 0)))
    crop, flip = jax.random.split(key)
    top, left = jax.random.randint(crop, (2, n), 0, 2 * _BORDER + 1)
    mirrored = jax.random.bernoulli(flip, 0.5, (n,))[:, None]
    rows = top[:, None] + jnp.arange(height)
    across = jnp.arange(width)
    columns = left[:, None] + jnp.where(mirrored, across[::-1], across)
    # Whole rows first: on a CPU a tenth of the time of a slice of every image.
    lines = framed.reshape(n, height + 2 * _BORDER, -1)
    lines = jnp.take_along_axis(lines, rows[:, :, None], axis=1)
    lines = lines.reshape(n, height, -1, colours)
    return jnp.take_along_axis(lines, columns[:, None, :, None], axis=2)
