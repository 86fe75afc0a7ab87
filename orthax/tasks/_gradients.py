"""The gradients of several tasks at once, or combined in two passes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthax.tasks._combine import check_task_rule, task_weights
from orthax.tasks._rules import OSGD, TaskRule


def task_value_and_grad(
    losses: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that gives the losses of all tasks and all their gradients.

    Args:
      losses: a function of parameters, and perhaps more, that returns losses
        `(tasks,)`, or a pair of them and anything else if `has_aux`.
      has_aux: whether it returns a pair.

    Returns:
      A function of the same arguments that returns `(losses, grads)`, or `((losses,
      aux), grads)`, where every leaf of `grads` has an axis of tasks followed by the
      axes of the parameter.

    Raises:
      ValueError: when called, if `losses` does not return a vector of at least one
        loss.

    Limits:
      One forward pass, and a batch of backward passes, one for each task; the gradients
      take the memory of the parameters times the number of tasks. See
      `combined_value_and_grad` for less.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> f = tasks.task_value_and_grad(lambda x: jnp.stack([x**2, 3 * x]))
      >>> values, grads = f(2.0)
      >>> values.tolist(), grads.tolist()
      ([4.0, 6.0], [4.0, 3.0])
    """

    def value_and_grad(params: Any, *args: Any, **kwargs: Any) -> Any:
        def of_params(params: Any) -> Any:
            return losses(params, *args, **kwargs)

        values, pull, *aux = jax.vjp(of_params, params, has_aux=has_aux)
        _check_losses(values)
        (grads,) = jax.vmap(pull)(jnp.eye(len(values), dtype=values.dtype))
        return ((values, *aux) if has_aux else values), grads

    return value_and_grad


def combined_value_and_grad(
    losses: Callable[..., Any], rule: TaskRule = OSGD(), *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Return a function that gives losses and their combined gradient, in two passes.

    The first pass computes the Gram matrix, one gradient at a time, $K e_i = J (J^T
    e_i)$: a backward pass and its transpose for each task. The second is one backward
    pass with the weights of the rule. The result is that of `task_value_and_grad`
    followed by `combine_tasks(rule)`, with the memory of one gradient.

    Args:
      losses: as for `task_value_and_grad`.
      rule: one without a state.
      has_aux: whether `losses` returns a pair.

    Returns:
      A function of the same arguments that returns `(losses, grads)`, or `((losses,
      aux), grads)`, with `grads` like the parameters.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if `rule` has a state, and as `task_value_and_grad`.

    Limits:
      The backward pass of `losses` must have a derivative in reverse mode itself.
      Parameters must be floating. The tasks of the first pass are not turns of a loop:
      the program grows with their number.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> losses = lambda x: jnp.stack([x[0], 2 * x[1] - 3 * x[0]])
      >>> values, grads = tasks.combined_value_and_grad(losses)(jnp.ones(2))
      >>> grads.tolist()
      [1.0, 2.0]

    References:
      Pearlmutter: "Fast Exact Multiplication by the Hessian", 1994 (products with a
      Jacobian without the Jacobian); the rule's.
    """
    check_task_rule(rule)
    if jax.tree.leaves(rule.init()):
        raise ValueError(
            f"{rule} keeps a state between steps: use task_value_and_grad and "
            "combine_tasks instead."
        )

    def value_and_grad(params: Any, *args: Any, **kwargs: Any) -> Any:
        def of_params(params: Any) -> Any:
            return losses(params, *args, **kwargs)

        values, pull, *aux = jax.vjp(of_params, params, has_aux=has_aux)
        _check_losses(values)
        gram = _gram(pull, values)
        weights = task_weights((gram + gram.T) / 2, rule)
        (grads,) = pull(weights.astype(values.dtype))
        return ((values, *aux) if has_aux else values), grads

    return value_and_grad


def _gram(pull: Callable[[jax.Array], tuple], values: jax.Array) -> jax.Array:
    """Return J J^T, one gradient in memory at a time.

    J v, a forward derivative, is the transpose of the backward pass: what has a rule
    for the backward direction alone, like `jax.custom_vjp`, need not have the other.
    A loop would be shorter, but in its body XLA's convolutions are slow on a CPU; an
    optimisation barrier between the turns is gone before XLA orders them there.
    """
    _, push = jax.vjp(pull, values)  # linear: where does not matter
    rows = []
    for task in jnp.eye(len(values), dtype=values.dtype):
        if rows:  # never true, but only known once the last gradient is done with
            never = jnp.isnan(rows[-1][0]) & jnp.isfinite(rows[-1][0])
            task = jnp.where(never, jnp.zeros_like(task), task)
        rows += push(pull(task))
    return jnp.stack(rows)


def _check_losses(values: jax.Array) -> None:
    shape = getattr(values, "shape", None)
    if shape is None or len(shape) != 1 or not shape[0]:
        raise ValueError(
            "`losses` must return one array of shape (tasks,), at least one task; got "
            f"{shape if shape is not None else values!r}. jnp.stack makes one of "
            "several."
        )
