"""Which device works on which matrices: decided before anything is moved."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from orthax.components._costs import Costs
from orthax.components._layout import Axes, Layout

# Share of time that another plan than a stack for each shape must save.
_GAIN = 0.1


class Division(NamedTuple):
    """Leaves whose matrices are divided among the devices in one way.

    Attributes:
      kind: `"local"`: every device works on the matrices that it has, whole. `"stack"`:
        matrices of one shape, each device as many. `"split"`: every device a part of
        the long side of each. `"compiler"`: as `"stack"`, but moved by the compiler,
        which alone knows how the leaves are sharded.
      members: the leaves, by their place in the list.
      exchanged: mesh axes over which their matrices are sharded.
      divided: mesh axes over which the leaves are not sharded, but the work is.
      flops: operations of the busiest device, padding included.
      bytes: what a device sends, at most.
      collectives: what they are called, as often as they are used.
      seconds: time by the `Machine` of the `Stacking`.
    """

    kind: str
    members: tuple[int, ...]
    exchanged: Axes
    divided: Axes
    flops: float
    bytes: int
    collectives: tuple[str, ...]
    seconds: float


class _Lot(NamedTuple):
    """Leaves of one shape, layout and cut: units that are alike."""

    members: tuple[int, ...]
    layout: Layout
    count: int
    flops: float

    @property
    def bytes(self) -> int:
        """Size of what a device has of one unit."""
        return math.prod(self.layout.tile) * self.layout.dtype.itemsize


def divided(layouts: Sequence[Layout], costs: Costs) -> list[Division]:
    """Return the plan for every leaf: which devices work on what.

    Leaves of equal shape, dtype, cut and sharding are one stack. Where matrices are
    sharded, an all-to-all brings whole ones together and another one brings them back.
    Where leaves are replicated, every device works on all of them, or on its share with
    an all-gather at the end, whichever takes less time by the costs.
    """
    pools: dict[tuple[Any, ...], list[_Lot]] = {}
    for lot in _lots(layouts, costs):
        layout = lot.layout
        alike = layout.exchanged, layout.replicated, layout.dtype
        pools.setdefault(alike, []).append(lot)
    plans = [plan for pool in pools.values() for plan in _pooled(pool, costs)]
    return sorted(plans, key=lambda plan: plan.members)


def constrained(layouts: Sequence[Layout], costs: Costs) -> list[Division]:
    """Return what is asked of the compiler where it alone knows the layout.

    What it moves is a guess for leaves that are neither replicated nor sharded over all
    devices along one axis.
    """
    alike: dict[tuple[Any, ...], list[_Lot]] = {}
    for lot in _lots(layouts, costs):
        layout = lot.layout
        alike.setdefault((layout.shape, layout.dtype, layout.cut), []).append(lot)
    plans = []
    for lots in alike.values():
        layout = lots[0].layout
        names = costs.axes or tuple(name for name, _ in layout.sizes)
        devices = layout.parts(names)
        whole = math.prod(layout.whole) * layout.dtype.itemsize
        members = tuple(sorted(i for lot in lots for i in lot.members))
        count = len(members) * math.prod(layout.shape[i] for i in layout.batch)
        share = -(-count // devices)
        sent, moved = 0, ("compiler's choice",)
        part = share * whole * (devices - 1)
        specs = {tuple(filter(None, lot.layout.spec)) for lot in lots}
        if specs == {()}:
            sent, moved = part, ("all-gather",)
            summed = 2 * count * whole * (devices - 1) // devices
            if len(members) == 1 and summed <= part:
                # XLA's choice for one leaf that is padded.
                sent, moved = summed, ("all-reduce",)
        elif len(lots) == 1 and specs <= {(names,)}:
            if layout.exchanged:
                sent, moved = 2 * part // devices, ("all-to-all", "all-to-all")
            elif len(members) == 1 and count % devices == 0:
                sent, moved = 0, ()
        flops = share * lots[0].flops
        seconds = costs.seconds(flops, sent, len(moved))
        plans.append(
            Division("compiler", members, names, (), flops, sent, moved, seconds)
        )
    return sorted(plans, key=lambda plan: plan.members)


def _lots(layouts: Sequence[Layout], costs: Costs) -> list[_Lot]:
    alike: dict[Layout, list[int]] = {}
    for i, layout in enumerate(layouts):
        alike.setdefault(layout, []).append(i)
    lots = []
    for layout, members in alike.items():
        matrices = layout.unit.matrices((1, *layout.whole))
        flops = sum(b * costs.flops(m, n) for b, m, n in matrices)
        count = len(members) * layout.count
        lots.append(_Lot(tuple(members), layout, count, flops))
    return lots


def _stacked(lot: _Lot, costs: Costs) -> Division:
    """Return the best plan that gives every device whole units of one shape."""
    layout, exchanged = lot.layout, lot.layout.exchanged
    plans = []
    for divided in _choices(layout, costs):
        devices = layout.parts(exchanged + divided)
        share = -(-lot.count // devices)
        padded = share * devices * lot.bytes
        moved = _moved(layout, exchanged, divided, padded)
        kind = "stack" if exchanged or divided else "local"
        work = share * lot.flops
        plans.append(_plan(kind, lot, divided, work, moved, costs))
    return min(plans, key=_seconds)


def _choices(layout: Layout, costs: Costs) -> list[Axes]:
    """Return which replicated mesh axes the work may be divided over."""
    free = tuple(n for n in layout.replicated if layout.parts((n,)) > 1)
    if costs.axes is not None:
        return [tuple(name for name in free if name in costs.axes)]
    return [(), *((name,) for name in free), *([free] if len(free) > 1 else [])]


def _moved(
    layout: Layout, exchanged: Axes, divided: Axes, padded: int
) -> tuple[int, tuple[str, ...]]:
    """Return the bytes that a device sends, and the collectives, of a whole exchange.

    `padded` is the size of what it has of all units, as many as the devices need.
    """
    p, z = layout.parts(exchanged), layout.parts(divided)
    sent, names = 0, ()
    if p > 1:
        sent += 2 * (padded // z) * (p - 1) // p
        names += ("all-to-all", "all-to-all")
    if z > 1:
        sent += (padded // z) * (z - 1)
        names += ("all-gather",)
    return sent, names


def _split(lot: _Lot, costs: Costs) -> list[Division]:
    """Return the plans in which devices share the long side of every matrix."""
    layout = lot.layout
    sharded = [i for i in layout.short if layout.spec[i]]
    if costs.split is None or not layout.cut.is_whole or len(sharded) > 1:
        return []
    m, n = (math.prod(layout.shape[i] for i in s) for s in (layout.short, layout.long))
    plans = []
    for divided in _choices(layout, costs):
        devices = layout.parts(layout.exchanged + divided)
        shared = costs.split.flops(m, n, devices) if devices > 1 else None
        if shared is None or n % devices:
            continue
        each, sums, numbers = shared
        moved = _moved(layout, layout.on(layout.short), divided, lot.count * lot.bytes)
        gram = m * m * max(4, layout.dtype.itemsize)
        sent = 2 * lot.count * sums * gram * (devices - 1) // devices
        moved = moved[0] + sent, (*moved[1], *["all-reduce"] * (sums + numbers))
        plans.append(_plan("split", lot, divided, lot.count * each, moved, costs))
    return plans


def _pooled(pool: Sequence[_Lot], costs: Costs) -> list[Division]:
    """Return the plans for lots on the same mesh axes.

    The largest matrices may be shared by all devices, where that saves time.
    """
    pool = sorted(pool, key=lambda lot: -lot.flops)
    stacked = [_stacked(lot, costs) for lot in pool]
    shared = [min(_split(lot, costs), key=_seconds, default=None) for lot in pool]
    best, least = stacked, sum(map(_seconds, stacked))
    for first in range(1, len(pool) + 1):
        pairs = zip(shared[:first], stacked[:first], strict=True)
        plans = [split or stack for split, stack in pairs] + stacked[first:]
        seconds = sum(map(_seconds, plans))
        if seconds * (1 + _GAIN) < least:
            best, least = plans, seconds
    return best


def _seconds(plan: Division) -> float:
    return plan.seconds


def _plan(
    kind: str,
    lot: _Lot,
    divided: Axes,
    flops: float,
    moved: tuple[int, tuple[str, ...]],
    costs: Costs,
) -> Division:
    sent, names = moved
    return Division(
        kind,
        lot.members,
        lot.layout.exchanged,
        divided,
        flops,
        sent,
        names,
        costs.seconds(flops, sent, len(names)),
    )
