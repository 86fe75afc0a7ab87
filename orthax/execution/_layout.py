"""How the leaves of a tree lie on a mesh of devices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from orthax.components import Leaf, Matricisation
from orthax.internal.components import path_string

Axes = tuple[str, ...]
P = jax.sharding.PartitionSpec


class Layout(NamedTuple):
    """How one leaf lies on a mesh, and what it is cut into.

    Attributes:
      shape: of the whole leaf.
      dtype: of the leaf.
      cut: how it is cut into matrices, with non-negative axes.
      spec: for each axis of the leaf, the mesh axes that it is sharded over.
      sizes: of the mesh axes, by name.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    cut: Matricisation
    spec: tuple[Axes, ...]
    sizes: tuple[tuple[str, int], ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of the leaf that are not part of a matrix."""
        used = self.cut.rows + self.cut.columns
        return tuple(i for i in range(len(self.shape)) if i not in used)

    @property
    def sides(self) -> tuple[int, ...]:
        """Axes of the leaf that are part of a matrix, in their order."""
        batch = self.batch
        return tuple(i for i in range(len(self.shape)) if i not in batch)

    @property
    def exchanged(self) -> Axes:
        """Mesh axes over which matrices are sharded, in the order of the mesh."""
        used = {name for i in self.sides for name in self.spec[i]}
        return tuple(name for name, _ in self.sizes if name in used)

    @property
    def replicated(self) -> Axes:
        """Mesh axes over which the leaf is not sharded."""
        used = {name for names in self.spec for name in names}
        return tuple(name for name, _ in self.sizes if name not in used)

    @property
    def tile(self) -> tuple[int, ...]:
        """Shape of what a device has of the matrix axes."""
        return tuple(self.local[i] for i in self.sides)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the matrix axes."""
        return tuple(self.shape[i] for i in self.sides)

    @property
    def local(self) -> tuple[int, ...]:
        """Shape of what a device has of the leaf."""
        pairs = zip(self.shape, self.spec, strict=True)
        return tuple(n // self.parts(names) for n, names in pairs)

    @property
    def count(self) -> int:
        """How many units, positions of the batch axes, a device has."""
        return math.prod(self.local[i] for i in self.batch)

    @property
    def unit(self) -> Matricisation:
        """How a stack of units, `(count, *whole)`, is cut."""
        place = {axis: i + 1 for i, axis in enumerate(self.sides)}
        cut = self.cut
        return Matricisation(
            tuple(place[axis] for axis in cut.rows),
            tuple(place[axis] for axis in cut.columns),
            groups=cut.groups,
            blocks=cut.blocks,
            split=cut.split,
        )

    @property
    def short(self) -> tuple[int, ...]:
        """Axes of the leaf that make the short side of its matrices.

        Of square ones the side that is less sharded, which has the shorter way.
        """
        rows, columns = self.cut.rows, self.cut.columns
        m, n = (math.prod(self.shape[i] for i in side) for side in (rows, columns))
        if m == n:
            m, n = (self.parts(self.on(side)) for side in (rows, columns))
        return rows if m < n else columns

    @property
    def long(self) -> tuple[int, ...]:
        """Axes of the leaf that make the long side of its matrices."""
        return self.cut.rows if self.short == self.cut.columns else self.cut.columns

    def on(self, axes: Sequence[int]) -> Axes:
        """Return the mesh axes that some axes of the leaf are sharded over."""
        return tuple(name for i in axes for name in self.spec[i])

    def parts(self, axes: Axes) -> int:
        """Return over how many devices some mesh axes go."""
        sizes = dict(self.sizes)
        return math.prod(sizes[name] for name in axes)

    def to_units(self, x: jax.Array) -> jax.Array:
        """Return what a device has of the leaf as units, `(count, *tile)`."""
        return x.transpose(self.batch + self.sides).reshape(self.count, *self.tile)

    def from_units(self, units: jax.Array) -> jax.Array:
        """Return what a device has of the leaf from its units."""
        order = self.batch + self.sides
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return units.reshape([self.local[i] for i in order]).transpose(inverse)

    def assembled(self, tiles: jax.Array) -> jax.Array:
        """Return whole units from the tiles of all devices, `(devices, n, *tile)`."""
        names = self.exchanged
        sizes = [self.parts((name,)) for name in names]
        count, rank = tiles.shape[1], len(names)
        order = [rank]
        for i, axis in enumerate(self.sides):
            order += [names.index(name) for name in self.spec[axis]] + [rank + 1 + i]
        tiles = tiles.reshape(*sizes, count, *self.tile).transpose(order)
        return tiles.reshape(count, *self.whole)

    def tiled(self, units: jax.Array) -> jax.Array:
        """Return the tiles of all devices, `(devices, n, *tile)`, of whole units."""
        names = self.exchanged
        shape, order, place = [len(units)], [], 1
        where: dict[str, int] = {}
        for axis, n in zip(self.sides, self.tile, strict=True):
            for name in self.spec[axis]:
                where[name] = place
                shape.append(self.parts((name,)))
                place += 1
            shape.append(n)
            order.append(place)
            place += 1
        front = [where[name] for name in names]
        x = units.reshape(shape).transpose([*front, 0, *order])
        return x.reshape(-1, len(units), *self.tile)


def layouts(
    shapes: Sequence[jax.ShapeDtypeStruct | jax.Array],
    cuts: Sequence[Matricisation],
    specs: Sequence[P],
    sizes: Mapping[str, int],
) -> list[Layout]:
    """Return the layouts of leaves on a mesh with axes of the given sizes."""
    return [
        Layout(
            tuple(x.shape),
            np.dtype(x.dtype),
            cut,
            full_spec(spec, len(x.shape)),
            tuple(sizes.items()),
        )
        for x, cut, spec in zip(shapes, cuts, specs, strict=True)
    ]


class LeafShardings(tuple):
    """The sharding of every leaf of a tree by its path: pairs, which can be hashed."""

    def __repr__(self) -> str:
        """Return how many there are: a model has hundreds."""
        return f"<shardings of {len(self)} leaves>"


def leaf_shardings(tree: Any) -> LeafShardings | jax.NamedSharding | P | None:
    """Return what says how leaves are sharded: one thing for all, or by path.

    Raises:
      TypeError: for a leaf that says nothing.
    """
    kinds = jax.sharding.Sharding | P
    if tree is None or isinstance(tree, jax.NamedSharding | P | LeafShardings):
        return tree
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, kinds)
    )
    pairs = []
    for path, leaf in leaves:
        sharding = leaf if isinstance(leaf, kinds) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.NamedSharding | P):
            found = leaf if sharding is None else sharding
            where = f" for '{path_string(path)}'" if path else ""
            raise TypeError(
                "`shardings` must be jax.NamedShardings, jax.Ps or arrays that have "
                f"one, got {found!r} of type {type(found).__name__}{where}."
            )
        pairs.append((path_string(path), sharding))
    return LeafShardings(pairs)


def shardings_of(
    shardings: LeafShardings | jax.NamedSharding | P,
    leaves: Sequence[Leaf],
    mesh: jax.sharding.AbstractMesh,
) -> tuple[jax.NamedSharding, ...]:
    """Return the sharding of every leaf; specs alone are over `mesh`.

    Raises:
      ValueError: for a leaf that has none, or a spec without a mesh.
    """
    by_path = dict(shardings) if isinstance(shardings, LeafShardings) else None
    found = []
    for leaf in leaves:
        if by_path is not None and leaf.path not in by_path:
            known = ", ".join(map(repr, list(by_path)[:3]))
            raise ValueError(
                f"Leaf '{leaf.path}' of shape {tuple(leaf.value.shape)} has no "
                f"sharding: `shardings` has those of {known} ... . Give a tree like "
                "the parameters."
            )
        sharding = shardings if by_path is None else by_path[leaf.path]
        if isinstance(sharding, P):
            if mesh.empty:
                raise ValueError(
                    f"`shardings` has {sharding} and no mesh: give jax.NamedSharding("
                    "mesh, spec), or surround the call by jax.set_mesh(mesh)."
                )
            sharding = jax.NamedSharding(mesh, sharding)
        found.append(sharding)
    return tuple(found)


def named_layouts(
    leaves: Sequence[Leaf], shardings: Sequence[Any]
) -> list[Layout] | None:
    """Return the layouts of leaves with `jax.NamedSharding`s, or None if none has one.

    Raises:
      ValueError: for leaves on different meshes, a leaf that has more axes in its spec
        than in its shape, or one that cannot be divided evenly.
    """
    found = [s for s in shardings if isinstance(s, jax.NamedSharding)]
    if not found:
        return None
    sizes = dict(found[0].mesh.shape)
    everywhere = jax.NamedSharding(found[0].mesh, P())
    made = []
    for leaf, sharding in zip(leaves, shardings, strict=True):
        own = sharding if isinstance(sharding, jax.NamedSharding) else everywhere
        where = f"Leaf '{leaf.path}' of shape {tuple(leaf.value.shape)}"
        if dict(own.mesh.shape) != sizes:
            raise ValueError(
                f"{where} is on a mesh with the axes {dict(own.mesh.shape)}, others on "
                f"one with {sizes}: all must be on one mesh."
            )
        if len(own.spec) > len(leaf.value.shape):
            raise ValueError(f"{where} has fewer axes than its sharding {own.spec}.")
        (layout,) = layouts([leaf.value], [leaf.cut], [own.spec], sizes)
        for n, names in zip(layout.shape, layout.spec, strict=True):
            if n % layout.parts(names):
                raise ValueError(
                    f"{where}: an axis of {n} cannot be divided over the mesh axes "
                    f"{names} of {layout.parts(names)} devices. Leave them out of its "
                    "spec."
                )
        made.append(layout)
    return made


def full_spec(spec: P, rank: int) -> tuple[Axes, ...]:
    """Return the mesh axes of every axis of a leaf."""
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    return tuple(entries + [()] * (rank - len(entries)))
