"""What the names of modules say of a kernel: dense, attention, a convolution."""

import math
import re

from orthax.components._matricisation import Matricisation
from orthax.components._rule import Decision

DENSE = Matricisation((0,), (1,))
_QUERY = re.compile(
    r"^(query|key|value|[qkv]|w[qkv]|to_[qkv]|(query|key|value|[qkv])_proj)$"
)
_OUT = re.compile(r"^(out|o|to_out|(out|o|output)_proj|attention_output)(_0)?$")
# Gemma's, whose einsums have the heads first: (H, D, K) and (H, K, D).
_QUERY_EINSUM = re.compile(r"^(q|k|v|query|key|value)_einsum$")
_OUT_EINSUM = re.compile(r"^(attn_vec|out|o)_einsum$")
_FUSED = re.compile(
    r"(^|_)(w?q?kv|q_?k_?v|key_value|gate_up|up_gate|gate_and_up|in_?proj|x_proj|c_attn"
    r"|adaln|modulation|geglu)(_|\d|$)|fused|^dense_[ih]$",
    re.I,
)
_ROUTER = re.compile(r"router|^switch(_\d+)?$", re.I)
_GATE = re.compile(r"^(gate|gating)(_\d+)?$", re.I)
_LOOKUP = re.compile(
    r"^((tok(en)?|word|vocab|pos(ition(al)?)?|type|segment|label|class)_?)?"
    r"emb(s|ed(der|ding)?s?)?(_tokens|_\d+)?$|^w[tp]e$",
    re.I,
)
_NORM = re.compile(r"norm_?\d*$|^ln(_|\d|$)|_ln(_?\d+)?$", re.I)
_DENSE_LIKE = re.compile(
    r"dense|linear|mlp|ffn|feed_?forward|att(n|ention)|moe|expert|^w[io](_\d+)?$"
    r"|(gate|up|down)_proj",
    re.I,
)
_CONV = re.compile(r"conv(?!next)", re.I)
_TEMPORAL = re.compile(r"(^|_|short)conv(?!next)", re.I)
_DEPTHWISE = re.compile(r"depthwise|(^|_)dw(_?conv|_|\d|$)", re.I)
# Linen writes the class into the names that it makes up.
_CONV_LOCAL = re.compile(r"^ConvLocal(_\d+)?$")
_TRANSPOSED = re.compile(r"transpose|deconv|upconv|up_conv|upsampl", re.I)
_UP = re.compile(r"(^|_)up(_?\d+)?$", re.I)  # of an MLP or of a U-Net
_KERAS_TRANSPOSED = re.compile(r"^conv\dd_transpose(_\d+)?$")
_PICTURE = re.compile(r"conv|stem|patch|embed|sampl|shortcut", re.I)
_MOST_TAPS = 64
_WIDEST_HEAD = 512
_MOST_HEADS = 128


def module_of(parts: list[str]) -> str:
    """Return the name of the module that holds a leaf; numbers are those of lists."""
    return next((part for part in parts[-2::-1] if not part.isdigit()), "")


def kernel(parts: list[str], shape: list[int], attention: str) -> Decision | str:
    """Decide a leaf called `kernel` or `w` by its modules and its shape.

    Args:
      parts: the components of its path.
      shape: its shape without stacked axes, of two axes or more.
      attention: how attention is cut.

    Returns:
      The decision, or what is wrong.
    """
    rank, module = len(shape), module_of(parts)
    if _DEPTHWISE.search(module):
        return Decision(None, "depthwise convolution, by its module's name")
    gates = recurrent(parts, shape)
    if gates is not None:
        return gates
    if rank == 2:
        return _dense(parts[-1], module, shape, attention)
    if _CONV_LOCAL.search(module):
        cut = Matricisation((rank - 2,), (rank - 1,))
        return Decision(cut, "unshared convolution, by its module's name")
    if "einsum" in module.lower():
        return _einsum(module, shape, attention)
    if _QUERY.search(module) or _OUT.search(module):
        return heads(module, _OUT.search(module) is not None, shape, attention)
    if rank > 3 and math.prod(shape[:-2]) == 1:
        return _convolution(module, shape)  # the same whatever it is
    if _FUSED.search(module) or (rank > 3 and _is_no_convolution(parts, module)):
        return f"a kernel of rank {rank} below {module!r} is not a convolution"
    if _TRANSPOSED.search(module) or (rank > 3 and _UP.search(module)):
        return _transposed(parts[-1], module, shape)
    if rank > 3 or _CONV.search(module):
        return _convolution(module, shape)
    return (
        "a kernel of rank 3 may be a Conv1d, a stacked Dense or a LinearGeneral, which "
        "look alike"
    )


def _is_no_convolution(parts: list[str], module: str) -> bool:
    experts = re.search(r"moe|expert", "/".join(parts), re.I)
    return not _CONV.search(module) and bool(experts or _DENSE_LIKE.search(module))


def _dense(name: str, module: str, shape: list[int], attention: str) -> Decision | str:
    """Decide a kernel of two axes."""
    is_temporal = _TEMPORAL.search(module) and "pointwise" not in module
    if is_temporal and name == "w" and min(shape) <= 16:
        return (
            f"a kernel of rank 2 below {module!r} may be a depthwise convolution, taps "
            "by width, or dense"
        )
    if _NORM.search(module):
        return f"a kernel of rank 2 below {module!r} may be a matrix or stacked vectors"
    doubt = ""
    if (_QUERY.search(module) or _OUT.search(module)) and attention != "whole":
        doubt = "if this is attention its heads are fused: cut whole"
    elif is_temporal and min(shape) <= 16:
        doubt = f"{module!r} may be depthwise"
    elif _FUSED.search(module):
        doubt = f"{module!r} may be several in one: cut whole"
    elif _ROUTER.search(module) or (_GATE.search(module) and shape[1] < shape[0]):
        doubt = f"{module!r} may choose experts, which Muon's authors leave to AdamW"
    elif _LOOKUP.search(module):
        doubt = f"{module!r} may be a lookup"
    if doubt:
        return Decision(DENSE, f"dense kernel; {doubt}", guess=True)
    return Decision(DENSE, "dense kernel")


def recurrent(parts: list[str], shape: list[int]) -> Decision | None:
    """Return the blocks of Haiku's and Keras's recurrent cells, None for others."""
    name, module = parts[-1], module_of(parts)
    cell = module_of(parts[:-1]) if module in _HAIKU_CELL else module
    kind = re.search(r"(^|_|\d_?d)(lstm|gru)(_cell)?(_\d+)?$", cell)
    if kind is None:
        return None
    blocks = {"lstm": 4, "gru": 3}[kind[2]]
    if shape[-1] % blocks:
        return None
    width, rank = shape[-1] // blocks, len(shape)
    fits = {
        # Haiku concatenates input and state; its convolutions take them one by one.
        "linear/w": rank == 2 and shape[0] > width,
        "input_to_hidden/w": rank > 2 and "conv" in cell,
        "hidden_to_hidden/w": rank > 2 and "conv" in cell and shape[-2] == width,
        "w_i": rank == 2,
        "w_h": rank == 2 and shape[0] == width,
        "kernel": rank == 2 and kind[3] is not None,  # Keras
        "recurrent_kernel": rank == 2 and shape[0] == width,
    }
    if not fits.get(f"{module}/{name}" if module != cell else name, False):
        return None
    taps = tuple(range(rank - 2))
    cut = Matricisation((*taps, rank - 2), (rank - 1,), blocks=blocks, spatial=taps)
    return Decision(cut, f"{blocks} fused gates, by the cell's name", name == "kernel")


_HAIKU_CELL = ("linear", "input_to_hidden", "hidden_to_hidden")


# --- attention ------------------------------------------------------------------------


def attention_cut(is_out: bool, attention: str) -> Matricisation:
    """Return the cut of an attention kernel, (D, H, K), or (H, K, D) for `out`."""
    cuts = {
        "whole": (((0,), (1, 2)), ((0, 1), (2,))),
        "per_head": (((0,), (2,)), ((1,), (2,))),
        "heads": (((0, 2), (1,)), ((1, 2), (0,))),
    }
    return Matricisation(*cuts[attention][is_out])


def heads(name: str, is_out: bool, shape: list[int], attention: str) -> Decision | str:
    """Decide a kernel of attention, (D, H, K), or (H, K, D) for the output."""
    if len(shape) != 3:
        return f"a kernel of rank {len(shape)} below {name!r} is not a convolution"
    h, k, d = shape if is_out else (shape[1], shape[2], shape[0])
    found = Decision(attention_cut(is_out, attention), f"attention {name}, {attention}")
    return _if_heads(found, h, k, d, shape)


def _if_heads(
    found: Decision, h: int, k: int, d: int, shape: list[int]
) -> Decision | str:
    """Return the decision if a width of `d` may have `h` heads of `k` features."""
    # A stacked kernel has its layers where the heads or the width would be.
    several = h > 1 and (k > _WIDEST_HEAD or k >= d or (h == d and k > 1))
    if h > min(d, _MOST_HEADS) or several:
        return (
            f"{tuple(shape)} is not what {h} heads of {k} features and a width of {d} "
            "look like; heads may come first, or layers be stacked"
        )
    if h > 1 and (2 * k > d or k < 8 or h * k > 4 * d):
        reason = f"{found.reason}; stacked layers may look alike"
        return found._replace(reason=reason, guess=True)
    return found


def _einsum(module: str, shape: list[int], attention: str) -> Decision | str:
    """Decide the kernel of an einsum: Gemma's, (H, D, K) and (H, K, D)."""
    if _OUT_EINSUM.search(module):
        return heads(module, True, shape, attention)
    if len(shape) != 3 or not _QUERY_EINSUM.search(module):
        return f"the letters of {module!r} say what its axes are, not its shape"
    h, d, k = shape
    rows, columns = {
        "whole": ((1,), (0, 2)),
        "per_head": ((1,), (2,)),
        "heads": ((1, 2), (0,)),
    }[attention]
    cut = Matricisation(rows, columns)
    return _if_heads(Decision(cut, f"attention {module}, {attention}"), h, k, d, shape)


# --- convolutions ---------------------------------------------------------------------


def _convolution(module: str, shape: list[int]) -> Decision | str:
    """Decide a kernel (*taps, in, out) if its shape can be one."""
    wrong = _no_convolution(module, shape)
    if wrong:
        return wrong
    rank = len(shape)
    taps = tuple(range(rank - 2))
    cut = Matricisation((*taps, rank - 2), (rank - 1,), spatial=taps)
    longest, doubt = max(shape[:-2]), ""
    if min(shape[-2:]) == 1 and longest > 1:
        side = "input" if shape[-2] == 1 else "output"
        doubt = f"one {side} channel, as depthwise kernels have"
    elif rank == 3 and shape[1] <= 8:
        doubt = "stacked depthwise kernels look alike"
    elif rank == 5:
        doubt = "3-d, and stacked 2-d kernels look alike"
    elif shape[0] > 1 == shape[1] or (
        longest % 2 == 0 and shape[-2] > 4 and not _PICTURE.search(module)
    ):
        doubt = "stacked kernels look alike"
    reason = f"convolution kernel{'; ' if doubt else ''}{doubt}"
    return Decision(cut, reason, guess=bool(doubt))


def _no_convolution(module: str, shape: list[int]) -> str:
    """Return why a kernel is not a convolution, (*taps, in, out), or ""."""
    rank, taps = len(shape), {n for n in shape[:-2] if n > 1}
    if re.search("spectral|fourier|graph|gcn|relation", module, re.I):
        return f"the kernel of {module!r} may have no taps, as other convolutions have"
    if rank > 5:
        return f"a kernel of rank {rank} is not a convolution that Flax or Haiku has"
    said = re.search(r"conv_?(\d)_?d(?![a-z])", module, re.I)
    if said and int(said[1]) != rank - 2:
        return f"a kernel of rank {rank} below {module!r} may be stacked"
    longest = max(taps, default=1)
    # Taps differ in 3-d alone; an array (out, in, *taps) has them last.
    if (len(taps) > 1 and rank == 4) or longest > _MOST_TAPS:
        return (
            f"a kernel whose first axes are {tuple(shape[:-2])} is not a convolution "
            "that can be distinguished from a stacked kernel or heads"
        )
    if max(shape[-2:]) < longest or (rank == 3 and shape[1] < longest):
        return (
            f"a kernel of shape {tuple(shape)} has more taps than channels: it may be "
            "stacked, or have its channels first"
        )
    return ""


def _transposed(name: str, module: str, shape: list[int]) -> Decision | str:
    """Decide a transposed convolution: (*taps, out, in), in Flax (*taps, in, out)."""
    wrong = _no_convolution(module, shape)
    if wrong:
        return wrong
    taps = tuple(range(len(shape) - 2))
    first, second = len(taps), len(taps) + 1
    is_haiku = name == "w"
    if is_haiku or _KERAS_TRANSPOSED.search(module):
        first, second = second, first
    cut = Matricisation((*taps, first), (second,), spatial=taps)
    reason = "transposed convolution, by its module's name"
    if is_haiku and "transpose" in module:
        return Decision(cut, reason)
    return Decision(cut, f"{reason}; its kernel may be transposed", guess=True)
