"""The default rule: Flax and Haiku parameters, by their names and ranks."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from orthax.components._matricisation import Matricisation
from orthax.components._rule import Decision

ATTENTION_CUTS = ("whole", "per_head", "heads")
_PROJECTIONS = ("query", "key", "value", "out")
_KERNELS = ("kernel", "w")
_VECTORS = re.compile(
    r"(^|_)(bias|scale|offset|gamma|beta|mean|var|norm|negative_slope|A_log)$"
    r"|^(bias_.*|b|g|D)$"
)
_TABLES = re.compile(r"embed|^pos(ition)?(_|$)|(^|_)(cls|tokens?)(_|$)|^cls$", re.I)
# Linen writes the class into the names that it makes up.
_CONV_LOCAL = re.compile(r"^ConvLocal(_\d+)?$")


@dataclasses.dataclass(frozen=True)
class ByName:
    """Cut Flax (NNX, Linen) and Haiku parameters by name and rank. The default.

    `kernel` and `w` are dense at rank 2 and a convolution at rank 4 or 5; at rank 3
    attention below `query`, `key`, `value`, `out`, and ambiguous elsewhere. `lora_a`
    and `lora_b` are matrices. Biases, norms, embeddings, positional tables and
    everything of rank below 2 are left alone. Any other leaf of rank 2 is taken for a
    matrix, the paper's rule. `orthax.explain` shows what comes of it.

    Attributes:
      attention: how the kernels of attention are cut. `"whole"`: query (D, H, K) as
        one matrix D x HK, out (H, K, D) as HK x D. `"per_head"`: H matrices D x K and
        K x D. `"heads"`: a head is a component, DK x H and KD x H, the paper's reading
        of its Section 1.
      stacked: sub-trees whose leaves carry a scan or vmap axis, by name (axis 0) or as
        a pair (name, axis). A name matches a component of the path, or several joined
        by `"/"`. Where several match, the outermost comes first.
      skip: sub-trees or leaves to leave alone, named in the same way.

    Raises:
      ValueError: for an unknown `attention`; from `resolve`, for a leaf whose name and
        rank do not tell its axes.
      TypeError: if `stacked` or `skip` are not made of names.

    Limits:
      Names cannot tell everything. A depthwise or grouped kernel looks like a plain
      one and is cut whole, fused gates of recurrent cells likewise, unless a module's
      name says otherwise; `from_model` knows them, `ByPath` can be told.

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

    def __post_init__(self):
        check_attention(self.attention)
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

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the cut of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        parts = re.split(r"[/~]+", path)
        if any(_position(name, parts) is not None for name in self.skip):
            return Decision(None, "skipped by name")
        axes = self._unstacked(path, parts, len(leaf.shape))
        found = _by_name(parts, [leaf.shape[axis] for axis in axes], self.attention)
        if isinstance(found, str):
            raise ValueError(_ambiguous(path, leaf, found))
        if found.cut is None:
            return found
        rows, columns, spatial = (
            tuple(sorted(axes[axis] for axis in part))
            for part in (found.cut.rows, found.cut.columns, found.cut.spatial)
        )
        return found._replace(cut=Matricisation(rows, columns, spatial=spatial))

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return which of the names given are in none of the paths, for `explain`."""
        parts = [re.split(r"[/~]+", path) for path in paths]
        names = [("skip", name) for name in self.skip]
        names += [("stacked", name) for name, _ in self.stacked]
        return tuple(
            f"{kind} {name!r}"
            for kind, name in names
            if all(_position(name, own) is None for own in parts)
        )

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
        return axes


def _by_name(parts: list[str], shape: list[int], attention: str) -> Decision | str:
    """Decide by names and rank, stacked axes not counted, or say what is wrong."""
    name, rank = parts[-1], len(shape)
    if rank < 2:
        return Decision(None, "rank below 2")
    if _VECTORS.search(name):
        return Decision(None, f"{name!r} is a bias, a norm or another vector")
    if _TABLES.search(name):
        return Decision(None, f"{name!r} is an embedding or a table")
    if name in _KERNELS:
        return _kernel(parts, shape, attention)
    if name == "weight":
        return (
            "'weight' is what Equinox calls embeddings and layers alike, and "
            "components.from_model(model) tells apart"
        )
    if rank > 2:
        return f"the name {name!r} does not tell the axes of a leaf of rank {rank}"
    if name in ("lora_a", "lora_b"):
        return Decision(Matricisation((0,), (1,)), "LoRA factor")
    reason = f"any leaf of rank 2 ({name!r} is not a known name)"
    return Decision(Matricisation((0,), (1,)), reason, guess=True)


def _kernel(parts: list[str], shape: list[int], attention: str) -> Decision | str:
    rank, parent = len(shape), parts[-2] if len(parts) > 1 else ""
    if rank == 2:
        cut = Matricisation((0,), (1,))
        if parent in _PROJECTIONS and attention != "whole":
            reason = "dense kernel; if this is attention its heads are fused: cut whole"
            return Decision(cut, reason, guess=True)
        return Decision(cut, "dense kernel")
    if "depthwise" in parent.lower():
        return Decision(None, "depthwise convolution, by its module's name")
    if _CONV_LOCAL.search(parent):
        cut = Matricisation((rank - 2,), (rank - 1,))
        return Decision(cut, "unshared convolution, by its module's name")
    if parts[-1] == "w" and "transpose" in parent.lower():  # Haiku: (*taps, out, in)
        taps = tuple(range(rank - 2))
        cut = Matricisation((*taps, rank - 1), (rank - 2,), spatial=taps)
        return Decision(cut, "transposed convolution, by its module's name")
    if rank == 3:
        if parent not in _PROJECTIONS:
            return (
                "a kernel of rank 3 may be a Conv1d, a stacked Dense or a "
                "LinearGeneral, which look alike"
            )
        cut = attention_cut(parent == "out", attention)
        return Decision(cut, f"attention {parent}, {attention}")
    return _convolution(parent, shape)


def _convolution(parent: str, shape: list[int]) -> Decision | str:
    rank = len(shape)
    if parent in (*_PROJECTIONS, "qkv"):
        return f"a kernel of rank {rank} below {parent!r} is no convolution"
    if rank > 5:
        return f"a kernel of rank {rank} is no convolution that Flax or Haiku has"
    taps = tuple(range(rank - 2))
    cut = Matricisation((*taps, rank - 2), (rank - 1,), spatial=taps)
    if shape[-2] == 1:
        reason = "convolution kernel; one input channel, as depthwise kernels have"
        return Decision(cut, reason, guess=True)
    if rank == 5:
        reason = "3-d convolution kernel; stacked 2-d kernels look alike"
        return Decision(cut, reason, guess=True)
    return Decision(cut, "convolution kernel")


def attention_cut(is_out: bool, attention: str) -> Matricisation:
    """Return the cut of an attention kernel, (D, H, K), or (H, K, D) for `out`."""
    cuts = {
        "whole": (((0,), (1, 2)), ((0, 1), (2,))),
        "per_head": (((0,), (2,)), ((1,), (2,))),
        "heads": (((0, 2), (1,)), ((1, 2), (0,))),
    }
    return Matricisation(*cuts[attention][is_out])


def check_attention(attention: str) -> None:
    """Raise unless `attention` names a cut."""
    if attention not in ATTENTION_CUTS:
        raise ValueError(
            f"`attention` must be one of {ATTENTION_CUTS}, got {attention!r}."
        )


def _position(name: str, parts: list[str]) -> int | None:
    """Return where the components of `name` stand in a row in `parts`."""
    wanted = re.split(r"[/~]+", name)
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
    return (
        f"Leaf '{path}' of shape {tuple(leaf.shape)} is ambiguous: {why}. Say what it "
        f"is: components.ByName(stacked=(...,)) for a scan or vmap axis, "
        f"ByName(skip=(...,)) to leave it alone, components.ByPath([...]) for its "
        "axes, or components.from_model(model) for NNX and Equinox models."
    )
