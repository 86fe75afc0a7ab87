"""Which leaves are factorised, at which rank, and to which layer each belongs."""

import re
from collections.abc import Mapping, Sequence

from orthax import components

Order = Sequence[str] | None
Ranks = int | Mapping[str, int] | None


def check_order(order: Order, needs: Mapping[str, float]) -> None:
    """Raise unless `order` is valid, or absent and not needed.

    Args:
      order: patterns, from the input to the output.
      needs: settings by name; one that is not zero needs an order.
    """
    if order is None:
        users = [f"{name}={value}" for name, value in needs.items() if value]
        if users:
            raise ValueError(
                f"{', '.join(users)} needs the order of the layers, which a tree does "
                "not have: give `order`, patterns of paths from the input to the "
                'output, such as order=("stem", "blocks/0/", "blocks/1/", "head").'
            )
        return
    is_sequence = isinstance(order, Sequence) and not isinstance(order, str)
    if not is_sequence or not order or not all(isinstance(p, str) for p in order):
        raise TypeError(
            "`order` must be a sequence of patterns of paths, from the input to the "
            f"output, got {order!r}."
        )
    for pattern in order:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Pattern {pattern!r} of `order` is not a regular expression: {error}."
            ) from None


def eligible(
    leaves: Sequence[components.Leaf],
    *,
    min_aspect: float,
    keep_first: bool,
    keep_last: bool,
    order: Order,
    ranks: Ranks,
) -> dict[int, int | None]:
    """Return the positions of the leaves to factorise, each with its layer.

    Layers are counted from the input, and only those with a leaf to factorise.
    """
    check_order(order, {"keep_first": keep_first, "keep_last": keep_last})
    _check_paths(leaves)
    named = isinstance(ranks, Mapping)
    indices = _named(leaves, ranks) if named else _square_enough(leaves, min_aspect)
    layers: dict[int, int | None] = dict.fromkeys(indices)
    if order is not None:
        positions = _positions(leaves, order, indices)
        dense = {0 if keep_first else None, len(order) - 1 if keep_last else None}
        positions = {i: at for i, at in positions.items() if named or at not in dense}
        numbers = {at: k for k, at in enumerate(sorted(set(positions.values())))}
        layers = {i: numbers[at] for i, at in positions.items()}
    if not layers:
        shapes = ", ".join(
            f"'{leaf.path}' {tuple(leaf.value.shape)}" for leaf in leaves if leaf.cut
        )
        raise ValueError(
            f"No leaf is left to factorise. The rule finds matrices in {shapes}; "
            f"min_aspect={min_aspect}, keep_first={keep_first}, keep_last={keep_last}, "
            "`ranks` and blocks of unequal sizes leave all of them dense."
        )
    return layers


def checked_rank(ranks: Ranks, path: str, short_side: int) -> int:
    """Return the rank of a leaf: a number for all leaves is clipped, one by path fits.

    Raises:
      TypeError: if it is not an integer.
      ValueError: if it is below one, or given by path and above the short side.
    """
    if ranks is None:
        return short_side
    named = isinstance(ranks, Mapping)
    rank = ranks[path] if named else ranks
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"`ranks` for '{path}' must be an integer, got {rank!r}.")
    if rank < 1 or (named and rank > short_side):
        raise ValueError(
            f"`ranks` gives {rank} for '{path}'; its matrices have ranks from 1 to "
            f"{short_side}. Are these the ranks of another model?"
        )
    return min(rank, short_side)


def _check_paths(leaves: Sequence[components.Leaf]) -> None:
    """Raise if two leaves with matrices have one path."""
    paths: set[str] = set()
    for leaf in leaves:
        if leaf.path in paths and leaf.cut:
            raise ValueError(f"Two leaves have the path '{leaf.path}': rename one.")
        paths.add(leaf.path)


def _square_enough(leaves: Sequence[components.Leaf], min_aspect: float) -> list[int]:
    """Return the positions of leaves of equal matrices that are square enough."""
    indices = []
    for i, leaf in enumerate(leaves):
        shapes = leaf.cut.matrices(leaf.value.shape) if leaf.cut else ()
        if len(shapes) == 1:
            _, m, n = shapes[0]
            if min(m, n) > min_aspect * max(m, n):
                indices.append(i)
    return indices


def _named(leaves: Sequence[components.Leaf], ranks: Mapping[str, int]) -> list[int]:
    """Return the positions of the leaves that `ranks` names."""
    indices = {leaf.path: i for i, leaf in enumerate(leaves) if leaf.cut}
    for path in ranks:
        if path not in indices:
            raise ValueError(
                f"`ranks` names '{path}', in which the rule finds no matrices. It "
                f"finds them in {', '.join(map(repr, indices))}. Are these the ranks "
                "of another model?"
            )
        leaf = leaves[indices[path]]
        if len(leaf.cut.matrices(leaf.value.shape)) > 1:
            raise ValueError(
                f"`ranks` names '{path}' of shape {tuple(leaf.value.shape)}, whose "
                f"blocks {leaf.cut.blocks} have unequal sizes: give a rule without "
                "`blocks` for it, or leave it out of `ranks`."
            )
    return sorted(indices[path] for path in ranks)


def _positions(
    leaves: Sequence[components.Leaf], order: Sequence[str], indices: Sequence[int]
) -> dict[int, int]:
    """Return the position in `order` of the first pattern that each leaf matches."""
    first = [
        next((at for at, p in enumerate(order) if re.search(p, leaf.path)), None)
        for leaf in leaves
    ]
    for at, pattern in enumerate(order):
        if at not in first:
            matches = [leaf.path for leaf in leaves if re.search(pattern, leaf.path)]
            reason = "no path matches it"
            if matches:
                reason = (
                    f"'{matches[0]}' belongs to an earlier pattern; end names with "
                    '"/", as in "blocks/1/"'
                )
            raise ValueError(f"Pattern {pattern!r} of `order` has no leaf: {reason}.")
    for i in indices:
        if first[i] is None:
            raise ValueError(
                f"No pattern of `order` matches leaf '{leaves[i].path}': add one, or "
                "leave the leaf out by the rule."
            )
    return {i: first[i] for i in indices}
