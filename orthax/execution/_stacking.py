"""What a caller asks of the work on matrices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

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
    """How equal matrices are worked on together, and on which devices.

    Attributes:
      max_bytes: largest stack that is handed to a function at once, in bytes of its
        input; larger ones are worked on in pieces, one after another. Default: no
        limit.
      sharding: how leaves on many devices are worked on. `"stack"`: an all-to-all gives
        every device its share of whole matrices, another one brings them back, and
        replicated leaves are divided where that saves time. Names of mesh axes (one, a
        tuple, a `PartitionSpec`, or a `NamedSharding` over them): the same, replicated
        leaves being divided over these axes and no others. None: left to the compiler.
      shardings: how leaves are sharded, which a program cannot see on a mesh of
        automatic axes: one for all or a tree like the parameters, of
        `jax.NamedSharding`s, of `jax.P`s for the mesh of the leaves, or of arrays,
        such as the sharded parameters themselves. Default: types say it on explicit
        axes; on automatic ones the compiler moves stacks of matrices of one shape,
        with two all-to-alls for leaves that are sharded over all devices along one
        axis, an all-gather for replicated ones, and more for others.
      machine: the cost of moving and computing, by which plans are chosen.

    Raises:
      ValueError: if `max_bytes` is not positive or `sharding` names no axis; from
        `map_matrices`, if `max_bytes` is smaller than one matrix, `sharding` names an
        axis that the mesh lacks or that a surrounding `shard_map` has taken, or
        `shardings` lack a leaf, are on another mesh or do not divide a leaf evenly.
      TypeError: if an attribute is something else.

    Limits:
      Inside a `shard_map` over some axes the others are left to the compiler. On a mesh
      of both kinds of axes, without `shardings`, the automatic ones are, and one axis
      of a leaf may be sharded over one kind only: JAX forgets the other. A derivative
      of the update is left to the compiler.

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
        limit = self.max_bytes
        if limit is not None:
            if isinstance(limit, bool) or not isinstance(limit, int):
                advice = ""
                if isinstance(limit, float) and math.isfinite(limit):
                    advice = f" Write {int(limit)}."
                raise TypeError(
                    f"`max_bytes` must be an integer or None, got {limit!r}.{advice}"
                )
            if limit < 1:
                raise ValueError(f"`max_bytes` must be positive, got {limit}.")
        if not isinstance(self.machine, Machine):
            raise TypeError(f"`machine` must be a Machine, got {self.machine!r}.")
        if self.sharding not in (None, "stack"):
            _axes(self.sharding)
        object.__setattr__(self, "shardings", leaf_shardings(self.shardings))

    @property
    def axes(self) -> Axes | None:
        """Mesh axes that replicated leaves are divided over; None: where it pays."""
        return None if self.sharding in (None, "stack") else _axes(self.sharding)

    def check(self, mesh: jax.sharding.AbstractMesh) -> None:
        """Raise unless the axes that are asked for can be used on a mesh."""
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
                f"{asked}, but no mesh is known here: surround the call by "
                "jax.set_mesh(mesh), or give a jax.NamedSharding(mesh, spec)."
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
                f"{asked}, but a surrounding shard_map has taken "
                f"{', '.join(map(repr, taken))}: leave it out."
            )

    def known(
        self, leaves: Sequence[Leaf], mesh: jax.sharding.AbstractMesh
    ) -> tuple[jax.NamedSharding, ...] | None:
        """Return how leaves are sharded where `shardings` say so, or None.

        Args:
          leaves: from `resolve`, those that are cut.
          mesh: that their types name, or one without axes.

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
            f"`sharding` {sharding!r} names no mesh axis; to leave sharding to the "
            "compiler write None."
        )
    return names
