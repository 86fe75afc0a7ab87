"""How many stages run, and on which of the given activations."""

from collections.abc import Sequence
from typing import Any

import jax

from orthax.internal.decorrelation import count

# One array, or one for each stage.
Activations = jax.Array | Sequence[jax.Array]


def features_of(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Return the features of each stage, or raise, naming the argument."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError(f"`{name}` must have an entry for each stage, got none.")
        return tuple(count(f"{name}[{k}]", n) for k, n in enumerate(value))
    return (count(name, value),)


def select(
    xs: Activations, given: int, built: int, stages: int | None
) -> tuple[list[jax.Array], int]:
    """Return the activations that are read and the number of stages to run.

    Args:
      xs: activations of the first stages.
      given: the number of stages that have an activation before the layer.
      built: the number of stages of the layer.
      stages: the number of stages to run; None: all that have activations.
    """
    xs = [xs] if _is_array(xs) else list(xs)
    if not 1 <= len(xs) <= given or not all(map(_is_array, xs)):
        types = [type(x).__name__ for x in xs]
        raise ValueError(
            f"`xs` must be an array for each of the first stages, 1 to {given} of them,"
            f" or a single array, got {len(xs)}: {types}."
        )
    if stages is None:
        return xs, built if len(xs) == given else len(xs)
    stages = count("stages", stages)
    if stages > built:
        raise ValueError(f"`stages` is {stages}, but the layer has {built}.")
    if len(xs) < min(stages, given):
        raise ValueError(
            f"`stages` is {stages}, but `xs` has the activations of {len(xs)}: run as "
            "many stages in the layers before."
        )
    return xs[:stages], stages


def check_shapes(xs: Sequence[jax.Array], widths: Sequence[int]) -> None:
    """Raise if an activation has other features than its stage or another batch."""
    for k, (x, width) in enumerate(zip(xs, widths, strict=False)):
        if not x.ndim or x.shape[-1] != width:
            raise ValueError(
                f"`xs[{k}]` has shape {x.shape}, but stage {k} has {width} features on "
                "its last axis."
            )
        if x.shape[:-1] != xs[0].shape[:-1]:
            raise ValueError(
                f"`xs[{k}]` has shape {x.shape} and `xs[0]` {xs[0].shape}: only the "
                "last axis, the features, may differ."
            )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
