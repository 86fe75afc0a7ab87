"""Which matrices one device works on together, and the calls that do."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orthax.execution._costs import Work

Stacks = Sequence[jax.Array | jax.ShapeDtypeStruct]
Function = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a platform works on together: what measurements say of it.

    Attributes:
      join_bytes: matrices of more bytes are not joined into a batch: where one keeps
        the machine busy, joining only copies. None: all are joined.
      pad_bytes: joined matrices with the same short side share a batch, padded with
        zeros on the long side, where that adds at most so many bytes to those of one
        shape, and the work gives zeros for zeros.
      batch_bytes: largest batch of joined matrices; larger ones are worked on in
        pieces. A wish: one matrix may be larger. None: no limit.
      loop_from: so many equal matrices that are not joined, or more, share one program
        that takes one at a time, which saves compilation and costs a little time; fewer
        have a program for each stack. None: each stack has one, and its matrices are
        taken one at a time.
      in_turn: whether a matrix that is not joined waits for the one before it.
    """

    join_bytes: int | None = None
    pad_bytes: int = 0
    batch_bytes: int | None = None
    loop_from: int | None = 2
    in_turn: bool = False


# On a CPU a large matrix keeps the machine busy, and one after another need less
# memory, in loops where many would take long to compile. On a TPU a matrix that is
# worked on alone stays in the 128 MiB of fast memory from its first step to its last,
# as do batches of smaller ones of up to 32 MiB. A GPU, or what is not known, needs many
# at once.
_CPU = Limits(2**18, 2**18, 2**21, loop_from=4, in_turn=True)
_TPU = Limits(2**21, 2**18, 2**25, loop_from=None)
_GPU = Limits(pad_bytes=2**18)


def limits_of(platform: str | None) -> Limits:
    """Return the limits of batches on a platform; None: on any."""
    return {None: Limits(), "cpu": _CPU, "tpu": _TPU}.get(platform, _GPU)


class Batch(NamedTuple):
    """Stacks of matrices that share one call of a function.

    Attributes:
      members: indices of the stacks.
      transposed: for each stack, whether its matrices are transposed.
      shape: `(b, m, n)` of the batch; smaller matrices are padded with zeros.
      joined: whether the stacks are copied into one array.
      at_once: the most matrices passed to the function at once. If one, and not
        joined: a loop that replaces the matrices in place.
    """

    members: tuple[int, ...]
    transposed: tuple[bool, ...]
    shape: tuple[int, int, int]
    joined: bool
    at_once: int


def batches_of(
    stacks: Stacks, work: Work, limits: Limits, max_bytes: int | None = None
) -> tuple[Batch, ...]:
    """Group stacks into batches that share one call of a function.

    Args:
      stacks: arrays of shape `(b, m, n)`, of which only shapes and dtypes matter.
      work: the function.
      limits: the limits of the platform.
      max_bytes: as in `Stacking`.

    Raises:
      ValueError: if `max_bytes` is smaller than one matrix.
    """
    kinds: dict[tuple[str, int, bool, bool], dict[int, list[int]]] = {}
    for i, x in enumerate(stacks):
        _, m, n = x.shape
        join = limits.join_bytes is None or _bytes_each(x) <= limits.join_bytes
        either = work.commutes_with_transpose and join
        kind = (x.dtype.name, min(m, n), either or m <= n, join)
        kinds.setdefault(kind, {}).setdefault(max(m, n), []).append(i)
    most = math.inf if max_bytes is None else max_bytes
    pad_bytes = limits.pad_bytes if work.zeros_for_zeros else 0
    out = []
    for (_, _, _, join), lengths in sorted(kinds.items()):
        # Longer before shorter ones: each may take in those that follow.
        lots = [lot for _, lot in sorted(lengths.items(), reverse=True)]
        if join:
            lots = _padded(stacks, lots, pad_bytes, most)
        for lot in lots:
            many = _count(stacks, lot) >= (limits.loop_from or math.inf)
            wish = limits.batch_bytes if join else None
            if not join and (many or limits.loop_from is None):
                wish = 0
            for members in [lot] if join or many else [[i] for i in lot]:
                at_once = _at_once(stacks, members, wish, max_bytes)
                out.append(_batch(stacks, members, join, at_once))
    return tuple(out)


def _padded(
    stacks: Stacks, lots: Sequence[list[int]], pad_bytes: int, most: float
) -> list[list[int]]:
    """Join matrices with longer ones where that adds few zeros."""
    padded: list[list[int]] = []
    for lot in lots:
        if padded:
            longest = _bytes_each(stacks[padded[-1][0]])
            added = longest - _bytes_each(stacks[lot[0]])
            if _count(stacks, lot) * added <= pad_bytes and longest <= most:
                padded[-1] += lot
                continue
        padded.append(lot)
    return padded


def _at_once(
    stacks: Stacks, members: Sequence[int], wish: int | None, max_bytes: int | None
) -> int:
    """Return how many matrices of a batch are handed to a function at once."""
    x, b = stacks[members[0]], _count(stacks, members)
    each = _bytes_each(x)
    if not b * each:
        return max(1, b)
    at_once = b if wish is None else min(b, max(1, wish // each))
    if max_bytes is not None:
        at_once = min(at_once, max_bytes // each)
    if at_once < 1:
        _, m, n = x.shape
        raise ValueError(
            f"Stacking(max_bytes={max_bytes}) is smaller than one {m} x {n} "
            f"matrix of dtype {x.dtype}, which takes {each} bytes: raise it."
        )
    return at_once


def _batch(stacks: Stacks, members: Sequence[int], joined: bool, at_once: int) -> Batch:
    """Return a batch whose matrices are all as most of them are, tall or wide."""
    shapes = [stacks[i].shape for i in members]
    tall = sum(b for b, m, n in shapes if m > n)
    wide = sum(b for b, m, n in shapes if m < n)
    short, long = sorted(shapes[0][1:])
    shape = (long, short) if tall > wide else (short, long)
    transposed = tuple(m > n if tall <= wide else m < n for _, m, n in shapes)
    count = sum(b for b, *_ in shapes)
    return Batch(tuple(members), transposed, (count, *shape), joined, at_once)


def _count(stacks: Stacks, members: Sequence[int]) -> int:
    return sum(stacks[i].shape[0] for i in members)


def _bytes_each(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape[1:]) * x.dtype.itemsize


def call(
    f: Function, batches: Sequence[Batch], in_turn: bool, stacks: Sequence[jax.Array]
) -> list[jax.Array]:
    """Call `f` once for each batch; return stacks of the same shapes."""
    out, last = list(stacks), None
    for batch in batches:
        parts = [stacks[i] for i in batch.members]
        if batch.joined:
            whole = _in_pieces(f, _joined(parts, batch), batch.at_once)
            parts = list(_apart(whole, parts, batch))
        else:
            parts = _in_place(f, parts, batch.at_once, last)
            last = parts[-1] if in_turn else None
        for i, x in zip(batch.members, parts, strict=True):
            out[i] = x
    return out


def _joined(stacks: Sequence[jax.Array], batch: Batch) -> jax.Array:
    _, m, n = batch.shape
    parts = []
    for x, transposed in zip(stacks, batch.transposed, strict=True):
        x = x.mT if transposed else x
        rest = (m - x.shape[1], n - x.shape[2])
        if any(rest):
            x = jnp.pad(x, ((0, 0), (0, rest[0]), (0, rest[1])))
        parts.append(x)
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _apart(
    whole: jax.Array, stacks: Sequence[jax.Array], batch: Batch
) -> Iterator[jax.Array]:
    """Yield the part of a batch that belongs to every member."""
    ends = itertools.accumulate(len(x) for x in stacks[:-1])
    parts = jnp.split(whole, [*ends])
    for x, transposed, part in zip(stacks, batch.transposed, parts, strict=True):
        part = part.mT if transposed else part
        _, m, n = x.shape
        yield part if part.shape == x.shape else part[:, :m, :n]


def _in_place(
    f: Function, stacks: Sequence[jax.Array], at_once: int, done: jax.Array | None
) -> list[jax.Array]:
    """Call `f` on equal matrices where they are, once `done` is there."""
    places = np.array([(k, j) for k, x in enumerate(stacks) for j in range(len(x))])
    if at_once > 1 or len(places) < 2:
        (x,) = stacks
        return [_in_pieces(f, x if done is None else _after(x, done), at_once)]
    places = jnp.asarray(places) if done is None else _after(places, done)

    def step(i: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        member, j = places[i]
        pick = [functools.partial(_taken, k) for k in range(len(out))]
        y = _called(f, jax.lax.switch(member, pick, out, j))
        # XLA keeps what a branch returns untouched where it is.
        return tuple(
            jax.lax.cond(member == k, _put, lambda x, *_: x, x, y, j)
            for k, x in enumerate(out)
        )

    return list(jax.lax.fori_loop(0, len(places), step, tuple(stacks)))


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


def _in_pieces(f: Function, x: jax.Array, at_once: int) -> jax.Array:
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


def _called(f: Function, x: jax.Array) -> jax.Array:
    out = f(x)
    if out.shape != x.shape:
        raise ValueError(
            f"The function mapped over matrices turned a stack of shape {x.shape} into "
            f"{out.shape}; it must keep the shape."
        )
    return out
