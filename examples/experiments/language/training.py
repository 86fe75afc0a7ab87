"""The trainer of language models: what a run is, its steps, the row it leaves.

To be read from top to bottom; `examples/train_lm.py` is the program. What the shared
trainer calls an epoch is here a number of steps on sequences from anywhere in the text,
and a look at the validation part behind them: one program. Runs that differ in seed and
learning rate alone may be trained side by side; what is stopped goes on from its last
checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.data import Text
from examples.data.text import Level
from examples.experiments.language.arms import Arm, make_optimiser
from examples.experiments.language.report import COLUMNS, KEY
from examples.models.gpt import GPT, GPTConfig
from examples.training import supervised
from examples.training.report import Row, circumstances, joined
from examples.training.side_by_side import Trainer
from examples.training.supervised import State

_MOST = 64 * 1024  # tokens that are evaluated at a time

# ----------------------------------------------------------------- what a run is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the runs of one compiled program share."""

    text: str
    level: Level
    model: GPTConfig
    arm: Arm
    batch_size: int  # sequences
    steps: int  # between two looks at the validation part
    dtype: Literal["float32", "bfloat16"]  # of the activations


@dataclasses.dataclass(frozen=True)
class Run(supervised.Run):
    """One run: a row of the results file, and what tells it from the others.

    `epochs` counts the looks at the validation part.
    """

    recipe: Recipe
    budget: int  # epochs of the study; others take so many of AdamW's time
    rest_rate: float  # of all but the kernels
    warmup: int  # steps in which the rates rise to their height

    def key(self) -> dict[str, str]:
        """Return the columns that identify this run, as the results file has them."""
        values = dataclasses.asdict(self)
        values |= values.pop("recipe")
        values |= values.pop("model") | values.pop("arm")
        return {name: str(values[name]) for name in KEY}

    def rates(self, steps: int, epoch: int) -> np.ndarray:
        """Return the rates of the steps of an epoch, counted from zero: `(steps, 2)`.

        Those of the kernels, and those of all else.
        """
        whole = self.epochs * steps
        at = np.arange(epoch * steps, (epoch + 1) * steps)
        share = np.minimum(1.0, (at + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            behind = np.maximum(at - self.warmup, 0) / max(1, whole - self.warmup)
            share = share * (1 + np.cos(np.pi * behind)) / 2
        return np.float32(np.outer(share, (self.learning_rate, self.rest_rate)))


def make_model(recipe: Recipe, key: jax.Array) -> GPT:
    """Return the network of a recipe."""
    return GPT(recipe.model, dtype=jnp.dtype(recipe.dtype), rngs=nnx.Rngs(key))


# ------------------------------------------------------------------------ the step


class Metrics(NamedTuple):
    """What an epoch leaves behind, in nats a token; accuracy between 0 and 1."""

    train_loss: jax.Array  # mean of its steps, before each of them
    validation_loss: jax.Array  # behind them
    validation_accuracy: jax.Array


@functools.lru_cache(maxsize=4)
def _starts(recipe: Recipe) -> tuple[nnx.GraphDef, Callable, Callable]:
    """Return the structure of a network, and what makes its parameters and state."""

    def params_of(key: jax.Array) -> nnx.State:
        return nnx.split(make_model(recipe, key))[1]

    abstract = nnx.eval_shape(lambda: make_model(recipe, jax.random.key(0)))
    # The rates have no part in the optimiser's first state.
    start = make_optimiser(recipe.arm, 1.0, 1.0).init
    return nnx.split(abstract)[0], jax.jit(params_of), jax.jit(jax.vmap(start))


def initialise(keys: jax.Array, recipe: Recipe) -> State:
    """Return the states of networks before the first step, one for every key."""
    graphdef, params_of, start = _starts(recipe)
    own = [params_of(key) for key in keys]
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *own)
    return State(graphdef, params, None, start(params))


def losses(
    state: State, params: nnx.State, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the loss at every token but the first, and whether it was the likeliest.

    Args:
      state: of which the structure of the model is taken.
      params: its parameters.
      tokens: shape `(n, length + 1)`.

    Returns:
      Losses in nats and hits, `(n, length)` each.
    """
    logits = nnx.merge(state.graphdef, params)(tokens[:, :-1])
    after = tokens[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, after)
    return loss, logits.argmax(-1) == after


def draw(text: jax.Array, key: jax.Array, recipe: Recipe) -> jax.Array:
    """Return sequences from anywhere in a text, `(batch_size, context + 1)`."""
    length = recipe.model.context + 1
    starts = jax.random.randint(key, (recipe.batch_size, 1), 0, len(text) - length + 1)
    return text[starts + jnp.arange(length)]


def train_step(
    state: State, tokens: jax.Array, rates: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Return the state after a step at two rates, and the loss before it."""

    def objective(params: nnx.State) -> jax.Array:
        return losses(state, params, tokens)[0].mean()

    loss, grads = jax.value_and_grad(objective)(state.params)
    tx = make_optimiser(recipe.arm, rates[0], rates[1])
    updates, optimiser = tx.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, optimiser=optimiser), loss


def windows(text: np.ndarray, context: int, most: int = 0) -> np.ndarray:
    """Return sequences in which every token of a text is foretold once, but its first.

    What is left behind the last whole sequence is left out.

    Args:
      text: tokens, `(n,)`, more than `context`.
      context: of the model.
      most: so many at most, evenly spread; 0 for all.

    Returns:
      Shape `(count, context + 1)`; the last token of each is the next one's first.
    """
    count = (len(text) - 1) // context
    rows = np.arange(count)
    if 0 < most < count:
        rows = np.linspace(0, count - 1, most).round().astype(int)
    return text[rows[:, None] * context + np.arange(context + 1)]


def evaluate(state: State, split: jax.Array, recipe: Recipe) -> tuple[jax.Array, ...]:
    """Return mean loss and accuracy on sequences, `(n, context + 1)`."""
    count = len(split)
    fits = max(1, _MOST // recipe.model.context)
    parts = next(n for n in range(1, count + 1) if count % n == 0 and count <= n * fits)

    def of_part(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, hits = losses(state, state.params, tokens)
        return loss.mean(), hits.mean()

    each = jax.lax.map(of_part, split.reshape(parts, -1, split.shape[1]))
    return jax.tree.map(jnp.mean, each)


def train_steps(
    state: State, key: jax.Array, rates: jax.Array, train: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Return the state after as many steps as there are rates, and their losses."""

    def one(state: State, at: tuple) -> tuple[State, jax.Array]:
        rates, number = at
        tokens = draw(train, jax.random.fold_in(key, number), recipe)
        return train_step(state, tokens, rates, recipe)

    return jax.lax.scan(one, state, (rates, jnp.arange(len(rates))))


def train_epoch(
    state: State,
    key: jax.Array,
    rates: jax.Array,
    train: jax.Array,
    validation: jax.Array,
    *,
    recipe: Recipe,
) -> tuple[State, Metrics]:
    """Return the state after some steps, and metrics."""
    state, losses = train_steps(state, key, rates, train, recipe)
    return state, Metrics(losses.mean(), *evaluate(state, validation, recipe))


# ---------------------------------------------------------------------- many runs


def make_row(
    run: Run,
    history: Metrics,
    seconds: float,
    tested: tuple[np.ndarray, np.ndarray] | None,
) -> Row:
    """Return the row of a finished run, from its metrics `(epochs,)`."""
    finite = all(np.isfinite(values).all() for values in history)
    last = {name: values[-1] for name, values in history._asdict().items()}
    last |= dict(zip(("test_loss", "test_accuracy"), tested or (), strict=False))
    if not finite:  # no network to speak of
        last = dict.fromkeys(last, np.nan)
    recipe = run.recipe
    tokens = run.epochs * recipe.steps * recipe.batch_size * recipe.model.context
    values = {
        **run.key(),
        **{name: f"{value:.6g}" for name, value in last.items()},
        "status": "finished" if finite else "diverged",
        "parameters": str(parameters(recipe.model)),
        "seconds": f"{seconds:.2f}",
        "tokens_per_s": f"{tokens / seconds:.4g}",
        **circumstances(),
        **{f"{name}_curve": joined(x) for name, x in history._asdict().items()},
    }
    return {name: values.get(name, "") for name in COLUMNS}


@functools.lru_cache(maxsize=4)
def parameters(model: GPTConfig) -> int:
    """Return how many numbers a network learns."""
    shapes = nnx.eval_shape(lambda: GPT(model, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes)))


def title(recipe: Recipe) -> str:
    """Return what a progress bar says of a recipe."""
    return recipe.arm.name


def steps(recipe: Recipe, data: Text) -> int:
    """Return the steps of an epoch."""
    return recipe.steps


TRAINER = Trainer(initialise, train_epoch, evaluate, make_row, title, steps)
