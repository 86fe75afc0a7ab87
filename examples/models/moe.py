"""A mixture of experts: the feed-forward block of sparse transformers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class FeedForward(nnx.Module):
    """Two dense layers, the hidden one four times as wide.

    Args:
      width: features of a token.
      dtype: dtype of the activations; parameters are float32.
      rngs: random streams of the initial weights.
    """

    def __init__(self, width: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return tokens `(..., width)`, of tokens of that shape."""
        return self.down(nnx.gelu(self.up(x)))


class MixtureOfExperts(nnx.Module):
    """Every token through the few experts that a router picks for it.

    The kernels of all experts are one leaf with a leading axis, `experts/up/kernel`
    of shape (experts, width, 4 width): matrices of their own, which `from_model` knows
    and `ByName(stacked=("experts",))` is told.

    Every expert computes every token, and what was not picked is weighted by zero:
    right for any routing, at the cost of experts / top_k times the arithmetic. There
    is no loss that balances the experts.

    Args:
      width: features of a token.
      experts: number of experts.
      top_k: experts that a token goes through.
      dtype: dtype of the activations; parameters are float32, and so is the routing.
      rngs: random streams of the initial weights.

    Raises:
      ValueError: if `top_k` is not between 1 and `experts`.

    References:
      Shazeer et al.: "Outrageously large neural networks: the sparsely-gated
      mixture-of-experts layer", 2017. https://arxiv.org/abs/1701.06538. Equations 1 and
      3 to 5, without noise.
    """

    def __init__(
        self,
        width: int = 512,
        experts: int = 32,
        top_k: int = 2,
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top_k <= experts:
            raise ValueError(
                f"`top_k` is {top_k}; expected 1 to the number of experts, {experts}."
            )
        self.top_k = top_k
        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)

        @nnx.split_rngs(splits=experts)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> FeedForward:
            return FeedForward(width, dtype=dtype, rngs=rngs)

        self.experts = stacked(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return tokens `(..., width)`, of tokens of that shape."""
        # Not nnx.vmap: it writes the parameters back, which a model that is used
        # inside jax.jit, and made outside, forbids.
        graphdef, params = nnx.split(self.experts)
        outputs = jax.vmap(lambda params: nnx.merge(graphdef, params)(x))(params)
        weights = self.weights(x).astype(outputs.dtype)
        return jnp.einsum("e...d,...e->...d", outputs, weights)

    def weights(self, x: jax.Array) -> jax.Array:
        """Return what every expert counts for every token, `(..., experts)`.

        Zero for those that are not picked; the others are a softmax and sum to one.
        """
        scores = self.router(x)
        best, picked = jax.lax.top_k(scores, self.top_k)
        chosen = jax.nn.one_hot(picked, scores.shape[-1], dtype=scores.dtype)
        return (jax.nn.softmax(best)[..., None] * chosen).sum(-2)
