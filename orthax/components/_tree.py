"""A tree read leaf by leaf: paths, which leaves can be cut, and how they are."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orthax.components._matricisation import Decision, Matricisation
from orthax.components._paths import path_string
from orthax.components._rule import Rule, RuleOrTree, check_rule, decide

_SHOWN = 10


class Leaf(NamedTuple):
    """One leaf of a tree, and how a rule cuts it.

    Attributes:
      path: its path, joined by "/".
      value: the leaf itself.
      cut: the axes, or None for a leaf that is left alone.
    """

    path: str
    value: Any
    cut: Matricisation | None


class Decided(NamedTuple):
    """One leaf of a tree with a rule's decision, or the error that it raised."""

    path: str
    value: Any
    decision: Decision | None
    error: str | None


def resolve(tree: Any, rule: RuleOrTree) -> list[Leaf]:
    """Return every leaf of a tree with its cut, in the order of `jax.tree.leaves`.

    Args:
      tree: arrays, or anything with a shape and a dtype.
      rule: how leaves are cut; a rule, or a tree of cuts as in `ByTree`.

    Returns:
      One `Leaf(path, value, cut)` for each leaf; `cut` is None where it is left alone.

    Raises:
      ValueError: if the rule cannot decide a leaf (all such leaves are named), a cut
        does not fit its leaf, the rule names what is in no path (unless parts of the
        tree are hidden by `optax.masked`, or the rule says `unmatched="ignore"`), or
        the tree has floating leaves of rank 2 or more and none of them is cut.
      TypeError: if `rule` is not a rule or a leaf is not an array.

    Limits:
      Leaves that are not floating or complex (integers, PRNG keys, `float0`), of rank
      below 2, of size one or empty are never shown to the rule, and never cut.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
      >>> for path, _, cut in components.resolve(params, components.ByName()):
      ...     print(path, cut and (cut.rows, cut.columns))
      dense/bias None
      dense/kernel ((0,), (1,))
    """
    rule = check_rule(rule)
    decided = decide_all(tree, rule)
    errors = [leaf.error for leaf in decided if leaf.error]
    unmatched = _unmatched(tree, rule)
    if errors or unmatched:
        lines = [in_one_message(errors)] if errors else []
        raise ValueError("\n".join(lines + unmatched))
    asked = [leaf for leaf in decided if can_be_cut(leaf.value)]
    if asked and not any(leaf.decision.cut for leaf in asked):
        shown = ", ".join(f"'{leaf.path}' {leaf.value.shape}" for leaf in asked[:3])
        raise ValueError(
            f"{rule!r} cuts no leaf of this tree, so nothing would be done. It has "
            f"{len(asked)} leaves of rank 2 or more, among them {shown}: say with "
            "components.ByPath([...]) or components.from_model(model) which are "
            "matrices, or leave the tree out with optax.masked."
        )
    return [Leaf(leaf.path, leaf.value, leaf.decision.cut) for leaf in decided]


def _unmatched(tree: Any, rule: Rule) -> list[str]:
    """Return what is wrong with names of a rule that are in no path of a whole tree."""
    if getattr(rule, "unmatched", "ignore") != "raise":
        return []
    is_hidden = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hidden)
    if any(isinstance(leaf, optax.MaskedNode) for _, leaf in leaves):
        return []  # a mask may hide what is named, and whole sub-trees
    paths = [path_string(path) for path, _ in leaves]
    unused = rule.unused(paths)
    if not (unused and paths):
        return []
    known = {"/".join(part) for path in paths for part in _sub_paths(path)}
    lines = []
    for name in unused:
        near = difflib.get_close_matches(name.partition(" ")[2].strip("'\""), known)
        near = f"; near it: {', '.join(map(repr, near))}" if near else ""
        lines.append(
            f"{name} of {type(rule).__name__} is in no path of this tree{near}."
        )
    advice = "orthax.explain(params, rule) lists the paths."
    if hasattr(getattr(rule, "rule", rule), "skip"):
        advice = (
            f"{advice} Names match whole components of them. For trees that need not "
            'have them: unmatched="ignore".'
        )
    return [*lines, advice]


def _sub_paths(path: str) -> list[list[str]]:
    """Return the runs of components of a path, up to three and the whole."""
    parts = path.split("/")
    starts = range(len(parts))
    return [parts] + [parts[i : i + n] for i in starts for n in (1, 2, 3)]


def in_one_message(errors: Sequence[str]) -> str:
    """Return the errors of several leaves as one message.

    Args:
      errors: the messages that a rule raised, one for each leaf.

    Returns:
      A line for each of the first ten, and how many there are besides; of more than
      ten, those whose paths differ in numbers alone are one. The sentences that all of
      them end with, the advice, follow once.

    Example:
      >>> from orthax.internal.components import in_one_message
      >>> errors = ["'a' is odd. Say what.", "'b' is odd. Say what."]
      >>> print(in_one_message(errors))
      'a' is odd.
      'b' is odd.
      Say what.
    """
    if len(errors) > _SHOWN:
        alike: dict[str, list[str]] = {}
        for error in errors:
            alike.setdefault(re.sub(r"\d+(?=[^' ]*')", "*", error), []).append(error)
        errors = [_one_of(same) for same in alike.values()]
    # Between the sentences of each, and of them the last that are the same.
    sentences = [re.split(r"(?<=\.) ", error) for error in errors]
    same = 0
    while len(errors) > 1 and all(len(own) > same + 1 for own in sentences):
        if len({own[-1 - same] for own in sentences}) > 1:
            break
        same += 1
    cut = [len(own) - same for own in sentences]
    lines = [" ".join(own[:n]) for own, n in zip(sentences, cut, strict=True)]
    more = len(lines) - _SHOWN
    rest = [f"... and {more} more kinds of leaves."] if more > 0 else []
    advice = [" ".join(sentences[0][cut[0] :])] if same else []
    return "\n".join(lines[:_SHOWN] + rest + advice)


def _one_of(errors: Sequence[str]) -> str:
    """Return the first of errors that are alike, and how many more there are."""
    if len(errors) == 1:
        return errors[0]
    return re.sub(
        r"('[^']*')", rf"\1 and {len(errors) - 1} like it", errors[0], count=1
    )


def decide_all(tree: Any, rule: RuleOrTree) -> list[Decided]:
    """Return every leaf with the rule's decision, or with the error it raised.

    What `resolve` does, without raising: for `explain`.

    Args:
      tree: arrays, or anything with a shape and a dtype.
      rule: how leaves are cut; a rule, or a tree of cuts as in `ByTree`.

    Raises:
      TypeError: if `rule` is not a rule or a leaf is not an array.
    """
    rule = check_rule(rule)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [_decided(path_string(path), leaf, rule) for path, leaf in leaves]


def _decided(path: str, leaf: Any, rule: Rule) -> Decided:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        if isinstance(leaf, bool | int | float | complex):
            return Decided(path, leaf, Decision(None, "a scalar"), None)
        what = f"Leaf '{path}'" if path else "The tree"
        raise TypeError(
            f"{what} is {_shown(leaf)} of type {type(leaf).__name__}, not an array: "
            "pass the parameters alone (nnx.state(model, nnx.Param), "
            "variables['params'], or eqx.filter(model, eqx.is_inexact_array))."
        )
    if not can_be_cut(leaf):
        return Decided(path, leaf, Decision(None, _why_not(leaf)), None)
    try:
        decision = decide(rule, path, leaf)
        if decision.cut is not None:
            decision = decision._replace(cut=decision.cut.on(len(leaf.shape)))
            decision.cut.matrices(leaf.shape)
    except ValueError as error:
        message = str(error)
        if f"'{path}'" not in message:
            message = f"Leaf '{path}' of shape {tuple(leaf.shape)}: {message}"
        return Decided(path, leaf, None, message)
    return Decided(path, leaf, decision, None)


def _shown(leaf: Any) -> str:
    """Return the beginning of what a leaf prints: a module may print a page."""
    text = repr(leaf)
    short = len(text) < 80 and "\n" not in text
    return text if short else " ".join(reprlib.repr(leaf).split())


def can_be_cut(leaf: Any) -> bool:
    """Return whether a rule is asked about a leaf."""
    return hasattr(leaf, "shape") and _why_not(leaf) is None


def _why_not(leaf: Any) -> str | None:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return f"dtype {leaf.dtype}"
    if len(leaf.shape) < 2:
        return "rank below 2"
    size = np.prod(leaf.shape)
    if size < 2:
        return "empty" if size == 0 else "size one"
    return None
