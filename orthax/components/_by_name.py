"""The default rule: Flax and Haiku parameters, by their names and ranks."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from orthax.components._kernels import attention_cut as attention_cut
from orthax.components._matricisation import Matricisation
from orthax.components._names import by_name, unwrapped
from orthax.components._rule import Decision, checked_patterns, match, not_found

ATTENTION_CUTS = ("whole", "per_head", "heads")


@dataclasses.dataclass(frozen=True)
class ByName:
    """Cut Flax (NNX, Linen) and Haiku parameters by name and rank. The default.

    Below modules with the names that people give them, `kernel` and `w` are dense at
    rank 2, attention or a Conv1d at rank 3, a convolution at rank 4 or 5, if their
    shape can be that; else they raise. Biases, norms, embeddings, tables, depthwise
    kernels and everything of rank below 2 are left alone. The gates of Haiku's and
    Keras's recurrent cells are blocks. Any other leaf of rank 2 is taken for a matrix,
    the paper's rule; what a name does not settle is marked as a guess.
    `orthax.explain` shows what comes of it.

    Attributes:
      attention: how the kernels of attention are cut. `"whole"`: query (D, H, K) as
        one matrix D x HK, out (H, K, D) as HK x D. `"per_head"`: H matrices D x K and
        K x D. `"heads"`: a head is a component, DK x H and KD x H, the paper's reading
        of its Section 1.
      stacked: sub-trees whose leaves carry a scan or vmap axis, by name (axis 0) or as
        a pair (name, axis). A name matches a component of the path, or several joined
        by `"/"`. Where several match, the outermost comes first.
      skip: sub-trees or leaves to leave alone, named in the same way.
      overrides: pairs of a regular expression and a `Matricisation` or None, as in
        `ByPath`. They come first and mean the leaf as it is, stacked axes included.
      unmatched: `"raise"` or `"ignore"`: what `components.resolve`, and so `init`,
        does with names in `stacked`, `skip` and `overrides` that are in no path.

    Raises:
      ValueError: for an unknown `attention` or `unmatched`, or an invalid expression;
        from `resolve`, for a leaf whose name and shape do not tell its axes, or a
        kernel that `stacked` leaves with fewer than two.
      TypeError: if `stacked` or `skip` are not made of names, `overrides` not of pairs.

    Limits:
      Names cannot tell everything. A depthwise or grouped kernel looks like a plain
      one and is cut whole, fused outputs likewise (marked as a guess below the usual
      names, `qkv`), unless a module's name says otherwise; `from_function` and
      `from_model` know them, `overrides` can be told.

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
        stacked = []
        for entry in _sequence("stacked", self.stacked):
            pair = (entry, 0) if isinstance(entry, str) else entry
            if not (
                isinstance(pair, Sequence)
                and [type(part) for part in pair] == [str, int]
            ):
                advice = ""
                if [type(part) for part in self.stacked] == [str, int]:
                    advice = f" For one pair write stacked=({tuple(self.stacked)!r},)."
                raise TypeError(
                    f"`stacked` holds names or pairs (name, axis), got {entry!r}."
                    f"{advice}"
                )
            stacked.append(tuple(pair))
        skip = _sequence("skip", self.skip)
        if not all(isinstance(name, str) for name in skip):
            raise TypeError(f"`skip` holds names, got {self.skip!r}.")
        object.__setattr__(self, "stacked", tuple(stacked))
        object.__setattr__(self, "skip", tuple(skip))
        object.__setattr__(self, "overrides", checked_patterns(self.overrides))

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the cut of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        found = match(self.overrides, path, leaf)
        if found is not None:
            return found
        parts = _parts(path)
        if any(_position(name, parts) is not None for name in self.skip):
            return Decision(None, "skipped by name")
        axes = self._unstacked(path, parts, len(leaf.shape))
        found = by_name(parts, [leaf.shape[axis] for axis in axes], self.attention)
        if isinstance(found, str):
            raise ValueError(_ambiguous(path, leaf, found))
        if found.cut is None:
            return found
        rows, columns, spatial = (
            tuple(sorted(axes[axis] for axis in part))
            for part in (found.cut.rows, found.cut.columns, found.cut.spatial)
        )
        cut = dataclasses.replace(
            found.cut, rows=rows, columns=columns, spatial=spatial
        )
        return found._replace(cut=cut)

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return which of the names given are in none of the paths, for `explain`."""
        parts = [_parts(path) for path in paths]
        names = [("skip", name) for name in self.skip]
        names += [("stacked", name) for name, _ in self.stacked]
        return tuple(
            f"{kind} {name!r}"
            for kind, name in names
            if all(_position(name, own) is None for own in parts)
        ) + not_found(self.overrides, paths)

    def _unstacked(self, path: str, parts: list[str], ndim: int) -> list[int]:
        """Return the axes that are left when the declared scan axes are taken out."""
        found = [(_position(name, parts), name, axis) for name, axis in self.stacked]
        axes = list(range(ndim))
        for _, name, axis in sorted(f for f in found if f[0] is not None):
            if not -len(axes) <= axis < len(axes):
                raise ValueError(
                    f"`stacked` says that leaves below {name!r} carry a stacked axis "
                    f"{axis}, but leaf '{path}' has rank {ndim}: correct the axis, or "
                    "name a smaller sub-tree."
                )
            axes.pop(axis)
        if len(axes) < 2 <= ndim and unwrapped(parts)[-1] in ("kernel", "w"):
            raise ValueError(
                f"Leaf '{path}' of rank {ndim} is left with fewer than two axes by "
                f"stacked={self.stacked!r}, so that it would be no matrix: name a "
                "smaller sub-tree, or skip the leaf."
            )
        return axes


def check_attention(attention: str) -> None:
    """Raise unless `attention` names a cut."""
    if attention not in ATTENTION_CUTS:
        raise ValueError(
            f"`attention` must be one of {ATTENTION_CUTS}, got {attention!r}."
        )


def _parts(path: str) -> list[str]:
    """Return the components of a path; Haiku's, flat and dotted ones included."""
    return [part for part in re.split(r"[/~.]+", path) if part] or [""]


def _position(name: str, parts: list[str]) -> int | None:
    """Return where the components of `name` stand in a row in `parts`."""
    wanted = _parts(name)
    for i in range(len(parts) - len(wanted) + 1):
        if parts[i : i + len(wanted)] == wanted:
            return i
    return None


def _sequence(name: str, value: Any) -> Sequence:
    if isinstance(value, str) or not isinstance(value, Sequence):
        advice = f" Write {name}=({value!r},)." if isinstance(value, str) else ""
        raise TypeError(f"`{name}` must be a sequence of names, got {value!r}.{advice}")
    return value


def _ambiguous(path: str, leaf: Any, why: str) -> str:
    modules = ", components.from_model(model) off NNX and Equinox modules"
    is_haiku = _parts(path)[-1] == "w"
    return (
        f"Leaf '{path}' of shape {tuple(leaf.shape)} is ambiguous: {why}. Say what it "
        "is: components.from_function(model.apply, params, x) reads it off the program"
        f"{'' if is_haiku else modules}. Or write components.ByName(stacked=(...,)) "
        "for a scan or vmap axis, ByName(overrides=[(regex, Matricisation(rows, "
        "columns))]) for its axes, ByName(skip=(...,)) to leave it alone."
    )
