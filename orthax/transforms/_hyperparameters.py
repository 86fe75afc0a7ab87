"""Checks of the hyperparameters of optimisers."""

import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# What may be a schedule.
_SCHEDULED = ("learning_rate", "weight_decay")


def check_hyperparameters(optional: Sequence[str] = (), /, **values: Any) -> None:
    """Raise unless all values can be hyperparameters.

    Args:
      optional: names of those that may be None.
      **values: by name, numbers (also traced ones, which `optax.inject_hyperparams`
        makes), or functions of the step where the name ends with `learning_rate` or
        `weight_decay`.

    Returns:
      Nothing.

    Raises:
      TypeError: if one cannot; the message says what to write instead.

    Example:
      >>> from orthax.internal.transforms import check_hyperparameters
      >>> check_hyperparameters(learning_rate=0.1, momentum=0.9)
      >>> check_hyperparameters(momentum="0.9")
      Traceback (most recent call last):
      TypeError: `momentum` must be a number, got '0.9' of type str.
    """
    for name, value in values.items():
        scheduled = name.endswith(_SCHEDULED)
        if _is_number(value) or (value is None and name in optional):
            continue
        if scheduled and callable(value) and not isinstance(value, type):
            continue
        expected = "a number"
        if scheduled:
            expected += " or a schedule (a function of the step)"
        shown = reprlib.repr(value)
        raise TypeError(
            f"`{name}` must be {expected}, got {shown} of type {type(value).__name__}."
            f"{_advice(name, value)}"
        )


def _is_number(value: Any) -> bool:
    if hasattr(value, "dtype"):
        return jnp.shape(value) == () and jnp.issubdtype(value.dtype, jnp.number)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _advice(name: str, value: Any) -> str:
    """Return what to write instead of the most common mistakes."""
    for argument, has in (("method", "flops"), ("rule", "resolve")):
        if hasattr(value, has):
            return f" Pass it as {argument}=..."
    if isinstance(value, tuple) and hasattr(value, "update"):
        return (
            " That is an optimiser already: put orthax.orthogonalise() before it, "
            "optax.chain(orthax.orthogonalise(), optax.sgd(0.1))."
        )
    if value is None and name == "momentum":
        return " For none use 0.0."
    if callable(value):
        return " For a schedule of it, wrap the optimiser in optax.inject_hyperparams."
    return ""


def check_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is a dtype or None.

    Args:
      dtype: anything.

    Raises:
      TypeError: if it is not, or if it is an array, which `inject_hyperparams` makes of
        a dtype's class.
    """
    if isinstance(dtype, jax.Array):
        raise TypeError(
            "A dtype arrived as an array: optax.inject_hyperparams calls classes such "
            'as jnp.bfloat16 as schedules. Pass its name, "bfloat16", or name the '
            "argument in `static_args`."
        )
    jnp.dtype(dtype)
