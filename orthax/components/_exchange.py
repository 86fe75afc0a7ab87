"""What one device does: bring whole matrices together, work, and bring them back."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from orthax.components._costs import Split
from orthax.components._division import Division
from orthax.components._layout import Axes, Layout

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
        if plan.kind == "spread":
            rest.append((plan, lays, _spread(f, units, lays, plan)))
        elif plan.kind == "split":
            rest.append((plan, lays, _shared(split, units, lays, plan)))
        else:
            shares.append((plan, lays, _fetch(units, lays[0], plan)))
    folded = [lays[0].unit.fold(share) for _, lays, share in shares]
    results = iter(f([stack for stacks in folded for stack in stacks]))
    for (plan, lays, share), stacks in zip(shares, folded, strict=True):
        done = lays[0].unit.unfold([next(results) for _ in stacks], share.shape)
        rest.append((plan, lays, _bring_back(done, lays, plan)))
    for plan, lays, units in rest:
        for i, lay, x in zip(plan.members, lays, units, strict=True):
            out[i] = lay.from_units(x)
    return out


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
    return _of_leaves(_gathered(tiles.reshape(-1, *layout.tile), plan.divided), lays)


def _of_leaves(units: jax.Array, lays: Sequence[Layout]) -> Units:
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
    return _of_leaves(x.reshape(tile).transpose(inverse), lays)


def _spread(
    f: ManyFunction, units: Units, lays: Sequence[Layout], plan: Division
) -> Units:
    """Let every device work on units of its own shapes; one exchange for all."""
    lots = _lots(lays)
    layout = lays[0]
    z, p = layout.parts(plan.divided), layout.parts(plan.exchanged)
    sizes = [math.prod(lay.tile) for lay, _ in lots]
    length = max(sum(n * sizes[g] for g, n in turn) for turn in plan.turns)
    flat = [
        jnp.concatenate([units[i].reshape(-1, sizes[g]) for i in members])
        for g, (_, members) in enumerate(lots)
    ]
    buffer = _own_slice(_packed(flat, plan, length), plan.divided, z)
    if p > 1:
        buffer = jax.lax.all_to_all(buffer, plan.exchanged, 0, 0)
    turns = list(dict.fromkeys(plan.turns))
    which = jnp.asarray([turns.index(turn) for turn in plan.turns])
    work = [functools.partial(_turn, f, turn, lots, length) for turn in turns]
    # The device with the index (z, p), as `_packed` counts them.
    device = jax.lax.axis_index(plan.divided + plan.exchanged)
    buffer = jax.lax.switch(which[device], work, buffer)
    if p > 1:
        buffer = jax.lax.all_to_all(buffer, plan.exchanged, 0, 0)
    flat = _unpacked(_gathered(buffer, plan.divided), plan, sizes)
    out: Units = list(units)
    for (lay, members), rows in zip(lots, flat, strict=True):
        parts = jnp.split(rows, len(members))
        for i, part in zip(members, parts, strict=True):
            out[i] = part.reshape(lay.count, *lay.tile)
    return out


def _lots(lays: Sequence[Layout]) -> list[tuple[Layout, list[int]]]:
    """Return the leaves of equal layout together, in the order of the plan."""
    alike: dict[Layout, list[int]] = {}
    for i, lay in enumerate(lays):
        alike.setdefault(lay, []).append(i)
    return list(alike.items())


def _packed(flat: Sequence[jax.Array], plan: Division, length: int) -> jax.Array:
    """Return a row for every device that holds the units of its turn, one by one."""
    taken = [0] * len(flat)
    rows = []
    for turn in itertools.takewhile(bool, plan.turns):
        parts = []
        for g, n in turn:
            parts.append(flat[g][taken[g] : taken[g] + n].ravel())
            taken[g] += n
        row = jnp.concatenate(parts)
        rows.append(jnp.pad(row, (0, length - row.size)))
    # Where there are fewer units than devices, the last ones have none.
    return jnp.pad(jnp.stack(rows), ((0, len(plan.turns) - len(rows)), (0, 0)))


def _unpacked(rows: jax.Array, plan: Division, sizes: Sequence[int]) -> list[jax.Array]:
    """Return the units of every lot, `(count, size)`: `_packed` undone."""
    found: list[list[jax.Array]] = [[] for _ in sizes]
    used = [*itertools.takewhile(bool, plan.turns)]
    for row, turn in zip(rows[: len(used)], used, strict=True):
        start = 0
        for g, n in turn:
            end = start + n * sizes[g]
            found[g].append(row[start:end].reshape(n, sizes[g]))
            start = end
    return [jnp.concatenate(parts) for parts in found]


def _turn(
    f: ManyFunction,
    turn: Sequence[tuple[int, int]],
    lots: Sequence[tuple[Layout, list[int]]],
    length: int,
    buffer: jax.Array,
) -> jax.Array:
    """Work on the units of one device: rows of tiles in, rows of tiles out."""
    if not turn:
        return buffer
    wholes, start = [], 0
    for g, n in turn:
        lay = lots[g][0]
        end = start + n * math.prod(lay.tile)
        tiles = buffer[:, start:end].reshape(-1, n, *lay.tile)
        wholes.append(lay.assembled(tiles))
        start = end
    lays = [lots[g][0] for g, _ in turn]
    folded = [lay.unit.fold(x) for lay, x in zip(lays, wholes, strict=True)]
    results = iter(f([stack for stacks in folded for stack in stacks]))
    rows = []
    for lay, whole, stacks in zip(lays, wholes, folded, strict=True):
        done = lay.unit.unfold([next(results) for _ in stacks], whole.shape)
        rows.append(lay.tiled(done).reshape(len(buffer), -1))
    row = jnp.concatenate(rows, axis=1)
    return jnp.pad(row, ((0, 0), (0, length - row.shape[1])))
