"""An optimiser's state carried into the coordinates of Sigma."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax._linalg import adjoint, matmul, working
from orthax.low_rank._factorise import masked
from orthax.low_rank._placement import by_compiler
from orthax.low_rank._state import (
    LowRankState,
    is_sigmas,
    leaf_of,
    leaves_of,
    owner_of,
    paths_of,
    stacks_of,
    wrapped,
)

MOMENTS = ("zero", "slice", "rotate")
KINDS = ("first", "second", "gradient")
# What the fields of optimisers' states hold, by their names in optax and here.
_KNOWN = {
    **dict.fromkeys(("mu", "trace", "ema", "m", "m1", "m2", "exp_avg"), "first"),
    **dict.fromkeys(("nu", "nu_max", "n", "sum_of_squares", "e_g", "e_x"), "second"),
    **dict.fromkeys(("exp_avg_sq", "grad_sum_sq"), "second"),
    # Gradients and weights: they turn with the basis, whatever becomes of the moments.
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
      new: the state after, from `factorise`, `refactor` or `refactor_masked`.
      moments: `"rotate"`: first moments $A^T M B$; second moments
        $(A \circ A)^T N (B \circ B)$, which are those of the new coordinates if the
        entries of the gradient are uncorrelated (there is no exact rotation).
        `"slice"`: the paper's code: zeros where a weight was dense, then leading rows
        and columns, as if the basis had not turned. `"zero"`: first moments zero;
        second moments as in `"slice"`.
      tx: the optimiser. Where given, leaves that belong to a weight but have another
        shape (Adafactor's rows and columns) start afresh if their shape must change.
      kinds: what fields of your own optimiser's state hold, by the name of the field:
        `"first"`, `"second"` or `"gradient"`, which is always rotated (accumulated
        gradients, copies of weights). The names of optax's states are known.

    Returns:
      A state of equal structure, for `new.trainable`.

    Raises:
      TypeError: if `new` is no `LowRankState`.
      ValueError: for an unknown `moments` or kind; if `old` and `new` are of different
        parameters; or if a leaf belongs to a weight, cannot be converted, and `tx` was
        not given.

    Limits:
      A field of an unknown name is zero where a weight was dense, and sliced later.
      Under `"slice"` and `"zero"` Adam's count stays while its moments are zero at
      first, without the correction of their bias: for some tens of steps it goes up to
      6 times too far (b1 = 0.9, b2 = 0.999). Works inside `jit` for `refactor_masked`.

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

    References:
      Coquelin et al. 2024, arXiv 2401.08505, and the authors' code ("slice").
    """
    if not isinstance(new, LowRankState):
        raise TypeError(f"`new` must be a LowRankState, got {type(new).__name__}.")
    known = check_moments(moments, kinds)
    old = wrapped(old)
    changes, everything = _changes(old, new), set(paths_of(old.trainable))
    leaves, structure = jax.tree.flatten(opt_state)
    wrong = []
    for i, (path, leaf) in enumerate(zip(paths_of(opt_state), leaves, strict=True)):
        owner = owner_of(path, everything)
        if owner not in changes:
            continue
        change, shape = changes[owner], jnp.shape(leaf)
        if shape == change.shape:
            name = _field(path, owner)
            leaves[i] = change.apply(leaf, known.get(name), moments)
        elif owner and math.prod(shape) > 1 and not change.keeps_shape:
            wrong.append((path, shape))
    converted = jax.tree.unflatten(structure, leaves)
    if wrong and tx is None:
        raise ValueError(
            f"'{wrong[0][0]}' of the optimiser's state has shape {wrong[0][1]}, which "
            "is not that of its weight: give `tx`, and such leaves start afresh."
        )
    return _refreshed(converted, tx, new) if wrong else converted


def check_moments(moments: str, kinds: Mapping[str, str] | None) -> dict[str, str]:
    """Return what every known field holds, or raise at what is no such thing."""
    if moments not in MOMENTS:
        raise ValueError(f"`moments` must be one of {MOMENTS}, got {moments!r}.")
    for name, kind in (kinds or {}).items():
        if kind not in KINDS:
            raise ValueError(
                f"`kinds` says that '{name}' holds {kind!r}; expected one of {KINDS}."
            )
    return {**_KNOWN, **(kinds or {})}


@dataclasses.dataclass(frozen=True)
class _Change:
    """What becomes of one leaf that mirrors a weight, or one Sigma of it."""

    shape: tuple[int, ...]
    old: tuple[tuple[Any, Any], ...]  # no bases where the weight was dense
    new: tuple[tuple[Any, Any, Any], ...]
    cut: components.Matricisation | None
    like: Any

    def apply(self, x: jax.Array, kind: str | None, moments: str) -> Any:
        """Return the leaf in the new coordinates."""
        how = _how(kind, moments, was_dense=not self.old)
        return _carried(x, self.old, self.new, self.like, self.cut, how)

    @property
    def keeps_shape(self) -> bool:
        """Whether the leaf has one shape before and after."""
        return getattr(self.like, "shape", None) == self.shape


def _how(kind: str | None, moments: str, *, was_dense: bool) -> str:
    """Return what is done to a field: zero, slice, rotate or spread."""
    if kind == "gradient" or (kind == "first" and moments == "rotate"):
        return "rotate"
    if kind == "second" and moments == "rotate":
        return "spread"
    if was_dense or (kind == "first" and moments == "zero"):
        return "zero"
    return "slice"


def _changes(old: LowRankState, new: LowRankState) -> dict[str, _Change]:
    """Return what changes between two states, by the path of the leaf before."""
    if not set(old.frozen) <= set(new.frozen):
        raise ValueError(
            f"`old` has factorised leaves that `new` lacks, "
            f"{sorted(set(old.frozen) - set(new.frozen))}: pass the state before, then "
            "the state after."
        )
    leaves, others = leaves_of(new.trainable)[0], leaves_of(old.trainable)[0]
    changes: dict[str, _Change] = {}
    for path, bases in new.frozen.items():
        factors = tuple(zip(bases.u, bases.vt, bases.rank, strict=True))
        leaf, before = leaves[bases.index], old.frozen.get(path)
        if before is bases:
            continue
        if before is None:
            shape = jnp.shape(others[bases.index])
            if len(leaves) != len(others) or shape != bases.shape:
                raise ValueError(
                    f"'{path}' has shape {bases.shape} in `new`, {shape} in `old`: "
                    "pass states of the same parameters."
                )
            changes[path] = _Change(shape, (), factors, bases.cut, leaf)
            continue
        pairs = tuple(zip(before.u, before.vt, strict=True))
        for i, (olds, news) in enumerate(zip(pairs, factors, strict=True)):
            here, like, was = path, leaf, others[bases.index]
            if is_sigmas(leaf):
                here, like, was = f"{path}/stacks/{i}", leaf.stacks[i], was.stacks[i]
            changes[here] = _Change(was.shape, (olds,), (news,), None, like)
    return changes


def _field(path: str, owner: str) -> str | None:
    """Return the name of the field in which a leaf stands."""
    parts = path[: len(path) - len(owner)].strip("/").split("/")
    return next((part for part in reversed(parts) if not part.isdigit()), None)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _carried(
    x: jax.Array,
    old: tuple[tuple[jax.Array, jax.Array], ...],
    new: tuple[tuple[jax.Array, jax.Array, jax.Array], ...],
    like: Any,
    cut: components.Matricisation | None,
    how: str,
) -> Any:
    """Return a leaf in new coordinates: one that is like another in its shape."""
    if how == "zero" and cut is not None:
        return jax.tree.map(lambda y: jnp.zeros_like(y, dtype=x.dtype), like)
    spec = jax.typeof(jax.tree.leaves(like)[0]).sharding.spec

    def carried(x: jax.Array, *factors: jax.Array) -> Any:
        (olds, news) = jax.tree.unflatten(structure, factors)
        if cut is not None:
            stacks = [None] * len(news)
            for i, stack in enumerate(cut.fold(working(x))):
                u, vt, rank = news[i]
                stacks[i] = _by(stack, u, adjoint(vt), how, rank)
        else:
            stacks = [_moved(stacks_of(x)[0], olds[0], news[0], how)]
        return leaf_of(tuple(stack.astype(x.dtype) for stack in stacks))

    flat, structure = jax.tree.flatten((old, new))
    return by_compiler(carried, spec, x, *map(jnp.asarray, flat))


def _moved(
    x: jax.Array,
    old: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array, jax.Array],
    how: str,
) -> jax.Array:
    """Return what belongs to one stack of Sigmas, for other bases."""
    (u, vt), (to_u, to_vt, rank), r = old, new, new[0].shape[-1]
    kept = x[:, :r, :r]
    if how == "zero":
        moved = jnp.zeros_like(kept)
    elif how == "slice":
        moved = kept
    else:
        a, b = matmul(adjoint(u), to_u), matmul(vt, adjoint(to_vt))
        moved = _by(working(x), a, b, how, rank)
    if u.shape == to_u.shape:
        # A leaf on which no check has worked is left alone, to the last bit.
        changed = jnp.any(u != to_u) | jnp.any(vt != to_vt)
        moved = jnp.where(changed, moved, kept.astype(moved.dtype))
    return masked(moved, rank)


def _by(x: jax.Array, a: jax.Array, b: jax.Array, how: str, rank: Any) -> jax.Array:
    """Return `A^H X B`, with squared entries of A and B for second moments."""
    if how == "spread":
        a, b = jnp.abs(a) ** 2, jnp.abs(b) ** 2
    return masked(matmul(matmul(adjoint(a), x), b), rank)


def _refreshed(opt_state: Any, tx: optax.GradientTransformation, new: Any) -> Any:
    """Return the state with a fresh leaf wherever the shape is not what it must be."""
    leaves, structure = jax.tree.flatten(opt_state)
    fresh = jax.tree.leaves(tx.init(new.trainable))
    if len(fresh) != len(leaves):
        raise ValueError(
            f"`tx` has a state of {len(fresh)} arrays for these weights, `opt_state` "
            f"has {len(leaves)}: pass the transformation that the state belongs to."
        )
    pairs = zip(leaves, fresh, strict=True)
    kept = [x if jnp.shape(x) == jnp.shape(y) else y for x, y in pairs]
    return jax.tree.unflatten(structure, kept)
