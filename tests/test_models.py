"""The networks of examples/models: the published sizes, and what the papers say."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import orthax
from examples.models import CLASSIFIERS, basic_cnn, densenet, gpt, moe, resnet, vit
from orthax import components

WHOLE = {
    **CLASSIFIERS,
    "vit_ti16": vit.vit_ti16,
    "vit_s16": vit.vit_s16,
    "vit_b16": vit.vit_b16,
    "gpt2_small": gpt.GPT,
    "moe": moe.MixtureOfExperts,
}

# The papers of BasicCNN and of the residual networks (ResNet-44: "0.66M"), torchvision,
# DeiT's checkpoints, GPT-2's; the mixture's by hand.
PARAMETERS = {
    "basic_cnn": 24_714,
    "resnet20": 269_722,
    "resnet44": 658_586,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "resnext50_32x4d": 25_028_904,
    "wide_resnet50_2": 68_883_240,
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "gpt2_small": 124_439_808,
    "moe": 512 * 32 + 32 * (2 * 4 * 512**2 + 5 * 512),
}

# Matrices that make a network: one a layer, but four an attention and one an expert.
MATRICES = {
    "basic_cnn": 4,
    "resnet20": 20,
    "resnet44": 44,
    "resnet18": 18 + 3,
    "resnet34": 34 + 3,
    "resnet50": 50 + 4,
    "densenet121": 121,
    "densenet161": 161,
    "resnext50_32x4d": 50 + 4,
    "wide_resnet50_2": 50 + 4,
    "vit_ti16": 1 + 12 * 6 + 1,
    "vit_s16": 1 + 12 * 6 + 1,
    "vit_b16": 1 + 12 * 6 + 1,
    "gpt2_small": 12 * 6,
    "moe": 1 + 2 * 32,
}

STACKED = components.ByName(stacked=("experts",))

every_network = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "densenet161"))
        for name in WHOLE
    ],
)
# One of each form that is quickly traced, the others take long.
FORMS = ("basic_cnn", "resnet20", "resnet18", "resnext50_32x4d")
every_classifier_in_time = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FORMS else [pytest.mark.slow])
        for name in CLASSIFIERS
    ],
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A network small enough to run, what it takes, what it gives."""

    make: Callable[..., nnx.Module]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    vocabulary: int | None = None

    def feed(self) -> jax.Array:
        rng = np.random.default_rng(0)
        if self.vocabulary:
            return jnp.asarray(rng.integers(0, self.vocabulary, self.inputs))
        return jnp.asarray(rng.standard_normal(self.inputs, np.float32))


TINY_GPT = gpt.GPTConfig(vocabulary=11, context=7, depth=1, heads=2, width=8)
TINY = {
    "basic_cnn": Tiny(
        functools.partial(basic_cnn.BasicCNN, (8, 8, 1), 5, features=4),
        (2, 8, 8, 1),
        (2, 5),
    ),
    "resnet, option A": Tiny(
        functools.partial(
            resnet.ResNet, (1, 1), (3, 6), 5, projected=False, cifar_stem=True
        ),
        (2, 8, 8, 3),
        (2, 5),
    ),
    "resnet, bottlenecks": Tiny(
        functools.partial(resnet.ResNet, (1, 1), (2, 4), 5, block=resnet.Bottleneck),
        (2, 16, 16, 3),
        (2, 5),
    ),
    "resnet, grouped bottlenecks": Tiny(
        functools.partial(
            resnet.ResNet,
            (1, 1),
            (2, 4),
            5,
            block=functools.partial(resnet.Bottleneck, widening=2, groups=2),
        ),
        (2, 16, 16, 3),
        (2, 5),
    ),
    "densenet": Tiny(
        functools.partial(densenet.DenseNet, (1, 1), 2, 5), (2, 16, 16, 3), (2, 5)
    ),
    "densenet, 3x3 stem": Tiny(
        functools.partial(densenet.DenseNet, (1, 1), 2, 5, cifar_stem=True),
        (2, 8, 8, 3),
        (2, 5),
    ),
    "vit": Tiny(
        functools.partial(vit.VisionTransformer, 8, 4, 5, width=8, depth=1, heads=2),
        (2, 8, 8, 3),
        (2, 5),
    ),
    "gpt": Tiny(functools.partial(gpt.GPT, TINY_GPT), (2, 7), (2, 7, 11), 11),
    "moe": Tiny(functools.partial(moe.MixtureOfExperts, 8, 4, 2), (2, 7, 8), (2, 7, 8)),
}

every_tiny_network = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)


@functools.cache
def abstract(name: str) -> nnx.Module:
    return nnx.eval_shape(lambda: WHOLE[name](rngs=nnx.Rngs(0)))


def params_of(model: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


# --- sizes ----------------------------------------------------------------------------


@every_network
def test_parameters_are_as_many_as_published(name):
    leaves = jax.tree.leaves(params_of(abstract(name)))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "name, inputs, outputs",
    [
        ("basic_cnn", (1, 32, 32, 3), (1, 10)),
        ("resnet20", (1, 32, 32, 3), (1, 10)),
        ("vit_ti16", (1, 224, 224, 3), (1, 1000)),
        ("gpt2_small", (1, 1024), (1, 1024, 50257)),
        ("moe", (1, 7, 512), (1, 7, 512)),
    ],
)
def test_logits_at_the_published_size(name, inputs, outputs):
    x = jax.ShapeDtypeStruct(inputs, "int32" if name == "gpt2_small" else "float32")
    y = nnx.eval_shape(lambda x: WHOLE[name](rngs=nnx.Rngs(0))(x), x)
    assert (y.shape, y.dtype) == (outputs, jnp.float32)


@pytest.mark.parametrize(
    "name, block, channels, size",
    [
        ("resnet18", resnet.BasicBlock, 512, 224),
        ("resnet50", resnet.Bottleneck, 2048, 224),
        ("resnext50_32x4d", resnet.Bottleneck, 2048, 224),
        ("resnet18", resnet.BasicBlock, 512, 32),
        *(
            pytest.param(
                *("densenet121", densenet.DenseLayer, 1024, size),
                marks=pytest.mark.slow,
            )
            for size in (224, 32)
        ),
    ],
)
def test_every_stage_halves_the_image(name, block, channels, size, monkeypatch):
    cifar_stem = size == 32
    shapes = []
    call = block.__call__

    def recording(self, x):
        y = call(self, x)
        shapes.append(y.shape)
        return y

    def forward(x):
        return CLASSIFIERS[name](cifar_stem=cifar_stem, rngs=nnx.Rngs(0))(x)

    monkeypatch.setattr(block, "__call__", recording)
    x = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    y = nnx.eval_shape(forward, x)
    assert (y.shape, y.dtype) == ((1, 1000), jnp.float32)
    first = size if cifar_stem else size // 4
    halved = [first // 2**i for i in range(4)]
    assert list(dict.fromkeys(shape[1] for shape in shapes)) == halved
    assert shapes[-1] == (1, halved[-1], halved[-1], channels)


@every_classifier_in_time
def test_classifiers_take_small_images_and_any_number_of_classes(name):
    expected = 10 if name in ("basic_cnn", "resnet20", "resnet44") else 1000
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
    y = nnx.eval_shape(lambda model, x: model(x), abstract(name), x)
    assert (y.shape, y.dtype) == ((2, expected), jnp.float32)
    model = nnx.eval_shape(lambda: CLASSIFIERS[name](classes=7, rngs=nnx.Rngs(0)))
    assert model.head.kernel.shape == (abstract(name).head.kernel.shape[0], 7)


def test_classifiers_say_which_images_they_take():
    def make(name, shape):
        return nnx.eval_shape(lambda: CLASSIFIERS[name](shape, rngs=nnx.Rngs(0)))

    assert make("basic_cnn", (8, 8, 1)).conv1.kernel.shape == (3, 3, 1, 32)
    with pytest.raises(ValueError, match=r"`shape` is \(8, 8, 1\); .*three channels"):
        make("resnet20", (8, 8, 1))


# --- how they are cut -----------------------------------------------------------------


@every_network
def test_names_and_modules_cut_every_leaf_alike(name):
    model = abstract(name)
    params = params_of(model)
    tables = [
        orthax.explain(params, rule) for rule in (STACKED, components.from_model(model))
    ]
    for table in tables:
        assert not any(row.error for row in table.rows), table
    # Names do not tell whether a router is a layer like others.
    assert [row.path for row in tables[0].rows if row.guess] == (
        ["router/kernel"] if name == "moe" else []
    )
    one, other = (
        [row._replace(reason="", guess=False) for row in table.rows] for table in tables
    )
    if name == "resnext50_32x4d":  # its groups: see below
        assert [row.path for row in one] == [row.path for row in other]
        different = [a.path for a, b in zip(one, other, strict=True) if a != b]
        assert len(different) == 16 and all("conv2/kernel" in p for p in different)
    else:
        assert one == other
    matrices = [shape for row in one for shape in row.matrices]
    assert sum(b for b, _, _ in matrices) == MATRICES[name]


def test_grouped_kernels_are_one_matrix_or_one_for_every_group():
    model = abstract("resnext50_32x4d")
    params, path = params_of(model), "blocks/layers/0/conv2/kernel"

    def matrices(rule):
        rows = {row.path: row for row in orthax.explain(params, rule).rows}
        return rows[path].matrices

    assert model.blocks.layers[0].conv2.kernel.shape == (3, 3, 4, 128)
    assert matrices(components.ByName()) == ((1, 36, 128),)
    assert matrices(components.from_model(model)) == ((32, 36, 4),)
    by_hand = components.Matricisation((0, 1, 2), (3,), groups=32)
    rule = components.ByPath([("conv2/kernel", by_hand), ("", None)])
    assert matrices(rule) == ((32, 36, 4),)


def test_polar_factors_of_a_grouped_kernel():
    model = nnx.eval_shape(
        lambda: resnet.Bottleneck(
            *(8, 4, 1),
            widening=2,
            groups=2,
            projected=True,
            init=nnx.initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
    )
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), params_of(model)
    )
    kernel = grads["conv2"]["kernel"].reshape(36, 8)

    def polar(x):
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        return u @ vt

    expected = {
        components.ByName(): polar(kernel),
        components.from_model(model): np.hstack(
            [polar(kernel[:, :4]), polar(kernel[:, 4:])]
        ),
    }
    for rule, factor in expected.items():
        tx = orthax.orthogonalise(rule=rule, method=orthax.polar.SVD())
        updates, _ = tx.update(grads, tx.init(grads))
        found = np.asarray(updates["conv2"]["kernel"]).reshape(36, 8)
        np.testing.assert_allclose(found, factor, rtol=0, atol=1e-5)


def test_experts_are_a_batch_axis():
    rows = {
        row.path: row
        for row in orthax.explain(params_of(abstract("moe")), STACKED).rows
    }
    assert rows["experts/up/kernel"].matrices == ((32, 512, 2048),)
    assert rows["experts/down/kernel"].matrices == ((32, 2048, 512),)
    assert rows["experts/up/bias"].matrices == ()


@pytest.mark.parametrize("name", ["vit_ti16", "gpt2_small"])
@pytest.mark.parametrize("attention", ["per_head", "heads"])
def test_attention_is_cut_alike_whatever_a_component_is(name, attention):
    model = abstract(name)
    params = params_of(model)
    rules = [
        components.ByName(attention=attention),
        components.from_model(model, attention=attention),
    ]
    one, other = (components.resolve(params, rule) for rule in rules)
    assert one == other
    assert one != components.resolve(params, components.ByName())


def test_tables_are_left_alone():
    tables = {
        "gpt2_small": ["positions/embedding", "tokens/embedding"],
        "vit_b16": ["class_token", "pos_embedding"],
    }
    for name, expected in tables.items():
        rows = orthax.explain(params_of(abstract(name))).rows
        alone = {row.path for row in rows if len(row.shape) > 1 and not row.matrices}
        # The bias of query, key and value is a table of heads.
        assert {path for path in alone if not path.endswith("/bias")} == set(expected)


# --- what they compute ----------------------------------------------------------------


@every_tiny_network
def test_every_parameter_has_a_finite_gradient(tiny):
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: tiny.make(rngs=nnx.Rngs(0)))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    # Compiling the initialisers takes longer than all the rest.
    params, others = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), states
    )

    @jax.jit
    def loss(params, others):
        y = nnx.merge(graphdef, params, others, copy=True)(tiny.feed())
        assert y.shape == tiny.outputs
        return (y * jnp.arange(y.size).reshape(y.shape)).sum() / y.size

    grads = nnx.to_pure_dict(jax.grad(loss)(params, others))
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(grad).all(), name
        # Softmax takes no notice of the keys' bias, a norm none of the bias before it.
        if not name.endswith("key/bias") and not ("conv" in name and "bias" in name):
            assert np.abs(grad).max() > 0, name


def products(jaxpr: Any) -> list[set[str]]:
    """Return the dtypes that every product and convolution multiplies."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append({str(x.aval.dtype) for x in equation.invars})
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found


@every_tiny_network
def test_bfloat16_is_that_of_activations_only(tiny):
    def make():
        return tiny.make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {str(leaf.dtype) for leaf in leaves} == {"float32"}
    graphdef, state = nnx.split(model)
    forward = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
    jaxpr = jax.make_jaxpr(forward)(state, tiny.feed())
    others = [each for each in products(jaxpr.jaxpr) if each != {"bfloat16"}]
    # The head or the router; GPT's head multiplies bfloat16 and adds float32.
    assert others == ([] if isinstance(model, gpt.GPT) else [{"float32"}])
    of_experts = isinstance(model, moe.MixtureOfExperts)
    assert str(jaxpr.out_avals[0].dtype) == "bfloat16" if of_experts else "float32"


@pytest.mark.parametrize("name", FORMS)
def test_batch_statistics_keep_nine_tenths(name):
    norms = [m for _, m in nnx.iter_graph(abstract(name)) if type(m) is nnx.BatchNorm]
    assert len(norms) >= 3
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.9, 1e-5)}


@dataclasses.dataclass(frozen=True)
class Begins:
    """How PyTorch, torchvision and Idelbayev's ResNets begin: names of `check_draw`."""

    convolution: str
    head: str = "uniform"
    bias: str = "uniform"


BEGINS = {
    "basic_cnn": Begins("uniform"),
    "resnet20": Begins("fan_in", head="fan_in"),
    "resnet44": Begins("fan_in", head="fan_in"),
    "resnet18": Begins("fan_out"),
    "resnet34": Begins("fan_out"),
    "resnet50": Begins("fan_out"),
    "densenet121": Begins("fan_in", bias="zeros"),
    "densenet161": Begins("fan_in", bias="zeros"),
    "resnext50_32x4d": Begins("fan_out"),
    "wide_resnet50_2": Begins("fan_out"),
}


def check_draw(kind: str, shape: tuple[int, ...], draw: np.ndarray) -> None:
    """Check that a draw has the distribution that `kind` says for a kernel's shape.

    Shapes are flax's, `(*taps, in / groups, out)`. PyTorch's, `(out, in / groups,
    *taps)`, have a fan-in of axis 1 times the taps and a fan-out of axis 0 times them.
    """
    if kind == "zeros":
        assert not draw.any()
        return
    *taps, channels, features = shape
    largest, deviation = np.abs(draw).max(), draw.std()
    tolerance = 5 / (2 * draw.size) ** 0.5  # standard errors, of a normal; relative
    if kind == "uniform":
        bound = (math.prod(taps) * channels) ** -0.5
        assert (1 - 20 / draw.size) * bound < largest <= bound
        assert deviation == pytest.approx(bound / 3**0.5, rel=tolerance)
    else:
        fan = math.prod(taps) * (channels if kind == "fan_in" else features)
        assert deviation == pytest.approx((2 / fan) ** 0.5, rel=tolerance)
        # A normal truncated at two deviations ends at 2.3 of what is left, a uniform
        # at 1.7.
        assert largest > 2.5 * deviation


@every_classifier_in_time
def test_initial_weights_are_those_of_pytorch(name):
    shapes = {}

    @jax.jit
    def draws():
        modules = [m for _, m in nnx.iter_graph(CLASSIFIERS[name](rngs=nnx.Rngs(0)))]
        kinds = {}
        for module in modules:
            if isinstance(module, nnx.Conv | nnx.Linear):
                shape = module.kernel.shape
                groups = getattr(module, "feature_group_count", 1)
                kinds[shape[:-2], groups] = module  # the last one of every kind
        values = {}
        for kind, module in kinds.items():
            shapes[kind] = module.kernel.shape
            bias = None if module.bias is None else module.bias[...]
            values[kind] = (module.kernel[...], bias)
        return values

    begins = BEGINS[name]
    for kind, values in draws().items():
        kernel, bias = jax.tree.map(np.float64, values)
        check_draw(begins.convolution if kind[0] else begins.head, shapes[kind], kernel)
        if bias is not None:
            check_draw(begins.bias, shapes[kind], bias)
    grouped = {groups for _, groups in shapes}
    assert grouped == ({1, 32} if name == "resnext50_32x4d" else {1})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "basic_cnn" else [pytest.mark.slow])
        for name in CLASSIFIERS
    ],
)
def test_first_logits_are_finite(name):
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    forward = jax.jit(lambda x: CLASSIFIERS[name](rngs=nnx.Rngs(0))(x))
    logits = forward(images)
    assert np.isfinite(logits).all() and np.ptp(logits) > 0


def test_option_a_takes_every_second_pixel_and_pads_channels_with_zeros():
    x = jnp.arange(1.0, 33).reshape(1, 4, 4, 2)

    @jax.jit
    def forward(x):
        init = nnx.initializers.zeros_init()
        options = {"projected": False, "init": init, "rngs": nnx.Rngs(0)}
        return resnet.BasicBlock(2, 6, 2, **options)(x)

    y = forward(x)
    assert y.shape == (1, 2, 2, 6)
    np.testing.assert_array_equal(y[..., 2:4], x[:, ::2, ::2])
    assert not y[..., :2].any() and not y[..., 4:].any()


@jax.jit
def gpt_logits(tokens):
    return gpt.GPT(TINY_GPT, rngs=nnx.Rngs(0))(tokens)


def test_gpt_does_not_look_ahead():
    tokens = np.asarray([[1, 2, 3, 4, 5]])
    other = np.asarray([[1, 2, 3, 9, 5]])
    one, two = (np.asarray(gpt_logits(x)) for x in (tokens, other))
    np.testing.assert_allclose(one[:, :3], two[:, :3], rtol=0, atol=1e-6)
    assert (np.abs(one[:, 3:] - two[:, 3:]).max(-1) > 1e-5).all()


def test_gpt_begins_at_the_entropy_of_its_vocabulary():
    logits = np.asarray(gpt_logits(np.asarray([[1, 2, 3, 4, 5]])), np.float64)
    entropy = np.log(np.exp(logits).sum(-1)) - logits.mean(-1)
    np.testing.assert_allclose(entropy, math.log(11), atol=0.1)


def test_experts_are_those_that_the_router_likes_best():
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)

    @jax.jit
    def forward(x):
        model = moe.MixtureOfExperts(8, 4, 2, rngs=nnx.Rngs(0))
        return params_of(model), model(x)

    params, outputs = jax.tree.map(np.float64, forward(x))
    up, down = (params["experts"][name] for name in ("up", "down"))
    for token, output in zip(x, outputs, strict=True):
        scores = token @ params["router"]["kernel"]
        best = np.argsort(scores)[-2:]
        shares = np.exp(scores[best]) / np.exp(scores[best]).sum()
        expected = 0
        for share, e in zip(shares, best, strict=True):
            hidden = token @ up["kernel"][e] + up["bias"][e]
            hidden = np.asarray(jax.nn.gelu(hidden))
            expected += share * (hidden @ down["kernel"][e] + down["bias"][e])
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_a_model_made_outside_runs_inside_jit():
    tiny = TINY["moe"]
    model = tiny.make(rngs=nnx.Rngs(0))
    assert jax.jit(lambda x: model(x))(tiny.feed()).shape == tiny.outputs


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda rngs: vit.vit_ti16(40, rngs=rngs), "`patch_size` is 16; .* 40"),
        (
            lambda rngs: TINY["vit"].make(rngs=rngs)(jnp.zeros((1, 16, 16, 3))),
            "16 patches; this model has positions for 4",
        ),
        (
            lambda rngs: gpt.GPT(TINY_GPT, rngs=rngs)(jnp.zeros((1, 8), int)),
            "length 8; expected at most the context, 7",
        ),
        (lambda rngs: moe.MixtureOfExperts(8, 4, 0, rngs=rngs), "`top_k` is 0"),
        (lambda rngs: moe.MixtureOfExperts(8, 4, 5, rngs=rngs), "`top_k` is 5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: make(nnx.Rngs(0)))
