"""Which matrices are worked on together."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
    """How equal matrices are worked on together.

    Attributes:
      max_bytes: largest stack that is handed to a function at once, in bytes of its
        input; larger ones are worked on in pieces, one after another. Default: no
        limit.

    Raises:
      ValueError: if `max_bytes` is not positive; from `map_matrices`, if it is smaller
        than one matrix.
      TypeError: if `max_bytes` is not an integer.

    Example:
      >>> from orthax import components
      >>> components.Stacking(max_bytes=2**28)
      Stacking(max_bytes=268435456)
    """

    max_bytes: int | None = None

    def __post_init__(self):
        limit = self.max_bytes
        if limit is None:
            return
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"`max_bytes` must be an integer or None, got {limit!r}.")
        if limit < 1:
            raise ValueError(f"`max_bytes` must be positive, got {limit}.")

    def groups(
        self,
        stacks: Sequence[jax.Array | jax.ShapeDtypeStruct],
        *,
        commutes_with_transpose: bool = False,
        join_bytes: int | None = None,
        pad_bytes: int = 0,
        stack_bytes: int | None = None,
        loop_from: int = 2,
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
            time; fewer have a program for each stack.

        Returns:
          Every stack in one group.

        Raises:
          ValueError: if `max_bytes` is smaller than one matrix.
        """
        kinds: dict[tuple[str, int, bool, bool], dict[int, list[int]]] = {}
        for i, x in enumerate(stacks):
            _, m, n = x.shape
            join = join_bytes is None or _bytes_each(x) <= join_bytes
            wide = m <= n or (commutes_with_transpose and join)
            kind = (x.dtype.name, min(m, n), wide, join)
            kinds.setdefault(kind, {}).setdefault(max(m, n), []).append(i)
        groups = []
        for (_, _, wide, join), lengths in sorted(kinds.items()):
            # Longer before shorter ones: each may take in those that follow.
            lots = [lot for _, lot in sorted(lengths.items(), reverse=True)]
            if join:
                lots = self._padded(stacks, lots, pad_bytes)
            for lot in lots:
                looped = not join and _count(stacks, lot) >= loop_from
                for members in [lot] if join or looped else [[i] for i in lot]:
                    wish = 0 if looped else stack_bytes if join else None
                    at_once = self._at_once(stacks, members, wish)
                    groups.append(_group(stacks, members, wide, join, at_once))
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
                    whole = _in_pieces(f, _joined(parts, group), group.at_once)
                    parts = _apart(whole, parts, group.turned)
                else:
                    parts = _in_place(f, parts, group.at_once, last)
                    last = parts[-1] if in_turn else None
                for i, x in zip(group.members, parts, strict=True):
                    out[i] = x
            return out

        return all_of


def _count(
    stacks: Sequence[jax.Array | jax.ShapeDtypeStruct], members: Sequence[int]
) -> int:
    return sum(stacks[i].shape[0] for i in members)


def _group(
    stacks: Sequence[jax.Array | jax.ShapeDtypeStruct],
    members: Sequence[int],
    wide: bool,
    joined: bool,
    at_once: int,
) -> Group:
    sides = [stacks[i].shape[1:] for i in members]
    short, long = sorted(sides[0])
    shape = (short, long) if wide else (long, short)
    turned = tuple(wide and m > n for m, n in sides)
    count = _count(stacks, members)
    return Group(tuple(members), turned, (count, *shape), joined, at_once)


def _joined(stacks: Sequence[jax.Array], group: Group) -> jax.Array:
    _, m, n = group.shape
    parts = []
    for x, turn in zip(stacks, group.turned, strict=True):
        x = x.mT if turn else x
        rest = (m - x.shape[1], n - x.shape[2])
        if any(rest):
            x = jnp.pad(x, ((0, 0), (0, rest[0]), (0, rest[1])))
        parts.append(x)
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _apart(
    whole: jax.Array, stacks: Sequence[jax.Array], turned: Sequence[bool]
) -> Iterator[jax.Array]:
    """Yield the part of a group's stack that belongs to every member."""
    ends = itertools.accumulate(len(x) for x in stacks[:-1])
    parts = jnp.split(whole, [*ends])
    for x, turn, part in zip(stacks, turned, parts, strict=True):
        part = part.mT if turn else part
        _, m, n = x.shape
        yield part if part.shape == x.shape else part[:, :m, :n]


def _in_place(
    f: Callable[[jax.Array], jax.Array],
    stacks: Sequence[jax.Array],
    at_once: int,
    done: jax.Array | None,
) -> list[jax.Array]:
    """Call `f` on equal matrices where they are, once `done` is there."""
    places = np.array([(k, j) for k, x in enumerate(stacks) for j in range(len(x))])
    if at_once > 1 or len(places) < 2:
        (x,) = stacks
        return [_in_pieces(f, x if done is None else _after(x, done), at_once)]
    places = jnp.asarray(places) if done is None else _after(places, done)

    def turn(i: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        member, j = places[i]
        pick = [functools.partial(_taken, k) for k in range(len(out))]
        y = _called(f, jax.lax.switch(member, pick, out, j))
        # XLA keeps what a branch returns untouched where it is.
        return tuple(
            jax.lax.cond(member == k, _put, lambda x, *_: x, x, y, j)
            for k, x in enumerate(out)
        )

    return list(jax.lax.fori_loop(0, len(places), turn, tuple(stacks)))


def _taken(k: int, stacks: Sequence[jax.Array], j: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(stacks[k], j, 1)


def _put(stack: jax.Array, matrix: jax.Array, j: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, matrix, j, 0)


def _after(x: jax.Array, done: jax.Array) -> jax.Array:
    """Return `x`, which now depends on another array.

    XLA starts on a CPU whatever it can and keeps in memory all that it started; an
    optimisation barrier would be removed. No number is above one and below minus one,
    which XLA does not know.
    """
    first = done[0, 0, 0].real
    return jnp.where((first > 1) & (first < -1), 0, x)


def _in_pieces(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, at_once: int
) -> jax.Array:
    """Call `f` on a stack, a number of matrices at once."""
    b, m, n = x.shape
    pieces = -(-b // at_once)
    if pieces < 2:
        return _called(f, x)
    at_once = -(-b // pieces)
    whole, rest = divmod(b, at_once)
    head = x[: whole * at_once].reshape(whole, at_once, m, n)
    head = jax.lax.map(lambda piece: _called(f, piece), head).reshape(-1, m, n)
    if not rest:
        return head
    return jnp.concatenate([head, _called(f, x[whole * at_once :])])


def _bytes_each(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape[1:]) * x.dtype.itemsize


def _called(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    out = f(x)
    if out.shape != x.shape:
        raise ValueError(
            f"The function mapped over matrices turned a stack of shape {x.shape} into "
            f"{out.shape}; it must keep the shape."
        )
    return out
