"""Options of how work on matrices is batched and divided among devices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from orthax._repr import concise
from orthax.components import Leaf
from orthax.execution._costs import Machine
from orthax.execution._layout import (
    Axes,
    full_spec,
    leaf_shardings,
    named_layouts,
    shardings_of,
)


@dataclasses.dataclass(frozen=True)
class Stacking:
    """How matrices are batched and divided among devices.

    Attributes:
      max_bytes: size of the largest batch that is passed to a function at once, in
        bytes; larger ones are divided and processed one part at a time. Default: no
        limit.
      sharding: how work on sharded leaves is divided. `"stack"`: an all-to-all gives
        every device its share of whole matrices, another one returns them, and
        replicated leaves are divided where that saves time. Names of mesh axes (one, a
        tuple, a `PartitionSpec`, or a `NamedSharding` over them): the same, but
        replicated leaves are divided over exactly these axes. None: left to the
        compiler.
      shardings: how leaves are sharded, which a program cannot see on automatic mesh
        axes: one for all leaves or a tree like the parameters, of
        `jax.NamedSharding`s, of `jax.P`s for the mesh of the leaves, or of arrays, such
        as the sharded parameters themselves. Default: on explicit axes, known from the
        types; on automatic axes the compiler moves batches of matrices of one shape,
        with two all-to-alls for leaves that are sharded over all devices along one
        axis, an all-gather for replicated ones, and more for others.
      machine: costs of communication and arithmetic, by which plans are chosen.

    Raises:
      ValueError: if `max_bytes` is not positive or `sharding` names no axis; from
        `map_matrices`, if `max_bytes` is smaller than one matrix, `sharding` names an
        axis that the mesh lacks or that a surrounding `shard_map` uses, or
        `shardings` lack a leaf, are on another mesh or do not divide a leaf evenly.
      TypeError: if `sharding` is something else.

    Limits:
      Inside a `shard_map` over some axes the other axes are left to the compiler. On a
      mesh with both explicit and automatic axes and without `shardings`, automatic axes
      are left to the compiler; shard each array axis over one kind only, since JAX
      loses the other. A derivative of the update is left to the compiler.

    Example:
      >>> from orthax import execution
      >>> execution.Stacking(max_bytes=2**28).max_bytes
      268435456
    """

    max_bytes: int | None = None
    sharding: str | Axes | jax.sharding.PartitionSpec | jax.NamedSharding | None = (
        "stack"
    )
    shardings: Any = None
    machine: Machine = dataclasses.field(default_factory=Machine)

    def __post_init__(self):
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"`max_bytes` must be positive, got {self.max_bytes}.")
        if self.sharding not in (None, "stack"):
            _axes(self.sharding)
        object.__setattr__(self, "shardings", leaf_shardings(self.shardings))

    def __repr__(self) -> str:
        """Return the expression that makes it, without defaults."""
        return concise(self)

    @property
    def axes(self) -> Axes | None:
        """Mesh axes over which replicated leaves are divided; None: chosen by cost."""
        return None if self.sharding in (None, "stack") else _axes(self.sharding)

    def check(self, mesh: jax.sharding.AbstractMesh) -> None:
        """Raise unless the requested axes can be used on a mesh."""
        if self.axes is None:
            return
        own = None
        if isinstance(self.sharding, jax.NamedSharding):
            own = dict(self.sharding.mesh.shape)
        known = own if mesh.empty else dict(mesh.shape)
        asked = "Stacking(sharding=...) asks for the mesh axes "
        asked += ", ".join(map(repr, self.axes))
        if known is None:
            raise ValueError(
                f"{asked}, but no mesh is known here: call it inside "
                "jax.set_mesh(mesh), or pass a jax.NamedSharding(mesh, spec)."
            )
        if own not in (None, known):
            raise ValueError(
                f"{asked} of a mesh with the axes {own}, but the leaves are on one "
                f"with the axes {known}."
            )
        if not set(self.axes) <= set(known):
            has = ", ".join(map(repr, known))
            raise ValueError(f"{asked}, but the mesh has the axes {has}.")
        taken = [name for name in self.axes if name in mesh.manual_axes]
        if taken:
            raise ValueError(
                f"{asked}, but a surrounding shard_map uses "
                f"{', '.join(map(repr, taken))}: leave it out."
            )

    def known(
        self, leaves: Sequence[Leaf], mesh: jax.sharding.AbstractMesh
    ) -> tuple[jax.NamedSharding, ...] | None:
        """Return the shardings of the leaves from `shardings`, or None.

        Args:
          leaves: matrix leaves, from `resolve`.
          mesh: the mesh of their types, or one without axes.

        Raises:
          ValueError: if they do not fit the leaves or the mesh.
        """
        if self.shardings is None or self.sharding is None:
            return None
        around = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
        found = shardings_of(self.shardings, leaves, around)
        named_layouts(leaves, found)
        for leaf, sharding in zip(leaves, found, strict=True):
            if not mesh.empty and dict(sharding.mesh.shape) != dict(mesh.shape):
                raise ValueError(
                    f"Leaf '{leaf.path}' is on a mesh with the axes "
                    f"{dict(mesh.shape)}, but `shardings` say {sharding.spec} on one "
                    f"with the axes {dict(sharding.mesh.shape)}."
                )
        return found


def _axes(sharding: Any) -> Axes:
    """Return the mesh axes that something names."""
    spec = sharding.spec if isinstance(sharding, jax.NamedSharding) else sharding
    if isinstance(spec, jax.sharding.PartitionSpec):
        names = tuple(name for entry in full_spec(spec, 0) for name in entry)
    else:
        names = (spec,) if isinstance(spec, str) else spec
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            '`sharding` must be "stack", None, or name mesh axes: a name, a tuple of '
            f"names, a PartitionSpec or a NamedSharding; got {sharding!r}."
        )
    if not names:
        raise ValueError(
            f"`sharding` {sharding!r} names no mesh axis; use None to leave sharding "
            "to the compiler."
        )
    return names
