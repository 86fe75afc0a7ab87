"""Vision transformers: ViT-Ti/16, ViT-S/16, ViT-B/16.

Dosovitskiy et al.: "An Image is Worth 16x16 Words: Transformers for Image Recognition
at Scale", 2021. https://arxiv.org/abs/2010.11929. Ti and S are those of Touvron et al.:
"Training data-efficient image transformers and distillation through attention", 2021.
https://arxiv.org/abs/2012.12877.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Touvron et al., Section 6: a truncated normal distribution.
_INIT = nnx.initializers.truncated_normal(0.02)


class EncoderBlock(nnx.Module):
    """Self-attention and a feed-forward block, each normed first and added.

    Args:
      width: features of a token.
      heads: attention heads.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.

    References:
      Dosovitskiy et al., 2021, Equations 2 and 3.
    """

    def __init__(self, width: int, heads: int, *, dtype: Any = None, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(
            heads, width, kernel_init=_INIT, decode=False, keep_rngs=False, **options
        )
        self.norm2 = nnx.LayerNorm(width, **options)
        self.up = nnx.Linear(width, 4 * width, kernel_init=_INIT, **options)
        self.down = nnx.Linear(4 * width, width, kernel_init=_INIT, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return tokens `(n, length, width)`, of tokens of that shape."""
        x = x + self.attention(self.norm1(x))
        y = nnx.gelu(self.up(self.norm2(x)), approximate=False)
        return x + self.down(y)


class VisionTransformer(nnx.Module):
    """Patches and a class token through encoder blocks; a dense head on that token.

    Args:
      image_size: height and width of an image.
      patch_size: height and width of a patch; divides `image_size`.
      classes: number of classes.
      width: features of a token.
      depth: number of encoder blocks.
      heads: attention heads of every block.
      dtype: dtype of the activations; parameters and logits are float32.
      rngs: random streams of the initial weights.

    Raises:
      ValueError: if `patch_size` does not divide `image_size`.

    References:
      Dosovitskiy et al., 2021, Section 3.1 and Table 1; Touvron et al., 2021, Table 1.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        classes: int = 1000,
        *,
        width: int,
        depth: int,
        heads: int,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(
                f"`patch_size` is {patch_size}; expected a divisor of `image_size`, "
                f"{image_size}."
            )
        options = {"dtype": dtype, "rngs": rngs}
        self.patches = nnx.Conv(
            3,
            width,
            (patch_size, patch_size),
            strides=patch_size,
            padding="VALID",
            kernel_init=_INIT,
            **options,
        )
        length = (image_size // patch_size) ** 2 + 1
        self.class_token = nnx.Param(_INIT(rngs.params(), (1, 1, width)))
        self.pos_embedding = nnx.Param(_INIT(rngs.params(), (1, length, width)))
        blocks = [EncoderBlock(width, heads, **options) for _ in range(depth)]
        self.blocks = nnx.Sequential(*blocks)
        self.norm = nnx.LayerNorm(width, **options)
        self.head = nnx.Linear(width, classes, kernel_init=_INIT, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, image_size, image_size, 3)`.

        Raises:
          ValueError: if the images are of another size.
        """
        x = self.patches(images)
        n, width = x.shape[0], x.shape[-1]
        x = x.reshape(n, -1, width)
        token = jnp.broadcast_to(self.class_token[...], (n, 1, width))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        positions = self.pos_embedding[...]
        if x.shape[1] != positions.shape[1]:
            raise ValueError(
                f"Images of shape {images.shape[1:]} make {x.shape[1] - 1} patches; "
                f"this model has positions for {positions.shape[1] - 1}."
            )
        x = self.blocks(x + positions.astype(x.dtype))
        return self.head(self.norm(x[:, 0]))


def vit_ti16(
    image_size: int = 224, classes: int = 1000, *, dtype: Any = None, rngs: nnx.Rngs
) -> VisionTransformer:
    """Return ViT-Ti/16: 5,717,416 parameters for a thousand classes at 224."""
    return VisionTransformer(
        image_size, 16, classes, width=192, depth=12, heads=3, dtype=dtype, rngs=rngs
    )


def vit_s16(
    image_size: int = 224, classes: int = 1000, *, dtype: Any = None, rngs: nnx.Rngs
) -> VisionTransformer:
    """Return ViT-S/16: 22,050,664 parameters for a thousand classes at 224."""
    return VisionTransformer(
        image_size, 16, classes, width=384, depth=12, heads=6, dtype=dtype, rngs=rngs
    )


def vit_b16(
    image_size: int = 224, classes: int = 1000, *, dtype: Any = None, rngs: nnx.Rngs
) -> VisionTransformer:
    """Return ViT-B/16: 86,567,656 parameters for a thousand classes at 224."""
    return VisionTransformer(
        image_size, 16, classes, width=768, depth=12, heads=12, dtype=dtype, rngs=rngs
    )
