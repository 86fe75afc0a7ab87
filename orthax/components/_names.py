"""What the default rule knows by name."""

import re

from orthax.components._kernels import DENSE, heads, kernel, module_of, recurrent
from orthax.components._rule import Decision

_VECTORS = re.compile(
    r"(^|_)(bias|scale|offset|gamma|beta|mean|var|norm|negative_slope|A_log|sinks?)$"
    r"|^(bias_.*|b|g|D)$"
    r"|^(query|key|value|gating|output|proj|attn|attention|conv|dense|linear)_b$"
    # Diagonals of state-space models, and the decays of RWKV.
    r"|^Lambda(_\w+)?$|^A_(re|im|real|imag)$|^log_(step|dt|A)\w*$|^a_param$"
    r"|^(nu|theta)_log$|^time_(decay|first|mix_[a-z]|maa_[a-z])$"
)
_TABLES = re.compile(
    r"embed|(^|_)embs?$|^(pos(ition(al)?)?|cls)(_|$)|(^|_)rel_pos(_[a-z])?$"
    r"|(^|_)(cls|tokens?|table|probe|latents?|codebook|prompts?|const|w[tp]e)(_?\d+)?$",
    re.I,
)
_NO_TABLES = re.compile(r"unembed|(^|_)(proj(ections?)?|head)(_|\d|$)", re.I)
_LORA = re.compile(r"(^|_)lora_[ab]$", re.I)
# Parameters below which wrappers of arrays put a key of their own: haliax a number,
# penzai `data_array`.
_WRAPPED = ("kernel", "w", "weight", "bias", "scale", "offset", "gamma", "beta")
# AlphaFold's attention keeps its kernels in one module.
_PROJECTION = re.compile(r"^(query|key|value|gating|output)_w$")


def by_name(parts: list[str], shape: list[int], attention: str) -> Decision | str:
    """Decide by names and rank, or say what is wrong.

    Args:
      parts: the components of the path.
      shape: the leaf's shape, stacked axes not counted.
      attention: how attention is cut.

    Returns:
      The decision, or why there is none, for an error.
    """
    parts = unwrapped(parts)
    name, rank = parts[-1], len(shape)
    if rank < 2:
        return Decision(None, "rank below 2")
    if _LORA.search(name) or (name in ("a", "b") and "lora" in module_of(parts)):
        return _rank_2(Decision(DENSE, "LoRA factor"), name, rank)
    if _VECTORS.search(name):
        return Decision(None, f"{name!r} is a bias, a norm or another vector")
    if _TABLES.search(name) and not _NO_TABLES.search(name):
        return Decision(None, f"{name!r} is an embedding or a table")
    if name in ("kernel", "w"):
        return kernel(parts, shape, attention)
    if name == "weight":
        return (
            "'weight' is what Equinox calls embeddings and layers alike, and "
            "components.from_model(model) tells apart"
        )
    if name == "depthwise_kernel":
        return Decision(None, "depthwise convolution, by its name")
    if name == "pointwise_kernel" and rank > 2:
        return kernel(["conv", "kernel"], shape, attention)
    if sum(size > 1 for size in shape) < 2:
        return Decision(None, "at most one axis is longer than one")
    return _unknown(parts, shape, attention)


def _unknown(parts: list[str], shape: list[int], attention: str) -> Decision | str:
    """Decide a leaf that has a name of its own."""
    name, rank = parts[-1], len(shape)
    gates = recurrent(parts, shape)
    if gates is not None:
        return gates
    projection = _PROJECTION.search(name)
    if projection and rank == 3:
        return heads(name, projection[1] == "output", shape, attention)
    reason = f"any leaf of rank 2 ({name!r} is not a known name)"
    return _rank_2(Decision(DENSE, reason, guess=True), name, rank)


def _rank_2(found: Decision, name: str, rank: int) -> Decision | str:
    if rank == 2:
        return found
    return f"the name {name!r} does not tell the axes of a leaf of rank {rank}"


def unwrapped(parts: list[str]) -> list[str]:
    """Return the path without the key that a wrapper adds after a parameter's name."""
    if len(parts) > 1 and (
        parts[-1] == "data_array" or (parts[-1].isdigit() and parts[-2] in _WRAPPED)
    ):
        return parts[:-1]
    return parts
