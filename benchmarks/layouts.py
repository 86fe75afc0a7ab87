"""Networks on eight devices: how every leaf is sharded on the mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import trees
from orthax import components

DEVICES = 8
# Devices over which one layer is split, where it is; the other axis has the rest.
_MODEL = 4

P = jax.sharding.PartitionSpec


def scanned_gpt2_small() -> trees.Network:
    """Return GPT-2 small with the parameters of its blocks in one leading axis."""
    params = trees.NETWORKS["gpt2_small"]().params
    blocks = [*params["blocks"]["layers"].values()]
    stacked = jax.tree.map(
        lambda *xs: jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype), *blocks
    )
    rule = components.ByName(stacked=("blocks",))
    return trees.Network({**params, "blocks": stacked}, rule)


# The smallest first.
NETWORKS: dict[str, Callable[[], trees.Network]] = {
    "moe32": trees.NETWORKS["moe32"],
    "gpt2_small_scanned": scanned_gpt2_small,
    "resnet50": trees.NETWORKS["resnet50"],
}


class Layout(NamedTuple):
    """A mesh, and how a leaf is sharded on it."""

    mesh: tuple[tuple[str, int], ...]
    spec: Callable[[components.Leaf], jax.sharding.PartitionSpec]


def _replicated(_: components.Leaf) -> jax.sharding.PartitionSpec:
    return P()


def _largest(leaf: components.Leaf) -> jax.sharding.PartitionSpec:
    """Shard the largest axis of the matrices that can be."""
    if leaf.cut is None:
        return P()
    cut, shape = leaf.cut.on(leaf.value.ndim), leaf.value.shape
    return _over(leaf, "data", sorted(cut.rows + cut.columns, key=lambda i: -shape[i]))


# The second projection of a pair takes what the first one has split.
_SECOND = {"out", "down", "conv2"}


def _projections(leaf: components.Leaf) -> jax.sharding.PartitionSpec:
    """Shard columns of first projections, rows of second ones, experts by expert."""
    if leaf.cut is None:
        return P()
    parts = set(leaf.path.split("/"))
    if "experts" in parts:
        return P("model")
    cut = leaf.cut.on(leaf.value.ndim)
    return _over(leaf, "model", cut.rows if parts & _SECOND else cut.columns)


def _over(
    leaf: components.Leaf, name: str, axes: Sequence[int]
) -> jax.sharding.PartitionSpec:
    """Shard the first of some axes that can be divided evenly, if there is one."""
    shape, sizes = leaf.value.shape, {"data": DEVICES, "model": _MODEL}
    able = [i for i in axes if shape[i] % sizes[name] == 0]
    return P(*[None] * able[0], name) if able else P()


LAYOUTS = {
    "data parallel": Layout((("data", DEVICES),), _replicated),
    "FSDP": Layout((("data", DEVICES),), _largest),
    "tensor parallel": Layout(
        (("data", DEVICES // _MODEL), ("model", _MODEL)), _projections
    ),
}
# On automatic axes a program knows shardings only where they are given to it.
AXES = {
    "auto": jax.sharding.AxisType.Auto,
    "given": jax.sharding.AxisType.Auto,
    "explicit": jax.sharding.AxisType.Explicit,
}


def shardings(network: trees.Network, layout: Layout, mesh: Any) -> Any:
    """Return the tree of shardings of a network on a mesh."""
    leaves = components.resolve(network.params, network.rule)
    lie = [jax.NamedSharding(mesh, layout.spec(leaf)) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(network.params), lie)
