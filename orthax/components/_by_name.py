"""The default rule: Flax and Haiku parameters, by their names and ranks."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from orthax._repr import concise
from orthax.components._kernels import attention_cut as attention_cut
from orthax.components._matricisation import Matricisation
from orthax.components._names import by_name, unwrapped
from orthax.components._rule import Decision, checked_patterns, match, not_found

ATTENTION_CUTS = ("whole", "per_head", "heads")


@dataclasses.dataclass(frozen=True)
class ByName:
    """The default rule: Flax (NNX, Linen) and Haiku parameters by name and rank.

    Depending on the names of their modules, `kernel` and `w` are dense at rank 2,
    attention or a Conv1d at rank 3, a convolution at rank 4 or 5, if the shape allows
    it; otherwise they raise. Biases, norms, embeddings, tables, depthwise kernels and
    leaves of rank below 2 are left alone. The gates of Haiku's and Keras's recurrent
    cells are blocks. Any other leaf of rank 2 is a matrix, as in the paper. Decisions
    that the name does not settle are marked as guesses. `orthax.explain` shows them.

    Attributes:
      attention: matrices of attention kernels. `"whole"`: query (D, H, K) is one matrix
        D x HK, out (H, K, D) is HK x D. `"per_head"`: H matrices D x K and K x D.
        `"heads"`: a head is a component, DK x H and KD x H, the paper's reading of its
        Section 1.
      stacked: sub-trees whose leaves have a scan or vmap axis, by name (axis 0) or as a
        pair (name, axis). A name matches a component of the path, or several joined by
        `"/"`. If several match, the outermost comes first.
      skip: sub-trees or leaves to leave alone, named in the same way.
      overrides: pairs of a regular expression and a `Matricisation` or None, as in
        `ByPath`. They come first and refer to the whole leaf, stacked axes included.
      unmatched: `"raise"` or `"ignore"`: what `components.resolve`, and so `init`,
        does about names in `stacked`, `skip` and `overrides` that match no path.

    Raises:
      ValueError: for an unknown `attention` or `unmatched`, or an invalid expression;
        from `resolve`, for a leaf whose name and shape do not determine its axes, or a
        kernel that `stacked` leaves with fewer than two.
      TypeError: if `stacked` or `skip` are not names, or `overrides` not pairs.

    Limits:
      Names do not determine everything. Depthwise and grouped kernels look like plain
      ones and are one matrix, as are fused outputs (marked as a guess below the usual
      names, `qkv`), unless a module's name says otherwise. `from_function` and
      `from_model` know them; `overrides` sets them by hand.

    Example:
      >>> import jax
      >>> from orthax import components
      >>> rule = components.ByName(stacked=("layers",))
      >>> leaf = jax.ShapeDtypeStruct((12, 64, 256), "float32")
      >>> cut = rule.resolve("layers/mlp/kernel", leaf)
      >>> cut.rows, cut.columns
      ((1,), (2,))
    """

    _: dataclasses.KW_ONLY
    attention: str = "whole"
    stacked: Sequence[str | tuple[str, int]] = ()
    skip: Sequence[str] = ()
    overrides: Sequence[tuple[str, Matricisation | None]] = ()
    unmatched: str = "raise"

    def __post_init__(self):
        check_attention(self.attention)
        if self.unmatched not in ("raise", "ignore"):
            raise ValueError(
                f'`unmatched` must be "raise" or "ignore", got {self.unmatched!r}.'
            )
        stacked = tuple(
            (entry, 0) if isinstance(entry, str) else tuple(entry)
            for entry in _names("stacked", self.stacked, pairs=True)
        )
        object.__setattr__(self, "stacked", stacked)
        object.__setattr__(self, "skip", _names("skip", self.skip))
        object.__setattr__(self, "overrides", checked_patterns(self.overrides))

    def __repr__(self) -> str:
        """Return the expression that makes it, without defaults."""
        return concise(self)

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the matricisation of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the decision on the leaf at `path`, with the reason."""
        decision = match(self.overrides, path, leaf)
        if decision is not None:
            return decision
        parts = _parts(path)
        if any(_position(name, parts) is not None for name in self.skip):
            return Decision(None, "skipped by name")
        axes = self._unstacked(path, parts, len(leaf.shape))
        decision = by_name(parts, [leaf.shape[axis] for axis in axes], self.attention)
        if isinstance(decision, str):
            raise ValueError(_ambiguous(path, leaf, decision))
        cut = decision.cut
        if cut is None:
            return decision
        rows, columns, spatial = (
            tuple(sorted(axes[axis] for axis in part))
            for part in (cut.rows, cut.columns, cut.spatial)
        )
        cut = dataclasses.replace(cut, rows=rows, columns=columns, spatial=spatial)
        return decision._replace(cut=cut)

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return the names that are in none of the paths, for `explain`."""
        split_paths = [_parts(path) for path in paths]
        names = [("skip", name) for name in self.skip]
        names += [("stacked", name) for name, _ in self.stacked]
        return tuple(
            f"{kind} {name!r}"
            for kind, name in names
            if all(_position(name, parts) is None for parts in split_paths)
        ) + not_found(self.overrides, paths)

    def _unstacked(self, path: str, parts: list[str], ndim: int) -> list[int]:
        """Return the axes that remain without the declared scan axes."""
        matches = [(_position(name, parts), name, axis) for name, axis in self.stacked]
        axes = list(range(ndim))
        for _, name, axis in sorted(m for m in matches if m[0] is not None):
            if not -len(axes) <= axis < len(axes):
                raise ValueError(
                    f"`stacked` says that leaves below {name!r} have a stacked axis "
                    f"{axis}, but leaf '{path}' has rank {ndim}: correct the axis "
                    f"(stacked=(({name!r}, 0),) is the first), or name a smaller "
                    "sub-tree."
                )
            axes.pop(axis)
        if len(axes) < 2 <= ndim and unwrapped(parts)[-1] in ("kernel", "w"):
            raise ValueError(
                f"Leaf '{path}' of rank {ndim} has fewer than two axes without "
                f"stacked={self.stacked!r}, so it is not a matrix: name a smaller "
                "sub-tree, or skip the leaf."
            )
        return axes


def check_attention(attention: str) -> None:
    """Raise unless `attention` is a known option."""
    if attention not in ATTENTION_CUTS:
        raise ValueError(
            f"`attention` must be one of {ATTENTION_CUTS}, got {attention!r}."
        )


def _parts(path: str) -> list[str]:
    """Return the components of a path, also of Haiku's flat and dotted ones."""
    return [part for part in re.split(r"[/~.]+", path) if part] or [""]


def _position(name: str, parts: list[str]) -> int | None:
    """Return the index in `parts` at which the components of `name` start, or None."""
    names = _parts(name)
    for i in range(len(parts) - len(names) + 1):
        if parts[i : i + len(names)] == names:
            return i
    return None


def _names(name: str, value: Any, *, pairs: bool = False) -> tuple:
    """Return names, or also pairs of a name and an axis, as a tuple, or raise."""

    def fits(entry: Any) -> bool:
        is_pair = pairs and isinstance(entry, tuple | list)
        return isinstance(entry, str) or (
            is_pair and [type(part) for part in entry] == [str, int]
        )

    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_sequence or not all(map(fits, value)):
        example = f"{name}=('head',)" + " or stacked=(('layers', 0),)" * pairs
        raise TypeError(
            f"`{name}` must be a sequence of names, such as {example}, got {value!r}."
        )
    return tuple(value)


def _ambiguous(path: str, leaf: Any, why: str) -> str:
    modules = ", components.from_model(model) from NNX and Equinox modules"
    is_haiku = _parts(path)[-1] == "w"
    return (
        f"Leaf '{path}' of shape {tuple(leaf.shape)} is ambiguous: {why}. "
        "components.from_function(model.apply, params, x) reads its axes from the "
        f"program{'' if is_haiku else modules}. Or write components.ByName(stacked="
        "(...,)) for a scan or vmap axis, ByName(overrides=[(regex, Matricisation("
        "rows, columns))]) to give the axes, ByName(skip=(...,)) to leave it alone."
    )
