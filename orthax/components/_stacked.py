"""Call a function on the stacks of a group, joined or where they are."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def call_joined(
    f: Callable[[jax.Array], jax.Array],
    stacks: Sequence[jax.Array],
    shape: tuple[int, int, int],
    turned: Sequence[bool],
    at_once: int,
) -> list[jax.Array]:
    """Call `f` on one stack of all matrices, some turned, padded to `shape`."""
    whole = _in_pieces(f, _joined(stacks, shape, turned), at_once)
    return list(_apart(whole, stacks, turned))


def _joined(
    stacks: Sequence[jax.Array], shape: tuple[int, int, int], turned: Sequence[bool]
) -> jax.Array:
    _, m, n = shape
    parts = []
    for x, turn in zip(stacks, turned, strict=True):
        x = x.mT if turn else x
        rest = (m - x.shape[1], n - x.shape[2])
        if any(rest):
            x = jnp.pad(x, ((0, 0), (0, rest[0]), (0, rest[1])))
        parts.append(x)
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _apart(
    whole: jax.Array, stacks: Sequence[jax.Array], turned: Sequence[bool]
) -> Iterator[jax.Array]:
    """Yield the part of a joined stack that belongs to every member."""
    ends = itertools.accumulate(len(x) for x in stacks[:-1])
    parts = jnp.split(whole, [*ends])
    for x, turn, part in zip(stacks, turned, parts, strict=True):
        part = part.mT if turn else part
        _, m, n = x.shape
        yield part if part.shape == x.shape else part[:, :m, :n]


def call_in_place(
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


def _called(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    out = f(x)
    if out.shape != x.shape:
        raise ValueError(
            f"The function mapped over matrices turned a stack of shape {x.shape} into "
            f"{out.shape}; it must keep the shape."
        )
    return out
