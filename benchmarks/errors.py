"""How far a polar factor is from the float64 one: two numbers, cheap at every size."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import trees
from orthax import components

# Relative to ||X||_F: from here up the default method promises a singular value of one.
KEPT = 1e-3
# Square of the condition number up to which the Gram matrix keeps seven digits; four
# are enough for the worst direction of a matrix that has more than so many.
_SAFE, _SAFE_LARGE, _LARGE = 1e9, 1e12, 1024
# Matrices up to this short side are all compared, of larger ones the first and the last
# of each shape: their decompositions would take longer than what is measured.
_ALL_UP_TO = 128


class Directions(NamedTuple):
    """The float64 singular directions of a matrix, and which the default keeps."""

    u: np.ndarray
    vh: np.ndarray
    kept: np.ndarray


def directions(x: np.ndarray) -> Directions:
    """Return the singular directions of a matrix that has full rank in float64."""
    x = np.asarray(x, np.float64)
    if x.shape[0] < x.shape[1]:
        turned = directions(x.T)
        return Directions(turned.vh.T, turned.u.T, turned.kept)
    x = x / np.abs(x).max()
    squares, v = np.linalg.eigh(x.T @ x)
    safe = _SAFE_LARGE if len(v) > _LARGE else _SAFE
    if squares[0] > 0 and squares[-1] <= safe * squares[0]:
        s = np.sqrt(squares)
        u, vh = (x @ v) / s, v.T
    else:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
    return Directions(u, vh, s >= KEPT * np.linalg.norm(s))


def relative(o: np.ndarray, reference: Directions) -> float:
    """Return the Frobenius error of a factor, relative to the norm of the factor."""
    o = np.asarray(o, np.float64)
    wrong = np.linalg.norm(o - reference.u @ reference.vh)
    return float(wrong / len(reference.vh) ** 0.5)


def kept(o: np.ndarray, reference: Directions) -> float:
    """Return the largest `|u_i^T O v_i - 1|` over the directions that are kept."""
    o = np.asarray(o, np.float64)
    values = np.sum(reference.u * (o @ reference.vh.T), axis=0)
    return float(np.abs(values[reference.kept] - 1).max())


class Place(NamedTuple):
    """Where a matrix of a tree is."""

    number: int  # among all matrices of the tree
    leaf: int
    stack: int
    row: int
    shape: tuple[int, int]


def places(network: trees.Network) -> list[Place]:
    """Return where every matrix of a network is, in the order of its leaves."""
    found = []
    for leaf, (_, value, cut) in enumerate(
        components.resolve(network.params, network.rule)
    ):
        stacks = cut.matrices(value.shape) if cut else ()
        for stack, (b, m, n) in enumerate(stacks):
            start = len(found)
            found += [Place(start + i, leaf, stack, i, (m, n)) for i in range(b)]
    return found


def sample(network: trees.Network) -> list[Place]:
    """Return what is compared: all small matrices, two of each large shape."""
    everything = places(network)
    ends = {}
    for place in everything:
        first, _ = ends.get(place.shape, (place, place))
        ends[place.shape] = first, place
    return [
        place
        for place in everything
        if min(place.shape) <= _ALL_UP_TO or place in ends[place.shape]
    ]


def pick(tree: Any, network: trees.Network, at: Sequence[Place]) -> list[np.ndarray]:
    """Return the matrices of a tree that stand at some places."""
    leaves = components.resolve(tree, network.rule)
    picked = []
    for place in at:
        _, value, cut = leaves[place.leaf]
        picked.append(np.asarray(cut.fold(value)[place.stack][place.row]))
    return picked


def worst(
    factors: Sequence[np.ndarray], references: Sequence[Directions]
) -> dict[str, float | None]:
    """Return the worst errors of some factors; square matrices stand apart.

    A large square matrix has singular values that are nearly zero, and they alone
    decide its Frobenius error.
    """
    pairs = [*zip(factors, references, strict=True)]
    square = [relative(o, r) for o, r in pairs if o.shape[0] == o.shape[1]]
    other = [relative(o, r) for o, r in pairs if o.shape[0] != o.shape[1]]
    return {
        "worst_error": _most(other),
        "worst_error_square": _most(square),
        "worst_kept_error": _most([kept(o, r) for o, r in pairs]),
    }


def _most(values: Sequence[float]) -> float | None:
    # NaN must come out as NaN, which `max` would lose.
    return float(np.max(values)) if values else None
