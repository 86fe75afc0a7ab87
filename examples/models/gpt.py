"""GPT-2: a causal transformer over tokens, whose head is its table of tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. The defaults are GPT-2 small.

    A model of characters: `GPTConfig(vocabulary=65, context=128, depth=4, heads=4,
    width=128)`.

    Attributes:
      vocabulary: number of tokens.
      context: longest sequence, in tokens.
      depth: number of blocks.
      heads: attention heads of every block; divides `width`.
      width: features of a token.
      initial: standard deviation of the first kernels; of those that are added to the
        residual stream it is divided by sqrt(2 depth).
      scanned: whether the blocks are one, whose parameters have a first axis as long as
        `depth`: compiled once, and cut by `ByName(stacked=("blocks",))`.
    """

    vocabulary: int = 50257
    context: int = 1024
    depth: int = 12
    heads: int = 12
    width: int = 768
    initial: float = 0.02
    scanned: bool = False


GPT2_SMALL = GPTConfig()

_INIT = nnx.initializers.normal(0.02)


class Block(nnx.Module):
    """Causal self-attention and a feed-forward block, each normed first and added.

    Args:
      config: sizes, and how large the first kernels are.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.

    References:
      Radford et al., 2019, Section 2.3.
    """

    def __init__(self, config: GPTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        width = config.width
        first = nnx.initializers.normal(config.initial)
        residual = nnx.initializers.normal(config.initial / (2 * config.depth) ** 0.5)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, **options)
        self.attention = nnx.MultiHeadAttention(
            config.heads,
            width,
            kernel_init=first,
            out_kernel_init=residual,
            decode=False,
            keep_rngs=False,
            **options,
        )
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, **options)
        self.up = nnx.Linear(width, 4 * width, kernel_init=first, **options)
        self.down = nnx.Linear(4 * width, width, kernel_init=residual, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return tokens `(n, length, width)`, of tokens of that shape."""
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=True))


class GPT(nnx.Module):
    """Tokens and positions through causal blocks; the logits of the next token.

    With `GPT2_SMALL` 124,439,808 parameters: the head is the table of tokens. There is
    no dropout.

    Args:
      config: sizes.
      dtype: dtype of the activations; parameters and logits are float32.
      rngs: random streams of the initial weights.

    References:
      Radford, Wu, Child, Luan, Amodei, Sutskever: "Language models are unsupervised
      multitask learners", 2019. Section 2.3 and Table 2.
    """

    def __init__(
        self, config: GPTConfig = GPT2_SMALL, *, dtype: Any = None, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "rngs": rngs}
        width = config.width
        self.tokens = nnx.Embed(
            config.vocabulary, width, embedding_init=_INIT, **options
        )
        self.positions = nnx.Embed(
            config.context, width, embedding_init=_INIT, **options
        )
        self.blocks = _blocks(config, dtype, rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits `(n, length, vocabulary)` of tokens `(n, length)`.

        Those at one place depend on the tokens up to it, and are of the one after it.

        Raises:
          ValueError: if `length` is larger than the context.
        """
        length, context = tokens.shape[1], self.positions.num_embeddings
        if length > context:
            raise ValueError(
                f"`tokens` has length {length}; expected at most the context, "
                f"{context}."
            )
        x = self.tokens(tokens) + self.positions(jnp.arange(length))
        x = self.norm(_through(self.blocks, x))
        # Products of the activations' dtype, sums and logits of float32.
        table = self.tokens.embedding[...].astype(x.dtype)
        return jnp.einsum("ntd,vd->ntv", x, table, preferred_element_type=jnp.float32)


def _blocks(config: GPTConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Return the blocks in a row, or one that has the parameters of all."""
    if not config.scanned:
        blocks = (Block(config, dtype=dtype, rngs=rngs) for _ in range(config.depth))
        return nnx.Sequential(*blocks)

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap
    def stacked(rngs: nnx.Rngs) -> Block:
        return Block(config, dtype=dtype, rngs=rngs)

    return stacked(rngs)


def _through(blocks: nnx.Module, x: jax.Array) -> jax.Array:
    """Return tokens behind all blocks."""
    if isinstance(blocks, nnx.Sequential):
        return blocks(x)
    graphdef, params = nnx.split(blocks)
    return jax.lax.scan(lambda x, own: (nnx.merge(graphdef, own)(x), None), x, params)[
        0
    ]
