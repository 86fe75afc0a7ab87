"""Published transformers, their matrices, and meshes of devices to lay them on.

Nothing is allocated: leaves are `jax.ShapeDtypeStruct`s, meshes are
`jax.sharding.AbstractMesh`es.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

P = jax.sharding.PartitionSpec


class Model(NamedTuple):
    """Sizes of a transformer of the Llama family.

    `hidden` is the width of the feed-forward block, or of one expert and of the shared
    one beside them; where there are experts, they are in every second layer, and the
    others have a block of `dense_hidden`. `parameters` is what was published.
    """

    parameters: float
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    tied: bool
    tokens: int
    source: str
    experts: int = 0
    dense_hidden: int = 0


_HERD = "[Grattafiori et al., 2024](https://arxiv.org/abs/2407.21783), Table 3"
_CONFIG = "[config.json](https://huggingface.co/meta-llama/{0}/blob/main/config.json)"
MODELS = {
    "Llama 3.2 1B": Model(
        *(1.24e9, 2048, 16, 32, 8, 64, 8192, 128256, True, 2**22),
        _CONFIG.format("Llama-3.2-1B"),
    ),
    "Llama 3 8B": Model(
        *(8.03e9, 4096, 32, 32, 8, 128, 14336, 128256, False, 2**22), _HERD
    ),
    "Llama 3 70B": Model(
        *(70.6e9, 8192, 80, 64, 8, 128, 28672, 128256, False, 2**24), _HERD
    ),
    "Llama 4 Maverick": Model(
        *(400e9, 5120, 48, 40, 8, 128, 8192, 202048, False, 2**24),
        _CONFIG.format("Llama-4-Maverick-17B-128E"),
        experts=128,
        dense_hidden=16384,
    ),
}


def matrices(model: Model) -> dict[str, Any]:
    """Return the shapes of all that is orthogonalised, layers in a leading axis."""
    d, heads = model.width, model.heads * model.head_size
    kv, layers = model.kv_heads * model.head_size, model.layers
    attention = {
        "query": leaf(layers, d, heads),
        "key": leaf(layers, d, kv),
        "value": leaf(layers, d, kv),
        "out": leaf(layers, heads, d),
    }
    if not model.experts:
        return {"attention": attention, "dense": _block(d, model.hidden, layers)}
    half = layers // 2
    return {
        "attention": attention,
        "dense": _block(d, model.dense_hidden, half),
        "shared": _block(d, model.hidden, half),
        "experts": _block(d, model.hidden, half, model.experts),
    }


def leaf(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a layer of one kernel, or of many in leading axes."""
    return {"kernel": jax.ShapeDtypeStruct(shape, "float32")}


def _block(width: int, hidden: int, *lead: int) -> dict[str, Any]:
    return {
        "gate": leaf(*lead, width, hidden),
        "up": leaf(*lead, width, hidden),
        "down": leaf(*lead, hidden, width),
    }


def size(tree: Any) -> int:
    """Return the number of parameters of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parameters(model: Model, experts: int | None = None) -> int:
    """Return the number of parameters, norms left out.

    Args:
      model: sizes.
      experts: how many experts count; default: all.
    """
    tables_ = (1 if model.tied else 2) * model.vocabulary * model.width
    router = model.experts * model.width * (model.layers // 2)
    found = model if experts is None else model._replace(experts=experts)
    return size(matrices(found)) + tables_ + router


def active(model: Model) -> int:
    """Return the number of parameters that a token meets: of all experts, one."""
    return parameters(model, 1 if model.experts else None)


def mesh(model: Model, devices: int) -> jax.sharding.AbstractMesh:
    """Return the mesh: tensor parallel over 8 where there are more devices than that.

    Experts take as many of the others as there are experts.
    """
    tensor = 8 if devices > 8 else 1
    others = devices // tensor
    if not model.experts:
        return explicit_mesh((others, tensor), ("fsdp", "tensor"))
    experts = math.gcd(model.experts, others)
    sizes = (experts, others // experts, tensor)
    return explicit_mesh(sizes, ("expert", "fsdp", "tensor"))


def explicit_mesh(
    sizes: Sequence[int], names: Sequence[str]
) -> jax.sharding.AbstractMesh:
    """Return a mesh of axes on which types say how leaves are sharded."""
    kinds = (jax.sharding.AxisType.Explicit,) * len(names)
    return jax.sharding.AbstractMesh(tuple(sizes), tuple(names), axis_types=kinds)


def shardings(model: Model, on: jax.sharding.AbstractMesh) -> dict[str, Any]:
    """Return where every matrix lies: one side over `tensor`, the other over the rest.

    First projections have their columns over `tensor`, second ones their rows.
    """
    rest = tuple(name for name in on.axis_names if name != "tensor")

    def lies(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.NamedSharding:
        names = [part.key for part in path]
        expert = names[0] == "experts"
        lead = (None, "expert") if expert else (None,)
        sides = ("fsdp" if expert else rest, "tensor")
        if names[1] in ("out", "down"):
            sides = sides[::-1]
        return jax.NamedSharding(on, P(*lead, *sides))

    return jax.tree.map_with_path(lies, matrices(model))
