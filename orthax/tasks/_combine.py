"""The gradients of several tasks, and the one update that is made of them."""

import functools
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax._linalg import HIGHEST, working
from orthax.internal.execution import mesh_of
from orthax.tasks._rules import OSGD, TaskRule

_STACK = (
    "Of a list of gradients, one for each task, make it by jax.tree.map(lambda *g: "
    "jnp.stack(g), *gradients)."
)
_SCOPES = ("global", "leaf")


class CombineTasksState(NamedTuple):
    """State of `combine_tasks`.

    Attributes:
      rule: what the rule keeps, `()` for most; under `scope="leaf"` with a leading axis
        of one entry for each leaf.
    """

    rule: Any


def task_weights(gram: jax.typing.ArrayLike, rule: TaskRule = OSGD()) -> jax.Array:
    r"""Return the weight that a rule gives to the gradient of each task.

    Args:
      gram: inner products of the gradients, $K_{ij} = \langle g_i, g_j \rangle$, shape
        `(tasks, tasks)`.
      rule: how they become one update.

    Returns:
      Weights `(tasks,)`, dimensionless: the update is $\sum_i w_i g_i$.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if `gram` is not square, has no tasks, or does not suit the rule.

    Limits:
      A rule with a state is asked in its first one. Computed in float32 at least; NaN
      in one gradient gives NaN in all weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import tasks
      >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # the tasks are in conflict
      >>> tasks.task_weights(gram, tasks.OSGD()).tolist()
      [2.0, 1.0]

    References:
      See each rule.
    """
    check_task_rule(rule)
    try:
        gram = jnp.asarray(gram)
    except (TypeError, ValueError):
        raise TypeError(
            "`gram` must be the inner products of the gradients, of shape (tasks, "
            f"tasks), got {reprlib.repr(gram)}: for the gradients themselves use "
            "tasks.combine_tasks()."
        ) from None
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        raise ValueError(
            f"`gram` must have shape (tasks, tasks), at least one task, got "
            f"{gram.shape}."
        )
    gram = working(gram)
    return _asked(rule, gram, rule.init())[0]


def combine_tasks(
    rule: TaskRule = OSGD(), *, scope: str = "global"
) -> optax.GradientTransformationExtraArgs:
    r"""Combine the gradients of several tasks into one update.

    Takes updates with a leading task axis, as `task_value_and_grad` gives them, and
    gives updates without: first in a chain. All rules need the Gram matrix of the
    gradients alone, and then one weighted sum.

    Args:
      rule: `OSGD()` (the default, in the order of the tasks), `PCGrad()`, `GradVac()`,
        `CAGrad()`, `Symmetric()`, `Sum()`, or a frozen dataclass of yours with the
        methods `init` and `weights`.
      scope: `"global"`: gradients are vectors of all parameters. `"leaf"`: those of
        every leaf are combined on their own.

    Returns:
      A transformation with a `CombineTasksState`; `params` have no task axis.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: for an unknown `scope`; from `update`, if there are not tasks, leaves
        have no task axis or different ones, or their number does not suit the rule.

    Limits:
      Average over devices and accumulated batches before: a rule is not linear. Inner
      products are computed in float32 at least, and overflow where squares do (1e19).
      A task whose gradient is zero changes nothing; if all are, the update is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax import tasks
      >>> tx = optax.chain(tasks.combine_tasks(), optax.sgd(0.1))
      >>> params = {"kernel": jnp.zeros(2)}
      >>> grads = {"kernel": jnp.array([[1.0, 0.0], [-3.0, 2.0]])}  # of two tasks
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"].round(4).tolist()  # the first falls as if it were alone
      [-0.1, -0.2]

    References:
      Wan, Hoffmann, Lu, Maire 2020, arXiv 2008.06635 (reconstructed), and each rule's.
    """
    check_task_rule(rule)
    if scope not in _SCOPES:
        raise ValueError(f"`scope` must be one of {_SCOPES}, got {scope!r}.")

    def init(params: optax.Params) -> CombineTasksState:
        state = rule.init()
        if scope == "leaf":
            count = sum(map(_is_inexact, jax.tree.leaves(params)))
            state = jax.tree.map(lambda x: jnp.stack([x] * count), state)
        return CombineTasksState(state)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _check_tasks(updates, params)
        leaves, structure = jax.tree.flatten(updates)
        moving = [x for x in leaves if _is_inexact(x)]
        if scope == "global":
            weights, kept = _asked(rule, _gram(moving), state.rule)
            each = [weights] * len(moving)
        else:
            grams = jnp.stack([_gram([x]) for x in moving])
            asked = functools.partial(_asked, rule)
            each, kept = jax.vmap(asked)(grams, state.rule)
        combined = iter(map(_combined, each, moving))
        leaves = [next(combined) if _is_inexact(x) else x[0] for x in leaves]
        return jax.tree.unflatten(structure, leaves), CombineTasksState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def check_task_rule(rule: TaskRule) -> None:
    """Raise TypeError unless `rule` is an instance of a rule for tasks."""
    if isinstance(rule, type) or not isinstance(rule, TaskRule):
        advice = f" Write {rule.__name__}()." if isinstance(rule, type) else ""
        raise TypeError(
            "`rule` must be a task rule such as tasks.OSGD() or "
            f"tasks.PCGrad(), got {rule!r}.{advice}"
        )


def _check_tasks(updates: optax.Updates, params: optax.Params | None) -> None:
    """Raise unless all leaves have the same leading axis, and the rest of `params`."""
    if params is not None:
        counts = [len(jax.tree.leaves(tree)) for tree in (updates, params)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"The updates have {counts[0]} leaves, the parameters {counts[1]}: "
                f"expected one tree like the parameters. {_STACK}"
            )
    found: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
        name = jax.tree_util.keystr(path)
        if jnp.ndim(leaf) < 1:
            raise ValueError(
                f"Leaf {name} has no axes: updates need a leading axis of tasks, as "
                "tasks.task_value_and_grad gives it."
            )
        found.setdefault(leaf.shape[0], name)
    if not found or 0 in found:
        raise ValueError("There are no tasks: the updates are empty.")
    if len(found) > 1:
        counts = ", ".join(f"{n} in leaf {name}" for n, name in found.items())
        raise ValueError(
            f"Leaves disagree about the number of tasks: {counts}. Their first axis "
            "must be that of the tasks, as tasks.task_value_and_grad gives it. "
            f"{_STACK}"
        )
    if params is None:
        return
    leaves = jax.tree_util.tree_flatten_with_path(updates)[0]
    for (path, leaf), param in zip(leaves, jax.tree.leaves(params), strict=True):
        if leaf.shape[1:] != jnp.shape(param):
            raise ValueError(
                f"Leaf {jax.tree_util.keystr(path)} has shape {leaf.shape}; expected "
                f"an axis of tasks followed by the parameter's {jnp.shape(param)}."
            )


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _asked(rule: TaskRule, gram: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Return a rule's weights, NaN where the Gram matrix is not finite."""
    weights, state = rule.weights(gram, state)
    return jnp.where(jnp.all(jnp.isfinite(gram)), weights, jnp.nan), state


def _gram(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the inner products of gradients, `(tasks, tasks)`, real.

    On a mesh of explicit axes each device adds up those of what it has, and one sum
    over the devices follows.
    """
    mesh = mesh_of(leaves)
    axes = mesh.explicit_axes
    if not axes:
        return sum(map(_inner, leaves))
    specs = tuple(jax.typeof(x).sharding.spec for x in leaves)

    def of_device(*own: jax.Array) -> jax.Array:
        total = 0
        for x, spec in zip(own, specs, strict=True):
            used = jax.tree.leaves(tuple(spec))
            copies = math.prod(mesh.shape[name] for name in axes if name not in used)
            total += _inner(x) / copies
        return jax.lax.psum(total, axes)

    how = {"axis_names": set(axes), "check_vma": False}
    out = jax.sharding.PartitionSpec()
    return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=out, **how)(
        *leaves
    )


def _inner(x: jax.Array) -> jax.Array:
    x = working(x)
    if jnp.iscomplexobj(x):
        return _inner(x.real) + _inner(x.imag)
    rest = tuple(range(1, x.ndim))
    return jax.lax.dot_general(x, x, ((rest, rest), ((), ())), precision=HIGHEST)


def _combined(weights: jax.Array, x: jax.Array) -> jax.Array:
    work = working(x)
    flat = jnp.tensordot(weights.astype(work.dtype), work, axes=1, precision=HIGHEST)
    return flat.astype(x.dtype)
