"""How the gradients of several tasks become one: rules on their Gram matrix."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from orthax._linalg import eigh, matmul

_NORMALISE = (None, "per_task", "total")
# Squared norms below so many eps of what they are the remainder of are rounding.
_ROUNDING = 16.0


@runtime_checkable
class TaskRule(Protocol):
    r"""One weight for each task, from the inner products of their gradients.

    The update is $d = \sum_i w_i g_i$. A frozen dataclass, not callable. Knowing the
    Gram matrix $K_{ij} = \langle g_i, g_j \rangle$ alone, a rule is the same in every
    orthonormal basis of the parameters.
    """

    def init(self) -> Any:
        """Return the first state, a pytree of arrays; `()` where there is none."""
        ...

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the weights `(tasks,)` from `(tasks, tasks)`, and the next state."""
        ...


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum of all gradients: that of the sum of all losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # in conflict
      >>> tasks.task_weights(gram, tasks.Sum()).tolist()
      [1.0, 1.0]
    """

    def init(self) -> tuple[()]:
        """Return no state."""
        return ()

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return ones."""
        return jnp.ones_like(gram[0]), state


@dataclasses.dataclass(frozen=True)
class OSGD:
    r"""Ordered Gram-Schmidt: to first order, no task moves against an earlier one.

    The projection of every gradient on the earlier ones is removed, and the remainders
    are summed: $q_i = g_i - \sum_{j<i} \frac{\langle g_i, q_j \rangle}{\langle q_j,
    q_j \rangle} q_j$ and $d = \sum_i q_i$, so that $\langle g_1, d \rangle =
    \|g_1\|^2$: the first loss falls as if it were alone. A reconstruction: we could
    read the paper's abstract, but not its algorithm.

    Attributes:
      order: tasks by priority, the highest first; a permutation. Default: 0, 1, ...
      normalise: `"per_task"` gives every remainder $q_i$ the norm of its $g_i$,
        `"total"` gives d the norm of the sum of all gradients. Default: neither.
      conflict_only: remove a projection only if it opposes the earlier gradient.

    Raises:
      ValueError: for an `order` that is not a permutation of all tasks, or an unknown
        `normalise`.

    Limits:
      A gradient contributes nothing if its remainder is below sqrt(16 tasks eps) of its
      norm, 2e-3 for two tasks in float32: it may be rounding of the Gram matrix.
      Momentum, Adam, decay or `orthogonalise` after it break the identity.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # in conflict
      >>> (tasks.task_weights(gram, tasks.OSGD()) @ gram).tolist()
      [1.0, 2.0]

    References:
      Wan, Hoffmann, Lu, Maire: "Orthogonalized SGD and Nested Architectures for Anytime
      Neural Networks", ICML 2020, arXiv 2008.06635 (reconstructed).
    """

    order: Sequence[int] | None = None
    normalise: str | None = None
    conflict_only: bool = False

    def __post_init__(self):
        object.__setattr__(self, "order", checked_order(self.order))
        if self.normalise not in _NORMALISE:
            raise ValueError(
                f"`normalise` must be one of {_NORMALISE}, got {self.normalise!r}."
            )

    def init(self) -> tuple[()]:
        """Return no state."""
        return ()

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the coefficients of the sum of all remainders."""
        rounding = _ROUNDING * len(gram) * float(jnp.finfo(gram.dtype).eps)
        remainders: list[_Remainder] = []
        for i in in_order(self.order, len(gram)):
            row = jnp.zeros_like(gram[0]).at[i].set(1)
            for earlier in remainders:
                part = over(matmul(row, earlier.products), earlier.square)
                if self.conflict_only:
                    part = jnp.minimum(part, 0)
                row -= part * earlier.row
            square = matmul(row, matmul(gram, row))
            row = jnp.where(square <= rounding * gram[i, i], 0, row)
            products = matmul(gram, row)
            remainders.append(_Remainder(row, products, matmul(row, products)))
        rows = [r.row for r in remainders]
        if self.normalise == "per_task":
            order = in_order(self.order, len(gram))
            rows = [
                jnp.sqrt(over(gram[i, i], r.square)) * r.row
                for i, r in zip(order, remainders, strict=True)
            ]
        weights = sum(rows)
        if self.normalise == "total":
            weights *= jnp.sqrt(over(jnp.sum(gram), square_of(gram, weights)))
        return weights, state


class _Remainder(NamedTuple):
    """What is left of a gradient: its coefficients, inner products and square."""

    row: jax.Array
    products: jax.Array
    square: jax.Array


@dataclasses.dataclass(frozen=True)
class Symmetric:
    r"""Löwdin's symmetric orthogonalisation: no task comes before another.

    The rows of the polar factor of the task Jacobian $J$, $(J J^T)^{-1/2} J$, are the
    orthonormal vectors nearest to all gradients together; each gets the norm of its
    gradient back, and they are summed. Gradients that are orthogonal stay as they are.

    Limits:
      Directions of the span that are rounding (eigenvalues of the Gram matrix below
      about 1e-6 of the largest in float32) are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # in conflict
      >>> weights = tasks.task_weights(gram, tasks.Symmetric())
      >>> weights.tolist()
      [1.534, 1.283]

    References:
      Löwdin: "On the Non-Orthogonality Problem", J. Chem. Phys. 18, 1950, equation
      (25); as a multitask rule it is ours.
    """

    def init(self) -> tuple[()]:
        """Return no state."""
        return ()

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the coefficients of the sum of all orthogonalised gradients."""
        values, v = eigh(gram)
        rounding = _ROUNDING * len(gram) * float(jnp.finfo(gram.dtype).eps)
        alive = values > rounding * values[-1]
        roots = jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, values, 1)), 0)
        sizes = jnp.sqrt(jnp.diagonal(gram))
        return matmul(v, roots * matmul(sizes, v)), state


def square_of(gram: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the squared norm of a combination, at least zero."""
    return jnp.maximum(matmul(weights, matmul(gram, weights)), 0)


def over(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a / b`, and zero where b is zero."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def checked_order(
    order: Sequence[int] | None, key: Any = None
) -> tuple[int, ...] | None:
    """Return an order of tasks as a tuple, or raise."""
    if order is None:
        return None
    if key is not None:
        raise ValueError("Give `order` or `key`, a given order or a random one.")
    if isinstance(order, int):
        raise TypeError(
            f"`order` must be a permutation of all tasks, got {order}: write all of "
            f"them, {order} first."
        )
    order = tuple(order)
    if {*order} != {*range(len(order))}:
        raise ValueError(
            f"`order` must be a permutation of the tasks, each of 0, 1, ... once; got "
            f"{order}."
        )
    return order


def in_order(order: tuple[int, ...] | None, tasks: int) -> tuple[int, ...]:
    """Return all tasks in order, or raise."""
    if order is None:
        return tuple(range(tasks))
    if len(order) != tasks:
        raise ValueError(
            f"`order` {order} names {len(order)} tasks, there are {tasks}."
        )
    return order
