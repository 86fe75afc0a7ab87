"""Text that a language model writes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.data.text import Vocabulary
from examples.experiments.language.training import Recipe
from examples.training.supervised import State


def sample(
    state: State,
    recipe: Recipe,
    vocabulary: Vocabulary,
    prompt: str,
    *,
    count: int,
    temperature: float,
    key: jax.Array,
) -> str:
    """Return what a model writes behind a prompt, drawn token by token.

    Args:
      state: of the model.
      recipe: of it.
      vocabulary: of its text.
      prompt: one character or more; the model sees the last ones, up to its context.
      count: tokens to write.
      temperature: by which the logits are divided.
      key: of the random numbers.

    Raises:
      ValueError: if the prompt has a character that is not in the vocabulary.
    """
    tokens = vocabulary.encode(prompt)[-recipe.model.context :]
    window = np.zeros(recipe.model.context, np.int32)
    window[: len(tokens)] = tokens
    written = _written(
        state,
        jnp.asarray(window),
        len(tokens),
        jax.random.split(key, count),
        temperature,
    )
    return vocabulary.decode(np.asarray(written))


@jax.jit
def _written(
    state: State,
    window: jax.Array,
    length: int,
    keys: jax.Array,
    temperature: float,
) -> jax.Array:
    """Return one token for every key, behind the first `length` of a window."""
    context = len(window)

    def one(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        window, length = carry
        # What stands behind the last token is not looked at.
        logits = nnx.merge(state.graphdef, state.params)(window[None])[0, length - 1]
        token = jax.random.categorical(key, logits / temperature)
        full = length == context
        window = jnp.where(full, jnp.roll(window, -1), window)
        window = window.at[jnp.where(full, context - 1, length)].set(token)
        return (window, jnp.minimum(length + 1, context)), token

    return jax.lax.scan(one, (window, length), keys)[1]
