"""Which leaves are factorised, and to which layer each belongs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from orthax import components

Order = Sequence[str] | None


def check_order(order: Order, config_needs: Mapping[str, Any]) -> None:
    """Raise unless `order` is one, or none is needed.

    Args:
      order: patterns, from the input to the output.
      config_needs: settings that need an order where they are not false, by name.
    """
    asked = [f"{name}={value}" for name, value in config_needs.items() if value]
    if order is None:
        if asked:
            raise ValueError(
                f"{', '.join(asked)} needs the order of the layers, which a tree does "
                "not have: give `order`, patterns of paths from the input to the "
                'output, such as order=("stem", "blocks/0/", "blocks/1/", "head").'
            )
        return
    patterns = isinstance(order, Sequence) and not isinstance(order, str)
    if not patterns or not order or not all(isinstance(p, str) for p in order):
        raise TypeError(
            "`order` must be a sequence of patterns of paths, from the input to the "
            f"output, got {order!r}."
        )
    for pattern in order:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Pattern {pattern!r} of `order` is no regular expression: {error}."
            ) from None


def chosen(
    leaves: Sequence[components.Leaf],
    *,
    min_aspect: float,
    keep_first: bool,
    keep_last: bool,
    order: Order,
    ranks: int | Mapping[str, Any] | None,
) -> dict[int, int | None]:
    """Return the places of the leaves to factorise, each with its layer.

    Layers are counted from the input, and only those with a leaf to factorise.
    """
    check_order(order, {"keep_first": keep_first, "keep_last": keep_last})
    check_paths(leaves)
    named = isinstance(ranks, Mapping)
    eligible = _named(leaves, ranks) if named else _eligible(leaves, min_aspect)
    places: dict[int, int | None] = dict.fromkeys(eligible)
    if order is not None:
        found = _patterns(leaves, order, eligible)
        kept = {0 if keep_first else None, len(order) - 1 if keep_last else None}
        found = {i: at for i, at in found.items() if named or at not in kept}
        numbers = {at: k for k, at in enumerate(sorted(set(found.values())))}
        places = {i: numbers[at] for i, at in found.items()}
    if not places:
        shown = ", ".join(
            f"'{leaf.path}' {tuple(leaf.value.shape)}" for leaf in leaves if leaf.cut
        )
        raise ValueError(
            f"No leaf is left to factorise. The rule cuts {shown}; min_aspect="
            f"{min_aspect}, keep_first={keep_first}, keep_last={keep_last} and `ranks` "
            "leave all of them as they are."
        )
    return places


def check_paths(leaves: Sequence[components.Leaf]) -> None:
    """Raise if two leaves that are cut have one path."""
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.path in seen and leaf.cut:
            raise ValueError(f"Two leaves have the path '{leaf.path}': rename one.")
        seen.add(leaf.path)


def checked_ranks(
    ranks: int | Mapping[str, Any] | None, path: str, sides: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the ranks that a leaf is to have, one for each of its stacks.

    One number for all leaves is a wish, and short sides may be below it; ranks that
    are named by path must fit.
    """
    if ranks is None:
        return sides
    named = isinstance(ranks, Mapping)
    wanted = ranks[path] if named else ranks
    each = wanted if isinstance(wanted, tuple | list) else (wanted,) * len(sides)
    for rank in each:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"`ranks` for '{path}' must be integers, got {wanted!r}.")
    pairs = list(zip(each, sides, strict=False))
    if len(each) != len(sides) or any(r < 1 or (named and r > k) for r, k in pairs):
        raise ValueError(
            f"`ranks` gives {wanted} for '{path}'; its matrices have ranks from 1 to "
            f"{sides[0] if len(sides) == 1 else sides}. Are they the ranks of another "
            "model?"
        )
    return tuple(min(r, k) for r, k in pairs)


def _eligible(leaves: Sequence[components.Leaf], min_aspect: float) -> list[int]:
    """Return the places of the leaves whose matrices are all square enough."""
    shapes = {
        i: leaf.cut.matrices(leaf.value.shape)
        for i, leaf in enumerate(leaves)
        if leaf.cut
    }
    return [
        i
        for i, each in shapes.items()
        if all(min(m, n) > min_aspect * max(m, n) for _, m, n in each)
    ]


def _named(leaves: Sequence[components.Leaf], ranks: Mapping[str, Any]) -> list[int]:
    """Return the places of the leaves that `ranks` names."""
    places = {leaf.path: i for i, leaf in enumerate(leaves) if leaf.cut}
    unknown = [path for path in ranks if path not in places]
    if unknown:
        raise ValueError(
            f"`ranks` names '{unknown[0]}', which is no leaf that the rule cuts. It "
            f"cuts {', '.join(map(repr, places))}. Are they the ranks of another model?"
        )
    return sorted(places[path] for path in ranks)


def _patterns(
    leaves: Sequence[components.Leaf], order: Sequence[str], eligible: Sequence[int]
) -> dict[int, int]:
    """Return which pattern of `order` each eligible leaf belongs to: the first."""
    first = [
        next((at for at, p in enumerate(order) if re.search(p, leaf.path)), None)
        for leaf in leaves
    ]
    for at, pattern in enumerate(order):
        if at not in first:
            taken = [leaf.path for leaf in leaves if re.search(pattern, leaf.path)]
            why = "it is found in no path"
            if taken:
                why = (
                    f"'{taken[0]}' belongs to an earlier pattern already; end names "
                    'with "/", as in "blocks/1/"'
                )
            raise ValueError(f"Pattern {pattern!r} of `order` has no leaf: {why}.")
    for i in eligible:
        if first[i] is None:
            raise ValueError(
                f"`order` says nothing about leaf '{leaves[i].path}': add a pattern "
                "that is found in its path, or leave it out by the rule."
            )
    return {i: first[i] for i in eligible}
