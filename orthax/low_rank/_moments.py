"""An optimiser's state converted to the coordinates of Sigma."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax._linalg import adjoint, matmul, working
from orthax.low_rank._sharding import auto_sharded
from orthax.low_rank._state import (
    Bases,
    LowRankState,
    owner_of,
    paths_of,
    squeezed,
)

MOMENTS = ("zero", "slice", "rotate")
KINDS = ("first", "second", "gradient")
# What the fields of optimisers' states hold, by their names in optax and here.
_KNOWN = {
    **dict.fromkeys(("mu", "trace", "ema", "m", "m1", "m2", "exp_avg"), "first"),
    **dict.fromkeys(("nu", "nu_max", "n", "sum_of_squares", "e_g", "e_x"), "second"),
    **dict.fromkeys(("exp_avg_sq", "grad_sum_sq"), "second"),
    # Gradients and weights: they rotate with the basis, whatever `moments` says.
    **dict.fromkeys(("acc_grads", "grad_acc", "avg_grad", "mean_grads"), "gradient"),
    **dict.fromkeys(("previous_gradient", "prev_updates", "updates"), "gradient"),
    **dict.fromkeys(("z", "params", "init_params", "params0", "x0"), "gradient"),
}


def convert_opt_state(
    opt_state: Any,
    old: Any,
    new: LowRankState,
    moments: str = "rotate",
    *,
    tx: optax.GradientTransformation | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Any:
    r"""Return the optimiser's state for weights that were factorised or refactored.

    Leaves of the state that mirror a factorised weight are found by their paths, in any
    nesting of optax's transformations, and take the shape of the new Sigma; counts and
    all other leaves stay. With the bases before, $U, V$, and after, $U', V'$, and
    $A = U^T U'$, $B = V^T V'$ (U and V are identities for a dense weight), a gradient
    or first moment M becomes $A^T M B$, which is exact.

    Args:
      opt_state: of any optax transformation, for `old`.
      old: the parameters, or the state before.
      new: the state after, from `factorise` or `refactor`.
      moments: `"rotate"`: first moments $A^T M B$; second moments
        $(A \circ A)^T N (B \circ B)$, which are those of the new coordinates if the
        entries of the gradient are uncorrelated (there is not an exact rotation).
        `"slice"`: the paper's code: zeros where a weight was dense, then leading rows
        and columns, as if the basis had not rotated. `"zero"`: first moments zero;
        second moments as in `"slice"`.
      tx: the optimiser. If given, leaves that belong to a weight but have another shape
        (Adafactor's rows and columns) start afresh if their shape must change.
      kinds: what fields of your own optimiser's state hold, by the name of the field:
        `"first"`, `"second"` or `"gradient"`, which is always rotated (accumulated
        gradients, copies of weights). The names of optax's states are known.

    Returns:
      A state of equal structure, for `new.trainable`.

    Raises:
      TypeError: if `new` is not a `LowRankState`.
      ValueError: for an unknown `moments` or kind; if `old` and `new` are of different
        parameters; or if a leaf belongs to a weight, cannot be converted, and `tx` was
        not given.

    Limits:
      A field of an unknown name is zero where a weight was dense, and sliced later.
      Under `"slice"` and `"zero"` Adam's step count is kept while its moments restart
      at zero, so bias correction no longer compensates: updates can be up to 6 times
      too large for a few dozen steps (b1 = 0.9, b2 = 0.999).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax import low_rank
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 3.0])), "bias": jnp.ones(2)}
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> grads = {"kernel": jnp.diag(jnp.array([5.0, 7.0])), "bias": jnp.ones(2)}
      >>> _, opt_state = tx.update(grads, tx.init(params), params)
      >>> state = low_rank.factorise(params, ranks=1)
      >>> converted = low_rank.convert_opt_state(opt_state, params, state)
      >>> converted[0].trace["kernel"].tolist(), converted[0].trace["bias"].tolist()
      ([[7.0]], [1.0, 1.0])
    """
    if not isinstance(new, LowRankState):
        raise TypeError(f"`new` must be a LowRankState, got {type(new).__name__}.")
    known = check_moments(moments, kinds)
    old = old if isinstance(old, LowRankState) else LowRankState(old, {})
    changes, paths = _changes(old, new), set(paths_of(old.trainable))
    leaves, structure = jax.tree.flatten(opt_state)
    wrong = []
    for i, (path, leaf) in enumerate(zip(paths_of(opt_state), leaves, strict=True)):
        owner = owner_of(path, paths)
        if owner not in changes:
            continue
        change, shape = changes[owner], jnp.shape(leaf)
        if shape == change.shape:
            kind = known.get(_field(path, owner))
            leaves[i] = _converted(leaf, change, kind, moments)
        elif owner and math.prod(shape) > 1 and change.sigma.shape != change.shape:
            wrong.append((path, shape))
    converted = jax.tree.unflatten(structure, leaves)
    if wrong and tx is None:
        raise ValueError(
            f"'{wrong[0][0]}' of the optimiser's state has shape {wrong[0][1]}, which "
            "is not that of its weight: give `tx`, and such leaves start afresh."
        )
    return _refreshed(converted, tx, new) if wrong else converted


def check_moments(moments: str, kinds: Mapping[str, str] | None) -> dict[str, str]:
    """Return what every known field holds; raise for an unknown kind or `moments`."""
    if moments not in MOMENTS:
        raise ValueError(f"`moments` must be one of {MOMENTS}, got {moments!r}.")
    for name, kind in (kinds or {}).items():
        if kind not in KINDS:
            raise ValueError(
                f"`kinds` says that '{name}' holds {kind!r}; expected one of {KINDS}."
            )
    return {**_KNOWN, **(kinds or {})}


class _Change(NamedTuple):
    """One weight that was factorised or refactored."""

    shape: tuple[int, ...]  # of the dense weight, or its Sigma, before
    old: Bases | None  # None for a dense weight
    new: Bases
    sigma: Any  # after


def _changes(old: LowRankState, new: LowRankState) -> dict[str, _Change]:
    """Return what changes between two states, by path."""
    lost = sorted(set(old.frozen) - set(new.frozen))
    if lost:
        raise ValueError(
            f"`old` has factorised leaves that `new` lacks, {lost}: pass the state "
            "before, then the state after."
        )
    before, after = map(jax.tree.leaves, (old.trainable, new.trainable))
    if len(before) != len(after):
        raise ValueError(
            f"`old` has {len(before)} leaves, `new` has {len(after)}: pass states of "
            "the same parameters."
        )
    changes = {}
    for path, bases in new.frozen.items():
        bases_before = old.frozen.get(path)
        if bases_before is bases:  # No check has worked on it.
            continue
        shape = jnp.shape(before[bases.index])
        if bases_before is None and shape != bases.shape:
            raise ValueError(
                f"'{path}' has shape {bases.shape} in `new`, {shape} in `old`: "
                "pass states of the same parameters."
            )
        changes[path] = _Change(shape, bases_before, bases, after[bases.index])
    return changes


def _field(path: str, owner: str) -> str | None:
    """Return the name of the field that a leaf of an optimiser's state is in."""
    parts = path[: len(path) - len(owner)].strip("/").split("/")
    return next((part for part in reversed(parts) if not part.isdigit()), None)


def _converted(x: Any, change: _Change, kind: str | None, moments: str) -> jax.Array:
    """Return a leaf that mirrors a weight in the coordinates of its new Sigma."""
    old, new, sigma = change.old, change.new, change.sigma
    if kind == "gradient" or (kind is not None and moments == "rotate"):
        before = () if old is None else (old.u, old.vt)
        power = 2 if kind == "second" else 1
        return _rotated(x, before, (new.u, new.vt), sigma, new.cut, power)
    if old is None or (kind == "first" and moments == "zero"):
        return jnp.zeros_like(sigma, dtype=x.dtype)
    return x[..., : new.rank, : new.rank]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _rotated(
    x: jax.Array,
    old: tuple[jax.Array, ...],
    new: tuple[jax.Array, jax.Array],
    sigma: jax.Array,
    cut: components.Matricisation,
    power: int,
) -> jax.Array:
    """Return `A^H X B` for what mirrors a weight, or its last Sigma, X.

    Sharded like `sigma`; without `old` bases X is dense.
    """

    def rotated(x: jax.Array, u: Any, vt: Any, *old: jax.Array) -> jax.Array:
        a, b = u, adjoint(vt)
        if old:
            stack = working(x).reshape(-1, *x.shape[-2:])
            a, b = matmul(adjoint(old[0]), a), matmul(old[1], b)
        else:
            (stack,) = cut.fold(working(x))
        if power == 2:
            a, b = jnp.abs(a) ** 2, jnp.abs(b) ** 2
        product = matmul(matmul(adjoint(a), stack), b)
        return squeezed(product).astype(x.dtype)

    return auto_sharded(rotated, jax.typeof(sigma).sharding.spec, x, *new, *old)


def _refreshed(opt_state: Any, tx: optax.GradientTransformation, new: Any) -> Any:
    """Return the state with a fresh leaf wherever the shape must change."""
    leaves, structure = jax.tree.flatten(opt_state)
    fresh = jax.tree.leaves(tx.init(new.trainable))
    if len(fresh) != len(leaves):
        raise ValueError(
            f"`tx` has a state of {len(fresh)} arrays for these weights, `opt_state` "
            f"has {len(leaves)}: pass the transformation that the state belongs to."
        )
    pairs = zip(leaves, fresh, strict=True)
    leaves = [x if jnp.shape(x) == jnp.shape(y) else y for x, y in pairs]
    return jax.tree.unflatten(structure, leaves)
