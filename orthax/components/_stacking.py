"""Which matrices are worked on together."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from orthax.components._costs import Costs, Flops, Machine, Split, SplitFlops
from orthax.components._division import Division, constrained, divided
from orthax.components._layout import (
    Axes,
    full_spec,
    leaf_shardings,
    named_layouts,
    shardings_of,
)
from orthax.components._stacked import call_in_place, call_joined
from orthax.components._tree import Leaf


class Group(NamedTuple):
    """Stacks that share a call of a function.

    Attributes:
      members: which stacks, by their place in the list.
      turned: whether the matrices of each are transposed.
      shape: `(b, m, n)` of the whole; smaller matrices are padded with zeros.
      joined: whether they are copied into one stack.
      at_once: how many matrices the function gets at once, at most. One of several,
        not joined: a loop replaces one after another where they are.
    """

    members: tuple[int, ...]
    turned: tuple[bool, ...]
    shape: tuple[int, int, int]
    joined: bool
    at_once: int


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
      >>> from orthax import components
      >>> components.Stacking(max_bytes=2**28).max_bytes
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

    def costs(self, flops: Flops, split: Split | None = None) -> Costs | None:
        """Return what the work on many devices is divided by; None: it is not."""
        if self.sharding is None:
            return None
        if self.sharding == "stack":
            return Costs(self.machine, flops, split)
        mesh = None
        if isinstance(self.sharding, jax.NamedSharding):
            mesh = tuple(self.sharding.mesh.shape.items())
        return Costs(self.machine, flops, split, _axes(self.sharding), mesh)

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

    def divisions(
        self,
        leaves: Sequence[Leaf],
        shardings: Sequence[Any],
        *,
        flops: Flops,
        split_flops: SplitFlops | None = None,
    ) -> list[Division]:
        """Return how matrices of leaves are divided among the devices of a mesh.

        Args:
          leaves: from `resolve`, those that are cut.
          shardings: a `jax.NamedSharding` for each, perhaps over a
            `jax.sharding.AbstractMesh`; anything else counts as replicated.
          flops: operations for one m x n matrix.
          split_flops: as `Split.flops`; default: no matrix is shared by devices.

        Returns:
          Every leaf in one division; nothing if no leaf is on a mesh, or if `sharding`
          is None.

        Raises:
          ValueError: if leaves are on different meshes or cannot be divided evenly, or
            `sharding` names axes that the mesh lacks.
        """
        laid = named_layouts(leaves, shardings)
        costs = self.costs(flops, split_flops and Split(None, split_flops))
        if laid is None or costs is None:
            return []
        named = [s for s in shardings if isinstance(s, jax.NamedSharding)]
        mesh = named[0].mesh
        costs.check(jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names))
        automatic = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
        if automatic and self.shardings is None:
            return constrained(laid, costs)
        return divided(laid, costs)

    def groups(
        self,
        stacks: Sequence[jax.Array | jax.ShapeDtypeStruct],
        *,
        commutes_with_transpose: bool = False,
        join_bytes: int | None = None,
        pad_bytes: int = 0,
        stack_bytes: int | None = None,
        loop_from: int | None = 2,
    ) -> list[Group]:
        """Return which stacks share a call of a function, and how.

        Args:
          stacks: arrays of shape `(b, m, n)`; only shapes and dtypes are looked at.
          commutes_with_transpose: whether the function satisfies
            `f(x.mT) == f(x).mT`: an m x n and an n x m matrix may share a stack.
          join_bytes: matrices of more bytes are not joined into a stack: where one
            keeps the machine busy, joining only copies. Default: all are joined.
          pad_bytes: joined matrices with the same short side share a stack, padded
            with zeros on the long side, where that adds at most so many bytes to those
            of one shape. Only for functions that give zeros for zeros.
          stack_bytes: as `max_bytes`, for stacks of matrices that are joined; a wish,
            not a limit.
          loop_from: so many equal matrices that are not joined, or more, share one
            program that takes one at a time, which saves compilation and costs a little
            time; fewer have a program for each stack. None: each stack has one, and
            its matrices are taken one at a time.

        Returns:
          Every stack in one group.

        Raises:
          ValueError: if `max_bytes` is smaller than one matrix.
        """
        kinds: dict[tuple[str, int, bool, bool], dict[int, list[int]]] = {}
        for i, x in enumerate(stacks):
            _, m, n = x.shape
            join = join_bytes is None or _bytes_each(x) <= join_bytes
            either = commutes_with_transpose and join
            kind = (x.dtype.name, min(m, n), either or m <= n, join)
            kinds.setdefault(kind, {}).setdefault(max(m, n), []).append(i)
        groups = []
        for (_, _, _, join), lengths in sorted(kinds.items()):
            # Longer before shorter ones: each may take in those that follow.
            lots = [lot for _, lot in sorted(lengths.items(), reverse=True)]
            if join:
                lots = self._padded(stacks, lots, pad_bytes)
            for lot in lots:
                one_program = loop_from is not None and _count(stacks, lot) >= loop_from
                alone = 0 if one_program or loop_from is None else None
                wish = stack_bytes if join else alone
                for members in [lot] if join or one_program else [[i] for i in lot]:
                    at_once = self._at_once(stacks, members, wish)
                    groups.append(_group(stacks, members, join, at_once))
        return groups

    def _padded(
        self,
        stacks: Sequence[jax.Array | jax.ShapeDtypeStruct],
        lots: Sequence[list[int]],
        pad_bytes: int,
    ) -> list[list[int]]:
        """Let matrices join longer ones where that adds few zeros."""
        padded: list[list[int]] = []
        for lot in lots:
            if padded:
                longest = _bytes_each(stacks[padded[-1][0]])
                added = longest - _bytes_each(stacks[lot[0]])
                few = _count(stacks, lot) * added <= pad_bytes
                if few and longest <= (self.max_bytes or longest):
                    padded[-1] += lot
                    continue
            padded.append(lot)
        return padded

    def _at_once(
        self,
        stacks: Sequence[jax.Array | jax.ShapeDtypeStruct],
        members: Sequence[int],
        wish: int | None,
    ) -> int:
        """Return how many matrices of a group are handed to a function at once."""
        x, b = stacks[members[0]], _count(stacks, members)
        each = _bytes_each(x)
        if not b * each:
            return max(1, b)
        at_once = b if wish is None else min(b, max(1, wish // each))
        if self.max_bytes is not None:
            at_once = min(at_once, self.max_bytes // each)
        if at_once < 1:
            _, m, n = x.shape
            raise ValueError(
                f"Stacking(max_bytes={self.max_bytes}) is smaller than one {m} x {n} "
                f"matrix of dtype {x.dtype}, which takes {each} bytes: raise it."
            )
        return at_once

    def each(
        self,
        f: Callable[[jax.Array], jax.Array],
        *,
        in_turn: bool = False,
        **how: Any,
    ) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
        """Lift a function on one stack to many: one call for each of `groups`.

        Args:
          f: maps a stack `(b, m, n)` to one of equal shape, matrix by matrix.
          in_turn: whether a matrix that is not joined waits for the one before it.
          **how: the keywords of `groups`.

        Returns:
          A function from stacks to stacks of the same shapes.
        """

        def all_of(stacks: Sequence[jax.Array]) -> list[jax.Array]:
            out = list(stacks)
            last = None
            for group in self.groups(stacks, **how):
                parts = [stacks[i] for i in group.members]
                if group.joined:
                    how_joined = group.shape, group.turned, group.at_once
                    parts = call_joined(f, parts, *how_joined)
                else:
                    parts = call_in_place(f, parts, group.at_once, last)
                    last = parts[-1] if in_turn else None
                for i, x in zip(group.members, parts, strict=True):
                    out[i] = x
            return out

        return all_of


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


def _count(
    stacks: Sequence[jax.Array | jax.ShapeDtypeStruct], members: Sequence[int]
) -> int:
    return sum(stacks[i].shape[0] for i in members)


def _group(
    stacks: Sequence[jax.Array | jax.ShapeDtypeStruct],
    members: Sequence[int],
    joined: bool,
    at_once: int,
) -> Group:
    """Return a group whose matrices are all as most of them are, tall or wide."""
    shapes = [stacks[i].shape for i in members]
    tall = sum(b for b, m, n in shapes if m > n)
    wide = sum(b for b, m, n in shapes if m < n)
    short, long = sorted(shapes[0][1:])
    shape = (long, short) if tall > wide else (short, long)
    turned = tuple(m > n if tall <= wide else m < n for _, m, n in shapes)
    count = sum(b for b, *_ in shapes)
    return Group(tuple(members), turned, (count, *shape), joined, at_once)


def _bytes_each(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape[1:]) * x.dtype.itemsize
