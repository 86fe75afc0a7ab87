"""Component rules against the layers of Flax, Haiku and Equinox: `layers.TABLE`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from flax import linen, nnx
from layers import Cut

import orthax
from orthax import components, execution
from orthax.components import ByName, ByPath
from orthax.internal.components import decide_all


def cuts(tree, rule):
    """Return the cut of every leaf of a tree, by path."""
    return {path: cut for path, _, cut in components.resolve(tree, rule)}


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def without(tree, paths):
    """Return the tree with None for the leaves at these paths."""
    keep = lambda path, leaf: None if layers.path_of(path) in paths else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(keep, tree)


# --- the table ------------------------------------------------------------------------


@pytest.mark.parametrize("layer", layers.TABLE, ids=lambda layer: layer.name)
def test_table(layer):
    tree, model = layer.build()
    leaves = layers.leaves_of(tree)
    assert set(leaves) == set(layer.leaves), "the table names every leaf"
    rule = layer.rule(model)
    raising = [path for path, cut in layer.leaves.items() if cut == layers.RAISES]
    if raising:
        with pytest.raises(ValueError) as error:
            components.resolve(tree, rule)
        named = [path for path in leaves if f"'{path}'" in str(error.value)]
        assert set(named) == set(raising)
    tree = without(tree, raising)
    expected = {path: layer.leaves[path] for path in layers.leaves_of(tree)}
    could_be_cut = any(len(leaves[path].shape) > 1 for path in expected)
    if could_be_cut and not any(expected.values()):
        with pytest.raises(ValueError, match="cuts no leaf"):
            components.resolve(tree, rule)
        tree, expected = [tree, shape(6, 5)], None
    resolved = components.resolve(tree, rule if expected else OnFirst(rule))
    found = {leaf.path: leaf.cut for leaf in resolved}
    if expected is None:
        assert [*found.values()][:-1] == [None] * (len(found) - 1)
    else:
        assert found == expected
        assert [*found] == [*expected], "in the order of the tree"


@dataclasses.dataclass(frozen=True)
class OnFirst:
    """The inner rule on the first entry of a list, and a matrix beside it."""

    inner: Any

    def resolve(self, path, leaf):
        where, _, inside = path.partition("/")
        return self.inner.resolve(inside, leaf) if where == "0" else layers.DENSE


def test_table_has_no_row_twice():
    names = [layer.name for layer in layers.TABLE]
    assert len(set(names)) == len(names) > 130


# --- the table against what the layers compute ----------------------------------------
#
# A linear layer's output is bilinear in kernel and input. Its tensor of coefficients
# (output element, kernel entry, input element) says without any convention which
# entries an output sums over, and which entries see the same input.


def linen_linear(module):
    return lambda params, x: module.apply({"params": params}, x)


def nnx_linear(model):
    graph = nnx.graphdef(model)
    return lambda params, x: nnx.merge(graph, params)(x)


def haiku_linear(function):
    apply = hk.without_apply_rng(hk.transform(function)).apply
    return lambda params, x: apply(params, x)


def eqx_linear(model):
    static = eqx.filter(model, lambda leaf: not hasattr(leaf, "shape"))
    return lambda params, x: eqx.combine(params, static)(x)


IMAGE = (1, 5, 5, 4)
NARROW = (1, 5, 5, 2)
ROW_IMAGE = (4, 5, 5)


def linear_layers():
    """Return name, parameters, function, rule and input shape of linear layers."""

    def of_linen(module, x, rule=ByName()):
        params = layers.linen_params(module, jnp.zeros(x))
        return params, linen_linear(module), rule, x

    def of_nnx(make, x):
        model = layers.nnx_model(make)
        rule = components.from_model(model)
        return nnx.state(model, nnx.Param), nnx_linear(model), rule, x

    def of_eqx(make, x):
        model = layers.eqx_model(make)
        rule = components.from_model(model)
        return layers.eqx_params(model), eqx_linear(model), rule, x

    def of_haiku(function, x):
        params = layers.haiku_params(function, jnp.zeros(x))
        return params, haiku_linear(function), ByName(), x

    general = functools.partial(nnx.LinearGeneral, use_bias=False)
    conv = functools.partial(nnx.Conv, padding="VALID", use_bias=False)
    local = functools.partial(linen.ConvLocal, padding="VALID", use_bias=False)
    return {
        "linen Dense": lambda: of_linen(linen.Dense(5, use_bias=False), (2, 6)),
        "linen Conv": lambda: of_linen(
            linen.Conv(5, (3, 3), padding="VALID", use_bias=False), IMAGE
        ),
        "linen ConvLocal": lambda: of_linen(
            layers.Inside(lambda: local(3, (2, 2))), (1, 3, 3, 2)
        ),
        "linen ConvTranspose": lambda: of_linen(
            linen.ConvTranspose(5, (3, 3), use_bias=False), NARROW
        ),
        "nnx LinearGeneral, output pair": lambda: of_nnx(
            lambda r: general(6, (2, 3), rngs=r), (2, 6)
        ),
        "nnx LinearGeneral, input pair": lambda: of_nnx(
            lambda r: general((2, 3), 5, axis=(-2, -1), rngs=r), (2, 2, 3)
        ),
        "nnx LinearGeneral, batched": lambda: of_nnx(
            lambda r: general(6, 5, batch_axis={0: 3}, rngs=r), (3, 2, 6)
        ),
        "nnx Einsum, batched": lambda: of_nnx(
            lambda r: nnx.Einsum("bed,edk->bek", (3, 6, 5), rngs=r), (2, 3, 6)
        ),
        "nnx Einsum, output first": lambda: of_nnx(
            lambda r: nnx.Einsum("...d,kd->...k", (5, 6), rngs=r), (2, 6)
        ),
        "nnx Conv, groups": lambda: of_nnx(
            lambda r: conv(4, 6, (3, 3), feature_group_count=2, rngs=r), IMAGE
        ),
        "nnx ConvTranspose": lambda: of_nnx(
            lambda r: nnx.ConvTranspose(2, 5, (3, 3), use_bias=False, rngs=r), NARROW
        ),
        "nnx ConvTranspose, transposed": lambda: of_nnx(
            lambda r: nnx.ConvTranspose(
                2, 5, (3, 3), use_bias=False, transpose_kernel=True, rngs=r
            ),
            NARROW,
        ),
        "equinox Linear": lambda: of_eqx(
            lambda k: eqx.nn.Linear(6, 5, use_bias=False, key=k), (6,)
        ),
        "equinox Conv2d, groups": lambda: of_eqx(
            lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, use_bias=False, key=k), ROW_IMAGE
        ),
        "equinox ConvTranspose2d, groups": lambda: of_eqx(
            lambda k: eqx.nn.ConvTranspose2d(
                4, 6, 3, padding=1, groups=2, use_bias=False, key=k
            ),
            ROW_IMAGE,
        ),
        "haiku Conv2D": lambda: of_haiku(
            lambda x: hk.Conv2D(5, 3, padding="VALID", with_bias=False)(x), IMAGE
        ),
        "haiku Conv2DTranspose": lambda: of_haiku(
            lambda x: hk.Conv2DTranspose(5, 3, with_bias=False)(x), NARROW
        ),
    }


LINEAR = linear_layers()


def coefficients(function, params, x):
    """Return which (output, kernel entry, input) belong together, as booleans."""
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape))
    by_input = jax.jacrev(function, argnums=1)
    tensor = jax.jit(jax.jacfwd(by_input))(zeros(params), jnp.zeros(x))
    (tensor,) = jax.tree.leaves(tensor)
    (entries,) = (leaf.shape for leaf in jax.tree.leaves(params))
    size = int(np.prod(entries))
    inputs = int(np.prod(x))
    # jacfwd puts the parameter's axes last, jacrev the input's before them.
    tensor = np.asarray(tensor).reshape(-1, inputs, size) != 0
    return tensor.transpose(0, 2, 1), entries


@pytest.mark.parametrize("name", LINEAR)
def test_rows_are_summed_over_and_columns_are_outputs(name):
    params, function, rule, x = LINEAR[name]()
    together, entries = coefficients(function, params, x)
    ((_, _, cut),) = components.resolve(params, rule)
    index = jnp.arange(np.prod(entries)).reshape(entries)
    (stack,) = cut.fold(index)
    stack = np.asarray(stack)
    place = np.empty((3, stack.size), int)  # matrix, row and column of every entry
    place[:, stack.ravel()] = np.indices(stack.shape).reshape(3, -1)
    matrix, _, column = place

    summed = together.any(2)  # (output, entry)
    columns = set()
    for entries_of_output in summed:
        where = {
            *zip(matrix[entries_of_output], column[entries_of_output], strict=True)
        }
        assert len(where) == 1, "an output sums over entries of one column"
        columns |= where if entries_of_output.sum() == stack.shape[1] else set()
    assert len(columns) == stack.shape[0] * stack.shape[2], "over all of them"

    seen = together.any(0)[stack]  # (matrix, row, column, input)
    assert (seen == seen[:, :, :1]).all(), "a row sees the same inputs in every column"
    for rows in seen[:, :, 0]:
        assert len(np.unique(rows, axis=0)) == len(rows), "and each row others"


# --- names that no framework's layer has ----------------------------------------------


@pytest.mark.parametrize(
    ("path", "leaf", "expected"),
    [
        # Left alone by name, at any rank.
        *(
            (name, shape(4, 6), None)
            for name in (
                "bias",
                "b",
                "scale",
                "offset",
                "layer/bias",
                "embedding",
                "embeddings",
                "token_embed",
                "pos_embedding",
                "position_embedding",
                "cls",
                "cls_token",
                "class_token",
            )
        ),
        ("scale", shape(1, 1, 4, 6), None),
        ("pos_embed", shape(1, 7, 6), None),
        # What a module is called is not what its leaf is: a patch embedding is a Conv.
        ("patch_embedding/kernel", shape(3, 3, 4, 6), layers.CONV),
        ("embed/kernel", shape(4, 6), layers.DENSE),
        ("bias/kernel", shape(4, 6), layers.DENSE),
        # Left alone by shape or dtype.
        ("kernel", shape(6), None),
        ("kernel", shape(), None),
        ("kernel", shape(1, 1), None),
        ("kernel", shape(0, 5), None),
        ("kernel", shape(3, 0, 5), None),
        ("kernel", shape(6, 5, dtype="int32"), None),
        ("kernel", shape(6, 5, dtype="bool"), None),
        ("kernel", shape(6, 5, dtype=jax.dtypes.float0), None),
        ("key", jax.random.split(jax.random.key(0), (6, 5)), None),
        ("weight", shape(6), None),
        # Cut.
        ("kernel", shape(6, 1), layers.DENSE),
        ("kernel", shape(1, 5), layers.DENSE),
        ("kernel", shape(6, 5, dtype="bfloat16"), layers.DENSE),
        ("kernel", shape(6, 5, dtype="float16"), layers.DENSE),
        ("kernel", shape(6, 5, dtype="complex64"), layers.DENSE),
        ("w", shape(6, 5), layers.DENSE),
        ("attention/query/kernel", shape(6, 5), layers.DENSE),
        ("lora_a", shape(6, 2), layers.DENSE),
        ("lora_b", shape(2, 5), layers.DENSE),
        ("anything", shape(6, 5), layers.DENSE),
        # Gates of a cell with parameters of its own: none is a bias for its letter.
        *(
            (name, shape(6, 5), layers.DENSE)
            for name in ("w_i", "w_f", "w_g", "w_o", "W_D")
        ),
        # Ambiguous.
        ("kernel", shape(3, 6, 5), layers.RAISES),
        ("w", shape(3, 6, 5), layers.RAISES),
        ("qkv/kernel", shape(6, 3, 8), layers.RAISES),
        ("kernel", shape(2, 3, 3, 3, 6, 5), layers.RAISES),
        ("query/kernel", shape(3, 6, 2, 4), layers.RAISES),
        ("key/kernel", shape(3, 6, 2, 4), layers.RAISES),
        ("value/kernel", shape(3, 6, 2, 4), layers.RAISES),
        ("out/kernel", shape(3, 2, 4, 6), layers.RAISES),
        ("qkv/kernel", shape(6, 3, 2, 4), layers.RAISES),
        ("query/kernel", shape(4, 3, 6, 2, 4), layers.RAISES),
        ("lora_a", shape(3, 6, 2), layers.RAISES),
        ("anything", shape(3, 6, 5), layers.RAISES),
        ("anything", shape(3, 3, 6, 5), layers.RAISES),
        ("weight", shape(5, 6), layers.RAISES),
        ("conv/weight", shape(5, 6, 3, 3), layers.RAISES),
    ],
    ids=str,
)
def test_names(path, leaf, expected):
    tree = {"anchor": {"kernel": shape(2, 2)}, **nested(path, leaf)}
    if expected == layers.RAISES:
        with pytest.raises(ValueError, match=f"'{path}'"):
            components.resolve(tree, ByName())
    else:
        assert cuts(tree, ByName())[path] == expected


def nested(path, leaf):
    *modules, name = path.split("/")
    return functools.reduce(
        lambda tree, module: {module: tree}, reversed(modules), {name: leaf}
    )


def test_weight_names_from_model():
    with pytest.raises(ValueError, match="from_model"):
        components.resolve({"weight": shape(5, 6)}, ByName())


def test_ambiguous_leaves_are_all_named_with_their_shapes():
    tree = {"a": {"kernel": shape(3, 6, 5)}, "b": [{"kernel": shape(2, 4, 4)}]}
    with pytest.raises(ValueError) as error:
        components.resolve(tree, ByName())
    for text in ("'a/kernel'", "(3, 6, 5)", "'b/0/kernel'", "(2, 4, 4)"):
        assert text in str(error.value)


def test_stacked_and_skip_match_whole_components_of_a_path():
    leaf = shape(3, 6, 5)
    tree = {"encoder": {"layers": {"kernel": leaf}}, "head": {"kernel": shape(6, 5)}}
    for stacked in ("layers", "encoder", "encoder/layers", ("layers", 0)):
        assert cuts(tree, ByName(stacked=(stacked,)))["encoder/layers/kernel"] == (
            layers.STACK
        )
    for stacked in ("layer", "decoder/layers", "encoder/layer", "head"):
        with pytest.raises(ValueError, match="'encoder/layers/kernel'"):
            components.resolve(tree, ByName(stacked=(stacked,)))
    for skip in ("encoder", "layers", "encoder/layers", "encoder/layers/kernel"):
        assert cuts(tree, ByName(skip=(skip,))) == {
            "encoder/layers/kernel": None,
            "head/kernel": layers.DENSE,
        }
    with pytest.raises(ValueError, match="'encoder/layers/kernel'"):
        components.resolve(tree, ByName(skip=("hea", "kern", "layer")))


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (ByName(skip=("haed",)), ("skip 'haed'", "near it: 'head'")),
        (ByName(stacked=("layer",)), ("stacked 'layer'", "'layers'")),
        (ByName(overrides=[("haed/kernel", None)]), ("'haed/kernel'", "'head/kernel'")),
        (components.OnlyConvolutions(ByName(skip=("haed",))), ("'haed'", "'head'")),
        (ByName(skip=("encoder/layers", "zzz")), ("skip 'zzz'",)),
    ],
    ids=str,
)
def test_names_that_are_in_no_path_raise(rule, named):
    tree = {"encoder": {"layers": {"conv": {"kernel": shape(3, 3, 6, 5)}}}}
    tree["head"] = {"kernel": shape(6, 5)}
    with pytest.raises(ValueError, match="is in no path of this tree") as error:
        components.resolve(tree, rule)
    for text in (*named, "orthax.explain", 'unmatched="ignore"'):
        assert text in str(error.value)
    assert len(decide_all(tree, rule)) == 2, "explain shows the others"
    inner = getattr(rule, "rule", rule)
    ignoring = dataclasses.replace(inner, unmatched="ignore")
    if inner is not rule:
        ignoring = dataclasses.replace(rule, rule=ignoring)
    assert components.resolve(tree, ignoring)


def test_names_that_are_in_no_path_are_told_with_the_leaves_they_were_meant_for():
    tree = {"layers": {"kernel": shape(3, 6, 5)}}
    with pytest.raises(ValueError, match="'layers/kernel'") as error:
        components.resolve(tree, ByName(stacked=("layer",)))
    assert "stacked 'layer' of ByName" in str(error.value)


def test_patterns_of_by_path_may_find_nothing():
    rule = ByPath([("bias", None), ("kernel", layers.DENSE)])
    assert cuts({"kernel": shape(6, 5)}, rule) == {"kernel": layers.DENSE}


SKIPPING = ByName(skip=("head",))
PARAMETERS = {"head": {"kernel": jnp.ones((6, 5))}, "up": {"kernel": jnp.ones((5, 6))}}
ON_UP = {"head": {"kernel": False}, "up": {"kernel": True}}


@pytest.mark.parametrize(
    "tx",
    [
        orthax.muon(0.1, rule=SKIPPING),
        orthax.normuon(0.1, rule=SKIPPING),
        optax.masked(orthax.orthogonalise(rule=SKIPPING), ON_UP),
        optax.masked(orthax.orthogonalise(rule=SKIPPING), {"head": False, "up": True}),
        optax.masked(
            orthax.orthogonalise(rule=ByName(skip=("head/kernel",))),
            {"head": False, "up": True},
        ),
        optax.partition(
            {"o": orthax.orthogonalise(rule=SKIPPING), "a": optax.adam(0.1)},
            {"head": {"kernel": "a"}, "up": {"kernel": "o"}},
        ),
    ],
    ids=["muon", "normuon", "masked", "above", "above what is named", "partition"],
)
def test_names_of_masked_leaves_are_not_missed(tx):
    state = tx.init(PARAMETERS)
    updates, _ = tx.update(PARAMETERS, state, PARAMETERS)
    assert set(updates) == {"head", "up"}


def test_muon_with_a_name_that_matches_nothing_is_not_off_in_silence():
    with pytest.raises(ValueError, match="skip 'heads'"):
        orthax.muon(0.1, rule=ByName(skip=("heads",))).init(PARAMETERS)


def test_names_of_leaves_that_are_none_are_found():
    tree = {"head": {"kernel": None}, "up": {"kernel": shape(5, 6)}}
    assert cuts(tree, SKIPPING) == {"up/kernel": layers.DENSE}


def test_overrides_come_first_and_mean_the_leaf_as_it_is():
    rule = ByName(
        stacked=("layers",),
        skip=("head",),
        overrides=[("mix$", Cut((-2,), (-1,))), ("head/kernel", layers.ROW_DENSE)],
    )
    tree = {"layers": {"mix": shape(3, 6, 5), "kernel": shape(3, 6, 5)}}
    tree["head"] = {"kernel": shape(6, 5), "other": shape(6, 5)}
    assert cuts(tree, rule) == {
        "head/kernel": layers.ROW_DENSE,
        "head/other": None,
        "layers/kernel": layers.STACK,
        "layers/mix": layers.STACK,
    }
    assert hash(rule) == hash(dataclasses.replace(rule))


def test_a_kernel_that_stacked_leaves_without_two_axes_raises():
    tree = {"decoder": {"layers": {"mlp": {"kernel": shape(64, 3, 32)}}}}
    tree["decoder"]["logits_dense"] = {"kernel": shape(64, 100), "gain": shape(3, 4)}
    with pytest.raises(ValueError, match="'decoder/logits_dense/kernel'") as error:
        components.resolve(tree, ByName(stacked=(("decoder", 1),)))
    assert "smaller sub-tree" in str(error.value)
    assert "gain" not in str(error.value), "a vector may well be stacked"
    found = cuts(tree, ByName(stacked=(("decoder/layers", 1),)))
    assert found["decoder/logits_dense/kernel"] == layers.DENSE


def test_stacked_vectors_are_no_matrices_whatever_their_name():
    tree = {"layers": {"kernel": shape(3, 6, 5), "gain": shape(3, 6)}}
    assert cuts(tree, ByName(stacked=("layers",)))["layers/gain"] is None


def test_stacked_axis_that_a_leaf_lacks_is_named():
    tree = {"layers": {"kernel": shape(3, 6, 5)}}
    with pytest.raises(ValueError, match="'layers/kernel'"):
        components.resolve(tree, ByName(stacked=(("layers", 3),)))


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "per head"},
        {"stacked": "layers"},
        {"stacked": (3,)},
        {"stacked": (("layers", "0"),)},
        {"skip": "head"},
        {"skip": (3,)},
        {"unmatched": "warn"},
    ],
    ids=str,
)
def test_malformed_options_raise_when_the_rule_is_made(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        ByName(**options)


def test_a_tree_with_matrices_of_which_none_is_cut_raises():
    tree = {"embed": {"embedding": shape(11, 6)}, "norm": {"scale": shape(6)}}
    with pytest.raises(ValueError, match="'embed/embedding'"):
        components.resolve(tree, ByName())
    with pytest.raises(ValueError, match="'head/kernel'"):
        components.resolve({"head": {"kernel": shape(6, 5)}}, ByName(skip=("head",)))


@pytest.mark.parametrize(
    "tree",
    [{}, None, {"scale": shape(6)}, {"ids": shape(6, 5, dtype="int32")}, [None, ()]],
    ids=str,
)
def test_a_tree_without_matrices_passes_through(tree):
    assert all(leaf.cut is None for leaf in components.resolve(tree, ByName()))


# --- trees ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recording:
    """A rule of a user's own, that writes down what it is asked."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def resolve(self, path, leaf):
        self.seen.append((path, leaf.shape))
        return Cut((-2,), (-1,))


class Pair(NamedTuple):
    first: Any
    second: Any


def test_paths_of_containers():
    leaf = shape(6, 5)
    tree = {"a": [leaf, (leaf, {"b": leaf})], "c": Pair(leaf, None), 3: leaf}
    assert set(cuts({"t": tree["a"]}, ByName())) == {"t/0", "t/1/0", "t/1/1/b"}
    assert set(cuts({"t": tree["c"]}, ByName())) == {"t/first"}
    assert set(cuts({"t": {3: leaf}}, ByName())) == {"t/3"}
    # Only a box's attribute is no part of the path: a key may well be called so.
    raw = {"query": leaf, "key": leaf, "value": leaf}
    assert set(cuts(raw, ByName())) == {"query", "key", "value"}


def test_a_rule_of_ones_own_sees_matrices_only_and_may_count_from_the_end():
    rule = Recording()
    tree = {"w": shape(3, 6, 5), "v": shape(5), "n": shape(6, 5, dtype="int32")}
    found = cuts(tree, rule)
    assert rule.seen == [("w", (3, 6, 5))]
    assert found == {"w": layers.STACK, "v": None, "n": None}


class Network(nnx.Module):
    """Layers in a list, and attention: every shape of path that NNX has."""

    def __init__(self, rngs):
        self.blocks = layers.modules([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

    def __call__(self, x):
        for each in self.blocks:
            x = each(x)
        return self.attention(x)


NETWORK = [
    *(f"blocks/{i}/kernel" for i in range(2)),
    *(f"attention/{part}/kernel" for part in ("query", "key", "value", "out")),
]


def resolving(rule):
    """Return a transform that doubles matrices, and asks the rule at `init` too."""

    def init(params):
        components.resolve(params, rule)
        return optax.EmptyState()

    def update(updates, state, params=None):
        return execution.map_matrices(lambda x: 2 * x, updates, rule), state

    return optax.GradientTransformation(init, update)


def test_nnx_optimizer_gives_the_same_paths_at_init_and_update():
    model = nnx.jit(lambda: Network(nnx.Rngs(0)))()
    rule = Recording()
    tx = optax.chain(resolving(rule), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    at_init = rule.seen.copy()
    rule.seen.clear()

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(jnp.ones((1, 3, 6))) ** 2).sum())(model)
        optimizer.update(model, grads)
        return grads

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))["blocks"]
    grads = nnx.to_pure_dict(step(model, optimizer))["blocks"]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))["blocks"]
    # The bias of query, key and value is of rank 2, (H, K): the rule is asked too.
    biases = [f"attention/{part}/bias" for part in ("query", "key", "value")]
    assert {path for path, _ in at_init} == {*NETWORK, *biases}
    assert sorted(at_init) == sorted(rule.seen)
    # The gradient of a matrix is doubled, that of a vector passes through.
    for i in range(2):
        for name, scale in (("kernel", 0.2), ("bias", 0.1)):
            step = before[i][name] - after[i][name]
            np.testing.assert_allclose(step, scale * grads[i][name], 1e-4, 1e-5)


@pytest.mark.parametrize("make", [lambda _: ByName(), components.from_model])
def test_nnx_states_boxed_and_pure_resolve_alike(make):
    model = layers.nnx_model(Network)
    rule = make(model)
    boxed = nnx.state(model, nnx.Param)
    pure = nnx.as_pure(boxed) if hasattr(nnx, "as_pure") else nnx.pure(boxed)
    paths = jax.tree_util.tree_flatten_with_path(boxed)[0]
    assert {str(path[-1]) for path, _ in paths} == {".value"}
    found = cuts(boxed, rule)
    assert found == cuts(pure, rule) == cuts(nnx.to_pure_dict(boxed), rule)
    assert {path for path, cut in found.items() if cut} == set(NETWORK)


def test_nnx_model_itself_with_keys_and_counts():
    model = nnx.Sequential(
        nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    found = cuts(nnx.state(model), components.from_model(model))
    assert len(found) == 4, "kernel and bias, and the key and count of the dropout"
    assert {path for path, cut in found.items() if cut} == {"layers/0/kernel"}
    assert cuts(nnx.state(model), ByName()) == found


def test_linen_boxes():
    init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
    module = linen.Dense(5, kernel_init=init)
    boxed = layers.linen_params(module, layers.VECTORS)
    assert isinstance(boxed["kernel"], linen.Partitioned)
    expected = {"bias": None, "kernel": layers.DENSE}
    assert cuts(boxed, ByName()) == cuts(linen.unbox(boxed), ByName()) == expected
    init = linen.with_logical_partitioning(linen.initializers.ones, ("in", "out"))
    boxed = layers.linen_params(linen.Dense(5, kernel_init=init), layers.VECTORS)
    assert cuts({"head": boxed}, ByPath([("^head/kernel$", layers.DENSE)])) == {
        "head/bias": None,
        "head/kernel": layers.DENSE,
    }


def test_equinox_model_of_real_arrays_and_its_gradient():
    model = eqx.nn.MLP(6, 5, 8, 1, key=layers.KEY)
    rule = components.from_model(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    expected = {"weight": layers.ROW_DENSE, "bias": None}
    expected = layers.below("layers/0", expected) | layers.below("layers/1", expected)
    assert cuts(params, rule) == expected
    grads = eqx.filter_grad(lambda model: model(jnp.ones(6)).sum())(model)
    assert cuts(grads, rule) == expected
    with pytest.raises(TypeError, match=r"eqx\.filter"):
        components.resolve(model, rule)  # its activation is a leaf, and no array


def test_haiku_names_with_slashes_and_tildes():
    params = layers.haiku_params(lambda x: hk.nets.MLP([8, 5])(x), layers.VECTORS)
    path = "mlp/~/linear_1/w"
    for skip in ("linear_1", "mlp/~/linear_1", "linear_1/w"):
        found = cuts(params, ByName(skip=(skip,)))
        assert found[path] is None and found["mlp/~/linear_0/w"] == layers.DENSE
    rule = ByPath([("linear_0", None), (r"mlp/~/linear_1/w$", layers.DENSE)])
    assert cuts(params, rule)[path] == layers.DENSE


# --- a stock transformer --------------------------------------------------------------


@pytest.mark.parametrize(
    "scan_axis", [None, 0, 1], ids=["unscanned", "axis 0", "axis 1"]
)
def test_transformer_every_hidden_kernel_is_cut_and_nothing_else(scan_axis):
    module = layers.Transformer(scan_axis=scan_axis)
    params = layers.linen_params(module, layers.TOKENS)
    rule = ByName(
        stacked=() if scan_axis is None else (("layers", scan_axis),), skip=("head",)
    )
    found = cuts(params, rule)
    kernels = {path for path in found if path.endswith("/kernel")} - {"head/kernel"}
    assert {path for path, cut in found.items() if cut} == kernels
    assert len(kernels) == (18 if scan_axis is None else 6)
    # optax.contrib.muon takes the leaves of rank 2: of the unscanned transformer the
    # table, the head and the biases of query, key and value, and 6 of 18 hidden
    # kernels; of the scanned one every bias and norm, and none of the 6.
    leaves = layers.leaves_of(params)
    rank2 = {path for path, leaf in leaves.items() if leaf.ndim == 2}
    assert len(rank2 & kernels) == (6 if scan_axis is None else 0)
    assert len(rank2 - kernels) == (11 if scan_axis is None else 9)


# --- ByPath ---------------------------------------------------------------------------


def test_by_path_takes_the_first_pattern_found():
    tree = {"a": {"kernel": shape(3, 6, 5), "bias": shape(4, 5)}, "b": shape(6, 5)}
    rule = ByPath(
        [
            ("bias", None),
            ("^a/", layers.STACK),
            ("kernel", None),
            ("", Cut((-1,), (-2,))),
        ]
    )
    assert cuts(tree, rule) == {
        "a/bias": None,
        "a/kernel": layers.STACK,
        "b": layers.ROW_DENSE,  # negative axes come back counted from the front
    }


def test_by_path_names_a_leaf_that_no_pattern_covers():
    tree = {"a": {"kernel": shape(6, 5)}, "b": {"other": shape(6, 5), "v": shape(5)}}
    with pytest.raises(ValueError, match="'b/other'") as error:
        components.resolve(tree, ByPath([("kernel", layers.DENSE)]))
    assert "(6, 5)" in str(error.value) and "a/kernel" not in str(error.value)
    assert "b/v" not in str(error.value), "vectors need no pattern"


def test_by_path_names_a_leaf_that_a_cut_does_not_fit():
    rule = ByPath([("kernel", layers.CONV)])
    with pytest.raises(ValueError, match="'a/kernel'"):
        components.resolve({"a": {"kernel": shape(6, 5)}}, rule)
    rule = ByPath([("kernel", Cut((0,), (1,), blocks=4))])
    with pytest.raises(ValueError, match="'a/kernel'"):
        components.resolve({"a": {"kernel": shape(6, 5)}}, rule)


@pytest.mark.parametrize(
    ("patterns", "error", "match"),
    [
        ([("a(", None)], ValueError, r"a\("),
        ([("a", (0, 1))], TypeError, "Matricisation"),
        ([("a", "skip")], TypeError, "Matricisation"),
        ([("a",)], TypeError, "pair"),
        ([("a", None, None)], TypeError, "pair"),
        (["ab"], TypeError, "pair"),
        ([(3, None)], TypeError, "pair"),
        ([None], TypeError, "pair"),
        ({"a": None}, TypeError, "sequence"),
        ("ab", TypeError, "sequence"),
    ],
    ids=str,
)
def test_by_path_malformed_patterns_raise_when_the_rule_is_made(patterns, error, match):
    with pytest.raises(error, match=match):
        ByPath(patterns)
    with pytest.raises(error, match=match):
        model = layers.nnx_model(lambda rngs: nnx.Linear(6, 5, rngs=rngs))
        components.from_model(model, overrides=patterns)


def test_rules_are_hashable_values():
    make = lambda: ByPath([["a", layers.DENSE], ("b", None)])  # noqa: E731
    assert make() == make() and hash(make()) == hash(make())
    make = lambda: ByName(stacked=["layers", ("experts", 1)], skip=["head"])  # noqa: E731
    assert make() == make() and hash(make()) == hash(make())
    model = layers.nnx_model(layers.nnx_mha)
    rules = [components.from_model(model) for _ in range(2)]
    assert rules[0] == rules[1] and hash(rules[0]) == hash(rules[1])
    assert not any(callable(rule) for rule in (make(), rules[0], ByPath([])))


# --- from_model -----------------------------------------------------------------------


def test_from_model_override_comes_before_what_the_module_says():
    model = layers.nnx_model(lambda rngs: nnx.Conv(4, 8, (3, 3), rngs=rngs))
    rule = components.from_model(model, overrides=[("kernel", Cut((2,), (3,)))])
    assert cuts(nnx.state(model, nnx.Param), rule)["kernel"] == Cut((2,), (3,))


def test_from_model_says_what_to_do_about_an_unknown_parameter():
    model = layers.nnx_model(layers.Raw)
    with pytest.raises(ValueError, match="'mix'") as error:
        components.resolve(nnx.state(model, nnx.Param), components.from_model(model))
    assert "(3, 6, 5)" in str(error.value) and "overrides" in str(error.value)


def test_from_model_reads_models_in_containers_and_subclasses():
    class Own(nnx.Conv):
        pass

    models = {
        "a": [
            layers.nnx_model(lambda r: Own(4, 6, (3, 3), feature_group_count=2, rngs=r))
        ],
        "b": layers.eqx_model(lambda key: eqx.nn.Linear(6, 5, key=key)),
    }
    tree = {
        "a": [nnx.state(models["a"][0], nnx.Param)],
        "b": layers.eqx_params(models["b"]),
    }
    assert cuts(tree, components.from_model(models)) == {
        "a/0/kernel": dataclasses.replace(layers.CONV, groups=2),
        "a/0/bias": None,
        "b/weight": layers.ROW_DENSE,
        "b/bias": None,
    }


def test_from_model_names_a_leaf_of_another_model():
    model = layers.nnx_model(lambda rngs: nnx.Linear(6, 5, rngs=rngs))
    rule = components.from_model(model)
    for other in ({"other": shape(6, 5)}, {"kernel": shape(3, 6, 5)}):
        with pytest.raises(ValueError, match=f"'{next(iter(other))}'"):
            components.resolve(other, rule)


@pytest.mark.parametrize(
    "model",
    [
        linen.Dense(5),
        hk.transform(lambda x: hk.Linear(5)(x)),
        hk.without_apply_rng(hk.transform_with_state(lambda x: hk.Linear(5)(x))),
        {"layer": linen.Dense(5)},
    ],
    ids=["linen", "haiku", "haiku with state", "linen in a dictionary"],
)
def test_from_model_sends_linen_and_haiku_to_by_name(model):
    with pytest.raises(TypeError, match="ByName"):
        components.from_model(model)


@pytest.mark.parametrize("model", [{"kernel": np.ones((6, 5))}, nnx.Linear, None, 3])
def test_from_model_needs_a_model(model):
    with pytest.raises(TypeError, match="from_model"):
        components.from_model(model)


def test_from_model_unknown_attention_raises():
    with pytest.raises(ValueError, match="attention"):
        components.from_model(layers.nnx_model(layers.nnx_mha), attention="each")


def test_from_model_equinox_heads_are_fused():
    with pytest.raises(ValueError, match="heads"):
        components.from_model(layers.eqx_model(layers.eqx_mha), attention="heads")
