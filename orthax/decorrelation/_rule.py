"""What a decorrelation rule is, and the steps that several of them share."""

import math
import operator
from typing import Any, Protocol, runtime_checkable

import jax


@runtime_checkable
class DecorrelationRule(Protocol):
    """A linear map that decorrelates, and how it learns; a frozen dataclass.

    Samples are rows: `z = x @ R.T`, where x, shape (n, d), has its mean removed. The
    state is a tree of arrays of your own, the same shapes from step to step. Write
    your own rule by giving a frozen dataclass, never a callable, these five methods.
    """

    def init(self, features: int, dtype: jax.typing.DTypeLike) -> Any:
        """Return the state for d features; of the rules here, that of R = I."""
        ...

    def apply(self, state: Any, x: jax.Array) -> jax.Array:
        """Return `x @ R.T`, shape (n, d); differentiable in x."""
        ...

    def fold(self, state: Any, kernel: jax.Array) -> jax.Array:
        """Return `R.T @ kernel`, shape (d, out): `apply(x) @ kernel = x @ fold`."""
        ...

    def matrix(self, state: Any) -> jax.Array:
        """Return R, shape (d, d)."""
        ...

    def update(self, state: Any, x: jax.Array, *, axis_name: Any | None = None) -> Any:
        """Return the state after learning from centred samples, shape (n, d).

        With `axis_name` the samples are those of one device of the mapped axis, as
        many on each, and the new state must be the same on all.
        """
        ...


def averaged(tree: Any, axis_name: Any | None) -> Any:
    """Return the mean over devices, in one collective, or `tree` without an axis."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def check_number(name: str, value: Any, below: float = math.inf) -> None:
    """Raise unless `value` is a number above zero and at most `below`."""
    check_at_least_zero(name, value, below)
    if not value > 0:
        raise ValueError(f"`{name}` must be above zero, got {value}.")


def check_at_least_zero(name: str, value: Any, below: float = math.inf) -> None:
    """Raise unless `value` is a finite number from zero to `below`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` must be a Python number, got {value!r} of type "
            f"{type(value).__name__}: rules are static under jit."
        )
    if not (math.isfinite(value) and 0 <= value <= below):
        limit = "finite" if below == math.inf else f"at most {below:g}"
        raise ValueError(f"`{name}` must not be negative and {limit}, got {value}.")


def count(name: str, value: int) -> int:
    """Return a positive integer, or raise, naming the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer, and static under jit, got {value!r} of type "
            f"{type(value).__name__}."
        ) from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"`{name}` must be 1 or more, got {value!r}.")
    return number
