"""Rules, which say what axes of a leaf form matrices, and rules made of patterns."""

import dataclasses
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from orthax.components._by_tree import ByTree, is_entry
from orthax.components._matricisation import Decision, Matricisation


@runtime_checkable
class Rule(Protocol):
    """Which axes of each leaf form matrices: a frozen dataclass, never a callable.

    A rule of your own is a frozen dataclass with this method. A leaf is anything with a
    `shape` and a `dtype` (an array, a tracer, a `jax.ShapeDtypeStruct`), floating or
    complex, of rank 2 or more; `path` is its path in the tree joined by `"/"`, without
    the `.value` that NNX appends in some places.
    """

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the matricisation of a leaf, or None to leave the leaf alone.

        Raises:
          ValueError: if the leaf is ambiguous; the message names the path and what to
            write instead.
        """
        ...


def decide(rule: Rule, path: str, leaf: Any) -> Decision:
    """Return a rule's decision on a leaf, with the reason if the rule gives one."""
    if hasattr(rule, "decide"):
        return rule.decide(path, leaf)
    return Decision(rule.resolve(path, leaf), type(rule).__name__)


# A tree may also be a module or a class of your own: see `ByTree`.
RuleOrTree = Rule | Mapping[Any, Any] | Sequence[Any]


def check_rule(rule: RuleOrTree) -> Rule:
    """Return a rule; a tree becomes a `ByTree`.

    Args:
      rule: a rule, or a tree as in `ByTree`.

    Returns:
      The rule, or a `ByTree`, hashable and frozen whatever the tree consists of.

    Raises:
      TypeError: if it is neither: a class, a callable, or without `resolve`.
      ValueError: if a tree has two entries for one path.
    """
    # `repr` of a tree or a model, which end up here too, can be endless.
    shown = rule if isinstance(rule, type) else reprlib.repr(rule)
    got = f"`rule` must be a rule such as components.ByName(), got {shown}"
    if isinstance(rule, type):
        raise TypeError(f"{got}: a class; write {rule.__name__}().")
    if not isinstance(rule, Rule):
        got = f"{got} of type {type(rule).__name__}.{_advice(rule)}"
        if is_entry(rule) or jax.tree_util.all_leaves([rule]):
            raise TypeError(got)
        try:
            return ByTree(rule)
        except TypeError as error:
            raise TypeError(f"{got} {error}") from None
    if callable(rule):
        raise TypeError(
            f"{got}, which is callable: optax.inject_hyperparams would take it for a "
            "schedule. Make it a frozen dataclass with a method `resolve`."
        )
    return rule


def _advice(rule: Any) -> str:
    """Return what to write instead of the most common mistakes."""
    if rule is None:
        return " Leave it out for the default; to leave leaves alone: ByName(skip=...)."
    if is_entry(rule):
        cut = ByTree(rule).cuts[0][1]
        return f' For all leaves: components.ByPath([("", {cut!r})]).'
    if hasattr(rule, "flops"):
        return " This is a polar method: pass it as `method=`."
    if isinstance(rule, list | tuple):
        return " For a list of patterns use components.ByPath([...])."
    if getattr(rule, "__name__", "") in ("from_model", "from_function"):
        return f" Call it: components.{rule.__name__}(...)."
    if callable(rule):
        return (
            " For a model, use components.from_model(model); for a forward pass, "
            "components.from_function(apply, params, x); call a function that returns "
            "a tree first; a rule of your own is a frozen dataclass with the method "
            "`resolve(path, leaf)`."
        )
    return ""


@dataclasses.dataclass(frozen=True)
class ByPath:
    """A list of patterns of paths, of which the first match decides.

    Attributes:
      patterns: pairs of a regular expression and a `Matricisation`, or None to leave
        the leaf alone. The first pattern found anywhere in the path (`re.search`)
        decides. Every leaf of rank 2 or more must be covered.

    Raises:
      ValueError: for an invalid expression; from `resolve`, for a leaf that no pattern
        covers or whose rank does not fit its `Matricisation`.
      TypeError: if `patterns` is not a sequence of such pairs.

    Example:
      >>> from orthax import components
      >>> rule = components.ByPath([
      ...     ("bias|embed", None),
      ...     ("depthwise", None),
      ...     ("qkv/kernel", components.Matricisation((0,), (1,), blocks=3)),
      ...     ("kernel", components.Matricisation(range(-4, -1), (-1,))),
      ... ])
      >>> import jax
      >>> leaf = jax.ShapeDtypeStruct((3, 3, 8, 16), "float32")
      >>> rule.resolve("conv/kernel", leaf).rows
      (0, 1, 2)
    """

    patterns: Sequence[tuple[str, Matricisation | None]]

    def __post_init__(self):
        object.__setattr__(self, "patterns", checked_patterns(self.patterns))

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return what the first matching pattern gives."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the decision, with the pattern that gave it as the reason."""
        decision = match(self.patterns, path, leaf)
        if decision is None:
            raise ValueError(
                f"No pattern of ByPath covers leaf '{path}' of shape {leaf.shape}: add "
                f"({re.escape(path)!r}, Matricisation(rows=..., columns=...)), or None "
                "instead of the Matricisation to leave it alone."
            )
        return decision

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return the patterns that match none of the paths, for `explain`."""
        return not_found(self.patterns, paths)


def match(
    patterns: Sequence[tuple[str, Matricisation | None]], path: str, leaf: Any
) -> Decision | None:
    """Return the decision of the first pattern found in `path`, or None."""
    for pattern, cut in patterns:
        if re.search(pattern, path):
            reason = f"pattern {pattern!r}"
            if cut is None:
                return Decision(None, reason)
            try:
                return Decision(cut.on(len(leaf.shape)), reason)
            except ValueError as error:
                raise ValueError(
                    f"Pattern {pattern!r} covers leaf '{path}' of shape {leaf.shape}, "
                    f"but {error}"
                ) from None
    return None


def not_found(
    patterns: Sequence[tuple[str, Matricisation | None]], paths: Sequence[str]
) -> tuple[str, ...]:
    """Return the patterns that match none of the paths."""
    return tuple(
        f"pattern {pattern!r}"
        for pattern, _ in patterns
        if not any(re.search(pattern, path) for path in paths)
    )


def checked_patterns(
    patterns: Sequence[tuple[str, Matricisation | None]],
) -> tuple[tuple[str, Matricisation | None], ...]:
    """Return the patterns as a tuple, or raise for the first malformed one."""
    if isinstance(patterns, str | dict) or not isinstance(patterns, Sequence):
        raise TypeError(
            "Patterns must be a sequence of pairs (regular expression, Matricisation "
            f"or None), such as [('kernel', None)], got {patterns!r}."
        )
    pairs = []
    for entry in patterns:
        pattern, cut = (
            entry if isinstance(entry, tuple | list) and len(entry) == 2 else (None, 0)
        )
        if not isinstance(pattern, str) or not isinstance(cut, Matricisation | None):
            raise TypeError(
                "Patterns must be pairs (regular expression, Matricisation or None), "
                f"such as ('kernel', Matricisation((0,), (1,))), got {entry!r}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Pattern {pattern!r} is not a regular expression: {error}. It is "
                "found anywhere in the path; any characters are '.*', not '*'."
            ) from None
        pairs.append((pattern, cut))
    return tuple(pairs)


@dataclasses.dataclass(frozen=True)
class OnlyConvolutions:
    """The convolutions of another rule; all other leaves are left alone.

    The paper uses this in Barlow Twins, whose dense layers are too large for an SVD.

    Attributes:
      rule: the other rule, which must mark convolutions by `Matricisation.spatial`, as
        `ByName` and `from_model` do.

    Raises:
      TypeError: if `rule` is not a rule.

    Example:
      >>> import jax
      >>> from orthax import components
      >>> rule = components.OnlyConvolutions(components.ByName())
      >>> leaf = jax.ShapeDtypeStruct((8, 16), "float32")
      >>> rule.resolve("dense/kernel", leaf) is None
      True

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 2.3.5.
    """

    rule: Rule

    def __post_init__(self):
        object.__setattr__(self, "rule", check_rule(self.rule))

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the matricisation of the leaf at `path`, if it is a convolution."""
        return self.decide(path, leaf).cut

    @property
    def unmatched(self) -> str:
        """What the other rule does with names that are in no path."""
        return getattr(self.rule, "unmatched", "ignore")

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the other rule that are in none of the paths."""
        return self.rule.unused(paths) if hasattr(self.rule, "unused") else ()

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the decision on the leaf at `path`, with the reason."""
        decision = decide(self.rule, path, leaf)
        if decision.cut is not None and not decision.cut.spatial:
            return Decision(None, f"not a convolution: {decision.reason}")
        return decision
