"""Which device works on which matrices: decided before anything is moved."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from orthax.execution._costs import Machine, Work
from orthax.execution._division import Constrained, Division, Local, Shared, Split
from orthax.execution._layout import Axes, Layout

# Share of time that another plan than a stack for each shape must save.
_GAIN = 0.1


class Costs(NamedTuple):
    """What a division is decided by.

    Attributes:
      work: what is done to the matrices.
      machine: what moving and computing take.
      axes: mesh axes over which replicated leaves are divided; None: where it pays.
    """

    work: Work
    machine: Machine
    axes: Axes | None


class _Lot(NamedTuple):
    """Leaves of one shape, layout and cut: units that are alike.

    Attributes:
      members: the leaves, by their place in the list.
      layout: how each is sharded.
      count: how many units a device has of all of them.
      flops: operations for one unit.
    """

    members: tuple[int, ...]
    layout: Layout
    count: int
    flops: float

    def divided(self, kind: type[Division], costs: Costs, **how: Any) -> Division:
        """Return a division of these leaves, with its time."""
        calls, sent = len(how.get("collectives", ())), how.get("bytes", 0)
        seconds = costs.machine.seconds(how["flops"], sent, calls)
        layouts = (self.layout,) * len(self.members)
        return kind(self.members, layouts, seconds=seconds, **how)


def divided(layouts: Sequence[Layout], costs: Costs) -> list[Division]:
    """Return how every leaf is divided: which devices work on what.

    Leaves of equal shape, dtype, cut and sharding are divided alike. Where matrices are
    sharded, an all-to-all brings whole ones together and another one brings them back.
    Where leaves are replicated, every device works on all of them, or on its share with
    an all-gather at the end, whichever takes less time by the costs.
    """
    pools: dict[tuple[Any, ...], list[_Lot]] = {}
    for lot in _lots(layouts, costs):
        layout = lot.layout
        alike = layout.exchanged, layout.replicated, layout.dtype
        pools.setdefault(alike, []).append(lot)
    return _sorted(x for pool in pools.values() for x in _pooled(pool, costs))


def constrained(
    layouts: Sequence[Layout], costs: Costs, mesh: jax.sharding.AbstractMesh
) -> list[Division]:
    """Return what is asked of the compiler where it alone knows the layout.

    What it moves is a guess for leaves that are neither replicated nor sharded over all
    devices along one axis.
    """
    plain = [x._replace(spec=((),) * len(x.shape)) for x in layouts]
    names = costs.axes or mesh.axis_names
    found = []
    for lot in _lots(plain, costs):
        specs = {layouts[i] for i in lot.members}
        share = -(-lot.count // lot.layout.parts(names))
        sent, calls = _guessed(lot, specs, names)
        how = {"flops": share * lot.flops, "bytes": sent, "collectives": calls}
        found.append(lot.divided(Constrained, costs, axes=names, mesh=mesh, **how))
    return _sorted(found)


def _guessed(
    lot: _Lot, layouts: set[Layout], names: Axes
) -> tuple[int, tuple[str, ...]]:
    """Return the bytes that a device sends, and the collectives, by the compiler."""
    layout, devices = lot.layout, lot.layout.parts(names)
    whole = math.prod(layout.whole) * layout.dtype.itemsize
    part = -(-lot.count // devices) * whole * (devices - 1)
    specs = {tuple(filter(None, x.spec)) for x in layouts}
    if specs == {()}:
        summed = 2 * lot.count * whole * (devices - 1) // devices
        if len(lot.members) == 1 and summed <= part:
            # XLA's choice for one leaf that is padded.
            return summed, ("all-reduce",)
        return part, ("all-gather",)
    if len(layouts) == 1 and specs <= {(names,)}:
        if next(iter(layouts)).exchanged:
            return 2 * part // devices, ("all-to-all", "all-to-all")
        if len(lot.members) == 1 and lot.count % devices == 0:
            return 0, ()
    return 0, ("compiler's choice",)


def _lots(layouts: Sequence[Layout], costs: Costs) -> list[_Lot]:
    alike: dict[Layout, list[int]] = {}
    for i, layout in enumerate(layouts):
        alike.setdefault(layout, []).append(i)
    lots = []
    for layout, members in alike.items():
        matrices = layout.unit.matrices((1, *layout.whole))
        flops = sum(b * costs.work.flops(m, n) for b, m, n in matrices)
        lots.append(_Lot(tuple(members), layout, len(members) * layout.count, flops))
    return lots


def _pooled(pool: Sequence[_Lot], costs: Costs) -> list[Division]:
    """Return the divisions of lots on the same mesh axes.

    The largest matrices may be split over all devices, where that saves time.
    """
    pool = sorted(pool, key=lambda lot: -lot.flops)
    shared = [min(_shared(lot, costs), key=_seconds) for lot in pool]
    split = [min(_split(lot, costs), key=_seconds, default=None) for lot in pool]
    best, least = shared, sum(map(_seconds, shared))
    for first in range(1, len(pool) + 1):
        pairs = zip(split[:first], shared[:first], strict=True)
        found = [one or other for one, other in pairs] + shared[first:]
        seconds = sum(map(_seconds, found))
        if seconds * (1 + _GAIN) < least:
            best, least = found, seconds
    return best


def _shared(lot: _Lot, costs: Costs) -> Iterable[Division]:
    """Yield the divisions that give every device whole matrices."""
    layout = lot.layout
    size = math.prod(layout.tile) * layout.dtype.itemsize
    for replicated in _choices(layout, costs):
        axes = layout.exchanged + replicated
        devices = layout.parts(axes)
        share = -(-lot.count // devices)
        if not axes:
            yield lot.divided(Local, costs, flops=share * lot.flops)
            continue
        sent, calls = _moved(
            layout, layout.exchanged, replicated, share * devices * size
        )
        how = {"flops": share * lot.flops, "bytes": sent, "collectives": calls}
        yield lot.divided(Shared, costs, axes=axes, replicated=replicated, **how)


def _split(lot: _Lot, costs: Costs) -> Iterable[Division]:
    """Yield the divisions in which devices share the long side of every matrix."""
    layout = lot.layout
    sharded = [i for i in layout.short if layout.spec[i]]
    if costs.work.split_flops is None or not layout.cut.is_whole or len(sharded) > 1:
        return
    m, n = (math.prod(layout.shape[i] for i in s) for s in (layout.short, layout.long))
    size = math.prod(layout.tile) * layout.dtype.itemsize
    for replicated in _choices(layout, costs):
        axes = layout.exchanged + replicated
        devices = layout.parts(axes)
        found = costs.work.split_flops(m, n, devices) if devices > 1 else None
        if found is None or n % devices:
            continue
        flops, sums, numbers = found
        gathered = layout.on(layout.short)
        sent, calls = _moved(layout, gathered, replicated, lot.count * size)
        gram = m * m * max(4, layout.dtype.itemsize)
        sent += 2 * lot.count * sums * gram * (devices - 1) // devices
        calls += ("all-reduce",) * (sums + numbers)
        how = {"flops": lot.count * flops, "bytes": sent, "collectives": calls}
        yield lot.divided(Split, costs, axes=axes, replicated=replicated, **how)


def _choices(layout: Layout, costs: Costs) -> list[Axes]:
    """Return which replicated mesh axes the work may be divided over."""
    free = tuple(n for n in layout.replicated if layout.parts((n,)) > 1)
    if costs.axes is not None:
        return [tuple(name for name in free if name in costs.axes)]
    return [(), *((name,) for name in free), *([free] if len(free) > 1 else [])]


def _moved(
    layout: Layout, exchanged: Axes, replicated: Axes, size: int
) -> tuple[int, tuple[str, ...]]:
    """Return the bytes that a device sends, and the collectives, of a whole exchange.

    `size` is that of what it has of all units, as many as the devices need.
    """
    p, z = layout.parts(exchanged), layout.parts(replicated)
    sent, calls = 0, ()
    if p > 1:
        sent += 2 * (size // z) * (p - 1) // p
        calls += ("all-to-all", "all-to-all")
    if z > 1:
        sent += (size // z) * (z - 1)
        calls += ("all-gather",)
    return sent, calls


def _seconds(division: Division) -> float:
    return division.seconds


def _sorted(divisions: Iterable[Division]) -> list[Division]:
    return sorted(divisions, key=lambda division: division.members)
