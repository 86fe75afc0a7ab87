"""What NNX and Equinox layers say of their leaves: axes read off their attributes.

No framework is imported: a layer is recognised by the name of its class and the package
that defines the class. A user's class of the same name is not taken for it; a subclass
of the library's is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from orthax.components._by_name import attention_cut
from orthax.components._matricisation import Matricisation
from orthax.components._stacked_axes import Sizes

# A layer's leaves: name below the layer -> the sizes of the unstacked leaf's axes, and
# its cut or the reason why there is none.
Layer = dict[str, tuple[Sizes, Matricisation | str]]


def framework_of(cls: type) -> str | None:
    """Return "nnx" or "equinox" for the classes of their modules, None for others."""
    for base in cls.__mro__:
        if base.__name__ == "Module" or base is cls:
            framework = _defined_by(base)
            if framework is not None:
                return framework
    return None


def is_array(x: Any) -> bool:
    """Return whether `x` is an array, or a variable of NNX that holds one."""
    # nnx.Rngs has every attribute that it is asked for; an array's shape is a tuple.
    if not isinstance(getattr(x, "shape", None), tuple) or not hasattr(x, "dtype"):
        return False
    # A module may have a `shape` and a `dtype` of its own.
    bases = {base.__name__ for base in type(x).__mro__ if _defined_by(base)}
    is_leaf = "Module" not in bases and jax.tree_util.all_leaves([x])
    return "Variable" in bases or is_leaf


def leaves_of(layer: Any, attention: str) -> tuple[str, Layer]:
    """Return a layer's name and what it says of its leaves; nothing if not known."""
    cls = _library_class(layer)
    if cls is None:
        cls, read = type(layer), _nnx_attention
    else:
        read = _LAYERS[_defined_by(cls), cls.__name__]
    try:
        leaves = read(layer, attention)
    except AttributeError:
        if type(layer) is cls:
            raise
        leaves = {}  # a subclass that does not call the constructor of its base
    return f"{cls.__module__.split('.')[0]} {cls.__name__}", leaves


def _defined_by(cls: type) -> str | None:
    """Return the framework whose own class this is."""
    package, *rest = cls.__module__.split(".")
    if package == "flax" and rest[:1] == ["nnx"]:
        return "nnx"
    return "equinox" if package == "equinox" else None


def _library_class(layer: Any) -> type | None:
    """Return the first class of a layer, or of its bases, that the table has."""
    for cls in type(layer).__mro__:
        if (_defined_by(cls), cls.__name__) in _LAYERS:
            return cls
    return None


def _cut(rows: Sequence[int], columns: Sequence[int], **kwargs: Any) -> Matricisation:
    return Matricisation(tuple(rows), tuple(columns), **kwargs)


def _nnx_linear(layer: Any, attention: str = "whole", **fused: int) -> Layer:
    i, o = layer.in_features, layer.out_features
    return {"kernel": ((i, o), _cut((0,), (1,), **fused)), "bias": ((o,), "bias")}


def _nnx_general(layer: Any, attention: str) -> Layer:
    batch, i, o = (*layer.batch_axis.values(),), layer.in_features, layer.out_features
    first, middle = len(batch), len(batch) + len(i)
    cut = _cut(range(first, middle), range(middle, middle + len(o)))
    return {"kernel": ((*batch, *i, *o), cut), "bias": ((*batch, *o), "bias")}


def _nnx_einsum(layer: Any, attention: str) -> Layer:
    """Cut by the letters: contracted are rows, only in the output are columns."""
    inputs, output = layer.einsum_str.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    rows = [i for i, a in enumerate(kernel) if a in x and a not in output]
    columns = [i for i, a in enumerate(kernel) if a not in x and a in output]
    cut = _cut(rows, columns) if rows and columns else "no matrix product"
    return {
        "kernel": ((*layer.kernel_shape,), cut),
        "bias": ((*(layer.bias_shape or ()),), "bias"),
    }


def _nnx_conv(layer: Any, attention: str) -> Layer:
    sizes, i, o = layer.kernel_size, layer.in_features, layer.out_features
    taps, groups = tuple(range(len(sizes))), layer.feature_group_count
    cut = _cut((*taps, len(taps)), (len(taps) + 1,), groups=groups, spatial=taps)
    if groups > 1 and groups == i:
        cut = "depthwise"
    return {"kernel": ((*sizes, i // groups, o), cut), "bias": ((o,), "bias")}


def _nnx_conv_transpose(layer: Any, attention: str) -> Layer:
    sizes, i, o = layer.kernel_size, layer.in_features, layer.out_features
    taps = tuple(range(len(sizes)))
    first, second = len(taps), len(taps) + 1
    if layer.transpose_kernel:
        kernel = (*sizes, o, i), _cut((*taps, second), (first,), spatial=taps)
    else:
        kernel = (*sizes, i, o), _cut((*taps, first), (second,), spatial=taps)
    return {"kernel": kernel, "bias": ((o,), "bias")}


def _nnx_lora(layer: Any, attention: str) -> Layer:
    cut = _cut((0,), (1,))
    return {
        "lora_a": ((layer.in_features, None), cut),
        "lora_b": ((None, layer.out_features), cut),
    }


def _nnx_attention(layer: Any, attention: str) -> Layer:
    """Cut by heads the general linear layers of Flax's attention, or one's own."""
    leaves: Layer = {}
    for name in ("query", "key", "value", "out"):
        part = getattr(layer, name, None)
        if not _is_library(part, "nnx", "LinearGeneral"):
            continue
        whole = _nnx_general(part, attention)
        sizes, cut = whole["kernel"]
        if cut == attention_cut(name == "out", "whole"):
            whole["kernel"] = sizes, attention_cut(name == "out", attention)
        leaves |= _below(name, whole)
    return leaves


def _is_library(layer: Any, framework: str, name: str) -> bool:
    cls = _library_class(layer)
    return cls is not None and (_defined_by(cls), cls.__name__) == (framework, name)


def _below(name: str, leaves: Layer) -> Layer:
    return {f"{name}/{leaf}": said for leaf, said in leaves.items()}


def _fused_dense(blocks: int) -> Callable[[Any, str], Layer]:
    def read(layer: Any, attention: str) -> Layer:
        leaves: Layer = {}
        for name in ("dense_i", "dense_h"):
            part = getattr(layer, name, None)
            if _is_library(part, "nnx", "Linear"):
                leaves |= _below(name, _nnx_linear(part, blocks=blocks))
        return leaves

    return read


def _fused_weights(blocks: int) -> Callable[[Any, str], Layer]:
    cut = _cut((1,), (0,), blocks=blocks)

    def read(layer: Any, attention: str) -> Layer:
        i, h = layer.input_size, layer.hidden_size
        return {
            "weight_ih": ((blocks * h, i), cut),
            "weight_hh": ((blocks * h, h), cut),
            "bias": ((blocks * h,), "bias"),
        }

    return read


def _eqx_linear(layer: Any, attention: str = "whole", **fused: Any) -> Layer:
    features = (layer.in_features, layer.out_features)
    i, o = (1 if size == "scalar" else size for size in features)
    return {"weight": ((o, i), _cut((1,), (0,), **fused)), "bias": ((o,), "bias")}


def _eqx_conv(layer: Any, attention: str) -> Layer:
    i, o, groups = layer.in_channels, layer.out_channels, layer.groups
    taps = tuple(range(2, layer.num_spatial_dims + 2))
    cut = _cut((1, *taps), (0,), groups=groups, spatial=taps)
    if groups > 1 and groups == i:
        cut = "depthwise"
    return {
        "weight": ((o, i // groups, *layer.kernel_size), cut),
        "bias": ((o, *(1 for _ in taps)), "bias"),
    }


def _eqx_attention(layer: Any, attention: str) -> Layer:
    if attention == "heads":
        raise ValueError(
            'attention="heads" makes a head a component, but Equinox fuses heads and '
            'their features in one axis: use "whole" or "per_head".'
        )
    leaves: Layer = {}
    for name in ("query", "key", "value", "output"):
        part = getattr(layer, f"{name}_proj", None)
        if attention == "whole" or not _is_library(part, "equinox", "Linear"):
            continue
        split = "rows" if name == "output" else "columns"
        fused = _eqx_linear(part, blocks=layer.num_heads, split=split)
        leaves |= _below(f"{name}_proj", fused)
    return leaves


def _vectors(reason: str, *names: str) -> Callable[[Any, str], Layer]:
    # Whatever their rank: norms over several axes have parameters of several axes.
    return lambda layer, attention: {
        name: (leaf.shape, reason)
        for name in names
        if is_array(leaf := getattr(layer, name, None))
    }


_LAYERS: dict[tuple[str | None, str], Callable[[Any, str], Layer]] = {
    ("nnx", "Linear"): _nnx_linear,
    ("nnx", "LinearGeneral"): _nnx_general,
    ("nnx", "Einsum"): _nnx_einsum,
    ("nnx", "Conv"): _nnx_conv,
    ("nnx", "ConvTranspose"): _nnx_conv_transpose,
    ("nnx", "Embed"): _vectors("a lookup", "embedding"),
    ("nnx", "MultiHeadAttention"): _nnx_attention,
    ("nnx", "LoRA"): _nnx_lora,
    ("nnx", "OptimizedLSTMCell"): _fused_dense(4),
    ("nnx", "GRUCell"): _fused_dense(3),
    ("equinox", "Linear"): _eqx_linear,
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
