"""What is done to the input of a layer, by name: nothing, mean removal, every rule."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from orthax import decorrelation

Name = Literal[
    "nothing",
    "mean",
    "scaled",
    "off_diagonal",
    "local",
    "whitening",
    "blended",
    "blended_normalised",
    "lateral",
    "factorised",
    "polar",
]
NAMES: tuple[Name, ...] = Name.__args__
WITHOUT_RATE: tuple[Name, ...] = ("nothing", "mean")


@dataclasses.dataclass(frozen=True)
class MeanRemoval:
    """R = I that never learns: the baseline of every rule, which removes the mean too.

    Its state is an array of which only the length d counts.
    """

    def init(self, features: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return zeros, shape (features,)."""
        # Of no use but for their number: checkpoints hold no array without entries.
        return jnp.zeros(features, dtype)

    def apply(self, state: jax.Array, x: jax.Array) -> jax.Array:
        """Return x."""
        return x

    def fold(self, state: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return the kernel."""
        return kernel

    def matrix(self, state: jax.Array) -> jax.Array:
        """Return the identity, shape (d, d)."""
        return jnp.eye(len(state), dtype=state.dtype)

    def update(
        self, state: jax.Array, x: jax.Array, *, axis_name: Any | None = None
    ) -> jax.Array:
        """Return the state as it is."""
        return state


def make_rule(name: Name, rate: float) -> decorrelation.DecorrelationRule | None:
    """Return the rule of a name; None for "nothing".

    Args:
      name: which.
      rate: the decorrelation rate; of the polar rule, which has none, the floor; of no
        use to those of `WITHOUT_RATE`.
    """
    match name:
        case "nothing":
            return None
        case "mean":
            return MeanRemoval()
        case "scaled":
            return decorrelation.Scaled(rate)
        case "off_diagonal":
            return decorrelation.OffDiagonal(rate)
        case "local":
            return decorrelation.Local(rate)
        case "whitening":
            return decorrelation.Whitening(rate)
        case "blended":
            return decorrelation.Blended(rate, kappa=0.01)
        case "blended_normalised":
            return decorrelation.Blended(rate, kappa=0.5, normalised=True)
        case "lateral":
            return decorrelation.Lateral(rate)
        case "factorised":
            return decorrelation.Factorised(rate, fraction=0.5)
        case "polar":
            return decorrelation.Polar(floor=rate)
    raise ValueError(f"`name` is {name!r}; expected one of {', '.join(NAMES)}")
