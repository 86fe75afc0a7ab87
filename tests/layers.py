"""Every layer of Flax, Haiku and Equinox, and how each of its leaves must be cut.

One row for a layer and a rule. The leaves come from the framework's own initialisation
(abstractly, so that nothing is compiled); the cuts come from the mathematics: rows are
what an output sums over, columns are the outputs. `test_layer_rules.py` holds the
rules against this table, and this table against what the layers compute.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import flax
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen, nnx

from orthax import components

Cut = components.Matricisation
KEY = jax.random.key(0)
RAISES = "raises"

# Inputs: a batch of vectors, of sequences, of images; and where two axes are features.
VECTORS = jnp.zeros((2, 6))
SEQUENCES = jnp.zeros((2, 7, 6))
PAIRS = jnp.zeros((4, 2, 3))
SIGNALS = jnp.zeros((2, 8, 4))
IMAGES = jnp.zeros((2, 8, 8, 4))
GREY = jnp.zeros((2, 8, 8, 1))
VOLUMES = jnp.zeros((2, 4, 4, 4, 2))

DENSE = Cut((0,), (1,))
STACK = Cut((1,), (2,))  # (L, in, out)
CONV1D = Cut((0, 1), (2,), spatial=(0,))  # (*k, in, out)
CONV = Cut((0, 1, 2), (3,), spatial=(0, 1))
CONV3D = Cut((0, 1, 2, 3), (4,), spatial=(0, 1, 2))
TRANSPOSED = Cut((0, 1, 3), (2,), spatial=(0, 1))  # (*k, out, in)
TO_PAIR = Cut((0,), (1, 2))  # (in, f1, f2)
FROM_PAIR = Cut((0, 1), (2,))  # (i1, i2, out)
ROW_DENSE = Cut((1,), (0,))  # (out, in)
ROW_CONV = Cut((1, 2, 3), (0,), spatial=(2, 3))  # (out, in, *k)

# (D, H, K) of query, key and value; (H, K, D) of the output.
HEADS = {
    "whole": (TO_PAIR, FROM_PAIR),
    "per_head": (Cut((0,), (2,)), Cut((1,), (2,))),
    "heads": (Cut((0, 2), (1,)), Cut((1, 2), (0,))),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the table.

    Attributes:
      name: framework, layer, and what is special about it.
      build: gives the parameters as Optax sees them, and the model (None in Linen and
        Haiku, whose parameters stand for themselves).
      rule: gives the rule for a model.
      leaves: for every leaf, by path: its cut, None (it passes through) or `RAISES`.
    """

    name: str
    build: Callable[[], tuple[Any, Any]]
    rule: Callable[[Any], Any]
    leaves: Mapping[str, Cut | str | None]


def path_of(key_path) -> str:
    """Return a leaf's path as rules spell it, written apart from the library's own.

    A boxed leaf (an NNX Variable, a Linen Partitioned) ends in the attribute `value`,
    which is no part of the path; a dictionary may well have a key of that name.
    """
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_of(tree) -> dict[str, Any]:
    """Return the leaves of a tree by path, in the order of the tree."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): leaf for path, leaf in flat}


def linen_params(module, *inputs):
    """Return the parameters of a Linen module."""
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


def haiku_params(function, *inputs):
    """Return the parameters of a Haiku function."""
    init = hk.transform_with_state(function).init
    return jax.eval_shape(init, KEY, *inputs)[0]


def nnx_model(make):
    """Return the abstract NNX module that `make(rngs)` gives."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def eqx_model(make):
    """Return the abstract Equinox module that `make(key)` gives."""
    return eqx.filter_eval_shape(make, KEY)


def eqx_params(model):
    """Return what `eqx.filter(model, eqx.is_inexact_array)` gives, also if abstract."""
    floats = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return eqx.filter(model, floats)


def by_name(**options):
    """Return the name rule for any model."""
    return lambda _: components.ByName(**options)


def by_module(**options):
    """Return the rule that reads the model."""
    return lambda model: components.from_model(model, **options)


def from_linen(name, module, inputs, leaves, rule=None):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    build = lambda: (linen_params(module, *inputs), None)  # noqa: E731
    return Layer(f"linen {name}", build, rule or by_name(), leaves)


def from_haiku(name, function, inputs, leaves, rule=None):
    build = lambda: (haiku_params(function, inputs), None)  # noqa: E731
    return Layer(f"haiku {name}", build, rule or by_name(), leaves)


def from_nnx(name, make, leaves, rule=None):
    def build():
        model = nnx_model(make)
        return nnx.state(model, nnx.Param), model

    return Layer(f"nnx {name}", build, rule or by_module(), leaves)


def from_equinox(name, make, leaves, rule=None):
    def build():
        model = eqx_model(make)
        return eqx_params(model), model

    return Layer(f"equinox {name}", build, rule or by_module(), leaves)


def kernel(cut, **others):
    """Return the leaves of a layer with a kernel and a bias."""
    return {"kernel": cut, "bias": None, **others}


def weight(cut, **others):
    """Return the leaves of a layer with a weight and a bias."""
    return {"weight": cut, "bias": None, **others}


def below(name, leaves):
    """Return the leaves as they are called below a module of this name."""
    return {f"{name}/{leaf}": cut for leaf, cut in leaves.items()}


def attention(cuts, *, bias=True, norms=False):
    """Return the leaves of Flax's attention, given the cuts of query and output."""
    query, out = cuts
    leaves = {f"{part}/kernel": query for part in ("query", "key", "value")}
    leaves["out/kernel"] = out
    if bias:
        leaves |= {path.replace("kernel", "bias"): None for path in leaves}
    if norms:
        leaves |= {"query_ln/scale": None, "key_ln/scale": None}
    return leaves


# --- Flax Linen -----------------------------------------------------------------------


class Inside(linen.Module):
    """One layer inside a module that names it as Linen does, `ConvLocal_0`."""

    make: Callable[[], linen.Module]

    @linen.compact
    def __call__(self, x):
        return self.make()(x)


class Norms(linen.Module):
    """All of Linen's normalisations."""

    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm()(x)
        x = linen.RMSNorm()(x)
        x = linen.GroupNorm(num_groups=2)(x)
        x = linen.InstanceNorm()(x)
        return linen.BatchNorm(use_running_average=True)(x)


class Block(linen.Module):
    """A transformer block, as `linen.scan` takes it."""

    heads: int = 2
    width: int = 6

    @linen.compact
    def __call__(self, x, _=None):
        y = linen.LayerNorm(name="norm1")(x)
        x += linen.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = linen.Dense(8, name="up")(linen.LayerNorm(name="norm2")(x))
        return x + linen.Dense(self.width, name="down")(linen.relu(y)), None


class Transformer(linen.Module):
    """A language model of stock layers, its blocks one by one or scanned."""

    scan_axis: int | None = None
    depth: int = 3

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(11, 6, name="embed")(tokens)
        shape = (1, tokens.shape[-1], 6)
        x += self.param("pos_embedding", linen.initializers.normal(), shape)
        if self.scan_axis is None:
            for i in range(self.depth):
                x, _ = Block(name=f"block{i}")(x)
        else:
            scanned = linen.scan(
                Block,
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = scanned(name="layers")(x, None)
        return linen.Dense(11, name="head")(linen.LayerNorm(name="norm")(x))


class Experts(linen.Module):
    """Four Dense experts by `linen.vmap`."""

    axis: int = 0

    @linen.compact
    def __call__(self, x, _=None):
        many = linen.vmap(
            linen.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=4,
        )
        return many(6, name="experts")(x).sum(0), None


class ScannedExperts(linen.Module):
    """Three layers of four experts: a stacked axis inside another."""

    axis: int = 0
    expert_axis: int = 0

    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            Experts,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(self.expert_axis, name="layers")(x, None)[0]


def block(scope, dense, cuts):
    """Return the leaves of `Block`."""
    leaves = below("attention", attention(cuts))
    leaves |= below("up", kernel(dense)) | below("down", kernel(dense))
    for norm in ("norm1", "norm2"):
        leaves |= {f"{norm}/scale": None, f"{norm}/bias": None}
    return below(scope, leaves)


def transformer(*blocks):
    """Return the leaves of `Transformer`."""
    leaves = {"embed/embedding": None, "pos_embedding": None}
    leaves |= below("head", kernel(DENSE)) | {"norm/scale": None, "norm/bias": None}
    for each in blocks:
        leaves |= each
    return leaves


def gates(input_gates, hidden_gates, input_bias, hidden_bias):
    """Return the leaves of a recurrent cell that keeps its gates apart."""
    leaves = {f"{gate}/kernel": DENSE for gate in (*input_gates, *hidden_gates)}
    return leaves | {f"{gate}/bias": None for gate in (*input_bias, *hidden_bias)}


def cell(module):
    """Return what a recurrent cell is initialised with: its carry, and its input."""
    shape = IMAGES.shape if isinstance(module, linen.ConvLSTMCell) else VECTORS.shape
    carry = jax.eval_shape(lambda: module.initialize_carry(KEY, shape))
    carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), carry)
    return carry, jnp.zeros(shape)


TOKENS = jnp.zeros((2, 7), int)
LSTM = linen.LSTMCell(5)
OPTIMISED_LSTM = linen.OptimizedLSTMCell(5)
GRU = linen.GRUCell(5)
MGU = linen.MGUCell(5)
SIMPLE = linen.SimpleCell(5)
CONV_LSTM = linen.ConvLSTMCell(5, (3, 3))
LSTM_LEAVES = gates(
    ["ii", "if", "ig", "io"], ["hi", "hf", "hg", "ho"], [], ["hi", "hf", "hg", "ho"]
)
BATCHED = linen.DenseGeneral(5, axis=-1, batch_dims=(0,))
MHDPA = linen.MultiHeadDotProductAttention(2, qkv_features=8, normalize_qk=True)
SCANNED_WHOLE = (Cut((1,), (2, 3)), Cut((1, 2), (3,)))
SCANNED_PER_HEAD = (Cut((1,), (3,)), Cut((2,), (3,)))
SCANNED_HEADS = (Cut((1, 3), (2,)), Cut((2, 3), (1,)))
# The scanned axis stands second: (D, L, H, K), (H, L, K, D) and (in, L, out).
SECOND_WHOLE = (Cut((0,), (2, 3)), Cut((0, 2), (3,)))
SECOND_PER_HEAD = (Cut((0,), (3,)), Cut((2,), (3,)))
BLOCKS = [f"block{i}" for i in range(3)]


LINEN = [
    from_linen("Dense", linen.Dense(5), VECTORS, kernel(DENSE)),
    # Rank 3 alone does not tell these apart, nor from a Conv1d or a scanned Dense.
    from_linen(
        "DenseGeneral, output pair",
        linen.DenseGeneral((4, 5)),
        VECTORS,
        kernel(RAISES),
    ),
    from_linen(
        "DenseGeneral, input pair",
        linen.DenseGeneral(5, axis=(-2, -1)),
        PAIRS,
        kernel(RAISES),
    ),
    from_linen("DenseGeneral, batched", BATCHED, PAIRS, kernel(RAISES)),
    from_linen(
        "Einsum", linen.Einsum((6, 2, 4), "btd,dhk->bthk"), SEQUENCES, kernel(RAISES)
    ),
    *(
        from_linen(
            f"MultiHeadDotProductAttention, {name}",
            MHDPA,
            (SEQUENCES, SEQUENCES),
            attention(cuts, norms=True),
            by_name(attention=name),
        )
        for name, cuts in HEADS.items()
    ),
    from_linen("Conv 1d", linen.Conv(5, (3,)), SIGNALS, kernel(RAISES)),
    from_linen("Conv 2d", linen.Conv(5, (3, 3)), IMAGES, kernel(CONV)),
    from_linen("Conv 1x1", linen.Conv(5, (1, 1)), IMAGES, kernel(CONV)),
    from_linen("Conv 3d", linen.Conv(5, (3, 3, 3)), VOLUMES, kernel(CONV3D)),
    from_linen("Conv, one channel", linen.Conv(5, (3, 3)), GREY, kernel(CONV)),
    # The shape tells neither the groups nor a depthwise kernel: names guess.
    from_linen(
        "Conv, groups",
        linen.Conv(6, (3, 3), feature_group_count=2),
        IMAGES,
        kernel(CONV),
    ),
    from_linen(
        "Conv, depthwise",
        linen.Conv(8, (3, 3), feature_group_count=4),
        IMAGES,
        kernel(CONV),
    ),
    from_linen(
        "ConvLocal",
        Inside(lambda: linen.ConvLocal(5, (3, 3))),
        IMAGES,
        below("ConvLocal_0", kernel(Cut((2,), (3,)))),
    ),
    from_linen("ConvTranspose", linen.ConvTranspose(5, (3, 3)), IMAGES, kernel(CONV)),
    # The flag `transpose_kernel` is not in the name either.
    from_linen(
        "ConvTranspose, transposed",
        linen.ConvTranspose(5, (3, 3), transpose_kernel=True),
        IMAGES,
        kernel(CONV),
    ),
    from_linen("Embed", linen.Embed(7, 5), TOKENS, {"embedding": None}),
    from_linen(
        "normalisations",
        Norms(),
        IMAGES,
        {
            "LayerNorm_0/scale": None,
            "LayerNorm_0/bias": None,
            "RMSNorm_0/scale": None,
            "GroupNorm_0/scale": None,
            "GroupNorm_0/bias": None,
            "InstanceNorm_0/scale": None,
            "InstanceNorm_0/bias": None,
            "BatchNorm_0/scale": None,
            "BatchNorm_0/bias": None,
        },
    ),
    from_linen("LSTMCell", LSTM, cell(LSTM), LSTM_LEAVES),
    from_linen("OptimizedLSTMCell", OPTIMISED_LSTM, cell(OPTIMISED_LSTM), LSTM_LEAVES),
    from_linen(
        "GRUCell",
        GRU,
        cell(GRU),
        gates(["ir", "iz", "in"], ["hr", "hz", "hn"], ["ir", "iz", "in"], ["hn"]),
    ),
    from_linen(
        "MGUCell",
        MGU,
        cell(MGU),
        gates(["if", "in"], ["hf", "hn"], ["if", "in"], ["hn"]),
    ),
    from_linen("SimpleCell", SIMPLE, cell(SIMPLE), gates(["i"], ["h"], ["i"], [])),
    # Four fused gates, which a name cannot tell: the kernel is cut whole.
    from_linen(
        "ConvLSTMCell",
        CONV_LSTM,
        cell(CONV_LSTM),
        below("ih", kernel(CONV)) | below("hh", kernel(CONV)),
    ),
    # The scale's own key contains a kernel: `Dense_0/kernel/scale`.
    from_linen(
        "WeightNorm",
        Inside(lambda: linen.WeightNorm(linen.Dense(5))),
        VECTORS,
        below("Dense_0", kernel(DENSE)) | {"WeightNorm_0/Dense_0/kernel/scale": None},
    ),
    from_linen("PReLU", linen.PReLU(), VECTORS, {"negative_slope": None}),
    *(
        from_linen(
            f"transformer, {name}",
            Transformer(),
            TOKENS,
            transformer(*(block(each, DENSE, cuts) for each in BLOCKS)),
            by_name(attention=name),
        )
        for name, cuts in HEADS.items()
    ),
    from_linen(
        "transformer, scanned but not said so",
        Transformer(scan_axis=0),
        TOKENS,
        transformer(block("layers", RAISES, (RAISES, RAISES))),
    ),
    *(
        from_linen(
            f"transformer, scanned, {name}",
            Transformer(scan_axis=0),
            TOKENS,
            transformer(block("layers", STACK, cuts)),
            by_name(stacked=("layers",), attention=name),
        )
        for name, cuts in zip(
            HEADS, (SCANNED_WHOLE, SCANNED_PER_HEAD, SCANNED_HEADS), strict=True
        )
    ),
    *(
        from_linen(
            f"transformer, scanned on axis 1, {name}",
            Transformer(scan_axis=1),
            TOKENS,
            transformer(block("layers", Cut((0,), (2,)), cuts)),
            by_name(stacked=(("layers", 1),), attention=name),
        )
        for name, cuts in zip(
            ("whole", "per_head"), (SECOND_WHOLE, SECOND_PER_HEAD), strict=True
        )
    ),
    from_linen(
        "transformer, without its head",
        Transformer(),
        TOKENS,
        transformer(*(block(each, DENSE, HEADS["whole"]) for each in BLOCKS))
        | {"head/kernel": None},
        by_name(skip=("head",)),
    ),
    from_linen(
        "experts",
        Experts(),
        VECTORS,
        below("experts", kernel(STACK)),
        by_name(stacked=("experts",)),
    ),
    from_linen(
        "experts, not said so", Experts(), VECTORS, below("experts", kernel(RAISES))
    ),
    *(
        from_linen(
            f"scanned experts, axes {axis} and {expert_axis}, {order}",
            ScannedExperts(axis, expert_axis),
            VECTORS,
            below("layers/experts", kernel(cut)),
            # In whatever order they are named, the outer sub-tree's axis is outer.
            by_name(stacked=stacked[:: 1 if order == "outer first" else -1]),
        )
        for axis, expert_axis, cut, stacked in (
            (0, 0, Cut((2,), (3,)), ("layers", "experts")),
            (1, 0, Cut((2,), (3,)), (("layers", 1), "experts")),  # (E, L, in, out)
            (0, 1, Cut((1,), (3,)), ("layers", ("experts", 1))),  # (L, in, E, out)
            (1, 1, Cut((0,), (3,)), (("layers", 1), ("experts", 1))),  # (in, L, E, out)
        )
        for order in ("outer first", "inner first")
    ),
    from_linen(
        "scanned experts, by one path",
        ScannedExperts(),
        VECTORS,
        below("layers/experts", kernel(Cut((2,), (3,)))),
        by_name(stacked=("layers", "layers/experts")),
    ),
]


# --- Flax NNX -------------------------------------------------------------------------


def nnx_stack(make):
    """Return three copies of a layer along a leading axis."""
    return lambda rngs: nnx.split_rngs(splits=3)(nnx.vmap(make))(rngs)


def modules(items):
    """Return a list of modules that this version of Flax registers as one."""
    return nnx.List(items) if hasattr(nnx, "List") else list(items)


class Nested(nnx.Module):
    """Layers in a list, a shared one, and a parameter of its own."""

    def __init__(self, rngs):
        self.blocks = modules([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.shared = self.blocks[0]
        self.matrix = nnx.Param(jnp.ones((6, 5)))
        self.pos_embedding = nnx.Param(jnp.ones((1, 7, 6)))
        self.steps = nnx.Param(jnp.zeros((6, 5), int))


class Stochastic(nnx.Module):
    """Streams of random numbers, a running statistic, and a way back to itself."""

    def __init__(self, rngs):
        self.rngs = rngs
        self.lin = nnx.Linear(6, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.again = self


class Raw(nnx.Module):
    """A parameter of rank 3 whose meaning only its author knows."""

    def __init__(self, rngs):
        self.mix = nnx.Param(jnp.ones((3, 6, 5)))
        self.lin = nnx.Linear(6, 5, rngs=rngs)


def nnx_mha(rngs):
    return nnx.MultiHeadAttention(2, 6, 8, normalize_qk=True, rngs=rngs)


def nnx_norms(rngs):
    return nnx.Sequential(
        nnx.LayerNorm(6, rngs=rngs),
        nnx.RMSNorm(6, rngs=rngs),
        nnx.GroupNorm(6, num_groups=2, rngs=rngs),
        nnx.BatchNorm(6, rngs=rngs),
    )


NNX_NORMS = {
    f"layers/{i}/{leaf}": None
    for i, leaves in enumerate((["scale", "bias"], ["scale"], *[["scale", "bias"]] * 2))
    for leaf in leaves
}
NNX_LSTM = gates(
    ["ii", "if_", "ig", "io"], ["hi", "hf", "hg", "ho"], [], ["hi", "hf", "hg", "ho"]
)
FUSED4 = Cut((0,), (1,), blocks=4)
FUSED3 = Cut((0,), (1,), blocks=3)

NNX = [
    from_nnx("Linear", lambda r: nnx.Linear(6, 5, rngs=r), kernel(DENSE)),
    from_nnx(
        "LinearGeneral, output pair",
        lambda r: nnx.LinearGeneral(6, (4, 5), rngs=r),
        kernel(TO_PAIR),
    ),
    from_nnx(
        "LinearGeneral, input pair",
        lambda r: nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=r),
        kernel(FROM_PAIR),
    ),
    from_nnx(
        "LinearGeneral, both",
        lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=r),
        kernel(Cut((0, 1), (2, 3))),
    ),
    from_nnx(
        "LinearGeneral, batched",
        lambda r: nnx.LinearGeneral(6, 5, batch_axis={0: 3}, rngs=r),
        kernel(STACK),
    ),
    from_nnx(
        "Einsum, output pair",
        lambda r: nnx.Einsum("btd,dhk->bthk", (6, 2, 4), (2, 4), rngs=r),
        kernel(TO_PAIR),
    ),
    from_nnx(
        "Einsum, input pair",
        lambda r: nnx.Einsum("bthk,hkd->btd", (2, 4, 6), rngs=r),
        {"kernel": FROM_PAIR},
    ),
    from_nnx(
        "Einsum, batched",
        lambda r: nnx.Einsum("bed,edk->bek", (3, 6, 5), rngs=r),
        {"kernel": STACK},
    ),
    from_nnx(
        "Einsum, output first",
        lambda r: nnx.Einsum("...d, kd -> ...k", (5, 6), rngs=r),
        {"kernel": ROW_DENSE},
    ),
    *(
        from_nnx(
            f"MultiHeadAttention, {name}",
            nnx_mha,
            attention(cuts, norms=True),
            by_module(attention=name),
        )
        for name, cuts in HEADS.items()
    ),
    from_nnx("Conv 1d", lambda r: nnx.Conv(4, 5, (3,), rngs=r), kernel(CONV1D)),
    from_nnx("Conv 2d", lambda r: nnx.Conv(4, 5, (3, 3), rngs=r), kernel(CONV)),
    from_nnx("Conv 3d", lambda r: nnx.Conv(4, 5, (3, 3, 3), rngs=r), kernel(CONV3D)),
    from_nnx(
        "Conv, one channel", lambda r: nnx.Conv(1, 5, (3, 3), rngs=r), kernel(CONV)
    ),
    from_nnx(
        "Conv, groups",
        lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r),
        kernel(dataclasses.replace(CONV, groups=2)),
    ),
    from_nnx(
        "Conv, depthwise",
        lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=r),
        kernel(None),
    ),
    from_nnx(
        "ConvTranspose", lambda r: nnx.ConvTranspose(4, 5, (3, 3), rngs=r), kernel(CONV)
    ),
    from_nnx(
        "ConvTranspose, transposed",
        lambda r: nnx.ConvTranspose(4, 5, (3, 3), transpose_kernel=True, rngs=r),
        kernel(TRANSPOSED),
    ),
    from_nnx("Embed", lambda r: nnx.Embed(7, 5, rngs=r), {"embedding": None}),
    from_nnx("normalisations", nnx_norms, NNX_NORMS),
    from_nnx("LSTMCell", lambda r: nnx.LSTMCell(6, 5, rngs=r), NNX_LSTM),
    from_nnx(
        "OptimizedLSTMCell",
        lambda r: nnx.OptimizedLSTMCell(6, 5, rngs=r),
        {"dense_i/kernel": FUSED4} | below("dense_h", kernel(FUSED4)),
    ),
    from_nnx(
        "GRUCell",
        lambda r: nnx.GRUCell(6, 5, rngs=r),
        {"dense_h/kernel": FUSED3} | below("dense_i", kernel(FUSED3)),
    ),
    from_nnx(
        "SimpleCell",
        lambda r: nnx.SimpleCell(6, 5, rngs=r),
        {"dense_h/kernel": DENSE} | below("dense_i", kernel(DENSE)),
    ),
    from_nnx(
        "RNN",
        lambda r: nnx.RNN(nnx.GRUCell(6, 5, rngs=r)),
        {"cell/dense_h/kernel": FUSED3} | below("cell/dense_i", kernel(FUSED3)),
    ),
    from_nnx(
        "LoRA", lambda r: nnx.LoRA(6, 2, 5, rngs=r), {"lora_a": DENSE, "lora_b": DENSE}
    ),
    from_nnx(
        "LoRA around a Linear",
        lambda r: nnx.LoRA(6, 2, 5, base_module=nnx.Linear(6, 5, rngs=r), rngs=r),
        {"lora_a": DENSE, "lora_b": DENSE} | below("base_module", kernel(DENSE)),
    ),
    from_nnx(
        "LoRALinear",
        lambda r: nnx.LoRALinear(6, 5, lora_rank=2, rngs=r),
        kernel(DENSE) | {"lora/lora_a": DENSE, "lora/lora_b": DENSE},
    ),
    from_nnx(
        "vmapped Linear",
        nnx_stack(lambda r: nnx.Linear(6, 5, rngs=r)),
        kernel(STACK),
    ),
    from_nnx(
        "vmapped Conv",
        nnx_stack(lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r)),
        kernel(Cut((1, 2, 3), (4,), groups=2, spatial=(1, 2))),
    ),
    from_nnx(
        "vmapped MultiHeadAttention",
        nnx_stack(nnx_mha),
        attention(SCANNED_PER_HEAD, norms=True),
        by_module(attention="per_head"),
    ),
    from_nnx(
        "vmapped LSTM",
        nnx_stack(lambda r: nnx.OptimizedLSTMCell(6, 5, rngs=r)),
        {"dense_i/kernel": Cut((1,), (2,), blocks=4)}
        | below("dense_h", kernel(Cut((1,), (2,), blocks=4))),
    ),
    from_nnx(
        "vmapped LoRA",
        nnx_stack(lambda r: nnx.LoRA(6, 2, 5, rngs=r)),
        {"lora_a": STACK, "lora_b": STACK},
    ),
    from_nnx("vmapped normalisations", nnx_stack(nnx_norms), NNX_NORMS),
    from_nnx(
        "vmapped Embed",
        nnx_stack(lambda r: nnx.Embed(7, 5, rngs=r)),
        {"embedding": None},
    ),
    from_nnx(
        "nested",
        Nested,
        {
            "blocks/0/kernel": DENSE,
            "blocks/0/bias": None,
            "blocks/1/kernel": DENSE,
            "blocks/1/bias": None,
            "matrix": DENSE,
            "pos_embedding": None,
            "steps": None,
        },
    ),
    from_nnx("stochastic", Stochastic, below("lin", kernel(DENSE))),
    from_nnx("raw parameter", Raw, {"mix": RAISES} | below("lin", kernel(DENSE))),
    from_nnx(
        "raw parameter, said",
        Raw,
        {"mix": STACK} | below("lin", kernel(DENSE)),
        by_module(overrides=[("^mix$", STACK)]),
    ),
    from_nnx(
        "raw parameter, left alone",
        Raw,
        {"mix": None} | below("lin", kernel(DENSE)),
        by_module(overrides=[("^mix$", None)]),
    ),
    # The same modules by their names alone.
    from_nnx(
        "Linear by name", lambda r: nnx.Linear(6, 5, rngs=r), kernel(DENSE), by_name()
    ),
    from_nnx(
        "Conv by name",
        lambda r: nnx.Conv(4, 5, (3, 3), rngs=r),
        kernel(CONV),
        by_name(),
    ),
    from_nnx(
        "Conv 1d by name",
        lambda r: nnx.Conv(4, 5, (3,), rngs=r),
        kernel(RAISES),
        by_name(),
    ),
    *(
        from_nnx(
            f"MultiHeadAttention by name, {name}",
            nnx_mha,
            attention(cuts, norms=True),
            by_name(attention=name),
        )
        for name, cuts in HEADS.items()
    ),
    from_nnx(
        "Embed by name",
        lambda r: nnx.Embed(7, 5, rngs=r),
        {"embedding": None},
        by_name(),
    ),
    from_nnx("normalisations by name", nnx_norms, NNX_NORMS, by_name()),
    from_nnx(
        "LSTMCell by name", lambda r: nnx.LSTMCell(6, 5, rngs=r), NNX_LSTM, by_name()
    ),
    # Fused gates are cut whole: their number is not in the name.
    from_nnx(
        "OptimizedLSTMCell by name",
        lambda r: nnx.OptimizedLSTMCell(6, 5, rngs=r),
        {"dense_i/kernel": DENSE} | below("dense_h", kernel(DENSE)),
        by_name(),
    ),
    from_nnx(
        "GRUCell by name",
        lambda r: nnx.GRUCell(6, 5, rngs=r),
        {"dense_h/kernel": DENSE} | below("dense_i", kernel(DENSE)),
        by_name(),
    ),
    from_nnx(
        "LoRALinear by name",
        lambda r: nnx.LoRALinear(6, 5, lora_rank=2, rngs=r),
        kernel(DENSE) | {"lora/lora_a": DENSE, "lora/lora_b": DENSE},
        by_name(),
    ),
    from_nnx(
        "vmapped Linear by name",
        lambda r: nnx.Sequential(nnx_stack(lambda r: nnx.Linear(6, 5, rngs=r))(r)),
        below("layers/0", kernel(STACK)),
        by_name(stacked=("layers/0",)),
    ),
]
# Since 0.12.9 the scales of nnx.WeightNorm are parameters under a key of their own.
FLAX = tuple(int(part) for part in flax.__version__.split(".")[:3])
NNX_SCALES = {"scales/('kernel',)": None} if FLAX >= (0, 12, 9) else {}
# Younger than the oldest Flax that is supported.
if hasattr(nnx, "WeightNorm"):
    NNX += [
        from_nnx(
            name,
            lambda r, norm=getattr(nnx, name): norm(nnx.Linear(6, 5, rngs=r), rngs=r),
            below("layer_instance", kernel(DENSE)) | more,
        )
        for name, more in (("WeightNorm", NNX_SCALES), ("SpectralNorm", {}))
    ]
    NNX += [
        from_nnx("PReLU", lambda r: nnx.PReLU(), {"negative_slope": None}),
        from_nnx(
            "InstanceNorm",
            lambda r: nnx.InstanceNorm(6, rngs=r),
            {"scale": None, "bias": None},
        ),
    ]


# --- Equinox --------------------------------------------------------------------------


def eqx_stack(make):
    """Return three copies of a layer along a leading axis."""
    return lambda key: eqx.filter_vmap(make)(jax.random.split(key, 3))


def eqx_mha(key):
    return eqx.nn.MultiheadAttention(
        2, 6, qk_size=3, vo_size=4, use_query_bias=True, key=key
    )


def projections(query, out):
    """Return the leaves of Equinox's attention."""
    leaves = {f"{part}_proj/weight": query for part in ("query", "key", "value")}
    return leaves | {"output_proj/weight": out, "query_proj/bias": None}


class Two(NamedTuple):
    """A container with named parts."""

    first: Any
    second: Any


class RawAttention(eqx.Module):
    """Parameters of its own; Flax calls the inside of a box `value`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array

    def __init__(self, key):
        self.query = self.key = self.value = jnp.ones((6, 5))


class Parts(eqx.Module):
    """Layers in a list and a tuple, something static, something absent."""

    layers: list
    pair: tuple
    named: Two
    activation: Callable
    absent: eqx.nn.Linear | None = None

    def __init__(self, key):
        self.layers = [eqx.nn.Linear(6, 5, key=key), eqx.nn.LayerNorm((4, 6))]
        self.named = Two(eqx.nn.Linear(6, 5, key=key), {"b": eqx.nn.LayerNorm((4, 6))})
        self.pair = (eqx.nn.Conv1d(4, 5, 3, key=key), eqx.nn.Embedding(7, 5, key=key))
        self.activation = jax.nn.relu


ROW_GROUPS = dataclasses.replace(ROW_CONV, groups=2)
ROW_FUSED4 = Cut((1,), (0,), blocks=4)
ROW_FUSED3 = Cut((1,), (0,), blocks=3)

EQUINOX = [
    from_equinox("Linear", lambda k: eqx.nn.Linear(6, 5, key=k), weight(ROW_DENSE)),
    from_equinox(
        "Linear, scalar in",
        lambda k: eqx.nn.Linear("scalar", 5, key=k),
        weight(ROW_DENSE),
    ),
    from_equinox(
        "MLP",
        lambda k: eqx.nn.MLP(6, 5, 8, 2, key=k),
        below("layers/0", weight(ROW_DENSE))
        | below("layers/1", weight(ROW_DENSE))
        | below("layers/2", weight(ROW_DENSE)),
    ),
    from_equinox(
        "Conv1d",
        lambda k: eqx.nn.Conv1d(4, 5, 3, key=k),
        weight(Cut((1, 2), (0,), spatial=(2,))),
    ),
    from_equinox("Conv2d", lambda k: eqx.nn.Conv2d(4, 5, 3, key=k), weight(ROW_CONV)),
    from_equinox(
        "Conv3d",
        lambda k: eqx.nn.Conv3d(4, 5, 3, key=k),
        weight(Cut((1, 2, 3, 4), (0,), spatial=(2, 3, 4))),
    ),
    from_equinox(
        "Conv2d, one channel", lambda k: eqx.nn.Conv2d(1, 5, 3, key=k), weight(ROW_CONV)
    ),
    from_equinox(
        "Conv2d, groups",
        lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k),
        weight(ROW_GROUPS),
    ),
    from_equinox(
        "Conv2d, depthwise",
        lambda k: eqx.nn.Conv2d(4, 8, 3, groups=4, key=k),
        weight(None),
    ),
    from_equinox(
        "ConvTranspose2d",
        lambda k: eqx.nn.ConvTranspose2d(4, 5, 3, key=k),
        weight(ROW_CONV),
    ),
    from_equinox(
        "ConvTranspose2d, groups",
        lambda k: eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=k),
        weight(ROW_GROUPS),
    ),
    from_equinox(
        "MultiheadAttention, whole", eqx_mha, projections(ROW_DENSE, ROW_DENSE)
    ),
    from_equinox(
        "MultiheadAttention, per_head",
        eqx_mha,
        projections(Cut((1,), (0,), blocks=2), Cut((1,), (0,), blocks=2, split="rows")),
        by_module(attention="per_head"),
    ),
    from_equinox(
        "Embedding", lambda k: eqx.nn.Embedding(7, 5, key=k), {"weight": None}
    ),
    from_equinox(
        "LSTMCell",
        lambda k: eqx.nn.LSTMCell(6, 5, key=k),
        {"weight_ih": ROW_FUSED4, "weight_hh": ROW_FUSED4, "bias": None},
    ),
    from_equinox(
        "GRUCell",
        lambda k: eqx.nn.GRUCell(6, 5, key=k),
        {
            "weight_ih": ROW_FUSED3,
            "weight_hh": ROW_FUSED3,
            "bias": None,
            "bias_n": None,
        },
    ),
    from_equinox("LayerNorm", lambda k: eqx.nn.LayerNorm((4, 6)), weight(None)),
    from_equinox("RMSNorm", lambda k: eqx.nn.RMSNorm((4, 6)), weight(None)),
    from_equinox("GroupNorm", lambda k: eqx.nn.GroupNorm(2, 6), weight(None)),
    from_equinox(
        "BatchNorm",
        lambda k: eqx.nn.BatchNorm(6, "batch", mode="ema"),
        weight(
            None, **{"ema_state_index/init/0": None, "ema_state_index/init/1": None}
        ),
    ),
    from_equinox(
        "WeightNorm",
        lambda k: eqx.nn.WeightNorm(eqx.nn.Linear(6, 5, key=k)),
        below("layer", weight(ROW_DENSE)) | {"g": None},
    ),
    from_equinox(
        "SpectralNorm",
        lambda k: eqx.nn.SpectralNorm(eqx.nn.Linear(6, 5, key=k), "weight", key=k),
        below("layer", weight(ROW_DENSE))
        | {"uv_index/init/0": None, "uv_index/init/1": None},
    ),
    from_equinox("PReLU", lambda k: eqx.nn.PReLU(), {"negative_slope": None}),
    from_equinox(
        "vmapped Linear",
        eqx_stack(lambda k: eqx.nn.Linear(6, 5, key=k)),
        weight(Cut((2,), (1,))),
    ),
    from_equinox(
        "vmapped Conv2d",
        eqx_stack(lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k)),
        weight(Cut((2, 3, 4), (1,), groups=2, spatial=(3, 4))),
    ),
    from_equinox(
        "vmapped LSTMCell",
        eqx_stack(lambda k: eqx.nn.LSTMCell(6, 5, key=k)),
        {
            "weight_ih": Cut((2,), (1,), blocks=4),
            "weight_hh": Cut((2,), (1,), blocks=4),
            "bias": None,
        },
    ),
    from_equinox(
        "vmapped MultiheadAttention, per_head",
        eqx_stack(eqx_mha),
        projections(Cut((2,), (1,), blocks=2), Cut((2,), (1,), blocks=2, split="rows")),
        by_module(attention="per_head"),
    ),
    from_equinox(
        "vmapped Embedding",
        eqx_stack(lambda k: eqx.nn.Embedding(7, 5, key=k)),
        {"weight": None},
    ),
    from_equinox(
        "vmapped LayerNorm",
        eqx_stack(lambda k: eqx.nn.LayerNorm(6)),
        weight(None),
    ),
    from_equinox(
        "parts",
        Parts,
        below("layers/0", weight(ROW_DENSE))
        | below("layers/1", weight(None))
        | below("pair/0", weight(Cut((1, 2), (0,), spatial=(2,))))
        | {"pair/1/weight": None}
        | below("named/first", weight(ROW_DENSE))
        | below("named/second/b", weight(None)),
    ),
    from_equinox(
        "raw parameters",
        lambda k: [RawAttention(k)],
        {"0/query": DENSE, "0/key": DENSE, "0": DENSE},
    ),
    # A weight may be a layer's or an embedding's: names do not tell.
    from_equinox(
        "Linear by name",
        lambda k: eqx.nn.Linear(6, 5, key=k),
        weight(RAISES),
        by_name(),
    ),
    from_equinox(
        "Conv2d by name",
        lambda k: eqx.nn.Conv2d(4, 5, 3, key=k),
        weight(RAISES),
        by_name(),
    ),
    from_equinox(
        "Embedding by name",
        lambda k: eqx.nn.Embedding(7, 5, key=k),
        {"weight": RAISES},
        by_name(),
    ),
    from_equinox(
        "LayerNorm by name",
        lambda k: eqx.nn.LayerNorm((4, 6)),
        weight(RAISES),
        by_name(),
    ),
]


# --- Haiku ----------------------------------------------------------------------------


def haiku_attention(x):
    init = hk.initializers.VarianceScaling(1.0)
    return hk.MultiHeadAttention(2, 4, w_init=init)(x, x, x)


def haiku_recurrent(make):
    def function(x):
        core = make()
        return core(x, core.initial_state(2))

    return function


def haiku_stack(x):
    return hk.experimental.layer_stack(3)(lambda x: hk.Linear(6)(x))(x)


def haiku_norms(x):
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    x = hk.GroupNorm(2)(x)
    return hk.BatchNorm(True, True, 0.9)(x, is_training=True)


def w(scope, cut):
    """Return the leaves of a Haiku layer."""
    return {f"{scope}/w": cut, f"{scope}/b": None}


HAIKU = [
    from_haiku("Linear", lambda x: hk.Linear(5)(x), VECTORS, w("linear", DENSE)),
    from_haiku(
        "MLP",
        lambda x: hk.nets.MLP([8, 5])(x),
        VECTORS,
        w("mlp/~/linear_0", DENSE) | w("mlp/~/linear_1", DENSE),
    ),
    from_haiku("Conv1D", lambda x: hk.Conv1D(5, 3)(x), SIGNALS, w("conv1_d", CONV1D)),
    from_haiku("Conv2D", lambda x: hk.Conv2D(5, 3)(x), IMAGES, w("conv2_d", CONV)),
    from_haiku(
        "Conv2D, channels first",
        lambda x: hk.Conv2D(5, 3, data_format="NCHW")(x),
        IMAGES,
        w("conv2_d", CONV),
    ),
    from_haiku("Conv3D", lambda x: hk.Conv3D(5, 3)(x), VOLUMES, w("conv3_d", CONV3D)),
    from_haiku(
        "Conv2DTranspose",
        lambda x: hk.Conv2DTranspose(5, 3)(x),
        IMAGES,
        w("conv2_d_transpose", TRANSPOSED),
    ),
    from_haiku(
        "Conv1DTranspose",
        lambda x: hk.Conv1DTranspose(5, 3)(x),
        SIGNALS,
        w("conv1_d_transpose", Cut((0, 2), (1,), spatial=(0,))),
    ),
    from_haiku(
        "DepthwiseConv1D",
        lambda x: hk.DepthwiseConv1D(2, 3)(x),
        SIGNALS,
        w("depthwise_conv1_d", None),
    ),
    from_haiku(
        "DepthwiseConv2D",
        lambda x: hk.DepthwiseConv2D(2, 3)(x),
        IMAGES,
        w("depthwise_conv2_d", None),
    ),
    from_haiku(
        "SeparableDepthwiseConv2D",
        lambda x: hk.SeparableDepthwiseConv2D(2, 3)(x),
        IMAGES,
        w("separable_depthwise_conv2_d/~/depthwise_conv2_d_1", None)
        | {"separable_depthwise_conv2_d/~/depthwise_conv2_d/w": None},
    ),
    from_haiku(
        "MultiHeadAttention",
        haiku_attention,
        SEQUENCES,
        w("multi_head_attention/query", DENSE)
        | w("multi_head_attention/key", DENSE)
        | w("multi_head_attention/value", DENSE)
        | w("multi_head_attention/linear", DENSE),
    ),
    from_haiku(
        "LSTM", haiku_recurrent(lambda: hk.LSTM(5)), VECTORS, w("lstm/linear", FUSED4)
    ),
    from_haiku(
        "GRU",
        haiku_recurrent(lambda: hk.GRU(5)),
        VECTORS,
        {"gru/w_i": FUSED3, "gru/w_h": FUSED3, "gru/b": None},
    ),
    from_haiku(
        "Conv2DLSTM",
        haiku_recurrent(lambda: hk.Conv2DLSTM((8, 8), 5, 3)),
        IMAGES,
        w("conv2_dlstm/input_to_hidden", dataclasses.replace(CONV, blocks=4))
        | w("conv2_dlstm/hidden_to_hidden", dataclasses.replace(CONV, blocks=4)),
    ),
    from_haiku(
        "VanillaRNN",
        haiku_recurrent(lambda: hk.VanillaRNN(5)),
        VECTORS,
        w("vanilla_rnn/linear", DENSE) | w("vanilla_rnn/linear_1", DENSE),
    ),
    from_haiku(
        "Embed", lambda x: hk.Embed(7, 5)(x), TOKENS, {"embed/embeddings": None}
    ),
    from_haiku(
        "normalisations",
        haiku_norms,
        IMAGES,
        {
            f"{norm}/{leaf}": None
            for norm in ("layer_norm", "group_norm", "batch_norm")
            for leaf in ("scale", "offset")
        },
    ),
    from_haiku("Bias", lambda x: hk.Bias()(x), SEQUENCES, {"bias/b": None}),
    from_haiku(
        "layer_stack, not said so",
        haiku_stack,
        VECTORS,
        w("__layer_stack_no_per_layer/linear", RAISES),
    ),
    from_haiku(
        "layer_stack",
        haiku_stack,
        VECTORS,
        w("__layer_stack_no_per_layer/linear", STACK),
        by_name(stacked=("__layer_stack_no_per_layer",)),
    ),
]


TABLE = LINEN + NNX + EQUINOX + HAIKU
