"""What will be done: which devices and batches leaves are worked on in."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from orthax.execution._batches import Batch, batches_of, call, limits_of
from orthax.execution._costs import Factors, Work
from orthax.execution._divide import Costs, constrained, divided
from orthax.execution._division import Division, Split
from orthax.execution._layout import Layout
from orthax.execution._stacking import Stacking


@dataclasses.dataclass(frozen=True)
class Plan:
    """How leaves are worked on: pure data, which `explain` prints.

    Attributes:
      divisions: how matrices are divided among devices; every leaf is in one.
      owners: for every stack of matrices of a device, the leaves that they are of.
      dtypes: what each of these stacks is worked on in.
      batches: which of these stacks share a call; every stack is in one.
      work: what is done to a batch.
      platform: where; None: anywhere.
    """

    divisions: tuple[Division, ...]
    owners: tuple[tuple[int, ...], ...]
    dtypes: tuple[jnp.dtype, ...]
    batches: tuple[Batch, ...]
    work: Work
    platform: str | None

    def __call__(self, *stacks: jax.Array) -> list[jax.Array]:
        """Return what a device has of all stacks, worked on: split ones come last."""
        whole, parts = stacks[: len(self.owners)], stacks[len(self.owners) :]
        in_turn = limits_of(self.platform).in_turn
        done = call(self.work.f, self.batches, in_turn, whole)
        axes = [x.axes for x in self.divisions if isinstance(x, Split)]
        return done + [self.work.f(x, a) for x, a in zip(parts, axes, strict=True)]


def divisions_of(
    layouts: Sequence[Layout],
    work: Work,
    stacking: Stacking,
    unseen: jax.sharding.AbstractMesh | None = None,
) -> tuple[Division, ...]:
    """Return how the matrices of leaves are divided among devices.

    Args:
      layouts: how each leaf is cut and sharded.
      work: what is done to the matrices.
      stacking: what the caller asks for.
      unseen: a mesh, where the compiler alone knows how leaves are sharded over it.
    """
    costs = Costs(work, stacking.machine, stacking.axes)
    if unseen is not None:
        return tuple(constrained(layouts, costs, unseen))
    return tuple(divided(layouts, costs))


def plan_of(
    divisions: tuple[Division, ...],
    work: Work | Factors,
    stacking: Stacking,
    platform: str | None = None,
) -> Plan:
    """Return what one device does with its part of some divisions.

    Raises:
      ValueError: if `stacking.max_bytes` is smaller than one matrix.
    """
    work = work.on(platform)
    owners, stacks = [], []
    for division in divisions:
        arrays = division.arrays()
        alone = len(arrays) == len(division.members)
        for i, (cut, shape) in enumerate(arrays):
            dtype = work.dtype(division.layouts[0].dtype)
            for stack in cut.matrices(shape):
                owners.append(
                    division.members[i : i + 1] if alone else division.members
                )
                stacks.append(jax.ShapeDtypeStruct(stack, dtype))
    batches = batches_of(stacks, work, limits_of(platform), stacking.max_bytes)
    dtypes = tuple(stack.dtype for stack in stacks)
    return Plan(divisions, tuple(owners), dtypes, batches, work, platform)


def carry_out(
    divisions: tuple[Division, ...],
    work: Work | Factors,
    stacking: Stacking,
    fetched: Sequence[Sequence[jax.Array]],
) -> list[list[jax.Array]]:
    """Work on what a device has fetched for every division.

    Args:
      divisions: from `divisions_of`.
      work: what is done to the matrices.
      stacking: what the caller asks for.
      fetched: for each division, arrays as `Division.fetch` returns them.

    Returns:
      As many arrays of the same shapes and dtypes.
    """
    pairs = list(zip(divisions, fetched, strict=True))
    whole = [
        (cut, x)
        for division, xs in pairs
        if not isinstance(division, Split)
        for (cut, _), x in zip(division.arrays(), xs, strict=True)
    ]
    split = [x for d, xs in pairs if isinstance(d, Split) for x in xs]
    folded = [cut.fold(x.astype(work.on(None).dtype(x.dtype))) for cut, x in whole]
    done = iter(
        _everywhere(divisions, work, stacking, [*itertools.chain(*folded), *split])
    )
    out = [
        cut.unfold([next(done) for _ in stacks], x.shape).astype(x.dtype)
        for (cut, x), stacks in zip(whole, folded, strict=True)
    ]
    wholes = iter(out)
    return [
        [next(done if isinstance(d, Split) else wholes) for _ in xs] for d, xs in pairs
    ]


def _everywhere(
    divisions: tuple[Division, ...],
    work: Work | Factors,
    stacking: Stacking,
    stacks: Sequence[jax.Array],
) -> list[jax.Array]:
    """Call the plan of the platform that the program is compiled for."""
    if isinstance(work, Work):
        return plan_of(divisions, work, stacking)(*stacks)
    cpu, tpu, gpu = (
        plan_of(divisions, work, stacking, platform)
        for platform in ("cpu", "tpu", "gpu")
    )
    return jax.lax.platform_dependent(*stacks, cpu=cpu, tpu=tpu, default=gpu)
