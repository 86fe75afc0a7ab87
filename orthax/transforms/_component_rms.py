"""Equalise the components of an update: NorMuon's second moment."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax import components
from orthax._linalg import working
from orthax.internal.components import check_rule
from orthax.internal.execution import by_compiler
from orthax.transforms._axis import check_axis, reduced_axes
from orthax.transforms._masked import Hidden

Axes = tuple[int, ...]


class ScaleByComponentRMSState(NamedTuple):
    """State of `scale_by_component_rms`.

    Attributes:
      nu: a tree like the parameters. For a matrix leaf, the float32 running mean of the
        squared entries of each column (or row, see `axis`): shaped and sharded like the
        parameter, with the other axes of size one, or a flat vector if one kernel holds
        several matrices. For other leaves an `optax.MaskedNode`.
    """

    nu: Any


def scale_by_component_rms(
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    axis: str = "columns",
    rule: components.RuleOrTree = components.ByName(),
) -> optax.GradientTransformationExtraArgs:
    r"""Divide every component by its running root mean square, and keep the norm.

    Polar factors have equal singular values, but the lengths of their components
    (units, filters) may differ widely; this equalises them. With
    $v \leftarrow \beta_2 v + (1 - \beta_2) \mathrm{mean}_{rows}(O \odot O)$, the m x n
    update O becomes $\hat O = O / (\sqrt{v} + \epsilon)$, rescaled to the Frobenius
    norm of O. Put it after `orthogonalise`.

    Args:
      b2: decay of the running mean, in [0, 1), dimensionless.
      eps: added to the root mean square, dimensionless; entries of a full-rank polar
        factor have root mean square `1 / sqrt(max(m, n))`.
      axis: which vectors are divided: `"columns"`, the components, as in NorMuon;
        `"rows"`; or `"short"`, the rows of tall matrices and the columns of others,
        whose norms differ even in a polar factor.
      rule: how leaves form matrices; the same as for `orthogonalise`.

    Returns:
      A transformation with a `ScaleByComponentRMSState`.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: for an unknown `axis`; from `init` and `update`, if the rule cannot
        decide a leaf or cuts none.

    Limits:
      A zero update gives zero. As in the paper there is no bias correction: restoring
      the norm cancels any common factor of v.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> tx = orthax.transforms.scale_by_component_rms()
      >>> updates = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> scaled, _ = tx.update(updates, tx.init(updates))
      >>> scaled["kernel"].round(3).tolist()
      [[3.536, 0.0], [0.0, 3.536]]

    References:
      Li, Liu, Liang, Chen, Zhao: "NorMuon: Making Muon more efficient and scalable",
      2025, arXiv 2510.05491, Algorithm 1. There the result is scaled to a root mean
      square of 0.2; here `scale_by_shape(RMSMatch(0.2))` follows, the same for updates
      of full rank.
    """
    rule = check_rule(rule)
    check_axis(axis)

    def init(params: optax.Params) -> ScaleByComponentRMSState:
        nu = [
            _zeros(leaf, axis) if leaf.cut else Hidden()
            for leaf in components.resolve(params, rule)
        ]
        return ScaleByComponentRMSState(
            jax.tree.unflatten(jax.tree.structure(params), nu)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        structure = jax.tree.structure(updates)
        values, moments = [], []
        leaves = components.resolve(updates, rule)
        for leaf, nu in zip(leaves, structure.flatten_up_to(state.nu), strict=True):
            x = leaf.value
            if leaf.cut:
                x, nu = _equalised(jnp.asarray(x), nu, leaf.cut, axis, b2, eps)
            values.append(x)
            moments.append(nu)
        nu = jax.tree.unflatten(structure, moments)
        return jax.tree.unflatten(structure, values), ScaleByComponentRMSState(nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(leaf: components.Leaf, axis: str) -> jax.Array:
    shape, cut = leaf.value.shape, leaf.cut
    if cut.is_whole:
        # A sum rather than zeros of its shape: it is sharded like the leaf.
        zeros = jnp.zeros_like(leaf.value, dtype=jnp.float32)
        cut = cut.on(len(shape))
        axes = reduced_axes(axis, cut.rows, cut.columns, shape)
        return jnp.sum(zeros, axis=axes, keepdims=True)
    sizes = (_count(axis, stack) for stack in cut.matrices(shape))
    return jnp.zeros(sum(sizes), jnp.float32)


def _count(axis: str, stack: tuple[int, int, int]) -> int:
    """Return the number of vectors of a batch `(b, m, n)`."""
    (side,) = reduced_axes(axis, (1,), (2,), stack)
    return stack[0] * stack[3 - side]


def _equalised(
    x: jax.Array,
    nu: jax.Array,
    cut: components.Matricisation,
    axis: str,
    b2: float,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    if cut.is_whole:
        cut = cut.on(x.ndim)
        return _divided(x, nu, cut.rows, cut.columns, axis, b2, eps)

    def on_stacks(x: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
        stacks = cut.fold(x)
        ends = itertools.accumulate(_count(axis, s.shape) for s in stacks)
        parts = jnp.split(nu, list(ends)[:-1])
        pairs = []
        for s, v in zip(stacks, parts, strict=True):
            (side,) = reduced_axes(axis, (1,), (2,), s.shape)
            v = v.reshape([1 if i == side else n for i, n in enumerate(s.shape)])
            pairs.append(_divided(s, v, (1,), (2,), axis, b2, eps))
        out = cut.unfold([s for s, _ in pairs], x.shape)
        return out, jnp.concatenate([v.ravel() for _, v in pairs])

    return by_compiler(on_stacks, (x, nu))(x, nu)


def _divided(
    x: jax.Array,
    v: jax.Array,
    rows: Axes,
    columns: Axes,
    axis: str,
    b2: float,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    work = working(x)
    entries = work.real**2 + work.imag**2
    axes = reduced_axes(axis, rows, columns, x.shape)
    square = jnp.mean(entries, axis=axes, keepdims=True)
    mean = (b2 * v).astype(square.dtype) + (1 - b2) * square
    v = mean.astype(v.dtype)
    out = work / (jnp.sqrt(v) + eps).astype(square.dtype)
    before = jnp.sum(entries, axis=rows + columns, keepdims=True)
    after = jnp.sum(out.real**2 + out.imag**2, axis=rows + columns, keepdims=True)
    ratio = jnp.sqrt(before / jnp.where(after > 0, after, 1))
    return (out * jnp.where(after > 0, ratio, 0)).astype(x.dtype), v
