"""What a rule is, and the rule that lists paths."""

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
    """Says how a leaf is cut into matrices; a frozen dataclass, never a callable.

    Write your own by giving a frozen dataclass this method. A leaf is anything with a
    `shape` and a `dtype` (an array, a tracer, a `jax.ShapeDtypeStruct`), floating or
    complex and of rank 2 or more; `path` is its path in the tree joined by `"/"`,
    without the `.value` that NNX appends in some places.
    """

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the cut of a leaf, or None to leave the leaf alone.

        Raises:
          ValueError: if the leaf is ambiguous; the message names the path and says
            what to write instead.
        """
        ...


def decide(rule: Rule, path: str, leaf: Any) -> Decision:
    """Return a rule's cut of a leaf, with the reason if the rule gives one."""
    if hasattr(rule, "decide"):
        return rule.decide(path, leaf)
    return Decision(rule.resolve(path, leaf), type(rule).__name__)


# A tree of cuts may also be a module or a class of one's own: see `ByTree`.
RuleOrTree = Rule | Mapping[Any, Any] | Sequence[Any]


def check_rule(rule: RuleOrTree) -> Rule:
    """Return a rule, made of a tree of cuts if it is one.

    Args:
      rule: a rule, or a tree as `ByTree` takes it.

    Returns:
      The rule, or a `ByTree`: hashable and frozen whatever the tree was made of.

    Raises:
      TypeError: if it is neither: a class, a callable, or without `resolve`.
      ValueError: if a tree has two entries of one path.
    """
    # Trees and models, which land here too, have endless ones.
    shown = rule if isinstance(rule, type) else reprlib.repr(rule)
    found = f"`rule` must be a rule such as components.ByName(), got {shown}"
    if isinstance(rule, type):
        raise TypeError(f"{found}: a class; write {rule.__name__}().")
    if not isinstance(rule, Rule):
        why = f"{found} of type {type(rule).__name__}."
        if is_entry(rule) or jax.tree_util.all_leaves([rule]):
            raise TypeError(f"{why}{_advice(rule)}")
        try:
            return ByTree(rule)
        except TypeError as error:
            raise TypeError(f"{why}{_advice(rule)} {error}") from None
    if callable(rule):
        raise TypeError(
            f"{found}, which is callable: optax.inject_hyperparams would take it for "
            "a schedule. Make it a frozen dataclass with a method `resolve`."
        )
    return rule


def _advice(rule: Any) -> str:
    """Return what to write instead of something that is no rule."""
    if rule is None:
        return " Leave it out for the default; to leave leaves alone: ByName(skip=...)."
    if is_entry(rule):
        return (
            f' For all leaves: components.ByPath([("", {ByTree(rule).cuts[0][1]!r})]).'
        )
    if hasattr(rule, "flops"):
        return " It says how polar factors are computed: write method=... before it."
    if hasattr(rule, "update") and hasattr(rule, "init"):
        return " A gradient transformation is none: give the rule that it was given."
    if isinstance(rule, list | tuple):
        return " For a list of patterns write components.ByPath([...])."
    if getattr(rule, "__name__", "") == "from_model":
        return " Call it with the model: components.from_model(model)."
    if callable(rule):
        return (
            " Of a model make one by components.from_model(model), of a function a "
            "frozen dataclass with a method `resolve(path, leaf)`; a function of the "
            "parameters that returns a tree of cuts is to be called first."
        )
    return ""


@dataclasses.dataclass(frozen=True)
class ByPath:
    """Cut every leaf as the first matching pattern says.

    Attributes:
      patterns: pairs of a regular expression and a `Matricisation`, or None to leave
        the leaf alone. The first pattern found anywhere in the path
        (`re.search`) decides. Every leaf of rank 2 or more must be covered.

    Raises:
      ValueError: for an invalid expression, or (from `resolve`) a leaf that no pattern
        covers or whose rank the matching cut does not fit.
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
        """Return the cut that the first matching pattern gives."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut and the pattern that gave it."""
        found = match(self.patterns, path, leaf)
        if found is None:
            raise ValueError(
                f"No pattern of ByPath covers leaf '{path}' of shape {leaf.shape}: add "
                f"({re.escape(path)!r}, Matricisation(rows=..., columns=...)), or None "
                "in place of the Matricisation to leave it alone."
            )
        return found

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return which patterns are found in none of the paths, for `explain`."""
        return not_found(self.patterns, paths)


def match(
    patterns: Sequence[tuple[str, Matricisation | None]], path: str, leaf: Any
) -> Decision | None:
    """Return what the first pattern found in `path` says, or None if there is none."""
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
    """Return the patterns that are found in none of the paths."""
    return tuple(
        f"pattern {pattern!r}"
        for pattern, _ in patterns
        if not any(re.search(pattern, path) for path in paths)
    )


def checked_patterns(
    patterns: Sequence[tuple[str, Matricisation | None]],
) -> tuple[tuple[str, Matricisation | None], ...]:
    """Return the patterns as a tuple, or raise at the first one that is malformed."""
    if isinstance(patterns, str | dict) or not isinstance(patterns, Sequence):
        advice = ""
        if isinstance(patterns, dict):
            advice = " Write the dict's items, in the order in which they are to be"
            advice += f" tried: {[*patterns.items()]!r}."
        raise TypeError(
            "Patterns must be a sequence of pairs (regular expression, Matricisation "
            f"or None), got {patterns!r}.{advice}"
        )
    if len(patterns) == 2 and isinstance(patterns[0], str):
        raise TypeError(
            "Patterns must be a sequence of pairs (regular expression, Matricisation "
            f"or None), got one pair alone: write [{tuple(patterns)!r}]."
        )
    pairs = []
    for i, entry in enumerate(patterns):
        fits = isinstance(entry, Sequence) and not isinstance(entry, str)
        if not fits or len(entry) != 2 or not isinstance(entry[0], str):
            raise TypeError(
                f"Pattern {i} is {entry!r}; expected a pair (regular expression, "
                "Matricisation or None)."
            )
        pattern, cut = entry
        if not (cut is None or isinstance(cut, Matricisation)):
            raise TypeError(
                f"Pattern {pattern!r} gives {cut!r} of type {type(cut).__name__}; "
                "expected a Matricisation, such as Matricisation((0,), (1,)), or None."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Pattern {pattern!r} is no regular expression: {error}. It is found "
                "anywhere in the path; for any characters write '.*', not '*'."
            ) from None
        pairs.append((pattern, cut))
    return tuple(pairs)


@dataclasses.dataclass(frozen=True)
class OnlyConvolutions:
    """Cut the convolutions that another rule cuts, and leave the rest alone.

    What the paper does in Barlow Twins, where dense layers are too large for an SVD.

    Attributes:
      rule: the rule that is asked, which must mark convolutions by
        `Matricisation.spatial`, as `ByName` and `from_model` do.

    Raises:
      TypeError: if `rule` is no rule.

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
        """Return the cut of the leaf at `path`, if it is a convolution."""
        return self.decide(path, leaf).cut

    @property
    def unmatched(self) -> str:
        """What becomes of names that no path has: what the rule that is asked says."""
        return getattr(self.rule, "unmatched", "ignore")

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return what the rule that is asked names and no path has."""
        return self.rule.unused(paths) if hasattr(self.rule, "unused") else ()

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        found = decide(self.rule, path, leaf)
        if found.cut is not None and not found.cut.spatial:
            return Decision(None, f"no convolution: {found.reason}")
        return found
