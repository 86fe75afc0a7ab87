"""Checks of matrices and methods, with errors that say what to write instead."""

import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from orthax.polar._method import Own, PolarMethod

_HALF = ("bfloat16", "float16")


def as_array(x: Any) -> jax.Array:
    """Return `x` as an array, or raise if it cannot be one."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"`x` must be an array of shape (*batch, m, n), got {reprlib.repr(x)} of "
            f"type {type(x).__name__}. For a tree of gradients use "
            "orthax.orthogonalise(), for a tree of other arrays "
            "execution.map_matrices(orthax.polar_factor, tree)."
        ) from None


def check_matrices(x: jax.Array) -> None:
    """Raise unless `x` is a batch of floating or complex matrices."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"`x` must be floating or complex, got dtype {x.dtype}: convert it first."
        )
    if x.ndim < 2:
        raise ValueError(
            f"`x` must have shape (*batch, m, n), got shape {x.shape}: a vector has no "
            "polar factor; reshape it to a row or a column."
        )


def check_method(method: PolarMethod) -> PolarMethod:
    """Return a method, or raise unless it is an instance of a polar method.

    Args:
      method: anything.

    Returns:
      `method`; if it is not derived from `PolarMethod`, wrapped in one that is.

    Raises:
      TypeError: if it is a class, lacks `factor` or `flops`, or is callable.
    """
    # `repr` of a tree or a transformation, which end up here too, can be endless.
    shown = method if isinstance(method, type) else reprlib.repr(method)
    got = f"`method` must be a polar method such as polar.Auto(), got {shown}"
    if isinstance(method, type):
        raise TypeError(f"{got}: a class; write {method.__name__}().")
    if not all(callable(getattr(method, name, None)) for name in ("factor", "flops")):
        raise TypeError(f"{got} of type {type(method).__name__}.{_advice(method)}")
    if callable(method):
        raise TypeError(
            f"{got}, which is callable: optax.inject_hyperparams would take it for a "
            "schedule. Make it a frozen dataclass with `factor` and `flops`."
        )
    return method if isinstance(method, PolarMethod) else Own(method)


def _advice(method: Any) -> str:
    """Return what to write instead of the most common mistakes."""
    if isinstance(method, str):
        return (
            " A method is an object, such as polar.SVD(), polar.NewtonSchulz() or "
            'polar.Auto("fast").'
        )
    if isinstance(method, int | float) or getattr(method, "ndim", None) == 0:
        return (
            " Pass a learning rate to the optimiser that follows: "
            "optax.chain(orthax.orthogonalise(), optax.sgd(0.1)); for a number of "
            "steps, use polar.NewtonSchulz(polar.polar_express(steps=5))."
        )
    if hasattr(method, "resolve"):
        return " This is a rule: pass it as `rule=`."
    return ""


def checked_restarts(restarts: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return restarts as a tuple, or raise unless they divide a table of `steps`."""
    restarts = tuple(restarts)
    if list(restarts) != sorted({*restarts} & {*range(1, steps)}):
        raise ValueError(
            f"`restarts` must be ascending step counts between 1 and {steps - 1} for "
            f"a table of {steps} rows, got {restarts!r}."
        )
    return restarts


def checked_dtype(dtype: jax.typing.DTypeLike | None) -> str | None:
    """Return the name of a half-precision dtype, or raise."""
    if dtype is None:
        return None
    name = jnp.dtype(dtype).name
    if name not in _HALF:
        raise ValueError(
            f"`dtype` is what the inputs of products are rounded to: one of {_HALF}, "
            f"or None for the dtype of the matrix, got {name!r}."
        )
    return name
