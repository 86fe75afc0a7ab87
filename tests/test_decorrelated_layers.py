"""Decorrelated NNX layers against numpy on rows and on patches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import orthax
from orthax import components, decorrelation, diagnostics, nn, polar
from orthax.nn._samples import samples_of

POLAR = decorrelation.Polar(momentum=1.0)
run = nnx.jit(lambda layer, x: layer(x))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def single(x):
    return jnp.asarray(x, "float32")


def images(*shape, seed=0):
    """Images whose neighbouring pixels and channels are correlated."""
    x = normal(*shape, seed=seed)
    for axis in range(1, x.ndim):
        x = x + 0.7 * np.roll(x, 1, axis)
    return single(1 + x)


def double(x):
    return np.asarray(x, "float64")


def matrix(layer):
    return double(layer.rule.matrix(layer.state().transform))


def close(found, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def trained(layer, *xs):
    for x in xs:
        run(layer, x)
    return layer


def linear(d=6, out=3, rule=POLAR, **kwargs):
    return nn.DecorrelatedLinear(d, out, rule, rngs=nnx.Rngs(0), **kwargs)


def test_linear_forward():
    layer, x = linear(), single(3 + normal(10, 2, 6) @ normal(6, 6, seed=1))
    kernel, bias = double(layer.layer.kernel[...]), double(layer.layer.bias[...])
    rows = double(x).reshape(-1, 6)
    # Evaluation before training: the plain layer.
    np.testing.assert_array_equal(layer(x, use_running_average=True), layer.layer(x))
    assert layer.statistics.updates[...] == 0
    # Training: the batch mean, and R of before, which then learns.
    close(run(layer, x).reshape(-1, 3), (rows - rows.mean(0)) @ kernel + bias)
    r = matrix(layer)
    covariance = np.cov(rows.T, bias=True)
    close(r @ covariance @ r, np.eye(6), 1e-3)
    y = single(normal(10, 6, seed=2))
    close(run(layer, y), (y - double(y).mean(0)) @ r @ kernel + bias)
    # Evaluation: running statistics, which stay.
    layer.eval()
    mean, r = double(layer.statistics.mean[...]), matrix(layer)
    before = nnx.to_pure_dict(nnx.state(layer))
    close(run(layer, y), (y - mean) @ r @ kernel + bias, 1e-4)
    close(layer(y[0]), (y[0] - mean) @ r @ kernel + bias, 1e-4)
    after = nnx.to_pure_dict(nnx.state(layer))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    layer.train()
    run(layer, x)
    assert layer.statistics.updates[...] == 3


def test_a_batch_of_one_is_evaluated():
    layer = trained(linear(), single(2 + normal(20, 6)))
    x = single(normal(1, 6, seed=1))
    found = run(layer, x)
    np.testing.assert_allclose(found, layer(x, use_running_average=True), atol=1e-5)
    assert layer.statistics.updates[...] == 1


def test_nan_leaves_the_layer_usable():
    layer = trained(linear(), single(normal(20, 6)))
    before = matrix(layer)
    assert np.isnan(run(layer, single(normal(20, 6)).at[0, 0].set(jnp.nan))).all()
    np.testing.assert_array_equal(matrix(layer), before)
    assert layer.statistics.skipped[...] == 1
    assert np.isfinite(run(layer, single(normal(20, 6)))).all()


def test_step_on_the_kernel_is_preconditioned_by_the_covariance():
    # -eta Sigma^-1 G in the weights of the plain layer, at whitening.
    x, error = normal(40, 6) @ normal(6, 6, seed=1), normal(40, 3, seed=2)
    x = x - x.mean(0)
    layer = trained(linear(), single(x))

    def loss(layer):
        return jnp.sum(layer(single(x), updating=False) * error) / 40

    gradient = double(nnx.grad(loss)(layer).layer.kernel[...])
    effective = matrix(layer).T @ gradient  # of R^T W
    sigma = x.T @ x / 40
    close(effective, np.linalg.solve(sigma, x.T @ error / 40), 1e-3)


CONVOLUTIONS = {
    "same": {},
    "valid": {"padding": "VALID", "strides": (2, 1)},
    "explicit": {"strides": 2, "padding": ((2, 0), (1, 3)), "kernel_dilation": (1, 2)},
    "number": {"padding": 1, "use_bias": False},
    "circular": {"padding": "CIRCULAR"},
    "reflect": {"padding": "REFLECT", "kernel_dilation": 2},
    "masked": {"mask": np.float32(normal(3, 2, 3, 4, seed=8) > 0)},
}


def padded(x, layer):
    """What the convolution of `layer.layer` reads, by numpy's padding."""
    conv, spatial = layer.layer, x.shape[1:-1]
    stride, dilation = (
        np.broadcast_to(value, len(spatial))
        for value in (conv.strides, conv.kernel_dilation)
    )
    reach = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, dilation, strict=True)]
    mode, pads = "constant", conv.padding
    if pads in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[pads]
        pads = [((r - 1) // 2, r // 2) for r in reach]
    elif pads == "CAUSAL":
        pads = [(reach[0] - 1, 0)]
    elif pads == "SAME":
        totals = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, s, r in zip(spatial, stride, reach, strict=True)
        ]
        pads = [(t // 2, t - t // 2) for t in totals]
    elif pads == "VALID":
        pads = [(0, 0)] * len(spatial)
    elif isinstance(pads, int):
        pads = [(pads, pads)] * len(spatial)
    return np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode), stride, dilation, reach


def patches(x, layer):
    """All patches, (images, *positions, taps * channels), one tap after another."""
    x, stride, dilation, reach = padded(np.asarray(x), layer)
    taps = itertools.product(*map(range, layer.layer.kernel_size))
    counts = [
        (n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, stride, strict=True)
    ]
    read = [
        tuple(
            slice(k * d, k * d + (count - 1) * s + 1, s)
            for k, d, s, count in zip(tap, dilation, stride, counts, strict=True)
        )
        for tap in taps
    ]
    return np.concatenate([x[(slice(None), *where)] for where in read], axis=-1)


def conv(kernel_size=(3, 2), rule=POLAR, sample=1.0, **kwargs):
    return nn.DecorrelatedConv(
        3, 4, kernel_size, rule, sample=sample, rngs=nnx.Rngs(0), **kwargs
    )


def check_conv(layer, x, y):
    """A convolution is a dense layer on its patches: what it gives and learns."""
    kernel = double(layer.layer.kernel[...])
    if layer.layer.mask is not None:
        kernel = kernel * layer.layer.mask
    kernel = kernel.reshape(-1, 4)
    bias = 0 if layer.layer.bias is None else double(layer.layer.bias[...])
    rows = double(patches(x, layer))
    flat = rows.reshape(-1, rows.shape[-1])
    close(run(layer, x), (rows - flat.mean(0)) @ kernel + bias)
    sigma, r = np.cov(flat.T, bias=True), matrix(layer)
    values, vectors = np.linalg.eigh(sigma)
    kept = values > 1e-8 * values[-1]  # padding can make features constant
    expected = (vectors[:, kept] * values[kept] ** -0.5) @ vectors[:, kept].T
    close(r, expected, 1e-3)
    rows = double(patches(y, layer))
    mean = rows.reshape(flat.shape).mean(0)
    close(run(layer, y), (rows - mean) @ r @ kernel + bias, 1e-4)
    # Evaluation, fused and not.
    layer.eval()
    mean, r = double(layer.statistics.mean[...]), matrix(layer)
    plain = nn.fuse(layer)
    assert type(plain) is nnx.Conv and plain.bias is not None
    expected = (rows - mean) @ r @ kernel + bias
    close(run(layer, y), expected, 1e-4)
    close(plain(y), run(layer, y), 1e-5)


SLOW = {"valid", "number", "circular"}  # as the others, but for what is padded


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in CONVOLUTIONS
    ],
)
def test_conv_is_linear_on_patches(name):
    layer = conv(**CONVOLUTIONS[name])
    check_conv(layer, images(5, 7, 6, 3), images(5, 7, 6, 3, seed=1))


@pytest.mark.parametrize("padding", ["CAUSAL", "SAME"])
def test_conv_of_one_axis(padding):
    layer = conv(3, padding=padding, kernel_dilation=2)
    check_conv(layer, images(6, 9, 3), images(6, 9, 3, seed=1))


def test_conv_learns_what_linear_learns_on_patches():
    rule = decorrelation.Scaled(0.01)
    layer, dense = conv(rule=rule), linear(18, 4, rule)
    for seed in range(3):
        x = images(4, 6, 5, 3, seed=seed)
        run(layer, x)
        run(dense, single(patches(x, layer)))
    close(matrix(layer), matrix(dense))
    close(layer.statistics.mean[...], dense.statistics.mean[...])
    # Without a batch axis, and with two.
    x = images(2, 3, 6, 5, 3)
    layer.eval()
    np.testing.assert_allclose(layer(x)[1, 2], layer(x[1, 2]), rtol=1e-4, atol=1e-5)


def test_conv_calls_the_function_that_it_was_given():
    seen = []

    def convolve(x, kernel, *args, **kwargs):
        seen.append(kernel.shape)
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    layer, x = conv(conv_general_dilated=convolve), images(4, 6, 5, 3)
    close(run(layer, x), run(conv(), x))
    assert seen == [(3, 2, 3, 4)]  # one ordinary convolution


def test_conv_draws_patches():
    # Drawn patches are patches, and the mean is that of all.
    rule = decorrelation.OffDiagonal(1.0)
    layer, x = conv(rule=rule, sample=0.2), images(4, 6, 5, 3)
    rows = patches(x, layer).reshape(-1, 18)
    index = np.array([0, 7, 119, 64])
    taken = samples_of(layer.layer).take(x, jnp.asarray(index))
    np.testing.assert_array_equal(taken, rows[index])
    steps = []
    for _ in range(300):
        layer.statistics.transform[...] = jnp.eye(18)
        run(layer, x)
        steps.append(np.eye(18) - matrix(layer))
    close(layer.statistics.mean[...], double(rows).mean(0), 1e-5)
    sigma = np.cov(double(rows).T, bias=True)
    error = np.abs(np.mean(steps, 0) - (sigma - np.diag(np.diag(sigma))))
    assert (error <= 5.5 * np.std(steps, 0) / 300**0.5 + 1e-6).all()
    assert np.std(steps, 0).max() > 1e-2


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_with_statistics_held_fixed(kind, x64):
    rule = decorrelation.Polar()
    if kind == "linear":
        layer, x = linear(4, 3, rule, param_dtype="float64"), jnp.asarray(normal(5, 4))
    else:
        layer = conv(rule=rule, param_dtype="float64", strides=2)
        x = jnp.asarray(images(3, 4, 3, 3), "float64")
    run(layer, x + normal(*x.shape, seed=3))
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    weights = jnp.asarray(normal(*run(layer, x).shape, seed=4))

    @functools.partial(jax.jit, static_argnums=3)
    def f(parameters, x, rest, updating):
        layer = nnx.merge(graph, parameters, rest)
        return jnp.sum(weights * layer(x, updating=updating) ** 2)

    at = (parameters, x)
    along = jax.tree.map(lambda a: jnp.asarray(normal(*a.shape, seed=5)), at)
    gradients = [
        jax.grad(f, argnums=(0, 1))(*at, rest, updating) for updating in (False, True)
    ]
    # The statistics that are learnt take no part in the gradient.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), *gradients)
    for part in (0, 1):
        shifted = [
            [
                jax.tree.map(lambda a, b, s=sign: a + s * 1e-5 * b, at[i], along[i])
                if i == part
                else at[i]
                for i in (0, 1)
            ]
            for sign in (1, -1)
        ]
        up, down = (f(*where, rest, False) for where in shifted)
        products = jax.tree.map(jnp.vdot, gradients[0][part], along[part])
        expected = sum(jax.tree.leaves(products))
        np.testing.assert_allclose((up - down) / 2e-5, expected, rtol=1e-6)
        assert abs(expected) > 0.1


class Model(nnx.Module):
    """Layers in every kind of place, one of them in several."""

    def __init__(self, rngs):
        shared = nnx.Linear(8, 8, rngs=rngs)
        self.first = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.body = nnx.Sequential(nnx.Linear(16, 8, rngs=rngs), nnx.relu, shared)
        self.many = nnx.data([shared, nnx.Linear(8, 8, use_bias=False, rngs=rngs)])
        self.named = nnx.data({"a": (nnx.Linear(8, 8, rngs=rngs), shared)})
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = self.body(x.reshape(len(x), -1))
        for layer in (*self.many, *self.named["a"]):
            x = nnx.relu(layer(x))
        return self.head(x)


LAYERS = {"first", "body/layers/0", "body/layers/2", "many/1", "named/a/0", "head"}


def parameters(model):
    flat, _ = jax.tree_util.tree_flatten_with_path(
        nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in flat
    }


def test_decorrelate_a_model_and_fuse_it():
    model = Model(nnx.Rngs(0))
    seen = []
    x = images(24, 4, 4, 3)
    before = run(model, x)
    new = nn.decorrelate(
        model,
        decorrelation.Scaled(0.01),
        select=lambda path, layer: seen.append(path) or True,
    )
    assert set(seen) == LAYERS and len(seen) == len(LAYERS)
    assert type(model.head) is nnx.Linear  # a copy
    assert type(new.norm) is nnx.BatchNorm
    shared = new.body.layers[2]
    assert shared is new.many[0] is new.named["a"][1]
    assert type(shared) is nn.Decorrelated
    kernels = {path.replace("/layer/", "/") for path in parameters(new)}
    assert kernels == set(parameters(model))
    trained(new, *(images(24, 4, 4, 3, seed=k) for k in range(3)))
    assert shared.statistics.updates[...] == 9  # it runs three times
    new.eval()
    plain = nn.fuse(new)
    assert type(plain.head) is nnx.Linear and type(plain.first) is nnx.Conv
    assert plain.many[0] is plain.body.layers[2]
    assert plain.many[1].bias is not None and model.many[1].bias is None
    close(run(plain, x), run(new, x), 1e-5)
    assert np.abs(run(plain, x) - before).max() > 0.1
    assert type(new.head) is nn.Decorrelated  # a copy


def test_decorrelate_in_place_and_some_layers():
    model = Model(nnx.Rngs(0))
    kernel = model.head.kernel
    new = nn.decorrelate(
        model,
        decorrelation.Scaled(0.01),
        select=lambda path, _: path == "head",
        copy=False,
    )
    assert new is model
    assert model.head.layer.kernel is kernel
    assert type(model.first) is nnx.Conv
    # Again: what is decorrelated stays, the rest follows.
    nn.decorrelate(model, decorrelation.Polar(), copy=False)
    assert model.head.rule == decorrelation.Scaled(0.01)
    assert model.head.layer.kernel is kernel
    assert model.first.rule == decorrelation.Polar()
    layer = nn.decorrelate(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), decorrelation.Polar())
    assert type(nn.fuse(layer)) is nnx.Linear


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OtherConv(nnx.Conv):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_subclasses_of_linear_keep_their_forward():
    plain = Doubled(6, 3, rngs=nnx.Rngs(0))
    layer = nn.Decorrelated(plain, POLAR)
    x = single(normal(10, 6))
    close(layer(x), plain(x - x.mean(0)))
    with pytest.raises(ValueError, match=r"'0' is a Doubled .* of its own"):
        nn.fuse([layer])


def stacked():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0)
    def make(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    return make(nnx.Rngs(0))


RNGS = nnx.Rngs(0)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: nn.Decorrelated(nnx.relu, POLAR), TypeError, "nnx.Linear or"),
        (lambda: linear(rule="polar"), TypeError, "decorrelation rule"),
        (lambda: linear(momentum=0), ValueError, "momentum"),
        (lambda: linear(sample=0), ValueError, "sample"),
        (
            lambda: nn.Decorrelated(nnx.Linear(2, 2, rngs=RNGS), POLAR, sample=0.5),
            ValueError,
            "needs `rngs`",
        ),
        (lambda: linear()(jnp.ones((5, 4))), ValueError, r"\*batch, 6"),
        (
            lambda: conv()(jnp.ones((5, 4, 4, 2))),
            ValueError,
            r"\*batch, axis_0, axis_1, 3",
        ),
        (
            lambda: nn.DecorrelatedConv(
                4, 4, (3, 3), POLAR, feature_group_count=2, rngs=RNGS
            ),
            ValueError,
            "feature_group_count=2",
        ),
        (lambda: conv(input_dilation=2), ValueError, "input_dilation=2"),
        (
            lambda: decorrelate(nnx.Conv(4, 4, 3, feature_group_count=4, rngs=RNGS)),
            ValueError,
            r"Layer 'a/0': .*select=lambda path, layer: path != 'a/0'",
        ),
        (lambda: decorrelate(OtherConv(4, 4, 3, rngs=RNGS)), ValueError, "of its own"),
        (lambda: decorrelate(stacked()), ValueError, r"'a/0'.*nnx.vmap"),
        (lambda: decorrelate(nnx.BatchNorm(4, rngs=RNGS)), ValueError, "No nnx.Linear"),
        (lambda: nn.fuse(nnx.Linear(2, 2, rngs=RNGS)), ValueError, "nothing to fuse"),
    ],
)
def test_bad_arguments_raise(make, error, words):
    with pytest.raises(error, match=words):
        make()


def decorrelate(layer):
    return nn.decorrelate({"a": [layer]}, POLAR)


def test_statistics_are_no_parameters():
    model = nn.decorrelate(Model(nnx.Rngs(0)), decorrelation.Scaled(0.01))
    tx = optax.chain(
        orthax.orthogonalise(rule=components.from_model(model)),
        optax.add_decayed_weights(0.1),
        optax.sgd(0.1),
    )
    optimiser = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = images(24, 4, 4, 3)

    @nnx.jit
    def step(model, optimiser):
        gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
        optimiser.update(model, gradients)

    kernel = model.head.layer.kernel[...]
    twin = nnx.clone(model)
    run(twin, x)
    step(model, optimiser)
    assert np.abs(model.head.layer.kernel[...] - kernel).max() > 1e-3
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        *(
            nnx.to_pure_dict(nnx.state(m, nn.DecorrelationVariable))
            for m in (model, twin)
        ),
    )
    state = nnx.state(optimiser)
    assert not any("statistics" in str(path) for path, _ in nnx.to_flat_state(state))


def test_rules_know_the_kernels():
    model = nn.decorrelate(Model(nnx.Rngs(0)), decorrelation.Polar())
    kernels = {p: x for p, x in parameters(model).items() if p.endswith("kernel")}
    assert "body/layers/0/layer/kernel" in kernels and len(kernels) == len(LAYERS)
    for rule in (components.from_model(model), components.ByName()):
        for path, leaf in kernels.items():
            cut = rule.resolve(path, leaf)
            assert cut.columns == (leaf.ndim - 1,)
            assert cut.rows == tuple(range(leaf.ndim - 1))


def test_updates_are_explicit_about_when():
    x = single(normal(16, 6))
    layer = linear(rule=decorrelation.Scaled(0.05))

    def count():
        return layer.statistics.updates[...].item()

    nnx.jit(lambda layer: nnx.grad(lambda m: jnp.sum(nnx.remat(run)(m, x)))(layer))(
        layer
    )
    assert count() == 1  # recomputed in the backward pass, learnt once
    for micro, part in enumerate(jnp.split(x, 4)):  # accumulation
        layer(part, updating=micro == 0)
    assert count() == 2
    layer.set_attributes(updating=False)
    before = matrix(layer)
    run(layer, x)
    np.testing.assert_array_equal(matrix(layer), before)
    layer(x, updating=True)
    assert count() == 3
    layer.set_attributes(updating=True)
    layer.eval()
    layer(x, updating=True)
    assert count() == 3
    layer.train()
    layer(x)
    assert count() == 4


def test_no_recompilation():
    traces = []
    layer = conv(rule=decorrelation.Polar(), sample=0.2)

    @nnx.jit
    def step(layer, x):
        traces.append(None)
        return nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)

    for seed in range(3):
        step(layer, images(4, 6, 5, 3, seed=seed))
    assert len(traces) == 1
    assert layer.statistics.updates[...] == 3
    assert layer.rngs.count[...] == 3


def test_seeds_under_vmap():
    # Several decompositions in one program, each of a stack: batched they could hang.
    rules = (
        decorrelation.Polar(),
        decorrelation.Polar(),
        decorrelation.Polar(),
        decorrelation.Lateral(0.01),
    )

    def model(rngs):
        return nnx.Sequential(
            *(nn.DecorrelatedLinear(6, 6, rule, rngs=rngs) for rule in rules)
        )

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0)
    def make(rngs):
        return model(rngs)

    seeds, x = make(nnx.Rngs(0)), single(normal(16, 6))
    forward = nnx.jit(nnx.vmap(lambda model, x: model(x), in_axes=(0, None)))
    forward(seeds, x)
    found = forward(seeds, x)
    assert seeds.layers[0].statistics.updates[...].tolist() == [2, 2]
    one = model(nnx.Rngs(5))
    kernels = jax.tree.map(lambda leaf: leaf[1], nnx.state(seeds, nnx.Param))
    nnx.update(one, kernels)
    run(one, x)
    np.testing.assert_allclose(run(one, x), found[1], rtol=1e-3, atol=1e-3)


def test_layers_under_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0)
    def make(rngs):
        return nn.DecorrelatedLinear(6, 6, decorrelation.Scaled(0.1), rngs=rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x)

    layers, x = make(nnx.Rngs(0)), single(normal(16, 6))
    forward(layers, x)
    assert layers.statistics.updates[...].tolist() == [1, 1, 1]
    first = linear(6, 6, decorrelation.Scaled(0.1))
    run(first, x)
    close(layers.statistics.transform[...][0], first.statistics.transform[...])


def test_data_parallel_in_shard_map():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=auto)
    x = images(16, 4, 5, 3)
    one, split = conv(), conv(axis_name="batch")
    graph, state = nnx.split(split)

    def step(state, x):
        model = nnx.merge(graph, state)
        y = model(x)
        return y, nnx.state(model)

    specs = {"in_specs": (P(), P("batch")), "out_specs": (P("batch"), P())}
    step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    close(step(state, x)[0], run(one, x))
    nnx.update(split, step(state, x)[1])
    close(matrix(split), matrix(one), 1e-3)
    close(split.statistics.mean[...], one.statistics.mean[...])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_explicit_mesh(kind):
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=explicit)
    rule = decorrelation.Scaled(0.01)
    make, x = linear, single(1 + normal(16, 3, 6))
    if kind == "conv":
        make, x = functools.partial(conv, sample=0.2), images(16, 4, 5, 3)
    gradient = nnx.jit(
        lambda layer, x: nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    )
    layers, found = [], []
    with jax.set_mesh(mesh):
        for spec in (P("batch"), P()):
            split = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
            layers.append(make(rule=rule))
            gradients = gradient(layers[-1], split)
            found.append(gradients["layer"]["kernel"][...])
    close(*found)
    close(*(layer.statistics.transform[...] for layer in layers))


def test_orbax_round_trip(tmp_path):
    layer = trained(linear(), single(1 + normal(20, 6)))
    state = nnx.state(layer)
    saved = nnx.to_pure_dict(state)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", saved)
    other = linear()
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    x = single(normal(5, 6, seed=1))
    layer.eval(), other.eval()
    np.testing.assert_array_equal(layer(x), other(x))
    assert other.statistics.updates[...] == 1


def test_low_precision_layers():
    x = single(normal(20, 6))
    layer = trained(
        linear(dtype="bfloat16", param_dtype="bfloat16"), x.astype("bfloat16")
    )
    assert layer.statistics.mean[...].dtype == "float32"
    y = run(layer, x.astype("bfloat16"))
    assert y.dtype == "bfloat16"
    small = nn.DecorrelatedConv(
        3, 4, (3, 3), POLAR, param_dtype="bfloat16", rngs=nnx.Rngs(0)
    )
    assert run(small, images(4, 6, 6, 3).astype("bfloat16")).dtype == "bfloat16"


def test_methods_of_the_polar_rule_in_a_layer():
    x = single(1 + normal(64, 6) @ normal(6, 6, seed=1))
    layer = trained(linear(rule=decorrelation.Polar(method=polar.Auto())), x, x)
    assert diagnostics.off_diagonal_correlation(x) > 0.1
    z = decorrelation.apply_decorrelation(layer.state(), x, layer.rule)
    assert diagnostics.off_diagonal_correlation(z) < 1e-3
