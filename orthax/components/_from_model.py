"""The rule that asks the model: NNX and Equinox layers, by their classes.

No framework is imported: a layer is recognised by the name of its class and the
package the class comes from, its axes are read off its attributes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orthax.components._by_name import ByName, attention_cut, check_attention
from orthax.components._matricisation import Matricisation
from orthax.components._rule import Decision, checked_patterns, match

# A layer's leaves: name below the layer -> rank of the unstacked leaf, and its cut or
# the reason why there is none.
_Layer = dict[str, tuple[int, Matricisation | str]]


@dataclasses.dataclass(frozen=True)
class FromModel:
    """The rule that `from_model` makes: what the modules of a model say of each leaf.

    Attributes:
      decisions: path, rank and decision of every leaf of the model; no decision for
        leaves of modules that are not known, which `ByName` then decides.
      attention: how attention kernels are cut, as in `ByName`.
      overrides: patterns that come first, as in `ByPath`.

    Raises:
      ValueError: from `resolve`, for a leaf that the model does not have, or one of
        another rank than the model's.
    """

    decisions: tuple[tuple[str, int, Decision | None], ...] = dataclasses.field(
        repr=False
    )
    attention: str = "whole"
    overrides: tuple[tuple[str, Matricisation | None], ...] = ()

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the cut of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        found = match(self.overrides, path, leaf)
        if found is not None:
            return found
        known = next((entry for entry in self.decisions if entry[0] == path), None)
        if known is None:
            raise ValueError(
                f"The model given to from_model has no leaf '{path}': build the rule "
                "from the model whose parameters are trained, or add the leaf to "
                "`overrides`."
            )
        _, rank, decision = known
        if rank != len(leaf.shape):
            raise ValueError(
                f"Leaf '{path}' of shape {tuple(leaf.shape)} has rank {rank} in the "
                "model given to from_model: build the rule from the model as trained."
            )
        if decision is not None:
            return decision
        found = ByName(attention=self.attention).decide(path, leaf)
        return found._replace(reason=f"{found.reason}; its module is not known")


def from_model(
    model: Any,
    *,
    attention: str = "whole",
    overrides: Sequence[tuple[str, Matricisation | None]] = (),
) -> FromModel:
    """Return the rule that cuts the leaves of an NNX or Equinox model.

    Reads the types and attributes of the modules, and so knows what names and shapes
    cannot tell: groups, fused gates, the axes of general linear layers, transposed
    kernels, embeddings, stacked layers. Depthwise kernels are left alone.

    Args:
      model: an `nnx.Module`, an `eqx.Module`, or containers of these.
      attention: `"whole"`, `"per_head"` or `"heads"`, as in `ByName`.
      overrides: pairs of a regular expression and a `Matricisation` or None, as in
        `ByPath`; they come before what the modules say.

    Returns:
      A rule for trees whose paths are the model's: `nnx.state(model)`,
      `eqx.filter(model, ...)`, and gradients of these.

    Raises:
      TypeError: if `model` holds no NNX or Equinox module (Linen and Haiku modules do
        not hold their parameters: use `ByName`).
      ValueError: for an unknown `attention`, `"heads"` on Equinox attention, whose
        heads are fused with their features, or malformed overrides.

    Limits:
      Extra axes of a leaf (a model made under `nnx.vmap` or `eqx.filter_vmap`) are
      taken to be leading. Parameters of modules that are not known are decided by
      `ByName`.

    Example:
      >>> import jax
      >>> import equinox as eqx
      >>> from orthax import components
      >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
      >>> cut = components.from_model(model).resolve("weight", model.weight)
      >>> cut.rows, cut.columns  # Equinox stores (out, in)
      ((1,), (0,))
    """
    check_attention(attention)
    found: dict[str, tuple[int, Decision | None]] = {}
    if not _walk(model, "", attention, found, ()):
        raise TypeError(_no_module(model))
    decisions = tuple((path, *entry) for path, entry in found.items())
    return FromModel(decisions, attention, checked_patterns(tuple(overrides)))


def _walk(
    node: Any,
    path: str,
    attention: str,
    found: dict[str, tuple[int, Decision | None]],
    above: tuple[int, ...],
) -> bool:
    """Record the leaves below a node; return whether a module was among them."""
    if id(node) in above:  # NNX graphs may have cycles
        return False
    is_module = _framework(type(node)) is not None
    if is_module:
        _record_layer(node, path, attention, found)
    for name, child in _children(node, is_module):
        below = f"{path}/{name}" if path else str(name)
        if hasattr(child, "shape") and hasattr(child, "dtype"):
            found.setdefault(below, (len(child.shape), None))
        else:
            found_below = _walk(child, below, attention, found, (*above, id(node)))
            is_module = found_below or is_module
    return is_module


def _children(node: Any, is_module: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(name), child) for name, child in node.items())
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        yield from ((str(i), child) for i, child in enumerate(node))
    elif is_module:
        for name, child in vars(node).items():
            if not name.startswith("_pytree__"):
                yield name, child


def _record_layer(
    node: Any,
    path: str,
    attention: str,
    found: dict[str, tuple[int, Decision | None]],
) -> None:
    for cls in type(node).__mro__:
        read = _LAYERS.get((_framework(cls), cls.__name__))
        if read is None:
            continue
        reason = f"{cls.__module__.split('.')[0]} {cls.__name__}"
        for name, (rank, cut) in read(node, attention).items():
            leaf = node
            for part in name.split("/"):
                leaf = getattr(leaf, part, None)
            if not hasattr(leaf, "shape"):
                continue
            below = f"{path}/{name}" if path else name
            decision = _decision(cut, reason, len(leaf.shape) - rank)
            # What a layer says of its parts goes before what they say themselves.
            found.setdefault(below, (len(leaf.shape), decision))
        return


def _decision(cut: Matricisation | str, reason: str, extra: int) -> Decision:
    if isinstance(cut, str):
        return Decision(None, f"{reason}: {cut}")
    rows, columns, spatial = (
        tuple(axis + extra for axis in part)
        for part in (cut.rows, cut.columns, cut.spatial)
    )
    cut = dataclasses.replace(cut, rows=rows, columns=columns, spatial=spatial)
    return Decision(cut, reason)


def _framework(cls: type) -> str | None:
    for base in cls.__mro__:
        for prefix, framework in (("flax.nnx", "nnx"), ("equinox", "equinox")):
            is_module = base.__name__ == "Module" or base is cls
            if is_module and base.__module__.startswith(prefix):
                return framework
    return None


def _no_module(model: Any) -> str:
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if kind.startswith(("flax", "haiku")) or "haiku" in kind:
        return (
            f"from_model was given a {kind}: Linen and Haiku modules do not hold their "
            "parameters, so their axes cannot be read off them. Use "
            "components.ByName(...) on the parameters."
        )
    return (
        f"from_model needs an NNX or Equinox module, or containers of them, got {kind}."
        " For a tree of arrays use components.ByName() or components.ByPath([...])."
    )


def _cut(rows: Sequence[int], columns: Sequence[int], **kwargs: Any) -> Matricisation:
    return Matricisation(tuple(rows), tuple(columns), **kwargs)


def _nnx_general(layer: Any, attention: str) -> _Layer:
    b, i, o = len(layer.batch_axis), len(layer.in_features), len(layer.out_features)
    cut = _cut(range(b, b + i), range(b + i, b + i + o))
    return {"kernel": (b + i + o, cut), "bias": (b + o, "bias")}


def _nnx_einsum(layer: Any, attention: str) -> _Layer:
    """Cut by the letters: contracted are rows, only in the output are columns."""
    inputs, output = layer.einsum_str.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    rows = [i for i, a in enumerate(kernel) if a in x and a not in output]
    columns = [i for i, a in enumerate(kernel) if a not in x and a in output]
    cut = _cut(rows, columns) if rows and columns else "no matrix product"
    return {"kernel": (len(kernel), cut), "bias": (len(layer.bias_shape or ()), "bias")}


def _nnx_conv(layer: Any, attention: str) -> _Layer:
    taps = tuple(range(len(layer.kernel_size)))
    groups = layer.feature_group_count
    cut = _cut((*taps, len(taps)), (len(taps) + 1,), groups=groups, spatial=taps)
    if groups > 1 and groups == layer.in_features:
        cut = "depthwise"
    return {"kernel": (len(taps) + 2, cut)}


def _nnx_conv_transpose(layer: Any, attention: str) -> _Layer:
    taps = tuple(range(len(layer.kernel_size)))
    i, o = (1, 0) if layer.transpose_kernel else (0, 1)
    cut = _cut((*taps, len(taps) + i), (len(taps) + o,), spatial=taps)
    return {"kernel": (len(taps) + 2, cut)}


def _nnx_attention(layer: Any, attention: str) -> _Layer:
    cuts = {name: attention_cut(False, attention) for name in ("query", "key", "value")}
    cuts["out"] = attention_cut(True, attention)
    return {f"{name}/kernel": (3, cut) for name, cut in cuts.items()}


def _fused_dense(blocks: int) -> Callable[[Any, str], _Layer]:
    cut = _cut((0,), (1,), blocks=blocks)
    leaves = {f"{name}/kernel": (2, cut) for name in ("dense_i", "dense_h")}
    return lambda layer, attention: leaves


def _fused_weights(blocks: int) -> Callable[[Any, str], _Layer]:
    cut = _cut((1,), (0,), blocks=blocks)
    leaves = dict.fromkeys(("weight_ih", "weight_hh"), (2, cut))
    return lambda layer, attention: leaves


def _fixed(**leaves: tuple[int, Matricisation | str]) -> Callable[[Any, str], _Layer]:
    return lambda layer, attention: leaves


def _eqx_conv(layer: Any, attention: str) -> _Layer:
    d, groups = layer.num_spatial_dims, layer.groups
    taps = tuple(range(2, d + 2))
    cut = _cut((1, *taps), (0,), groups=groups, spatial=taps)
    if groups > 1 and groups == layer.in_channels:
        cut = "depthwise"
    return {"weight": (d + 2, cut), "bias": (d + 1, "bias")}


def _eqx_attention(layer: Any, attention: str) -> _Layer:
    if attention == "heads":
        raise ValueError(
            'attention="heads" makes a head a component, but Equinox fuses heads and '
            'their features in one axis: use "whole" or "per_head".'
        )
    if attention == "whole":
        return {}
    heads = layer.num_heads
    cut = _cut((1,), (0,), blocks=heads)
    leaves: _Layer = {
        f"{name}_proj/weight": (2, cut) for name in ("query", "key", "value")
    }
    out = _cut((1,), (0,), blocks=heads, split="rows")
    return {**leaves, "output_proj/weight": (2, out)}


def _vectors(reason: str, *names: str) -> Callable[[Any, str], _Layer]:
    # Whatever their rank: norms over several axes have parameters of several axes.
    return lambda layer, attention: {
        name: (len(leaf.shape), reason)
        for name in names
        if hasattr(leaf := getattr(layer, name, None), "shape")
    }


_DENSE = _cut((0,), (1,))
_LAYERS: dict[tuple[str | None, str], Callable[[Any, str], _Layer]] = {
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
