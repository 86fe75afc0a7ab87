"""What moving and computing cost: what plans are chosen by."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from orthax.components._layout import Axes

Flops = Callable[[int, int], float]
SplitFlops = Callable[[int, int, int], tuple[float, int, int] | None]


class Split(NamedTuple):
    """How several devices share the long side of one matrix.

    Attributes:
      work: called as `work(x, axes)` inside a `shard_map` with what a device has of a
        stack `(b, m, n / devices)`, m <= n, whose columns are sharded over mesh axes.
      flops: called as `flops(m, n, devices)`; the operations of each device, how many
        m x m matrices are summed over them, and how often a few numbers are; or None
        where it cannot be.
    """

    work: Callable[[jax.Array, Axes], jax.Array]
    flops: SplitFlops


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device computes and moves: what the cost of a plan is counted in.

    Only ratios matter. The defaults are of the order of one accelerator of 2024 in
    float32 at the highest precision, in a fast network.

    Attributes:
      flops: operations per second.
      bandwidth: bytes per second that a device sends while it receives as many.
      latency: seconds that a collective takes at least.

    Raises:
      ValueError: if a number is not finite and positive.

    Example:
      >>> from orthax import components
      >>> slow = components.Machine(bandwidth=1e9)
      >>> components.Stacking(machine=slow).machine.bandwidth
      1000000000.0
    """

    flops: float = 5e13
    bandwidth: float = 1e11
    latency: float = 2e-5

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(
                    f"`{name}` must be finite and positive, got {value!r}."
                )


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the planner knows of the work.

    Attributes:
      machine: what moving and computing take.
      flops: operations for one m x n matrix.
      split: how devices share one matrix, or None where they cannot.
      axes: mesh axes over which replicated leaves are divided; None: where it pays.
      mesh: names and sizes of the axes of the mesh that `axes` belong to, if known.
    """

    machine: Machine
    flops: Flops
    split: Split | None = None
    axes: Axes | None = None
    mesh: tuple[tuple[str, int], ...] | None = None

    def seconds(self, flops: float, sent: float, collectives: int) -> float:
        """Return how long a plan takes, nothing overlapping."""
        machine = self.machine
        moving = sent / machine.bandwidth + collectives * machine.latency
        return flops / machine.flops + moving

    def check(self, mesh: jax.sharding.AbstractMesh) -> None:
        """Raise unless the axes that are asked for can be used on a mesh."""
        if self.axes is None:
            return
        known = self.mesh if mesh.empty else tuple(mesh.shape.items())
        asked = "Stacking(sharding=...) asks for the mesh axes "
        asked += ", ".join(map(repr, self.axes))
        if known is None:
            raise ValueError(
                f"{asked}, but no mesh is known here: surround the call by "
                "jax.set_mesh(mesh), or give a jax.NamedSharding(mesh, spec)."
            )
        if self.mesh not in (None, known):
            raise ValueError(
                f"{asked} of a mesh with the axes {dict(self.mesh)}, but the leaves "
                f"are on one with the axes {dict(known)}."
            )
        names = tuple(name for name, _ in known)
        if not set(self.axes) <= set(names):
            has = ", ".join(map(repr, names))
            raise ValueError(f"{asked}, but the mesh has the axes {has}.")
        taken = [name for name in self.axes if name in mesh.manual_axes]
        if taken:
            raise ValueError(
                f"{asked}, but a surrounding shard_map has taken "
                f"{', '.join(map(repr, taken))}: leave it out."
            )
