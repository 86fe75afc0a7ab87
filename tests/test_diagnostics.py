"""Diagnostics against float64 numpy, written from the definitions with loops."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orthax import components, diagnostics, polar

RTOL, ATOL = 2e-5, 2e-6
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
PER_MATRIX = (
    diagnostics.orthogonality_error,
    diagnostics.rank_estimate,
    diagnostics.singular_values,
    lambda tree, *rule: diagnostics.polar_residual(tree, tree, *rule),
)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same numbers, alone or in company."""
    RNG.bit_generator.state = START


def normal(*shape):
    return RNG.standard_normal(shape)


def close(found, expected, rtol=RTOL, atol=ATOL):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol, atol=atol)


def with_spectrum(m, n, *spectrum):
    """A float64 matrix with these singular values, the others zero."""
    u = np.linalg.qr(normal(m, len(spectrum)))[0]
    v = np.linalg.qr(normal(n, len(spectrum)))[0]
    return (u * np.array(spectrum)) @ v.T


def kernel(x, dtype="float32"):
    return {"kernel": jnp.asarray(x, dtype)}


# --- definitions, in float64, entry by entry ------------------------------------------


def orthogonality_error_of(x):
    x = x if x.shape[0] >= x.shape[1] else x.T
    k, total = x.shape[1], 0.0
    for i, j in itertools.product(range(k), range(k)):
        total += abs(np.vdot(x[:, i], x[:, j]) - (i == j)) ** 2
    return math.sqrt(total) / math.sqrt(k)


def polar_of(x):
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    out = np.zeros_like(x)
    for i, value in enumerate(s):
        if value > max(x.shape) * np.finfo("float32").eps * s[0]:
            out += np.outer(u[:, i], vh[i])
    return out


def cosine_of(a, b):
    a, b = a.ravel(), b.ravel()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / length if length else 0.0


def pair_cosines(vectors):
    pairs = itertools.combinations(vectors, 2)
    return np.array([abs(cosine_of(a, b)) for a, b in pairs])


# --- orthogonality_error --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 6)])
def test_orthogonality_error_is_its_definition(shape):
    x = normal(*shape)
    found = diagnostics.orthogonality_error(kernel(x))["kernel"]
    assert found.shape == (1,)
    close(found, [orthogonality_error_of(x)])


def test_orthogonality_error_known_by_construction():
    spectra = {"ones": (1, 1, 1), "stretched": (1.1, 1.1, 1.1), "rank2": (1, 1), "": ()}
    tree = {
        name: jnp.asarray(with_spectrum(6, 3, *s), "float32")
        for name, s in spectra.items()
    }
    found = diagnostics.orthogonality_error(tree)
    close(found["ones"], [0])
    close(found["stretched"], [0.21])
    close(found["rank2"], [math.sqrt(1 / 3)])
    close(found[""], [1])


def test_complex_matrices_use_the_conjugate():
    x = normal(5, 3) + 1j * normal(5, 3)
    unitary = np.linalg.qr(x)[0]
    tree = {"u": jnp.asarray(unitary, "complex64"), "x": jnp.asarray(x, "complex64")}
    found = diagnostics.orthogonality_error(tree)
    close(found["u"], [0])
    close(found["x"], [orthogonality_error_of(x)])
    gradients = {"u": tree["x"], "x": tree["x"]}
    updates = {"u": jnp.asarray(polar_of(x), "complex64"), "x": tree["x"]}
    close(diagnostics.polar_residual(updates, gradients)["u"], [0])
    dot = np.vdot(x, polar_of(x)).real
    cosine = dot / np.linalg.norm(x) / math.sqrt(3)
    close(diagnostics.update_cosine(gradients, updates)["u"], cosine)


# --- polar_residual -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_polar_residual_is_its_definition(shape):
    gradient, update = normal(*shape), normal(*shape)
    exact = polar_of(gradient)
    found = diagnostics.polar_residual(kernel(update), kernel(gradient))["kernel"]
    close(found, [np.linalg.norm(update - exact) / np.linalg.norm(exact)])
    close(diagnostics.polar_residual(kernel(exact), kernel(gradient))["kernel"], [0])


def test_polar_residual_keeps_the_null_space_at_zero():
    gradient = with_spectrum(6, 4, 3.0)
    exact = polar_of(gradient)
    assert np.linalg.norm(exact) == pytest.approx(1, rel=1e-6, abs=0)
    u, _, vh = np.linalg.svd(gradient, full_matrices=False)
    for update, expected in ((exact, 0), (u @ vh, math.sqrt(3)), (-exact, 2)):
        found = diagnostics.polar_residual(kernel(update), kernel(gradient))
        close(found["kernel"], [expected])


def test_polar_residual_of_a_zero_gradient():
    zero, update = np.zeros((3, 4, 2)), np.zeros((3, 4, 2))
    update[1, 0, 0] = 1e-3
    zero[2] = normal(4, 2)
    rule = components.ByPath([("", components.Matricisation((1,), (2,)))])
    found = diagnostics.polar_residual(kernel(update), kernel(zero), rule)
    close(found["kernel"], [0, np.inf, 1])


def test_polar_residual_is_taken_in_the_working_precision():
    # A factor that was rounded to bfloat16 on its way would hide this rounding.
    gradient = jnp.asarray(normal(8, 4), "bfloat16")
    exact = polar_of(np.asarray(gradient, "float64"))
    update = jnp.asarray(exact, "bfloat16")
    error = np.linalg.norm(np.asarray(update, "float64") - exact) / 2
    assert error > 5e-4
    found = diagnostics.polar_residual({"w": update}, {"w": gradient})["w"]
    close(found, [error], rtol=1e-3)


# --- rank_estimate and singular_values ------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_rank_by_construction(rank):
    x = with_spectrum(6, 4, *np.geomspace(1, 1e-3, rank)) if rank else np.zeros((6, 4))
    found = diagnostics.rank_estimate({"v": jnp.float32(x), "u": jnp.float32(x.T)})
    close(found["v"], [rank], rtol=0, atol=0)
    close(found["u"], [rank], rtol=0, atol=0)


def test_rank_tolerance_is_relative_to_the_largest():
    tree = kernel(with_spectrum(6, 4, 50, 5, 0.5, 0.05))
    for rank_tol, expected in ((None, 4), (5e-2, 2)):
        found = diagnostics.rank_estimate(tree, components.ByName(), rank_tol)
        assert found["kernel"].tolist() == [expected]
    stored = kernel(with_spectrum(6, 4, 1), "bfloat16")  # rounding fills the rest
    assert diagnostics.rank_estimate(stored)["kernel"] > 1
    assert diagnostics.rank_estimate(stored, rank_tol=5e-2)["kernel"] == 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(6, 4), (3, 6)])
def test_singular_values_are_numpys(shape, scale):
    x = normal(*shape)
    s = np.linalg.svd(x, compute_uv=False)
    found = diagnostics.singular_values(kernel(x * scale))["kernel"]
    expected = {
        "largest": max(s),
        "smallest": min(s),
        "median": sorted(s)[1] if len(s) == 3 else (sorted(s)[1] + sorted(s)[2]) / 2,
        "frobenius_norm": math.sqrt(sum(v * v for v in s)),
        "nuclear_norm": sum(s),
    }
    for name, value in expected.items():
        close(np.float64(getattr(found, name)) / scale, [value])
    close(found.stable_rank, [sum(v * v for v in s) / max(s) ** 2])


def test_singular_values_of_zero():
    found = diagnostics.singular_values(kernel(np.zeros((6, 4))))["kernel"]
    assert all(value.tolist() == [0] for value in found)


# --- what all of them do with trees ---------------------------------------------------


def test_matrices_of_a_leaf_come_in_the_order_of_the_fold():
    x = normal(3, 2, 3, 8).astype("float32")
    cases = {
        "stacked": (components.Matricisation((2,), (3,)), x.reshape(6, 3, 8)),
        "blocks": (
            components.Matricisation((1, 2), (3,), blocks=(2, 6)),
            [
                m[:, part]
                for part in (slice(2), slice(2, 8))
                for m in x.reshape(3, 6, 8)
            ],
        ),
        "groups": (
            components.Matricisation((0, 1, 2), (3,), groups=2),
            [x.reshape(18, 8)[:, :4], x.reshape(18, 8)[:, 4:]],
        ),
    }
    for name, (cut, matrices) in cases.items():
        rule = components.ByPath([(name, cut)])
        tree = {name: jnp.asarray(x)}
        found = diagnostics.orthogonality_error(tree, rule)[name]
        close(found, [orthogonality_error_of(np.float64(m)) for m in matrices])
        found = diagnostics.singular_values(tree, rule)[name].nuclear_norm
        close(found, [np.linalg.norm(np.float64(m), "nuc") for m in matrices])


def test_stacked_layers_are_one_matrix_each():
    x = np.stack([with_spectrum(6, 4, *[1.0] * rank) for rank in (4, 1, 3)])
    tree = {"layers": kernel(x)}
    rule = components.ByName(stacked=("layers",))
    found = diagnostics.rank_estimate(tree, rule)
    assert found["layers/kernel"].tolist() == [4, 1, 3]
    updates = {"layers": kernel(x * np.array([1, 2, -1]).reshape(3, 1, 1))}
    found = diagnostics.polar_residual(updates, tree, rule)
    close(found["layers/kernel"], [0, 1, 2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("f", PER_MATRIX)
def test_what_is_not_finite_stays_in_its_matrix(f, bad):
    rule = components.ByPath([("", components.Matricisation((1,), (2,)))])
    x = normal(3, 6, 4)
    clean = jax.tree.map(np.asarray, f(kernel(x), rule)["kernel"])
    x[1, 2, 3] = bad
    for found, before in zip(
        jax.tree.leaves(f(kernel(x), rule)), jax.tree.leaves(clean), strict=True
    ):
        assert np.isnan(found[1])
        close(found[::2], before[::2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_either_side_of_the_residual_may_be_not_finite(bad):
    x, broken = normal(6, 4), normal(6, 4)
    broken[0, 0] = bad
    for pair in ((x, broken), (broken, x)):
        assert np.isnan(diagnostics.polar_residual(*map(kernel, pair))["kernel"])


def mixed_tree():
    return {
        "conv": {"kernel": jnp.asarray(normal(3, 3, 2, 4), "float32")},
        "dense": {"kernel": jnp.asarray(normal(6, 5), "bfloat16"), "bias": jnp.ones(5)},
        "masked": optax.MaskedNode(),
        "none": None,
        "steps": jnp.arange(12).reshape(3, 4),
        "frozen": np.zeros((3, 4), jax.dtypes.float0),
        "key": jax.random.key(0),
        "python": 3,
    }


@pytest.mark.parametrize("f", PER_MATRIX)
def test_only_what_the_rule_cuts_is_measured(f):
    found = f(mixed_tree())
    assert set(found) == {"conv/kernel", "dense/kernel"}
    for value in jax.tree.leaves(found):
        assert value.shape == (1,) and value.dtype == "float32"
    conv = mixed_tree()["conv"]["kernel"]
    found = diagnostics.singular_values({"conv": {"kernel": conv}})["conv/kernel"]
    close(found.nuclear_norm, [np.linalg.norm(np.reshape(conv, (18, 4)), "nuc")])


def test_only_floating_leaves_are_counted():
    tree = mixed_tree()
    floating = {"conv/kernel", "dense/bias", "dense/kernel"}
    cosines = diagnostics.update_cosine(tree, tree)
    assert set(cosines) == floating
    assert all(value.shape == () for value in cosines.values())
    dead = diagnostics.dead_parameters(tree)
    assert set(dead) == floating
    assert dead["dense/bias"].count == 0


def test_nnx_states_and_their_gradients():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    loss = lambda model: model(jnp.eye(4)).sum()  # noqa: E731
    gradients, params = nnx.grad(loss)(model), nnx.state(model, nnx.Param)
    path = "layers/0/kernel"
    assert diagnostics.rank_estimate(gradients)[path].tolist() == [1]
    assert path in diagnostics.polar_residual(params, gradients)
    assert diagnostics.dead_parameters(gradients)[path].count == 0
    cosine = diagnostics.update_cosine(gradients, params)[path]
    close(cosine, cosine_of(np.float64(model.layers[0].kernel[...]), np.ones((4, 3))))


def test_trees_without_matrices_give_nothing():
    for tree in ({}, {"bias": jnp.ones(3)}, {"empty": jnp.ones((0, 3))}):
        assert all(f(tree) == {} for f in PER_MATRIX)


def everything(gradients, updates):
    return [
        diagnostics.orthogonality_error(updates),
        diagnostics.polar_residual(updates, gradients),
        diagnostics.rank_estimate(gradients, rank_tol=1e-3),
        diagnostics.singular_values(gradients),
        diagnostics.update_cosine(gradients, updates),
        diagnostics.dead_parameters(gradients, relative=True),
        diagnostics.representation_cosines(
            gradients["conv"]["kernel"], per_sample=False
        ),
    ]


def test_jit_is_eager_with_implicit_promotion_forbidden():
    def some(seed):
        shapes = {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}}
        key = jax.random.key(seed)
        return jax.tree.map(
            lambda s: jax.random.normal(key, s),
            shapes,
            is_leaf=lambda s: isinstance(s, tuple),
        )

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        eager = everything(some(0), some(1))
        jitted = jax.jit(everything)(some(0), some(1))
    jax.tree.map(lambda a, b: close(a, b), eager, jitted)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(eager))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_trees(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=kinds)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    trees = [{"conv": kernel(normal(6, 4))} for _ in range(2)]
    sharded = jax.device_put(trees, sharding)
    with jax.set_mesh(mesh):
        found = jax.jit(everything)(*sharded)
    jax.tree.map(close, found, everything(*trees))
    if kind == "Explicit":  # the mesh stands in the type: no context is needed
        jax.tree.map(close, everything(*sharded), found)


def test_float64_is_kept(x64):
    x = normal(5, 3)
    tree = kernel(x, "float64")
    error = diagnostics.orthogonality_error(tree)["kernel"]
    close(error, [orthogonality_error_of(x)], rtol=1e-12, atol=0)
    s = np.linalg.svd(x, compute_uv=False)
    found = diagnostics.singular_values(tree)["kernel"].smallest
    close(found, [s[-1]], rtol=1e-12, atol=0)
    cosine = diagnostics.update_cosine(tree, kernel(polar_of(x), "float64"))
    expected = sum(s) / np.linalg.norm(s) / math.sqrt(3)
    close(cosine["kernel"], expected, rtol=1e-12, atol=0)


# --- update_cosine --------------------------------------------------------------------


def test_update_cosine_is_its_definition():
    gradients = {"w": normal(3, 4, 5), "bias": normal(7), "scalar": normal()}
    updates = {"w": normal(3, 4, 5), "bias": normal(7), "scalar": normal()}
    found = diagnostics.update_cosine(
        *(jax.tree.map(jnp.float32, tree) for tree in (gradients, updates))
    )
    for path, value in found.items():
        close(value, cosine_of(np.array(gradients[path]), np.array(updates[path])))


@pytest.mark.parametrize("spectrum", [(2, 2, 2), (3, 2, 1), (1, 1e-3, 1e-3), (5, 4)])
def test_update_cosine_of_a_polar_factor(spectrum):
    x = with_spectrum(6, 4, *spectrum)
    factor = polar.polar_factor(jnp.float32(x), polar.SVD())
    found = diagnostics.update_cosine(kernel(x), {"kernel": factor})["kernel"]
    close(found, sum(spectrum) / np.linalg.norm(spectrum) / math.sqrt(len(spectrum)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_update_cosine_knows_no_scale_but_a_sign(scale):
    x, y = normal(4, 3), normal(4, 3)
    close(
        diagnostics.update_cosine(kernel(x * scale), kernel(-y / scale))["kernel"],
        -cosine_of(x, y),
    )


def test_update_cosine_of_zero_nan_and_nothing():
    x = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3), "d": jnp.ones((0, 2))}
    y = {**x, "a": jnp.zeros(3), "b": jnp.array([1, jnp.nan, 1])}
    for found in (diagnostics.update_cosine(x, y), diagnostics.update_cosine(y, x)):
        assert found["a"] == 0 and np.isnan(found["b"]) and found["d"] == 0
        close(found["c"], 1)
    infinite = {"a": jnp.array([1, jnp.inf])}
    assert np.isnan(diagnostics.update_cosine(infinite, {"a": jnp.ones(2)})["a"])


# --- dead_parameters ------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_dead_parameters_are_counted(relative):
    x = (normal(6, 5) * 10.0 ** RNG.integers(-6, 2, (6, 5))).astype("float32")
    x[0] = 0
    largest = max(abs(v) for v in x.ravel())
    expected = 0
    for v in x.ravel():
        expected += abs(v) <= 1e-4 * (largest if relative else 1)
    found = diagnostics.dead_parameters(kernel(x), relative=relative)["kernel"]
    assert 5 < expected < 30
    assert found.count == expected
    close(found.fraction, expected / 30)


def test_dead_parameters_at_the_threshold_and_scale():
    x = jnp.array([0.0, 0.25, -0.5, 1.0])
    dead = lambda *a, **k: diagnostics.dead_parameters(*a, **k)["x"].count  # noqa: E731
    assert dead({"x": x}, 0.25) == 2 and dead({"x": x}, 0) == 1
    assert dead({"x": x / 4}, 0.25) == 4
    assert dead({"x": x / 4}, 0.25, relative=True) == 2
    assert dead({"x": 4 * x}, 0.25, relative=True) == 2
    assert dead({"x": jnp.zeros(3)}, relative=True) == 3
    assert dead({"x": x + 0j}, 0.25) == 2
    assert dead({"x": jnp.float16(x)}, np.float64(0.25)) == 2


def test_dead_parameters_not_finite_or_empty():
    tree = {
        "nan": jnp.array([0, jnp.nan]),
        "inf": jnp.array([0, jnp.inf]),
        "fine": jnp.array([0.0, 1.0]),
        "empty": jnp.zeros((0, 3)),
    }
    for relative in (False, True):
        found = diagnostics.dead_parameters(tree, relative=relative)
        for path in ("nan", "inf"):
            assert np.isnan(found[path].count) and np.isnan(found[path].fraction)
        assert found["fine"] == (1, 0.5) and found["empty"] == (0, 0)


# --- representation_cosines -----------------------------------------------------------


@pytest.mark.parametrize("spatial", [(3,), (3, 2), (2, 1, 3)])
@pytest.mark.parametrize("axis", [-1, 1])
def test_representation_cosines_are_their_definition(spatial, axis):
    x = normal(4, *spatial, 5)
    found = diagnostics.representation_cosines(
        jnp.float32(np.moveaxis(x, -1, axis)), component_axis=axis
    )
    assert found.mean.shape == found.variance.shape == (4,)
    for i, sample in enumerate(x):
        cosines = pair_cosines([sample[..., c] for c in range(5)])
        assert len(cosines) == 10
        close(found.mean[i], sum(cosines) / 10)
        close(found.variance[i], sum((cosines - sum(cosines) / 10) ** 2) / 10)


@pytest.mark.parametrize("spatial", [(), (3, 2)])
def test_representation_cosines_over_the_batch(spatial):
    x = normal(4, *spatial, 5)
    found = diagnostics.representation_cosines(jnp.float32(x), per_sample=False)
    cosines = pair_cosines([x[..., c] for c in range(5)])
    close(found.mean, np.mean(cosines))
    close(found.variance, np.var(cosines))


def test_representation_cosines_by_construction():
    same, orthogonal = np.ones((6, 3)), np.eye(6)[:, :3]
    dead = same.copy()
    dead[:, 0] = 0  # of three pairs two have a zero map
    x = jnp.float32(np.stack([same, orthogonal, -2e30 * same, 1e-30 * same, dead]))
    found = diagnostics.representation_cosines(x)
    close(found.mean, [1, 0, 1, 1, 1 / 3])
    close(found.variance, [0, 0, 0, 0, 2 / 9])


def test_representation_cosines_floor_behind_a_relu():
    x = normal(2, 20_000, 6)
    limits = ((x, 0.8 / math.sqrt(20_000)), (np.abs(x), 2 / math.pi))
    for maps, floor in (*limits, (np.maximum(x, 0), 1 / math.pi)):
        found = diagnostics.representation_cosines(jnp.float32(maps))
        close(found.mean, [floor] * 2, rtol=0.02, atol=3e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_representation_cosines_not_finite(bad):
    x = normal(3, 4, 5)
    clean = diagnostics.representation_cosines(jnp.float32(x))
    x[1, 2, 3] = bad
    found = diagnostics.representation_cosines(jnp.float32(x))
    for after, before in zip(found, clean, strict=True):
        assert np.isnan(after[1])
        close(after[::2], before[::2])


def test_representation_cosines_complex_low_precision_and_empty():
    x = normal(1, 6, 2) + 1j * normal(1, 6, 2)
    found = diagnostics.representation_cosines(jnp.complex64(x)).mean
    a, b = x[0].T
    close(found, [abs(np.vdot(a, b)) / np.linalg.norm(a) / np.linalg.norm(b)])
    low = jnp.bfloat16(x.real)
    found = diagnostics.representation_cosines(low).mean
    assert found.dtype == "float32"
    close(found, pair_cosines(np.float64(low)[0].T))
    assert diagnostics.representation_cosines(jnp.ones((0, 4, 3))).mean.shape == (0,)


# --- cosine_threshold -----------------------------------------------------------------


def test_cosine_threshold():
    assert diagnostics.cosine_threshold(10_000) == pytest.approx(0.04, rel=1e-12, abs=0)
    found = diagnostics.cosine_threshold(np.int32(9), sigmas=1)
    assert type(found) is float and found == pytest.approx(1 / 3, rel=1e-12, abs=0)


@pytest.mark.parametrize("n", [9, 64])
def test_cosine_threshold_counts_standard_deviations(n):
    x, y = RNG.standard_normal((2, 50_000, n))
    cosines = np.sum(x * y, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    one = diagnostics.cosine_threshold(n, sigmas=1)
    assert np.std(cosines) == pytest.approx(one, rel=0.02, abs=0)
    assert np.mean(np.abs(cosines) > diagnostics.cosine_threshold(n)) < 3e-4


# --- errors ---------------------------------------------------------------------------

ONES = jnp.ones((3, 4))
X = jnp.ones((2, 3, 4))
MISTAKES = [
    (
        lambda: diagnostics.polar_residual({"a": ONES}, {"a": ONES, "v": ONES}),
        r"`gradients` has leaves that `updates` lacks: 'v'",
    ),
    (
        lambda: diagnostics.update_cosine({"a": ONES}, {"b": ONES}),
        r"`gradients` has leaves that `updates` lacks: 'a'",
    ),
    (
        lambda: diagnostics.update_cosine({"a": ONES}, {"a": jnp.ones((3, 4), int)}),
        r"`gradients` has leaves that `updates` lacks: 'a'",
    ),
    (
        lambda: diagnostics.update_cosine({}, dict.fromkeys("abcdefgh", ONES)),
        r"`updates` has .* 'e' and 3 more. Pass two trees of the same",
    ),
    (
        lambda: diagnostics.update_cosine({"a": ONES}, {"a": ONES.T}),
        r"'a' has shape \(3, 4\) in `gradients`, but \(4, 3\) in `updates`",
    ),
    (
        lambda: diagnostics.polar_residual({"a": ONES}, {"a": ONES.T}),
        r"'a' has shape \(3, 4\) in `updates`, but \(4, 3\) in `gradients`",
    ),
    (
        lambda: diagnostics.dead_parameters({"a/b": ONES, "a": {"b": ONES}}),
        r"Two leaves have the path 'a/b'",
    ),
    (
        lambda: diagnostics.orthogonality_error({"a/v": ONES, "a": {"v": ONES}}),
        r"Two leaves have the path 'a/v'",
    ),
    (
        lambda: diagnostics.singular_values({"norm": ONES}),
        r"cuts no leaf of this tree",
    ),
    (
        lambda: diagnostics.singular_values({"kernel": jnp.ones((2, 3, 4))}),
        r"'kernel' of shape \(2, 3, 4\) is ambiguous",
    ),
    (lambda: diagnostics.rank_estimate({"a": ONES}, rank_tol=-1.0), "rank_tol.*-1.0"),
    (lambda: diagnostics.dead_parameters({}, -1e-4), "`threshold` .* -0.0001"),
    (lambda: diagnostics.dead_parameters({}, math.nan), "`threshold` .* nan"),
    (
        lambda: diagnostics.dead_parameters({}, 1.0, relative=True),
        "relative `threshold` must be below 1, got 1.0",
    ),
    (lambda: diagnostics.cosine_threshold(0), "`n`, .* must be positive, got 0"),
    (lambda: diagnostics.cosine_threshold(9, 0.0), "`sigmas` .* positive, got 0.0"),
    (
        lambda: diagnostics.representation_cosines(X, component_axis=3),
        r"`component_axis` 3 is out of range for activations of shape \(2, 3, 4\)",
    ),
    (
        lambda: diagnostics.representation_cosines(X, component_axis=-4),
        r"`component_axis` -4 is out of range",
    ),
    (
        lambda: diagnostics.representation_cosines(X, component_axis=-3),
        r"axis 0 of activations of shape \(2, 3, 4\), which is the batch",
    ),
    (lambda: diagnostics.representation_cosines(jnp.ones(3)), r"got shape \(3,\)"),
    (
        lambda: diagnostics.representation_cosines(jnp.ones((2, 3, 1))),
        r"have 1 components on axis -1; a pair needs two",
    ),
    (
        lambda: diagnostics.representation_cosines(ONES),
        r"shape \(3, 4\) have length 1, .* pass per_sample=False",
    ),
    (
        lambda: diagnostics.representation_cosines(jnp.ones((8, 1, 1, 4))),
        r"have length 1, .* pass per_sample=False",
    ),
    (
        lambda: diagnostics.representation_cosines(ONES[:1], per_sample=False),
        r"have length 1, .* pass more samples",
    ),
]
WRONG_TYPES = [
    (lambda: diagnostics.singular_values({"a": ONES}, "ByName"), "`rule` must be a"),
    (lambda: diagnostics.singular_values({"a": "no array"}), "'a' is 'no array'"),
    (lambda: diagnostics.update_cosine({"a": "b"}, {"a": "b"}), "'a' is 'b'"),
    (lambda: diagnostics.dead_parameters({}, "1"), "`threshold` .* '1' of type str"),
    (lambda: diagnostics.dead_parameters({}, True), "`threshold` .* True of type bool"),
    (lambda: diagnostics.cosine_threshold(9.0), "`n` must be an integer.* 9.0"),
    (lambda: diagnostics.cosine_threshold(9, "4"), "`sigmas` .* '4' of type str"),
    (
        lambda: diagnostics.representation_cosines(X.astype(int)),
        "must be floating or complex, got dtype int32",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()
