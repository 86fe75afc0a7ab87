"""Random changes of colour and focus, on the device: the two views of Barlow Twins.

The changes and their chances are those of Zbontar, Jing, Misra, LeCun, Deny: "Barlow
Twins: Self-Supervised Learning via Redundancy Reduction", 2021, appendix A,
https://arxiv.org/abs/2103.03230. The random part and
the mirror image are taken where images are read.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as Pillow converts
_LONGEST_BLUR = 2.0  # standard deviation, pixels
_TAPS = 6  # on each side: three standard deviations


@dataclasses.dataclass(frozen=True)
class Changes:
    """How likely the changes of one view are.

    Attributes:
      blur: chance of a Gaussian blur.
      solarise: chance of a solarisation.
      jitter: chance of changes of brightness, contrast, saturation and hue.
      grey: chance of the loss of all colour.
    """

    blur: float
    solarise: float
    jitter: float = 0.8
    grey: float = 0.2


TWO_VIEWS = (Changes(blur=1.0, solarise=0.0), Changes(blur=0.1, solarise=0.2))


@functools.partial(jax.jit, static_argnums=2)
def changed(images: jax.Array, keys: jax.Array, chances: Changes) -> jax.Array:
    """Return images changed at random, each in the way of its key.

    Args:
      images: shape `(n, height, width, 3)`, floating, from 0 to 1.
      keys: of the random numbers, shape `(n,)`.
      chances: how likely what is.
    """
    return jax.vmap(lambda image, key: _changed(image, key, chances))(images, keys)


def _changed(image: jax.Array, key: jax.Array, chances: Changes) -> jax.Array:
    jitter, grey, blur, solarise, factors, order, width = jax.random.split(key, 7)

    def at_random(key: jax.Array, chance: float, other: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, chance), other, image)

    image = at_random(jitter, chances.jitter, _jittered(image, factors, order))
    image = at_random(grey, chances.grey, _grey(image))
    deviation = jax.random.uniform(width, minval=0.1, maxval=_LONGEST_BLUR)
    image = at_random(blur, chances.blur, blurred(image, deviation))
    return at_random(solarise, chances.solarise, solarised(image))


def _jittered(image: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Return an image of other brightness, contrast, saturation, hue, in any order."""
    at = jax.random.uniform(factors, (4,), minval=-1.0)
    change = [
        functools.partial(brightened, factor=1 + 0.4 * at[0]),
        functools.partial(contrasted, factor=1 + 0.4 * at[1]),
        functools.partial(saturated, factor=1 + 0.2 * at[2]),
        functools.partial(hued, turn=0.1 * at[3]),
    ]
    order = jax.random.permutation(order, 4)
    # Under `vmap` all four are computed at every place, and one of them is chosen.
    return jax.lax.fori_loop(
        0, 4, lambda i, image: jax.lax.switch(order[i], change, image), image
    )


def brightened(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Return an image with every value times a factor, at most one."""
    return jnp.clip(factor * image, 0, 1)


def contrasted(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Return an image with every distance from its mean grey times a factor."""
    mean = _grey(image).mean()
    return jnp.clip(mean + factor * (image - mean), 0, 1)


def saturated(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Return an image with every distance from grey times a factor."""
    grey = _grey(image)
    return jnp.clip(grey + factor * (image - grey), 0, 1)


def hued(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Return an image whose hue is turned, in units of the whole circle.

    Value and saturation stay. With the largest and smallest colour of a pixel as ends,
    a colour is a trapezoid of the hue: full for a third of the circle, and a sixth up
    or down on each side.
    """
    high, low = image.max(-1), image.min(-1)
    spread = high - low
    red, green, blue = jnp.moveaxis(image, -1, 0)
    over = jnp.where(spread > 0, spread, 1)
    sixths = jnp.select(
        [high == red, high == green],
        [(green - blue) / over, 2 + (blue - red) / over],
        4 + (red - green) / over,
    )
    sixths = sixths + 6 * turn
    # A colour is full within one sixth of its own hue, gone two sixths away.
    away = (sixths[..., None] - jnp.array([0.0, 2.0, 4.0]) + 3) % 6 - 3
    share = jnp.clip(2 - jnp.abs(away), 0, 1)
    return low[..., None] + spread[..., None] * share


def blurred(image: jax.Array, deviation: jax.Array) -> jax.Array:
    """Return an image under a Gaussian; beyond its edges it goes on as they are.

    Args:
      image: shape `(height, width, colours)`.
      deviation: standard deviation of the Gaussian, pixels, at most 2: it is cut off at
        6 pixels.
    """
    at = jnp.arange(-_TAPS, _TAPS + 1)
    weights = jax.nn.softmax(-((at / deviation) ** 2) / 2)
    for axis in (0, 1):
        frame = [(0, 0)] * 3
        frame[axis] = (_TAPS, _TAPS)
        framed, size = jnp.pad(image, frame, mode="edge"), image.shape[axis]
        image = sum(
            weight * jax.lax.slice_in_dim(framed, i, i + size, axis=axis)
            for i, weight in enumerate(weights)
        )
    return image


def solarised(image: jax.Array) -> jax.Array:
    """Return an image with its bright half, from 128 of 255 on, inverted."""
    return jnp.where(image >= 128 / 255, 1 - image, image)


def _grey(image: jax.Array) -> jax.Array:
    grey = (image * jnp.array(_GREY, image.dtype)).sum(-1)
    return jnp.broadcast_to(grey[..., None], image.shape)
