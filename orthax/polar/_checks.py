"""What is a stack of matrices and what is a method, and what to write instead."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from orthax.polar._method import Own, PolarMethod

_HALF = ("bfloat16", "float16")
# What somebody wants who gives the name of a method.
_MEANT = {
    "auto": "polar.Auto()",
    "default": "polar.Auto()",
    "exact": "polar.Auto()",
    "svd": "polar.SVD()",
    "fast": 'polar.Auto("fast")',
    "dwh": "polar.DWH()",
    "qdwh": "polar.QDWH()",
    "grameigh": "polar.GramEigh()",
    "eigh": "polar.GramEigh()",
    "ns": "polar.NewtonSchulz()",
    "newtonschulz": "polar.NewtonSchulz()",
    "polarexpress": "polar.NewtonSchulz()",
    "jordan": "polar.NewtonSchulz(polar.JORDAN)",
    "muon": "polar.NewtonSchulz(polar.JORDAN)",
    "cans": "polar.NewtonSchulz(polar.CANS)",
    "dion": "polar.NewtonSchulz(polar.DION)",
}


def as_array(x: Any) -> jax.Array:
    """Return `x` as an array, or raise if it is nothing of the kind."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"`x` must be an array of shape (*batch, m, n), got {reprlib.repr(x)} of "
            f"type {type(x).__name__}. For a tree of gradients use "
            "orthax.orthogonalise(), for one of other arrays execution.map_matrices("
            "orthax.polar_factor, tree)."
        ) from None


def check_matrices(x: jax.Array) -> None:
    """Raise unless `x` is a stack of floating or complex matrices."""
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
      TypeError: if it is a class or a string, lacks `factor` or `flops` or is callable.
    """
    # Trees and transformations, which land here too, have endless ones.
    shown = method if isinstance(method, type) else reprlib.repr(method)
    found = f"`method` must be a polar method such as polar.Auto(), got {shown}"
    if isinstance(method, type):
        raise TypeError(f"{found}: a class; write {method.__name__}().")
    if not all(callable(getattr(method, name, None)) for name in ("factor", "flops")):
        raise TypeError(f"{found} of type {type(method).__name__}.{_advice(method)}")
    if callable(method):
        raise TypeError(
            f"{found}, which is callable: optax.inject_hyperparams would take it for "
            "a schedule. Make it a frozen dataclass with `factor` and `flops`."
        )
    return method if isinstance(method, PolarMethod) else Own(method)


def _advice(method: Any) -> str:
    """Return what to write instead of something that is no method."""
    if isinstance(method, str):
        name = re.sub(r"[^a-z]", "", method.lower())
        meant = _MEANT.get(name, "polar.Auto()")
        return f" A method is an object, not its name: write {meant}."
    if isinstance(method, int | float) or getattr(method, "ndim", None) == 0:
        return (
            " A learning rate belongs to what stands behind: optax.chain("
            "orthax.orthogonalise(), optax.sgd(0.1)); a number of steps to "
            "polar.NewtonSchulz(polar.polar_express(steps=5))."
        )
    if hasattr(method, "resolve"):
        return " It says how leaves are cut: write rule=... before it."
    if callable(method):
        return (
            " Give it the methods `factor(x)` and `flops(m, n)` in a frozen dataclass, "
            "or write polar.SVD() for a singular value decomposition."
        )
    if isinstance(method, tuple) and hasattr(method, "update"):
        return " Put it behind, in a chain: optax.chain(orthax.orthogonalise(), ...)."
    if isinstance(method, dict):
        return " Parameters are for `init`, gradients for `update`."
    return ""


def checked_restarts(restarts: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return restarts as a tuple, or raise unless they cut a table of `steps` rows."""
    if isinstance(restarts, int):
        raise TypeError(
            f"`restarts` must be step counts, got {restarts}: for one restart write "
            f"({restarts},)."
        )
    cuts = tuple(restarts)
    if not all(isinstance(r, int) and 0 < r < steps for r in cuts) or list(
        cuts
    ) != sorted(set(cuts)):
        raise ValueError(
            f"`restarts` must be ascending step counts between 1 and {steps - 1} for "
            f"a table of {steps} rows, got {restarts!r}."
        )
    return cuts


def checked_dtype(dtype: jax.typing.DTypeLike | None) -> str | None:
    """Return the name of a dtype of half precision, or raise."""
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in _HALF:
        raise ValueError(
            f"`dtype` is what products are rounded to: one of {_HALF}, or None for the "
            f"dtype of the matrix (float32 and up), got {name!r}."
        )
    return name


def checked_precision(precision: str | jax.lax.Precision | None) -> jax.lax.Precision:
    """Return a precision, the highest for None, or raise."""
    if precision is None:
        return jax.lax.Precision.HIGHEST
    try:
        return jax.lax.Precision(precision)
    except ValueError:
        raise ValueError(
            f"`precision` must be a jax.lax.Precision or its name, such as 'highest', "
            f"'high' or 'default', got {precision!r}."
        ) from None
