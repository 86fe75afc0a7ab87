"""Rules that change gradients where they point against each other."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthax._linalg import matmul
from orthax.tasks._rules import checked_order, in_order, over, square_of


@dataclasses.dataclass(frozen=True)
class PCGrad:
    r"""Projected conflicting gradients: each loses what points against another.

    Every $g_i$ meets all others $g_j$ in turn, and where the inner product is negative
    its part along $g_j$ is taken away; then all are summed.

    Attributes:
      order: in which the others are met; default: as they come.
      key: a seed, or a key of `jax.random`: a random order instead, a new one for each
        task and step, as in the paper. The state is then the key.

    Raises:
      ValueError: for an `order` that is not a permutation of all tasks, or one given
        together with a `key`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # in conflict
      >>> tasks.task_weights(gram, tasks.PCGrad()).tolist()
      [2.0, 1.25]

    References:
      Yu, Kumar, Gupta, Levine, Hausman, Finn: "Gradient Surgery for Multi-Task
      Learning", 2020, arXiv 2001.06782, Algorithm 1.
    """

    order: Sequence[int] | None = None
    key: int | jax.Array | None = None

    def __post_init__(self):
        object.__setattr__(self, "order", checked_order(self.order, self.key))

    def init(self) -> Any:
        """Return the key, or no state."""
        return _first_key(self.key)

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the coefficients of the sum of all projected gradients."""
        turns, state = _turns(self.order, len(gram), state)
        tasks = np.arange(len(gram))
        rows = jnp.eye(len(gram), dtype=gram.dtype)
        for j in turns:
            inner = jnp.sum(rows * gram[j], axis=1)
            part = over(jnp.minimum(inner, 0), gram[j, j])
            rows = rows.at[tasks, j].add(-jnp.where(j == tasks, 0, part))
        return jnp.sum(rows, axis=0), state


@dataclasses.dataclass(frozen=True)
class GradVac:
    r"""Gradient vaccine: each gradient is turned until its cosines reach a target.

    As `PCGrad`, but where the cosine of $g_i$ and $g_j$ is below its target, so much of
    $g_j$ is added that it reaches it; a target of zero is `PCGrad`.

    Attributes:
      target: cosine, in [-1, 1); None: the running mean of the cosines of each pair,
        which is then part of the state.
      b: weight of the newest cosine in the running mean, in (0, 1], dimensionless.
      tasks: how many there are; needed for the running mean alone.
      order: as for `PCGrad`.
      key: as for `PCGrad`.

    Raises:
      ValueError: for numbers outside of their ranges, a running mean without `tasks`,
        or as `PCGrad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # in conflict
      >>> tasks.task_weights(gram, tasks.GradVac(0.0)).tolist()
      [2.0, 1.25]

    References:
      Wang, Tsvetkov, Firat, Cao: "Gradient Vaccine", 2021, arXiv 2010.05874, equations
      (3) and (4), Algorithm 1.
    """

    target: float | None = 0.5
    b: float = 0.01
    tasks: int | None = None
    order: Sequence[int] | None = None
    key: int | jax.Array | None = None

    def __post_init__(self):
        object.__setattr__(self, "order", checked_order(self.order, self.key))
        if self.target is not None and not -1 <= self.target < 1:
            raise ValueError(f"`target` must be in [-1, 1), got {self.target!r}.")
        if not 0 < self.b <= 1:
            raise ValueError(f"`b` must be in (0, 1], got {self.b!r}.")
        if self.target is None and self.tasks is None:
            raise ValueError(
                "The running mean of cosines (target=None) needs to know how many "
                "tasks there are: give `tasks`."
            )

    def init(self) -> Any:
        """Return the running means, zero at first, and the key."""
        means = ()
        if self.target is None:
            means = jnp.zeros((self.tasks, self.tasks))
        return means, _first_key(self.key)

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the coefficients of the sum of all turned gradients."""
        means, key = state
        if self.target is None and means.shape != gram.shape:
            raise ValueError(
                f"GradVac(tasks={self.tasks}) was given {len(gram)} tasks."
            )
        turns, key = _turns(self.order, len(gram), key)
        tasks = np.arange(len(gram))
        rows = jnp.eye(len(gram), dtype=gram.dtype)
        for j in turns:
            own = jnp.sum(rows * matmul(rows, gram), axis=1)
            inner = jnp.sum(rows * gram[j], axis=1)
            sizes = jnp.sqrt(jnp.maximum(own, 0)), jnp.sqrt(gram[j, j])
            cosine = jnp.clip(over(inner, sizes[0] * sizes[1]), -1, 1)
            goal = self.target if self.target is not None else means[tasks, j]
            goal = jnp.minimum(goal, 1 - 1e-6).astype(gram.dtype)
            turn = goal * jnp.sqrt((1 - cosine**2) / (1 - goal**2)) - cosine
            part = jnp.where(cosine < goal, turn * over(sizes[0], sizes[1]), 0)
            rows = rows.at[tasks, j].add(jnp.where(j == tasks, 0, part))
            if self.target is None:
                new = (1 - self.b) * means[tasks, j] + self.b * cosine
                means = means.at[tasks, j].set(jnp.where(j == tasks, 0, new))
        return jnp.sum(rows, axis=0), (means, key)


@dataclasses.dataclass(frozen=True)
class CAGrad:
    r"""Conflict-averse: the best worst case near the mean of all gradients.

    $d = \arg\max_d \min_i \langle g_i, d \rangle$ subject to $\|d - g_0\| \leq c
    \|g_0\|$, $g_0$ the mean. It is $g_0 + \frac{c \|g_0\|}{\|g_w\|} g_w$, where $g_w$
    is the convex combination of gradients that minimises $\langle g_w, g_0 \rangle + c
    \|g_0\| \|g_w\|$.

    Attributes:
      c: how far from the mean, in [0, 1), dimensionless; 0 is the mean.
      steps: of the projected gradient descent that finds the combination.

    Raises:
      ValueError: for a `c` outside of its range or `steps` below one.

    Limits:
      The minimum is found up to about 1e-3 of the norm of d in float32. Scaled as the
      mean, not as the sum.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # in conflict
      >>> tasks.task_weights(gram, tasks.CAGrad(c=0.0)).tolist()
      [0.5, 0.5]

    References:
      Liu, Liu, Jin, Stone, Liu: "Conflict-Averse Gradient Descent for Multi-task
      Learning", 2021, arXiv 2110.14048, equation (4) and Algorithm 1.
    """

    c: float = 0.5
    steps: int = 50

    def __post_init__(self):
        if not 0 <= self.c < 1:
            raise ValueError(f"`c` must be in [0, 1), got {self.c!r}.")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps!r}.")

    def init(self) -> tuple[()]:
        """Return no state."""
        return ()

    def weights(self, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the coefficients of the best direction."""
        size = jnp.trace(gram)
        unit = over(gram, size)
        mean = jnp.full_like(gram[0], 1 / len(gram))
        slope = matmul(unit, mean)
        radius = self.c * jnp.sqrt(square_of(unit, mean))
        # Step lengths over six orders of magnitude, the best of which is taken.
        lengths = jnp.logspace(-4, 2, 25, dtype=gram.dtype)[:, None]

        def value(w: jax.Array) -> jax.Array:
            squares = jnp.sum(w * matmul(w, unit), axis=-1)
            return matmul(w, slope) + radius * jnp.sqrt(jnp.maximum(squares, 0))

        def step(_: jax.Array, w: jax.Array) -> jax.Array:
            products = matmul(unit, w)
            norm = jnp.sqrt(jnp.maximum(matmul(w, products), 0))
            down = slope + radius * over(products, norm)
            tried = jnp.concatenate(
                [w[None], _on_simplex(w[None] - lengths * down[None])]
            )
            return tried[jnp.argmin(value(tried))]

        w = jax.lax.fori_loop(0, self.steps, step, mean)
        return mean + over(radius, jnp.sqrt(square_of(unit, w))) * w, state


def _on_simplex(x: jax.Array) -> jax.Array:
    """Return the nearest points with entries that are positive and add up to one.

    Held, Wolfe, Crowder: "Validation of subgradient optimization", 1974, Section 3.
    """
    ordered = -jnp.sort(-x, axis=-1)
    counts = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    shifts = (jnp.cumsum(ordered, axis=-1) - 1) / counts[None]
    last = jnp.sum(ordered > shifts, axis=-1, keepdims=True) - 1
    return jnp.maximum(x - jnp.take_along_axis(shifts, last, axis=-1), 0)


def _first_key(key: int | jax.Array | None) -> Any:
    if key is None:
        return ()
    if not isinstance(key, int | jax.Array):
        raise TypeError(
            f"`key` must be a seed or a key of jax.random, got {key!r} of type "
            f"{type(key).__name__}."
        )
    return jax.random.key(key) if isinstance(key, int) else key


def _turns(
    order: tuple[int, ...] | None, tasks: int, key: Any
) -> tuple[list[np.ndarray | jax.Array], Any]:
    """Return for every turn whom each task meets, and the next key."""
    if isinstance(key, tuple):
        met = in_order(order, tasks)
        return [np.full(tasks, j) for j in met], key
    key, now = jax.random.split(key)
    all_turns = jax.vmap(lambda k: jax.random.permutation(k, tasks))(
        jax.random.split(now, tasks)
    )
    return [all_turns[:, turn] for turn in range(tasks)], key
