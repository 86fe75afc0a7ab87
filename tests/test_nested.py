"""Nested layers against dense numpy products, and against the network without stages.

A property holds for stage k alone, with later stages built, and with later stages run.
"""

import functools
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import orthax
from orthax import components, nn

WIDTHS = nn.doubling(4, 3)
STAGES = range(1, len(WIDTHS) + 1)
RELU = functools.partial(jax.tree.map, nnx.relu)
JOIN = functools.partial(jnp.concatenate, axis=-1)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def activations(*batch, widths=WIDTHS):
    return [normal(*batch, width, seed=k) for k, width in enumerate(widths)]


def run(model, xs, stages=None):
    return model(xs, stages=stages)


jitted = nnx.jit(run, static_argnames="stages")


def equal(found, expected):
    """Assert that trees of arrays are equal, bit by bit."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def stage_of(path):
    """Which stage owns a leaf, from its path, such as `layers/0/stages/2/0/kernel`."""
    return int(re.search(r"(?:stages|trunk|exits)/(\d+)", path).group(1))


def leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(tree))
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def parameters(model):
    return leaves(nnx.state(model, nnx.Param))


def with_values_of(small, big):
    """The network of fewer stages, with the values of the first stages of `big`."""
    values = leaves(nnx.state(big))
    paths = leaves(nnx.state(small))
    flat, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(small)))
    assert [values[path].shape for path in paths] == [x.shape for x in flat]
    state = nnx.state(small)
    pure = jax.tree.unflatten(tree, [values[path] for path in paths])
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(small, state)
    return small


# --- networks: name -> what builds the one of n stages, and its input -----------------


def mlp(n):
    rngs, widths = nnx.Rngs(0), WIDTHS[:n]
    return nnx.Sequential(
        nn.NestedLinear(6, widths, rngs=rngs),
        nn.NestedNorm(widths, rngs=rngs),
        RELU,
        nn.NestedLinear(widths, widths, rngs=rngs),
        nn.NestedNorm(widths, nnx.LayerNorm, rngs=rngs),
        RELU,
        nn.NestedLinear(widths, (3,) * n, rngs=rngs),
    )


def convnet(n):
    rngs, widths = nnx.Rngs(0), WIDTHS[:n]
    return nnx.Sequential(
        nn.NestedConv(2, widths, (3, 3), rngs=rngs),
        nn.NestedNorm(widths, rngs=rngs),
        RELU,
        nn.NestedConv(widths, widths, (3, 3), strides=2, rngs=rngs),
        nn.NestedNorm(widths, nnx.GroupNorm, num_groups=2, rngs=rngs),
        RELU,
        functools.partial(jax.tree.map, lambda x: x.mean((1, 2))),
        nn.NestedLinear(widths, (3,) * n, rngs=rngs),
    )


def layer(fan_in, fan_out, rngs):
    return nnx.Sequential(
        nnx.BatchNorm(fan_in, rngs=rngs),
        nnx.Linear(fan_in, fan_out, rngs=rngs),
        nnx.relu,
    )


def interlaced(n, **kwargs):
    rngs = nnx.Rngs(0)
    return nn.Interlaced(lambda step: layer(6, 6, rngs), 2, n, **kwargs)


def both(n):
    """Stages that grow in width and depth, behind a layer that gives each its own."""
    rngs, widths = nnx.Rngs(0), WIDTHS[:n]

    def make(step):
        return layer(sum(widths[s] for s in step.reads), widths[step.stage], rngs)

    return nnx.Sequential(
        nn.NestedLinear(6, widths, rngs=rngs),
        nn.Interlaced(make, 1, n, inputs=n, widen=True, combine=JOIN),
        nn.NestedLinear(widths, (3,) * n, rngs=rngs),
    )


def branched(n):
    rngs = nnx.Rngs(0)
    trunk = [layer(6, 6, rngs) for _ in range(n)]
    return nn.Branched(trunk, [nnx.Linear(6, 3, rngs=rngs) for _ in range(n)])


NETWORKS = {
    "mlp": (mlp, normal(5, 6)),
    "convnet": (convnet, normal(5, 6, 6, 2)),
    "interlaced": (interlaced, normal(5, 6)),
    "both": (both, normal(5, 6)),
    "branched": (branched, normal(5, 6)),
}
each = pytest.mark.parametrize("name", NETWORKS)


# --- stage k does not know of later stages --------------------------------------------


@each
@pytest.mark.parametrize(
    ("call", "mode"),
    [(run, "train"), (jitted, "train"), (jitted, "eval")],
    ids=["eager", "jit", "jit-eval"],
)
def test_outputs_are_bit_identical_without_later_stages(name, call, mode):
    build, x = NETWORKS[name]
    start = build(3)
    jitted(start, x * 3 + 1)  # running statistics other than their initial values
    getattr(start, mode)()
    before, big = leaves(nnx.state(start)), nnx.clone(start)
    all_stages = call(big, x)
    assert len(all_stages) == 3
    after = leaves(nnx.state(big))
    for n in STAGES:
        big = nnx.clone(start)
        equal(call(big, x, n), all_stages[:n])
        for path, value in leaves(nnx.state(big)).items():
            expected = after if stage_of(path) < n else before
            np.testing.assert_array_equal(value, expected[path])
        small = with_values_of(build(n), start)
        getattr(small, mode)()
        equal(call(small, x), all_stages[:n])
    moved = [path for path in after if not np.array_equal(after[path], before[path])]
    assert bool(moved) == (mode == "train")


@each
def test_gradients_stop_at_later_stages_and_agree_with_the_small_network(name):
    build, x = NETWORKS[name]
    big = build(3)

    @functools.partial(nnx.jit, static_argnames="k")
    def gradient(model, x, k):
        return nnx.grad(lambda model: jnp.sum(jnp.sin(model(x)[k])))(model)

    for k in range(2):
        small = with_values_of(build(k + 1), big)
        expected = leaves(gradient(small, x, k))
        found = leaves(gradient(big, x, k))
        assert set(found) > set(expected)
        for path, value in found.items():
            if stage_of(path) > k:
                assert not np.any(value)
            else:
                close(value, expected[path])
        assert any(np.any(value) for value in expected.values())


@each
def test_a_stage_costs_what_the_network_without_later_stages_costs(name):
    build, x = NETWORKS[name]
    big, costs = build(3), []
    for n in STAGES:
        small = build(n)
        costs.append(cost(big, x, n))
        assert costs[-1] == cost(small, x)
        in_big = {p: v for p, v in parameters(big).items() if stage_of(p) < n}
        assert {p: v.shape for p, v in in_big.items()} == {
            p: v.shape for p, v in parameters(small).items()
        }
    assert costs[0] < costs[1] < costs[2] == cost(big, x)


def cost(model, x, stages=None):
    graph, state = nnx.split(model)

    def call(state, x):
        return nnx.merge(graph, state)(x, stages=stages)

    # Operations too, which all run outside of jit; inside, unused ones are dropped.
    flops = jax.jit(call).lower(state, x).cost_analysis()["flops"]
    return flops, str(jax.make_jaxpr(call)(state, x)).count(" = ")


def test_flops_and_parameters_of_a_product_are_those_of_its_blocks():
    linear = nn.NestedLinear(WIDTHS, WIDTHS, use_bias=False, rngs=nnx.Rngs(0))
    for n in STAGES:
        entries = sum(sum(WIDTHS[: k + 1]) * WIDTHS[k] for k in range(n))
        assert entries == 16 * (2 * 4 ** (n - 1) + 1) / 3
        found = [v.size for p, v in parameters(linear).items() if stage_of(p) < n]
        assert sum(found) == entries
        assert cost(linear, activations(5), n)[0] == 2 * 5 * entries


@pytest.mark.parametrize(
    "build", [interlaced, lambda n: nn.NestedLinear(6, WIDTHS[:n], rngs=nnx.Rngs(0))]
)
def test_the_first_values_do_not_depend_on_later_stages(build):
    big, small = parameters(build(3)), parameters(build(2))
    equal([big[path] for path in small], list(small.values()))


# --- what the layers compute, in float64 ----------------------------------------------


def dense_kernel(module, in_stages, out_stages):
    """The kernel of all stages as one array, zero where no stage reads."""
    blocks = [np.asarray(block.kernel[...], "float64") for block in module.stages]
    kernel = np.zeros((*blocks[0].shape[:-2], sum(in_stages), sum(out_stages)))
    start = 0
    for block in blocks:
        kernel[..., : block.shape[-2], start : start + block.shape[-1]] = block
        start += block.shape[-1]
    assert np.count_nonzero(kernel) == sum(block.size for block in blocks)
    return kernel


def joined(xs):
    return np.concatenate([np.asarray(x, "float64") for x in xs], -1)


@pytest.mark.parametrize(
    ("in_stages", "out_stages"),
    [(WIDTHS, WIDTHS), (6, WIDTHS), ((2, 3), (5, 1, 4)), ((7,), (2,))],
)
def test_linear_is_a_dense_product_with_a_block_triangular_kernel(
    in_stages, out_stages
):
    linear = nn.NestedLinear(
        in_stages, out_stages, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0)
    )
    widths = (in_stages,) if isinstance(in_stages, int) else in_stages
    xs = activations(5, 2, widths=widths)
    kernel = dense_kernel(linear, widths, out_stages)
    bias = joined([block.bias[...] for block in linear.stages])
    close(joined(linear(xs)), joined(xs) @ kernel + bias)
    if len(xs) == 1:
        equal(linear(xs[0]), linear(xs))


@pytest.mark.parametrize("strides", [1, 2])
def test_convolution_has_a_block_triangular_kernel(strides):
    conv = nn.NestedConv(
        *(WIDTHS, WIDTHS, (3, 3)),
        strides=strides,
        padding="VALID",
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    xs = activations(2, 7, 7)
    kernel, x = dense_kernel(conv, WIDTHS, WIDTHS), joined(xs)
    size = (7 - 3) // strides + 1
    expected = np.zeros((2, size, size, sum(WIDTHS)))
    for i, j in itertools.product(range(size), range(size)):
        patch = x[:, i * strides : i * strides + 3, j * strides : j * strides + 3]
        expected[:, i, j] = np.einsum("bhwi,hwio->bo", patch, kernel)
    close(joined(conv(xs)), expected)


def test_norm_of_a_stage_is_over_its_features_alone():
    xs = [3 * x + k for k, x in enumerate(activations(8))]
    batch = nn.NestedNorm(WIDTHS, rngs=nnx.Rngs(0))
    features = nn.NestedNorm(WIDTHS, nnx.LayerNorm, rngs=nnx.Rngs(0))
    for norm, axis, epsilon in ((batch, 0, 1e-5), (features, -1, 1e-6)):
        for x, y in zip(xs, norm(xs), strict=True):
            x = np.asarray(x, "float64")
            mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
            close(y, (x - mean) / np.sqrt(variance + epsilon))
    for k, x in enumerate(xs):
        close(batch.stages[k].mean[...], 0.01 * np.mean(x, 0))
    running = batch(xs, use_running_average=True)
    batch.eval()
    equal(batch(xs), running)
    assert not np.allclose(running[0], features(xs)[0])


def test_interlaced_layers_read_their_own_and_earlier_activations():
    model = interlaced(3)
    model.eval()
    x = normal(5, 6)
    (a0, a1), (b0, b1), (c0, c1, c2, c3) = model.stages
    h0 = a0(x)
    third = c0(h0)
    second = b0(h0)
    third = c1(h0 + second + third)
    h1 = a1(h0)
    third = c2(h1 + second + third)
    last = b1(h1 + second)
    third = c3(h1 + last + third)
    equal(model(x), [h1, last, third])


def test_stages_that_run_are_the_first_whose_inputs_are_there():
    linear = nn.NestedLinear(WIDTHS[:2], WIDTHS, rngs=nnx.Rngs(0))
    xs = activations(5)
    everything = linear(xs[:2])
    assert len(everything) == 3
    equal(linear(xs[:1]), everything[:1])
    equal(linear(xs[:2], stages=2), everything[:2])
    equal(linear(tuple(xs[:2]), stages=1), everything[:1])
    norm, same = nn.NestedNorm(WIDTHS, rngs=nnx.Rngs(0)), [normal(5, 4)] * 3
    pair = nn.Interlaced(lambda step: jnp.cos, 1, 3, inputs=3)
    for layer, ys in ((norm, xs), (pair, same)):
        equal(layer(ys, stages=2), layer(ys)[:2])
        equal(layer(ys[:2]), layer(ys)[:2])


# --- the plan -------------------------------------------------------------------------


def longest_path(plan, stages):
    depth = dict.fromkeys(range(stages), 0)
    for step in plan:
        depth[step.stage] = 1 + max(depth[stage] for stage in step.reads)
    return depth[stages - 1]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("all_given", [False, True])
def test_each_stage_doubles_the_layers_and_reads_no_later_one(
    layers, stages, widen, all_given
):
    inputs = stages if all_given else 1
    plan = nn.interlacing(layers, stages, inputs=inputs, widen=widen)
    for n in range(1, stages + 1):
        first = [step for step in plan if step.stage < n]
        fewer = n if all_given else 1
        assert tuple(first) == nn.interlacing(layers, n, inputs=fewer, widen=widen)
        own = [step for step in first if step.stage == n - 1]
        total = layers * 2 ** (n - 1)
        assert len(own if widen else first) == total
        assert [step.number for step in own] == list(range(len(own)))
        for i, step in enumerate(first):
            there = {*range(fewer), *(earlier.stage for earlier in first[:i])}
            assert step.reads == tuple(k for k in range(step.stage + 1) if k in there)
        deepest = total if widen or n == 1 else total // 2 + 1
        if not all_given:
            assert longest_path(first, n) == deepest


def test_widened_layers_side_by_side_do_not_read_one_another():
    assert nn.interlacing(1, 2, widen=True) == (
        (1, 0, (0,)),
        (0, 0, (0,)),
        (1, 1, (0, 1)),
    )
    model = nn.Interlaced(lambda step: lambda x: x + 1, 1, 2, widen=True)
    equal(model(jnp.zeros(1)), [jnp.ones(1), jnp.full(1, 3.0)])  # (0 + 1) + (0 + 1) + 1


def test_totals_double():
    assert nn.doubling(3, 1) == (3,)
    assert list(itertools.accumulate(nn.doubling(3, 5))) == [3, 6, 12, 24, 48]


# --- with the rest --------------------------------------------------------------------


@each
def test_from_model_knows_every_kernel(name):
    model = NETWORKS[name][0](3)
    rule = components.from_model(model)
    params = nnx.state(model, nnx.Param)
    kernels = {p: v for p, v in parameters(model).items() if p.endswith("kernel")}
    assert kernels
    for path, value in parameters(model).items():
        cut = rule.resolve(path, value)
        if path in kernels:
            rank = value.ndim
            assert (cut.rows, cut.columns) == (tuple(range(rank - 1)), (rank - 1,))
        else:
            assert cut is None
    assert "flax" in str(orthax.explain(params, rule))


@pytest.mark.parametrize("name", ["convnet", "interlaced", "branched"])
def test_every_exit_learns(name):
    build, x = NETWORKS[name]
    model = build(3)
    rule = components.from_model(model)
    tx = orthax.orthogonal_sgd(0.03, rule=rule)
    optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
    targets = [jnp.cos(normal(*y.shape)) for y in model(x)]

    @nnx.jit
    def step(model, optimiser):
        def losses(model):
            found = jnp.stack(
                [jnp.mean((y - t) ** 2) for y, t in zip(model(x), targets, strict=True)]
            )
            return found.sum(), found

        grads, found = nnx.grad(losses, has_aux=True)(model)
        optimiser.update(model, grads)
        return found

    history = np.array([step(model, optimiser) for _ in range(20)])
    assert np.all(history[-1] < history[0])


def test_dtypes_are_handed_on():
    rngs = nnx.Rngs(0)
    linear = nn.NestedLinear(6, WIDTHS, dtype=jnp.bfloat16, rngs=rngs)
    assert {y.dtype for y in linear(normal(5, 6))} == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in parameters(linear).values()} == {jnp.dtype("float32")}


def test_nan_stays_in_its_stage_and_later_ones():
    xs = activations(5)
    xs[1] = xs[1].at[0, 0].set(jnp.nan)
    ys = nn.NestedLinear(WIDTHS, WIDTHS, rngs=nnx.Rngs(0))(xs)
    assert [bool(jnp.isnan(y).any()) for y in ys] == [False, True, True]


# --- bad input ------------------------------------------------------------------------

RNGS = nnx.Rngs(0)
LINEAR = nn.NestedLinear(WIDTHS, WIDTHS, rngs=RNGS)
NORM = nn.NestedNorm(WIDTHS, rngs=RNGS)
XS = activations(5)
IDENTITY = nn.Interlaced(lambda step: lambda x: x, 2, 3)
PAIR = nn.Interlaced(lambda step: lambda x: x, 2, 2, inputs=2)
BAD = {
    "no stages": (lambda: nn.NestedLinear((), (3,), rngs=RNGS), "`in_stages` must"),
    "zero": (lambda: nn.NestedLinear(3, (3, 0), rngs=RNGS), r"`out_stages\[1\]` must"),
    "string": (
        lambda: nn.NestedConv("3", 3, 3, rngs=RNGS),
        "`in_stages` must be an in",
    ),
    "float": (
        lambda: nn.NestedNorm((2, 2.0), rngs=RNGS),
        r"`features\[1\]` must be an",
    ),
    "bool": (lambda: nn.doubling(True, 2), "`width` must be 1"),
    "none": (lambda: nn.doubling(4, 0), "`stages` must be 1"),
    "unread": (lambda: nn.NestedLinear((2, 2), 3, rngs=RNGS), "more stages than"),
    "norm": (lambda: nn.NestedNorm(3, "batch", rngs=RNGS), "`norm` must make"),
    "too many stages": (lambda: LINEAR(XS, stages=4), "`stages` is 4, but the layer"),
    "no such stage": (lambda: LINEAR(XS, stages=0), "`stages` must be 1"),
    "half": (lambda: NORM(XS, stages=1.5), "`stages` must be an integer"),
    "too few": (lambda: LINEAR(XS[:1], stages=2), "`xs` has the activations of 1"),
    "too many": (lambda: NORM([*XS, XS[0]]), "1 to 3 of them"),
    "empty": (lambda: LINEAR([]), "got 0"),
    "nested": (lambda: LINEAR([XS]), r"got 1: \['list'\]"),
    "order": (
        lambda: LINEAR(XS[::-1]),
        r"`xs\[0\]` has shape \(5, 8\), but stage 0 has",
    ),
    "batch": (lambda: LINEAR([XS[0], XS[1][:3]]), "only the last axis"),
    "norm order": (lambda: NORM(XS[::-1]), "stage 0 has 4 features"),
    "inputs": (lambda: nn.interlacing(2, 2, inputs=3), "more than the 2 `stages`"),
    "layers": (lambda: nn.interlacing(0, 2), "`layers` must be 1"),
    "make": (lambda: nn.Interlaced(3, 2, 2), "`make` must be callable"),
    "made": (lambda: nn.Interlaced(lambda s: 3, 2, 2), r"`make\(Step\(stage=0, .*call"),
    "combine": (lambda: nn.Interlaced(print, 2, 2, combine=0), "`combine` must be"),
    "one input": (lambda: IDENTITY(XS), "1 to 1 of them"),
    "sum": (lambda: PAIR([XS[0], XS[2]]), "adds what it reads"),
    "no trunk": (lambda: nn.Branched([], []), "`trunk` and `exits`"),
    "exits": (lambda: nn.Branched([abs], [abs, abs]), "got 1 and 2"),
    "exit": (lambda: nn.Branched([abs], [1]), r"`exits\[0\]` must be callable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_traced_stages_are_refused():
    with pytest.raises(TypeError, match="`stages` must be an integer, and static"):
        nnx.jit(run)(LINEAR, XS, 2)


def test_without_flax_the_room_says_what_to_install():
    program = "import sys; sys.modules['flax'] = None; import orthax.nn"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "ImportError: orthax.nn is written in Flax NNX" in done.stderr
    assert "pip install 'orthax-optim[flax]'" in done.stderr
