"""What one device does: bring whole matrices together, work, and bring them back."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from orthax.components._costs import Split
from orthax.components._division import Division
from orthax.components._layout import Axes, Layout
from orthax.components._matricisation import Matricisation

Units = list[jax.Array]
ManyFunction = Callable[[list[jax.Array]], Sequence[jax.Array]]


def carry_out(
    f: ManyFunction,
    split: Split | None,
    locals_: Sequence[jax.Array],
    layouts: Sequence[Layout],
    plans: Sequence[Division],
) -> list[jax.Array]:
    """Return what a device has of all leaves, once `f` has worked on their matrices.

    For code that runs on every device with its own part of every leaf, where the mesh
    axes have names: inside `jax.shard_map`.

    Args:
      f: maps a list of stacks `(b, m, n)` to as many of equal shapes.
      split: how devices share one matrix, where a plan says so.
      locals_: what this device has of each leaf.
      layouts: how each leaf lies on the mesh.
      plans: what `divide` decided.
    """
    out = list(locals_)
    shares, rest = [], []
    for plan in plans:
        own = [locals_[i] for i in plan.members]
        lays = [layouts[i] for i in plan.members]
        units = [lay.to_units(x) for lay, x in zip(lays, own, strict=True)]
        if plan.kind == "split":
            rest.append((plan, lays, _shared(split, units, lays, plan)))
        else:
            shares.append((plan, lays, _fetch(units, lays[0], plan)))
    cuts = [lays[0].unit for _, lays, _ in shares]
    done = on_matrices(f, cuts, *(share for *_, share in shares))
    for (plan, lays, _), whole in zip(shares, done, strict=True):
        rest.append((plan, lays, _bring_back(whole, lays, plan)))
    for plan, lays, units in rest:
        for i, lay, x in zip(plan.members, lays, units, strict=True):
            out[i] = lay.from_units(x)
    return out


def on_matrices(
    f: ManyFunction, cuts: Sequence[Matricisation], *xs: jax.Array
) -> tuple[jax.Array, ...]:
    """Call `f` on the matrices of whole leaves, or of stacks of them."""
    folded = [cut.fold(x) for cut, x in zip(cuts, xs, strict=True)]
    results = iter(f([stack for stacks in folded for stack in stacks]))
    return tuple(
        cut.unfold([next(results) for _ in stacks], x.shape)
        for cut, x, stacks in zip(cuts, xs, folded, strict=True)
    )


def _fetch(units: Units, layout: Layout, plan: Division) -> jax.Array:
    """Return this device's share of whole units, `(share, *whole)`."""
    x = jnp.concatenate(units) if len(units) > 1 else units[0]
    p, z = layout.parts(plan.exchanged), layout.parts(plan.divided)
    short = -len(x) % (p * z)
    if short:
        x = jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1))
    x = _own_slice(x, plan.divided, z)
    if p == 1:
        return x.reshape(-1, *layout.whole)
    tiles = x.reshape(p, -1, *layout.tile)
    return layout.assembled(jax.lax.all_to_all(tiles, plan.exchanged, 0, 0))


def _bring_back(share: jax.Array, lays: Sequence[Layout], plan: Division) -> Units:
    """Return the units of every leaf from all devices' shares: `_fetch` undone."""
    layout = lays[0]
    if layout.parts(plan.exchanged) > 1:
        tiles = jax.lax.all_to_all(layout.tiled(share), plan.exchanged, 0, 0)
    else:
        tiles = share
    return of_leaves(_gathered(tiles.reshape(-1, *layout.tile), plan.divided), lays)


def of_leaves(units: jax.Array, lays: Sequence[Layout]) -> Units:
    """Return the units of every leaf; what remains is padding."""
    ends = itertools.accumulate(lay.count for lay in lays)
    return jnp.split(units, [*ends])[:-1]


def _own_slice(x: jax.Array, divided: Axes, parts: int, axis: int = 0) -> jax.Array:
    """Return the part of a replicated array that this device works on."""
    if parts == 1:
        return x
    n = x.shape[axis] // parts
    start = jax.lax.axis_index(divided) * n
    return jax.lax.dynamic_slice_in_dim(x, start, n, axis)


def _gathered(x: jax.Array, divided: Axes, axis: int = 0) -> jax.Array:
    if not divided:
        return x
    return jax.lax.all_gather(x, divided, axis=axis, tiled=True)


def _shared(
    split: Split, units: Units, lays: Sequence[Layout], plan: Division
) -> Units:
    """Let every device work on its part of the long side of every matrix."""
    layout = lays[0]
    x = jnp.concatenate(units) if len(units) > 1 else units[0]
    place = {axis: i + 1 for i, axis in enumerate(layout.sides)}
    order = [0, *(place[i] for i in layout.short + layout.long)]
    tile = x.transpose(order).shape
    x = x.transpose(order).reshape(*tile[: 1 + len(layout.short)], -1)
    # The order of the columns makes no difference, as long as it is kept.
    gathered = [i + 1 for i, axis in enumerate(layout.short) if layout.spec[axis]]
    names, last = layout.on(layout.short), x.ndim - 1
    if gathered:
        x = jax.lax.all_to_all(x, names, last, *gathered, tiled=True)
    x = _own_slice(x, plan.divided, layout.parts(plan.divided), axis=last)
    whole = x.shape
    x = x.reshape(len(x), -1, whole[-1])
    x = split.work(x, plan.divided + plan.exchanged).reshape(whole)
    x = _gathered(x, plan.divided, axis=last)
    if gathered:
        x = jax.lax.all_to_all(x, names, *gathered, last, tiled=True)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return of_leaves(x.reshape(tile).transpose(inverse), lays)
