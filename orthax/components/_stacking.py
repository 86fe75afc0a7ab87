"""Which matrices are worked on together."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Group(NamedTuple):
    """Stacks that a function gets as one.

    Attributes:
      members: which stacks, by their place in the list.
      turned: whether the matrices of each are transposed.
      shape: `(b, m, n)` of the whole; smaller matrices are padded with zeros.
    """

    members: tuple[int, ...]
    turned: tuple[bool, ...]
    shape: tuple[int, int, int]


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
    ) -> list[Group]:
        """Return which stacks are handed to a function as one.

        Args:
          stacks: arrays of shape `(b, m, n)`; only shapes and dtypes are looked at.
          commutes_with_transpose: whether the function satisfies
            `f(x.mT) == f(x).mT`: an m x n and an n x m matrix may share a stack.
          join_bytes: matrices of more bytes are not joined with others: where one
            keeps the machine busy, joining only copies. Default: all are joined.
          pad_bytes: joined matrices with the same short side share a stack, padded
            with zeros on the long side, where that adds at most so many bytes to those
            of one shape. Only for functions that give zeros for zeros.

        Returns:
          Every stack in one group.
        """
        places = []
        for i, x in enumerate(stacks):
            _, m, n = x.shape
            join = join_bytes is None or _bytes_each(x.shape, x.dtype) <= join_bytes
            turn = commutes_with_transpose and join and m > n
            # Longer before shorter ones: each may take in those that follow.
            kind = (x.dtype.name, turn or m <= n, min(m, n))
            places.append((kind, -max(m, n), -1 if join else i, i, turn))
        groups = []
        same = itertools.groupby(sorted(places), lambda place: place[:3])
        for (kind, _, alone), members in same:
            *_, indices, turned = zip(*members, strict=True)
            group = _group(stacks, indices, turned)
            if groups and alone < 0 and groups[-1][0] == (kind, True):
                merged, added = _merged(groups[-1][1], group)
                itemsize = stacks[indices[0]].dtype.itemsize
                each = math.prod(merged.shape[1:]) * itemsize
                if added * itemsize <= pad_bytes and each <= (self.max_bytes or each):
                    groups[-1] = ((kind, True), merged)
                    continue
            groups.append(((kind, alone < 0), group))
        return [group for _, group in groups]

    def each(
        self,
        f: Callable[[jax.Array], jax.Array],
        *,
        join_bytes: int | None = None,
        stack_bytes: int | None = None,
        in_turn: bool = False,
        **how: bool | int,
    ) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
        """Lift a function on one stack to many: one call for each of `groups`.

        Args:
          f: maps a stack `(b, m, n)` to one of equal shape, matrix by matrix.
          join_bytes: as in `groups`.
          stack_bytes: as `max_bytes`, for stacks of matrices that are joined; a wish,
            not a limit.
          in_turn: whether a matrix that is not joined waits for the one before it.
          **how: the other keywords of `groups`.

        Returns:
          A function from stacks to stacks of the same shapes.
        """

        def all_of(stacks: Sequence[jax.Array]) -> list[jax.Array]:
            out = list(stacks)
            last = None
            for group in self.groups(stacks, join_bytes=join_bytes, **how):
                whole = _joined(stacks, group)
                bytes_each = _bytes_each(whole.shape, whole.dtype)
                large = join_bytes is not None and bytes_each > join_bytes
                if in_turn and large and last is not None:
                    whole = _after(whole, last)
                at_once = self._at_once(whole, None if large else stack_bytes)
                whole = _in_pieces(f, whole, at_once)
                last = whole if large else last
                lengths = [len(stacks[i]) for i in group.members]
                ends = itertools.accumulate(lengths[:-1])
                parts = jnp.split(whole, [*ends])
                for i, turn, x in zip(group.members, group.turned, parts, strict=True):
                    x = x.mT if turn else x
                    m, n = stacks[i].shape[1:]
                    out[i] = x if x.shape[1:] == (m, n) else x[:, :m, :n]
            return out

        return all_of

    def _at_once(self, x: jax.Array, stack_bytes: int | None) -> int:
        """Return how many matrices of a stack are handed to the function at once."""
        b, m, n = x.shape
        bytes_each = _bytes_each(x.shape, x.dtype)
        if not x.size:
            return max(1, b)
        at_once = b if stack_bytes is None else max(1, stack_bytes // bytes_each)
        if self.max_bytes is not None:
            at_once = min(at_once, self.max_bytes // bytes_each)
        if at_once < 1:
            raise ValueError(
                f"Stacking(max_bytes={self.max_bytes}) is smaller than one {m} x {n} "
                f"matrix of dtype {x.dtype}, which takes {bytes_each} bytes: raise it."
            )
        return at_once


def _group(
    stacks: Sequence[jax.Array], indices: Sequence[int], turned: Sequence[bool]
) -> Group:
    _, m, n = stacks[indices[0]].shape
    b = sum(stacks[i].shape[0] for i in indices)
    return Group(tuple(indices), tuple(turned), (b, n, m) if turned[0] else (b, m, n))


def _merged(longer: Group, shorter: Group) -> tuple[Group, int]:
    """Return one group of two, and how many zeros that adds."""
    b, *matrix = longer.shape
    whole = (b + shorter.shape[0], *matrix)
    added = shorter.shape[0] * (math.prod(matrix) - math.prod(shorter.shape[1:]))
    members = longer.members + shorter.members
    return Group(members, longer.turned + shorter.turned, whole), added


def _joined(stacks: Sequence[jax.Array], group: Group) -> jax.Array:
    _, m, n = group.shape
    parts = []
    for i, turn in zip(group.members, group.turned, strict=True):
        x = stacks[i].mT if turn else stacks[i]
        rest = (m - x.shape[1], n - x.shape[2])
        if any(rest):
            x = jnp.pad(x, ((0, 0), (0, rest[0]), (0, rest[1])))
        parts.append(x)
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


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


def _bytes_each(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    return math.prod(shape[1:]) * dtype.itemsize


def _called(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    out = f(x)
    if out.shape != x.shape:
        raise ValueError(
            f"The function mapped over matrices turned a stack of shape {x.shape} into "
            f"{out.shape}; it must keep the shape."
        )
    return out
