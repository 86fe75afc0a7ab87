"""Ways of dividing matrices among devices: what each moves, and what is worked on."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.shard_alike import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata

from orthax.components import Matricisation
from orthax.execution._layout import Axes, Layout

Arrays = Sequence[jax.Array]
Shape = tuple[int, ...]
P = jax.sharding.PartitionSpec
_number = itertools.count()


@dataclasses.dataclass(frozen=True)
class Division:
    """Leaves whose matrices are divided among devices in one way.

    Attributes:
      members: the leaves, by their place in the list.
      layouts: how each of them is sharded.
      axes: mesh axes over which the work is divided.
      flops: operations of the busiest device, padding included.
      bytes: what a device sends, at most.
      collectives: what they are called, as often as they are used.
      seconds: time by the `Machine` of the `Stacking`.
    """

    members: tuple[int, ...]
    layouts: tuple[Layout, ...]
    axes: Axes = ()
    flops: float = 0.0
    bytes: int = 0
    collectives: tuple[str, ...] = ()
    seconds: float = 0.0

    def arrays(self) -> list[tuple[Matricisation, Shape]]:
        """Return the arrays of whole matrices a device works on: cuts and shapes."""
        raise NotImplementedError

    def fetch(self, xs: Arrays) -> Arrays:
        """Return those arrays, of what a device has of the leaves."""
        raise NotImplementedError

    def bring_back(self, ys: Arrays) -> Arrays:
        """Return what a device has of the leaves: `fetch` undone."""
        raise NotImplementedError


class Local(Division):
    """Every device works on the matrices that it has, whole."""

    def arrays(self) -> list[tuple[Matricisation, Shape]]:
        return [(layout.cut, layout.local) for layout in self.layouts]

    def fetch(self, xs: Arrays) -> Arrays:
        return xs

    def bring_back(self, ys: Arrays) -> Arrays:
        return ys


class _Units(Division):
    """Leaves of one layout, whose units are one array."""

    @property
    def layout(self) -> Layout:
        return self.layouts[0]

    @property
    def count(self) -> int:
        """How many units a device has of all leaves."""
        return sum(layout.count for layout in self.layouts)

    def joined(self, xs: Arrays) -> jax.Array:
        """Return what a device has of the leaves as units, `(count, *tile)`."""
        pairs = zip(self.layouts, xs, strict=True)
        units = [layout.to_units(x) for layout, x in pairs]
        return jnp.concatenate(units) if len(units) > 1 else units[0]

    def apart(self, units: jax.Array) -> list[jax.Array]:
        """Return what a device has of the leaves; what follows them is padding."""
        ends = itertools.accumulate(layout.count for layout in self.layouts)
        parts = jnp.split(units, [*ends])[:-1]
        pairs = zip(self.layouts, parts, strict=True)
        return [layout.from_units(part) for layout, part in pairs]


@dataclasses.dataclass(frozen=True)
class Shared(_Units):
    """Every device works on as many matrices, which an all-to-all brings together.

    Attributes:
      replicated: those of `axes` over which the leaves are replicated: no all-to-all is
        needed before, and an all-gather after.
    """

    replicated: Axes = ()

    def arrays(self) -> list[tuple[Matricisation, Shape]]:
        share = -(-self.count // self.layout.parts(self.axes))
        return [(self.layout.unit, (share, *self.layout.whole))]

    def fetch(self, xs: Arrays) -> Arrays:
        layout = self.layout
        x = _padded(self.joined(xs), layout.parts(self.axes))
        x = _own_slice(x, self.replicated, layout.parts(self.replicated))
        if layout.exchanged:
            tiles = x.reshape(layout.parts(layout.exchanged), -1, *layout.tile)
            tiles = jax.lax.all_to_all(tiles, layout.exchanged, 0, 0)
            x = layout.assembled(tiles)
        return [x]

    def bring_back(self, ys: Arrays) -> Arrays:
        (x,), layout = ys, self.layout
        if layout.exchanged:
            x = jax.lax.all_to_all(layout.tiled(x), layout.exchanged, 0, 0)
            x = x.reshape(-1, *layout.tile)
        return self.apart(_gathered(x, self.replicated))


@dataclasses.dataclass(frozen=True)
class Split(_Units):
    """Every device works on a part of the long side of each matrix.

    Attributes:
      replicated: as for `Shared`.
    """

    replicated: Axes = ()

    def arrays(self) -> list[tuple[Matricisation, Shape]]:
        return []

    def fetch(self, xs: Arrays) -> Arrays:
        layout = self.layout
        x = self.joined(xs).transpose(self._order)
        x = x.reshape(*x.shape[: 1 + len(layout.short)], -1)
        # The order of the columns makes no difference, as long as it is kept.
        names, gathered = layout.on(layout.short), self._gathered
        if gathered:
            x = jax.lax.all_to_all(x, names, x.ndim - 1, *gathered, tiled=True)
        x = _own_slice(x, self.replicated, layout.parts(self.replicated), x.ndim - 1)
        return [x.reshape(len(x), -1, x.shape[-1])]

    def bring_back(self, ys: Arrays) -> Arrays:
        (x,), layout = ys, self.layout
        short = [layout.shape[i] for i in layout.short]
        x = _gathered(x.reshape(len(x), *short, -1), self.replicated, x.ndim - 1)
        names, gathered = layout.on(layout.short), self._gathered
        if gathered:
            x = jax.lax.all_to_all(x, names, *gathered, x.ndim - 1, tiled=True)
        tile = [len(x), *layout.tile]
        x = x.reshape([tile[i] for i in self._order])
        inverse = sorted(range(x.ndim), key=self._order.__getitem__)
        return self.apart(x.transpose(inverse))

    @property
    def _order(self) -> list[int]:
        """The axes of units, those of the short side first."""
        layout = self.layout
        place = {axis: i + 1 for i, axis in enumerate(layout.sides)}
        return [0, *(place[i] for i in layout.short + layout.long)]

    @property
    def _gathered(self) -> list[int]:
        """The axis of the short side that is sharded, once it is in front."""
        layout = self.layout
        return [i + 1 for i, axis in enumerate(layout.short) if layout.spec[axis]]


@dataclasses.dataclass(frozen=True)
class Constrained(_Units):
    """As `Shared`, but moved by the compiler, which alone knows the shardings.

    `fetch` and `bring_back` are called outside of the `shard_map`, on whole leaves.

    Attributes:
      mesh: the mesh that has the axes.
    """

    mesh: jax.sharding.AbstractMesh | None = None

    def arrays(self) -> list[tuple[Matricisation, Shape]]:
        share = -(-self.count // self.layout.parts(self.axes))
        return [(self.layout.unit, (share, *self.layout.whole))]

    def fetch(self, xs: Arrays) -> Arrays:
        x = _padded(self.joined(xs), self.layout.parts(self.axes))
        return [jax.lax.with_sharding_constraint(x, self._free)]

    def bring_back(self, ys: Arrays) -> Arrays:
        (x,) = ys
        return self.apart(jax.lax.with_sharding_constraint(x, self._free))

    @functools.cached_property
    def _free(self) -> jax.NamedSharding:
        # Several leaves are joined where they are; those of one may be anywhere.
        free = P.UNCONSTRAINED
        first = None if len(self.members) > 1 else free
        rest = [free] * len(self.layout.whole)
        return jax.NamedSharding(self.mesh, P(first, *rest))


def sharded_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `y`, sharded as the compiler finds `x`."""
    # JAX lowers equal calls once, which would make all leaves of one shape alike: a
    # number, of which the program shows nothing, tells them apart.
    with set_xla_metadata(pair=str(next(_number))):
        return shard_alike(x, y)[1]


def _padded(units: jax.Array, parts: int) -> jax.Array:
    """Return as many units as can be divided evenly."""
    short = -len(units) % parts
    if not short:
        return units
    return jnp.pad(units, [(0, short)] + [(0, 0)] * (units.ndim - 1))


def _own_slice(x: jax.Array, axes: Axes, parts: int, axis: int = 0) -> jax.Array:
    """Return the part of a replicated array that this device works on."""
    if parts == 1:
        return x
    n = x.shape[axis] // parts
    start = jax.lax.axis_index(axes) * n
    return jax.lax.dynamic_slice_in_dim(x, start, n, axis)


def _gathered(x: jax.Array, axes: Axes, axis: int = 0) -> jax.Array:
    if not axes:
        return x
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True)
