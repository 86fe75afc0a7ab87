"""What NNX and Equinox layers say of their leaves: axes read off their attributes.

No framework is imported: a layer is recognised by the name of its class and the package
that the class comes from.
"""

from collections.abc import Callable, Sequence
from typing import Any

from orthax.components._by_name import attention_cut
from orthax.components._matricisation import Matricisation

# A layer's leaves: name below the layer -> rank of the unstacked leaf, and its cut or
# the reason why there is none.
Layer = dict[str, tuple[int, Matricisation | str]]


def framework_of(cls: type) -> str | None:
    """Return "nnx" or "equinox" for the classes of their modules, None for others."""
    for base in cls.__mro__:
        for prefix, framework in (("flax.nnx", "nnx"), ("equinox", "equinox")):
            is_module = base.__name__ == "Module" or base is cls
            if is_module and base.__module__.startswith(prefix):
                return framework
    return None


def leaves_of(layer: Any, attention: str) -> tuple[str, Layer]:
    """Return a layer's name and what it says of its leaves; nothing if not known."""
    for cls in type(layer).__mro__:
        read = _LAYERS.get((framework_of(cls), cls.__name__))
        if read is not None:
            name = f"{cls.__module__.split('.')[0]} {cls.__name__}"
            return name, read(layer, attention)
    return "", {}


def _cut(rows: Sequence[int], columns: Sequence[int], **kwargs: Any) -> Matricisation:
    return Matricisation(tuple(rows), tuple(columns), **kwargs)


def _nnx_general(layer: Any, attention: str) -> Layer:
    b, i, o = len(layer.batch_axis), len(layer.in_features), len(layer.out_features)
    cut = _cut(range(b, b + i), range(b + i, b + i + o))
    return {"kernel": (b + i + o, cut), "bias": (b + o, "bias")}


def _nnx_einsum(layer: Any, attention: str) -> Layer:
    """Cut by the letters: contracted are rows, only in the output are columns."""
    inputs, output = layer.einsum_str.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    rows = [i for i, a in enumerate(kernel) if a in x and a not in output]
    columns = [i for i, a in enumerate(kernel) if a not in x and a in output]
    cut = _cut(rows, columns) if rows and columns else "no matrix product"
    return {"kernel": (len(kernel), cut), "bias": (len(layer.bias_shape or ()), "bias")}


def _nnx_conv(layer: Any, attention: str) -> Layer:
    taps = tuple(range(len(layer.kernel_size)))
    groups = layer.feature_group_count
    cut = _cut((*taps, len(taps)), (len(taps) + 1,), groups=groups, spatial=taps)
    if groups > 1 and groups == layer.in_features:
        cut = "depthwise"
    return {"kernel": (len(taps) + 2, cut)}


def _nnx_conv_transpose(layer: Any, attention: str) -> Layer:
    taps = tuple(range(len(layer.kernel_size)))
    i, o = (1, 0) if layer.transpose_kernel else (0, 1)
    cut = _cut((*taps, len(taps) + i), (len(taps) + o,), spatial=taps)
    return {"kernel": (len(taps) + 2, cut)}


def _nnx_attention(layer: Any, attention: str) -> Layer:
    cuts = {name: attention_cut(False, attention) for name in ("query", "key", "value")}
    cuts["out"] = attention_cut(True, attention)
    return {f"{name}/kernel": (3, cut) for name, cut in cuts.items()}


def _fused_dense(blocks: int) -> Callable[[Any, str], Layer]:
    cut = _cut((0,), (1,), blocks=blocks)
    leaves = {f"{name}/kernel": (2, cut) for name in ("dense_i", "dense_h")}
    return lambda layer, attention: leaves


def _fused_weights(blocks: int) -> Callable[[Any, str], Layer]:
    cut = _cut((1,), (0,), blocks=blocks)
    leaves = dict.fromkeys(("weight_ih", "weight_hh"), (2, cut))
    return lambda layer, attention: leaves


def _fixed(**leaves: tuple[int, Matricisation | str]) -> Callable[[Any, str], Layer]:
    return lambda layer, attention: leaves


def _eqx_conv(layer: Any, attention: str) -> Layer:
    d, groups = layer.num_spatial_dims, layer.groups
    taps = tuple(range(2, d + 2))
    cut = _cut((1, *taps), (0,), groups=groups, spatial=taps)
    if groups > 1 and groups == layer.in_channels:
        cut = "depthwise"
    return {"weight": (d + 2, cut), "bias": (d + 1, "bias")}


def _eqx_attention(layer: Any, attention: str) -> Layer:
    if attention == "heads":
        raise ValueError(
            'attention="heads" makes a head a component, but Equinox fuses heads and '
            'their features in one axis: use "whole" or "per_head".'
        )
    if attention == "whole":
        return {}
    heads = layer.num_heads
    cut = _cut((1,), (0,), blocks=heads)
    leaves: Layer = {
        f"{name}_proj/weight": (2, cut) for name in ("query", "key", "value")
    }
    out = _cut((1,), (0,), blocks=heads, split="rows")
    return {**leaves, "output_proj/weight": (2, out)}


def _vectors(reason: str, *names: str) -> Callable[[Any, str], Layer]:
    # Whatever their rank: norms over several axes have parameters of several axes.
    return lambda layer, attention: {
        name: (len(leaf.shape), reason)
        for name in names
        if hasattr(leaf := getattr(layer, name, None), "shape")
    }


_DENSE = _cut((0,), (1,))
_LAYERS: dict[tuple[str | None, str], Callable[[Any, str], Layer]] = {
    ("nnx", "Linear"): _fixed(kernel=(2, _DENSE)),
    ("nnx", "LinearGeneral"): _nnx_general,
    ("nnx", "Einsum"): _nnx_einsum,
    ("nnx", "Conv"): _nnx_conv,
    ("nnx", "ConvTranspose"): _nnx_conv_transpose,
    ("nnx", "Embed"): _vectors("a lookup", "embedding"),
    ("nnx", "MultiHeadAttention"): _nnx_attention,
    ("nnx", "LoRA"): _fixed(lora_a=(2, _DENSE), lora_b=(2, _DENSE)),
    ("nnx", "OptimizedLSTMCell"): _fused_dense(4),
    ("nnx", "GRUCell"): _fused_dense(3),
    ("equinox", "Linear"): _fixed(weight=(2, _cut((1,), (0,)))),
    ("equinox", "Conv"): _eqx_conv,
    ("equinox", "ConvTranspose"): _eqx_conv,
    ("equinox", "MultiheadAttention"): _eqx_attention,
    ("equinox", "Embedding"): _vectors("a lookup", "weight"),
    ("equinox", "LSTMCell"): _fused_weights(4),
    ("equinox", "GRUCell"): _fused_weights(3),
    ("equinox", "WeightNorm"): _vectors("a norm", "g"),
    **{
        (framework, name): _vectors("a norm", "scale", "weight", "bias")
        for framework, names in {
            "nnx": ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"),
            "equinox": ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm"),
        }.items()
        for name in names
    },
}
