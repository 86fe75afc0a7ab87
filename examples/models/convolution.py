"""The convolution of the examples, in the form that XLA runs fast on a CPU."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PIECE = 32  # images


class _Window(NamedTuple):
    """How the kernel moves: strides and padding of rows and columns."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    precision: Any


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Return `jax.lax.conv_general_dilated` of the arguments, quickly on a CPU as well.

    For `nnx.Conv(..., conv_general_dilated=convolve)`. On anything but a CPU it is that
    function, and so are its gradients. On a CPU, XLA (jax 0.10.2) has a fast routine
    for one form of convolution only: channels last in images, kernel and output. It
    brings the two convolutions of the gradient into this form outside of loops only;
    in the body of `jax.lax.scan` they take some hundred times as long. Here they have
    it from the start, the gradient of a strided one has no zeros to multiply, and the
    batch goes through in pieces, whose patches stay near the cache.

    Milliseconds a step of training, median, float32, SGD with momentum; two cores of an
    AMD EPYC (family 26) with other work beside, jax 0.10.2:

    | | step by step, lax | step by step | one scan |
    |---|---|---|---|
    | BasicCNN, 1024 CIFAR images | 339 | 183 | 128 (lax, timed once: 18,000) |
    | ResNet-20, 128 CIFAR images | 539 | 443 | 395 |
    | ResNet-20, 1024 CIFAR images | 8660 | 3640 | 3510 |

    Args:
      lhs: images, shape `(n, height, width, channels)`.
      rhs: kernel, shape `(height, width, channels, features)`.
      window_strides: strides along height and width, pixels.
      padding: "SAME", "VALID", or pixels before and after, for height and width.
      **options: the others of `jax.lax.conv_general_dilated`. Any that makes more of it
        than a plain convolution of two dimensions and this layout (dilation, groups,
        another dtype) takes it as it is.

    Returns:
      Shape `(n, height, width, features)`, equal to that of
      `jax.lax.conv_general_dilated` but for rounding.

    Limits:
      Reverse mode only: `jax.jvp` of a plain convolution raises TypeError.
    """
    precision = options.get("precision")
    if not _is_plain(lhs, rhs, options):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(lhs, rhs, _Window(strides, pairs, precision))


def _is_plain(lhs: jax.Array, rhs: jax.Array, options: dict[str, Any]) -> bool:
    if lhs.ndim != 4:
        return False
    layout, plain = (
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, each)
        for each in (options.get("dimension_numbers"), _LAYOUT)
    )
    dilations = (options.get(f"{side}_dilation") or (1, 1) for side in ("lhs", "rhs"))
    groups = (options.get(f"{kind}_group_count", 1) for kind in ("feature", "batch"))
    others = (options.get(name) for name in ("preferred_element_type", "out_sharding"))
    return (
        layout == plain
        and all(tuple(dilation) == (1, 1) for dilation in dilations)
        and all(count == 1 for count in groups)
        and all(other is None for other in others)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    def pieces(x: jax.Array, kernel: jax.Array) -> jax.Array:
        _, outputs = lax.scan(
            lambda _, x: (None, _reference(x, kernel, window)),
            None,
            _divide(x, count),
        )
        return outputs.reshape(x.shape[0], *outputs.shape[2:])

    reference = functools.partial(_reference, window=window)
    count = _count_pieces(x.shape[0])
    cpu = reference if count == 1 else pieces
    return lax.platform_dependent(x, kernel, cpu=cpu, default=reference)


def _forward(x: jax.Array, kernel: jax.Array, window: _Window) -> tuple:
    return _convolve(x, kernel, window), (x, kernel)


def _backward(window: _Window, kept: tuple, g: jax.Array) -> tuple:
    def reference(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple:
        return jax.vjp(functools.partial(_reference, window=window), x, kernel)[1](g)

    def cpu(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple:
        return (
            _grad_of_input(x, kernel, g, window),
            _grad_of_kernel(x, kernel, g, window),
        )

    return lax.platform_dependent(*kept, g, cpu=cpu, default=reference)


_convolve.defvjp(_forward, _backward)


def _reference(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        dimension_numbers=_LAYOUT,
        precision=window.precision,
    )


def _grad_of_input(
    x: jax.Array, kernel: jax.Array, g: jax.Array, window: _Window
) -> jax.Array:
    """Return the gradient of the images: one convolution of stride 1, pixels reordered.

    Pixel `q * stride + r` of the padded image meets tap `t * stride + r` of output
    `q - t`. For every remainder `r` that is a convolution over `t`, so the remainders
    become features of one kernel, and pixels afterwards. (Differentiation of a strided
    convolution puts zeros between the pixels of `g` instead, and multiplies them.)
    """
    taps, features = kernel.shape[:2], kernel.shape[2:]
    reach, first, last, padding, kept = [], [], [], [], []
    for k, s, (low, _), size, out in zip(
        taps, window.strides, window.padding, x.shape[1:3], g.shape[1:3], strict=True
    ):
        reach.append(-(-k // s))
        first.append(low // s)
        last.append(-(-(low + size) // s))
        padding.append((reach[-1] - 1 - first[-1], last[-1] - out))
        kept.append(slice(low - first[-1] * s, low - first[-1] * s + size))

    s, t = window.strides, reach
    missing = [(0, t[i] * s[i] - taps[i]) for i in range(2)]
    kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
    kernel = kernel.reshape(t[0], s[0], t[1], s[1], *features)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(*t, features[1], -1)
    y = _reference(g, kernel, _Window((1, 1), tuple(padding), window.precision))

    n, height, width, _ = y.shape
    y = y.reshape(n, height, width, *s, features[0]).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(n, height * s[0], width * s[1], features[0])
    return y[:, kept[0], kept[1]]


def _grad_of_kernel(
    x: jax.Array, kernel: jax.Array, g: jax.Array, window: _Window
) -> jax.Array:
    """Return the gradient of the kernel: `g` is the kernel, the images are channels."""
    ends = [
        (low, (out - 1) * s + k - size - low)
        for k, s, (low, _), size, out in zip(
            kernel.shape[:2],
            window.strides,
            window.padding,
            x.shape[1:3],
            g.shape[1:3],
            strict=True,
        )
    ]

    def piece(x: jax.Array, g: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            g.transpose(1, 2, 0, 3),
            (1, 1),
            ends,
            rhs_dilation=window.strides,
            dimension_numbers=_LAYOUT,
            precision=window.precision,
        )
        return y.transpose(1, 2, 0, 3)

    count = _count_pieces(x.shape[0])
    if count == 1:
        return piece(x, g)
    # Pieces of bfloat16 are added up in float32.
    total = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
    total, _ = lax.scan(
        lambda total, xs: (total + piece(*xs), None),
        total,
        (_divide(x, count), _divide(g, count)),
    )
    return total.astype(kernel.dtype)


def _count_pieces(n: int) -> int:
    """Return the number of equal pieces, of `_PIECE` images or little more."""
    least = max(n // _PIECE, 1)
    # The batch may not divide well: then it stays whole.
    return next((c for c in range(least, least // 2, -1) if n % c == 0), 1)


def _divide(images: jax.Array, count: int) -> jax.Array:
    return images.reshape(count, -1, *images.shape[1:])
