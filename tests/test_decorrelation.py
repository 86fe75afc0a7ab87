"""Decorrelation rules against what their mathematics says, in float64 numpy.

Data have exactly the covariance that is said, so that nothing is random: fixed points
are compared with eigendecompositions, single steps with the published formulas.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from orthax import decorrelation, diagnostics, polar

D = 8
CONDITIONS = (1.0, 1e2, 1e4)
RULES = {
    "scaled": decorrelation.Scaled(0.2),
    "off-diagonal": decorrelation.OffDiagonal(0.5),
    "local": decorrelation.Local(0.5),
    "whitening": decorrelation.Whitening(0.3),
    "lateral": decorrelation.Lateral(0.005),
    "blended": decorrelation.Blended(0.3, 0.5),
    "normalised": decorrelation.Blended(0.5, 0.3, normalised=True),
    "decorrelating": decorrelation.Blended(0.5, 0.0),
    "variances": decorrelation.Blended(0.3, 1.0),
    "factorised": decorrelation.Factorised(0.03, 0.5),
    "subspace": decorrelation.Factorised(0.1, 0.3, 0.5, seed=1),
    "polar": decorrelation.Polar(),
}
STEPS = dict.fromkeys(("off-diagonal", "local", "decorrelating", "factorised"), 20000)
STEPS |= {"polar": 2}
WHITE = {"whitening", "lateral", "blended", "normalised", "polar"}
each_rule = pytest.mark.parametrize("name", RULES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(condition, d=D, seed=1):
    """A covariance of that condition, its largest eigenvalue one, and its vectors."""
    vectors = np.linalg.qr(normal(d, d, seed=seed))[0]
    values = np.logspace(0, -np.log10(condition), d)
    return (vectors * values) @ vectors.T, values, vectors


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def samples(sigma, n=32, seed=2):
    """Samples of mean zero that have exactly the covariance sigma."""
    white = normal(n, len(sigma), seed=seed)
    white = np.linalg.qr(white - white.mean(0))[0] * n**0.5
    return white @ power(sigma, 0.5)


def single(x):
    return jnp.asarray(x, "float32")


def double(x):
    return np.asarray(x, "float64")


@functools.partial(jax.jit, static_argnums=(0, 2))
def trained(rule, x, steps):
    def step(_, state):
        return rule.update(state, x)

    return jax.lax.fori_loop(0, steps, step, rule.init(x.shape[1], x.dtype))


def correlations(c):
    scale = np.diag(c) ** -0.5
    return scale[:, None] * c * scale


def off(c):
    return c - np.diag(np.diag(c))


@each_rule
@pytest.mark.parametrize("condition", CONDITIONS)
def test_fixed_point(name, condition):
    rule, (sigma, *_) = RULES[name], covariance(condition)
    x = samples(sigma)
    state = trained(rule, single(x), STEPS.get(name, 2000))
    r = double(rule.matrix(state))
    c = r @ sigma @ r.T
    if name in WHITE:
        np.testing.assert_allclose(c, np.eye(D), atol=1e-4)
    elif name == "scaled":
        scale = np.trace(c) / D
        np.testing.assert_allclose(c / scale, np.eye(D), atol=1e-4)
        gain = np.mean(np.linalg.norm(x, axis=1) / np.linalg.norm(x @ r.T, axis=1))
        np.testing.assert_allclose(gain * (1 - rule.learning_rate * scale), 1, 1e-4)
    elif name == "variances":
        np.testing.assert_allclose(np.diag(c), 1, atol=1e-4)
        np.testing.assert_allclose(correlations(c), correlations(sigma), atol=1e-4)
    elif name in ("factorised", "subspace"):
        share = rule.fraction
        scale = 2 * rule.kappa / (1 - rule.kappa + 2 * rule.kappa * share)
        u = double(rule.init(D, "float32"))
        assert u.shape == (D, D * share)
        np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-6)
        np.testing.assert_allclose(c, scale * u @ u.T, atol=1e-4)
    else:
        assert np.abs(off(correlations(c))).max() < 1e-3
        if condition > 1:  # off-diagonal alone: not the variances
            assert np.ptp(np.diag(c)) > 0.1


@pytest.mark.parametrize("name", ["whitening", "lateral", "polar"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_zero_phase(name, condition):
    # Rules that stay symmetric and whiten end at one matrix, the zero-phase one.
    sigma, *_ = covariance(condition)
    rule = RULES[name]
    r = rule.matrix(trained(rule, single(samples(sigma)), STEPS.get(name, 2000)))
    expected = power(sigma, -0.5)
    error = np.linalg.norm(double(r) - expected, 2) / np.linalg.norm(expected, 2)
    assert error < (1e-4 if name == "polar" else 1e-3)


def expected_step(name, rule, state, x):
    """One step of the formula as published, from any state."""
    eta = getattr(rule, "learning_rate", None)
    n, d = x.shape
    r = np.linalg.inv(state) if name == "lateral" else state
    r = r @ r.T if name in ("factorised", "subspace") else r
    z = x @ r.T
    c = z.T @ z / n
    v = np.diag(c) - 1
    kappa = getattr(rule, "kappa", None)
    if name == "scaled":
        gain = np.mean(np.linalg.norm(x, axis=1) / np.linalg.norm(z, axis=1))
        return gain * r - eta * c @ (gain * r)
    if name == "lateral":
        return state + eta * (c - np.eye(d))
    if name in ("factorised", "subspace"):
        step = (1 - kappa) * c @ state + 2 * kappa * np.mean(v) * state
        return state - eta * step
    if name == "local":
        return r - eta * r @ off(c)
    if name == "whitening":
        return r - eta * (c - np.eye(d)) @ r
    if name == "off-diagonal":
        return r - eta * off(c) @ r
    first, second = (1 / (d - 1), 2) if rule.normalised else (1, 1)
    step = (1 - kappa) * first * off(c) @ r + second * kappa * np.diag(v) @ r
    return r - eta * step


@pytest.mark.parametrize("name", [name for name in RULES if name != "polar"])
@pytest.mark.parametrize("n", [3, 12])
def test_one_step_is_the_formula(name, n):
    # From a matrix that commutes with nothing: sides and rows matter. With fewer
    # samples than features and with more, products are associated otherwise.
    rule, d = RULES[name], 6
    state = np.eye(d) + 0.3 * normal(d, d, seed=3)
    if name == "subspace":
        state = state[:, :3]
    x = normal(n, d, seed=4)
    found = rule.update(single(state), single(x))
    expected = expected_step(name, rule, state, x)
    assert np.abs(expected - state).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@each_rule
def test_ways_to_apply_agree(name):
    rule, x, kernel = RULES[name], normal(5, D), normal(D, 3, seed=5)
    state = rule.init(D, "float32")
    disturbed = jax.tree.map(
        lambda leaf: (
            leaf + single(0.1 * normal(*leaf.shape, seed=6))
            if leaf.dtype == "float32"
            else leaf
        ),
        state,
    )
    if name == "polar":
        disturbed = rule.update(state, single(normal(20, D, seed=7)))
    r = double(rule.matrix(disturbed))
    np.testing.assert_allclose(rule.apply(disturbed, single(x)), x @ r.T, 1e-4, 1e-5)
    folded = rule.fold(disturbed, single(kernel))
    np.testing.assert_allclose(folded, r.T @ kernel, 1e-4, 1e-5)
    assert np.abs(r - np.eye(D)).max() > 0.05


def test_polar_of_one_batch_is_the_polar_factor():
    rule, x = decorrelation.Polar(momentum=1.0), single(normal(32, D))
    x = x - x.mean(0)
    u, _, vt = np.linalg.svd(double(x), full_matrices=False)
    for before in (
        rule.init(D, "float32"),
        rule.update(rule.init(D, "float32"), 3 * x),
    ):
        z = rule.apply(rule.update(before, x), x)
        np.testing.assert_allclose(z, 32**0.5 * u @ vt, atol=1e-4)


def test_polar_averages_the_covariance():
    rule, a = decorrelation.Polar(momentum=0.4), np.zeros((D, D))
    state = rule.init(D, "float32")
    for t in range(4):
        x = normal(12, D, seed=t) * 2.0**t
        weight = max(0.4, 1 / (t + 1))  # 1, 1/2, 0.4, 0.4
        a = (1 - weight) * a + weight * x.T @ x / 12
        state = rule.update(state, single(x))
        np.testing.assert_allclose(rule.matrix(state), power(a, -0.5), 1e-3, 1e-4)
        np.testing.assert_allclose(state.root, power(a, 0.5), 1e-3, 1e-4)


@pytest.mark.parametrize("method", [polar.SVD(), polar.Auto()], ids=repr)
def test_polar_does_not_square_the_condition(method):
    """Its error grows with the square root of the condition of the covariance."""
    rule, eps = decorrelation.Polar(method=method), np.finfo(np.float32).eps
    for condition in (1e4, 1e5):
        sigma, *_ = covariance(condition, 32)
        x = single(samples(sigma, 64))
        expected = power(sigma, -0.5)

        def error(r, expected=expected):
            return np.linalg.norm(double(r) - expected, 2) / np.linalg.norm(expected, 2)

        assert error(rule.matrix(trained(rule, x, 1))) < 5 * eps * condition**0.5
    values, vectors = jnp.linalg.eigh(x.T @ x / 64)  # the short way: eps * condition
    short = (vectors / jnp.sqrt(jnp.maximum(values, eps))) @ vectors.T
    assert error(short) > 5 * eps * condition**0.5


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_polar_null_directions_are_zero_and_floor_bounds_the_rest(scale):
    # Five samples in eight features, one feature constant, one a copy of another.
    x = normal(6, D)
    x[:, 3], x[:, 5] = 0, x[:, 1]
    x -= x.mean(0)
    rule = decorrelation.Polar(momentum=1.0, floor=1e-3)
    r = rule.matrix(trained(rule, single(scale * x), 1))
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-6 * s[0]
    expected = (vt[kept].T * (6**0.5 / s[kept])) @ vt[kept]
    np.testing.assert_allclose(double(r) * scale, expected, atol=1e-3)
    # Small directions are amplified as if they were as large as the floor.
    sigma, values, vectors = covariance(1e10)
    r = double(rule.matrix(trained(rule, single(samples(sigma)), 1)))
    seen = np.linalg.norm(r @ vectors, axis=0)
    found = np.where(values**0.5 > 1e-4, seen, 1)
    wanted = np.where(values**0.5 > 1e-4, 1 / np.maximum(values**0.5, 1e-3), 1)
    np.testing.assert_allclose(found, wanted, rtol=2e-2)
    assert np.linalg.norm(r, 2) < 1.02e3


learn_one = jax.jit(
    decorrelation.update_decorrelation, static_argnums=2, static_argnames="momentum"
)


def learnt(state, xs, rule):
    """The state after learning from each of the batches."""
    for x in xs:
        state = learn_one(state, x, rule, momentum=0.25)
    return state


def test_running_mean():
    rule, xs = decorrelation.Scaled(0.01), 3 + normal(5, 6, D)
    state = learnt(decorrelation.init_decorrelation(D, rule), single(xs), rule)
    mean = np.zeros(D)
    for t, x in enumerate(xs):
        mean += max(0.25, 1 / (t + 1)) * (x.mean(0) - mean)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    assert (state.updates, state.skipped) == (5, 0)
    x = single(normal(2, 3, D, seed=9))
    z = decorrelation.apply_decorrelation(state, x, rule)
    r = double(rule.matrix(state.transform))
    np.testing.assert_allclose(z, (x - mean) @ r.T, rtol=1e-4, atol=1e-5)


def bad_batches():
    for value in (np.nan, np.inf):
        x = normal(6, D)
        x[2, 3] = value
        yield x
    yield np.tile([[3e38], [-3e38]], (3, D))  # overflows on the way


@each_rule
def test_batches_that_are_not_finite_are_skipped_and_counted(name):
    rule = RULES[name]
    state = learnt(
        decorrelation.init_decorrelation(D, rule), single(normal(2, 6, D)), rule
    )
    assert state.updates == 2
    after = learnt(state, single(np.stack(list(bad_batches()))), rule)
    assert after.skipped == 3
    jax.tree.map(
        np.testing.assert_array_equal,
        after._replace(skipped=0),
        state._replace(skipped=0),
    )
    again = learnt(after, single(normal(2, 6, D, seed=1)), rule)
    assert again.updates == 4


@pytest.mark.parametrize("shape", [(D,), (1, D), (0, D)])
def test_fewer_than_two_samples_teach_nothing(shape):
    rule = decorrelation.Polar()
    state = decorrelation.init_decorrelation(D, rule)
    after = decorrelation.update_decorrelation(state, single(normal(*shape)), rule)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@each_rule
def test_constant_features_and_few_samples(name):
    # Six samples of eight features, two of them constant, always the same ones.
    rule = RULES[name]
    xs = 0.2 * normal(200, 6, D)
    xs[..., 2], xs[..., 6] = 0, 7
    state = learnt(decorrelation.init_decorrelation(D, rule), single(xs), rule)
    assert (state.updates, state.skipped) == (200, 0)
    z = decorrelation.apply_decorrelation(state, single(xs[0]), rule)
    assert np.isfinite(z).all() and np.abs(z).max() < 100
    if name not in ("factorised", "subspace"):  # those mix features
        assert np.abs(z[:, [2, 6]]).max() < 1e-3
        # Nothing grows where nothing is.
        r = double(rule.matrix(state.transform))
        kept = float(name != "polar")
        np.testing.assert_allclose(np.diag(r)[[2, 6]], kept, atol=1e-6)


def test_drawn_samples_are_unbiased():
    # Sorted samples, of which the first tenth says nothing of the rest.
    rule, n = decorrelation.OffDiagonal(1.0), 200
    x = normal(n, 3) @ np.array([[1.0, 0.7, 0], [0, 1, -0.5], [0, 0, 1]])
    x[: n // 10] *= 5
    x = x - x.mean(0)
    state = decorrelation.init_decorrelation(3, rule)

    @jax.jit
    @jax.vmap
    def update(key):
        return decorrelation.update_decorrelation(
            state, single(x), rule, sample=0.1, key=key
        )

    drawn = update(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(drawn.mean, np.zeros((4000, 3)), atol=1e-6)  # of all
    found = np.eye(3) - double(drawn.transform)
    error = np.abs(found.mean(0) - off(x.T @ x / n))
    standard_error = found.std(0) / 4000**0.5
    assert (error <= 5 * standard_error + 1e-6).all()
    first = x[: n // 10]
    biased = np.abs(off(first.T @ first / len(first)) - off(x.T @ x / n))
    assert biased.max() > 50 * standard_error.max()


def mesh(kind="Auto"):
    kinds = (jax.sharding.AxisType[kind],)
    return jax.make_mesh((8,), ("batch",), axis_types=kinds)


def states():
    """A state of every rule that has learnt a little."""
    x = single(normal(6, D, seed=1))
    return {
        name: learn_one(
            decorrelation.init_decorrelation(D, rule), x, rule, momentum=0.25
        )
        for name, rule in RULES.items()
    }


def learn_all(states, x, **kwargs):
    return {
        name: decorrelation.update_decorrelation(state, x, RULES[name], **kwargs)
        for name, state in states.items()
    }


def all_close(found, expected):
    for name in RULES:
        for x, y in zip(
            jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("rows", [1, 12])  # fewer than features on a device, and more
def test_data_parallel_is_one_device(rows):
    x, before = single(2 + normal(8 * rows, D)), states()
    update = functools.partial(learn_all, axis_name="batch")
    split = jax.jit(
        jax.shard_map(update, mesh=mesh(), in_specs=(P(), P("batch")), out_specs=P())
    )
    all_close(split(before, x), jax.jit(learn_all)(before, x))
    # NaN on one device.
    for state in split(before, x.at[-1, 0].set(jnp.nan)).values():
        assert (state.skipped, state.updates) == (1, 1)


@pytest.mark.parametrize(
    "kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]
)
def test_sharded_batch_under_jit(kind):
    x, before = single(2 + normal(96, D)), states()
    with jax.set_mesh(mesh(kind)):
        split = jax.device_put(x, NamedSharding(mesh(kind), P("batch")))
        found = jax.jit(learn_all)(before, split)
    all_close(found, jax.jit(learn_all)(before, x))


def test_devices_draw_samples_of_their_own():
    rule = decorrelation.Whitening(1.0)
    x = jnp.tile(single(normal(20, D)), (8, 1))  # the same on every device
    state = decorrelation.init_decorrelation(D, rule)

    def update(key, x):
        options = {"axis_name": "batch", "sample": 0.1, "key": key}
        return decorrelation.update_decorrelation(state, x, rule, **options)

    split = jax.shard_map(
        update, mesh=mesh(), in_specs=(P(), P("batch")), out_specs=P()
    )
    r = jax.jit(split)(jax.random.key(0), x).transform
    # Two samples have a covariance of rank two, sixteen of more.
    c = 2 * np.eye(D) - double(r)
    assert np.linalg.matrix_rank(c, tol=1e-3) > 4


def test_low_precision_is_converted_first():
    dtype = "bfloat16"
    rule, x = decorrelation.Polar(), single(normal(16, D)).astype(dtype)
    state = decorrelation.update_decorrelation(
        decorrelation.init_decorrelation(D, rule), x, rule
    )
    exact = decorrelation.update_decorrelation(
        decorrelation.init_decorrelation(D, rule), x.astype("float32"), rule
    )
    assert state.mean.dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, state, exact)
    assert decorrelation.apply_decorrelation(state, x, rule).dtype == dtype


def test_float64_stays(x64):
    sigma, *_ = covariance(1e10)
    rule = decorrelation.Polar(floor=1e-6)
    state = decorrelation.init_decorrelation(D, rule, "float64")
    state = decorrelation.update_decorrelation(state, jnp.asarray(samples(sigma)), rule)
    r = rule.matrix(state.transform)
    assert r.dtype == state.mean.dtype == "float64"
    np.testing.assert_allclose(r @ sigma @ r.T, np.eye(D), atol=1e-6)


def test_running_averages_are_in_float64(x64):
    """A weight of a third, rounded to float32, is off by 1e-8."""
    rule = decorrelation.Polar(momentum=0.01)
    state, batches = (
        decorrelation.init_decorrelation(D, rule, "float64"),
        normal(3, 20, D),
    )
    for x in jnp.asarray(batches):
        state = decorrelation.update_decorrelation(state, x, rule, momentum=0.01)
    means = batches.mean(axis=1)
    assert np.abs(state.mean - means.mean(0)).max() < 1e-14
    centred = batches - means[:, None]
    root = power(np.einsum("tni,tnj->ij", centred, centred) / 60, 0.5)
    assert np.abs(state.transform.root - root).max() < 1e-12


def test_nothing_is_differentiated_through_the_update():
    rule, x = decorrelation.Scaled(0.1), single(normal(6, D))
    state = decorrelation.init_decorrelation(D, rule)

    def f(x, scale):
        new = decorrelation.update_decorrelation(state, scale * x, rule)
        return jnp.sum(new.mean) + jnp.sum(new.transform)

    for gradient in jax.grad(f, argnums=(0, 1))(x, 2.0):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_gradient_of_apply():
    rule, x = decorrelation.Scaled(0.3), normal(6, D)
    state = decorrelation.update_decorrelation(
        decorrelation.init_decorrelation(D, rule), single(x), rule
    )
    weights = normal(6, D, seed=1)

    def f(state, x):
        return jnp.sum(
            single(weights) * decorrelation.apply_decorrelation(state, x, rule)
        )

    of_state, of_x = jax.grad(f, argnums=(0, 1), allow_int=True)(state, single(x))
    r = double(rule.matrix(state.transform))
    np.testing.assert_allclose(of_x, weights @ r, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(of_state.transform, np.zeros((D, D)))


@dataclasses.dataclass(frozen=True)
class Standardised:
    """A rule of a user: unit variances by division."""

    def init(self, features: int, dtype: Any) -> jax.Array:
        return jnp.ones(features, dtype)

    def apply(self, state, x):
        return x * state

    def fold(self, state, kernel):
        return state[:, None] * kernel

    def matrix(self, state):
        return jnp.diag(state)

    def update(self, state, x, *, axis_name=None):
        variance = jnp.mean(x**2, axis=0)
        if axis_name is not None:
            variance = jax.lax.pmean(variance, axis_name)
        return jax.lax.rsqrt(variance)


def test_own_rule():
    rule, x = Standardised(), single(5 * normal(40, D))
    state = decorrelation.update_decorrelation(
        decorrelation.init_decorrelation(D, rule), x, rule
    )
    np.testing.assert_allclose(
        jnp.var(decorrelation.apply_decorrelation(state, x, rule), 0), 1, 1e-5
    )


def test_off_diagonal_correlation():
    x = normal(50, 4) @ normal(4, 4, seed=1) + 10
    expected = np.abs(off(np.corrcoef(x.T))).sum() / 12
    found = diagnostics.off_diagonal_correlation(single(x).reshape(5, 10, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(
        diagnostics.off_diagonal_correlation(single(1e-20 * x)), expected, 1e-3
    )
    constant = np.concatenate([x, np.full((50, 2), 0.1)], axis=1)
    expected = np.abs(off(np.corrcoef(x.T))).sum() / 30
    np.testing.assert_allclose(
        diagnostics.off_diagonal_correlation(single(constant)), expected, 1e-4
    )
    assert np.isnan(
        diagnostics.off_diagonal_correlation(single(x).at[0, 0].set(jnp.nan))
    )


STATE = decorrelation.init_decorrelation(D, decorrelation.Polar())
X = jnp.ones((4, D))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: decorrelation.Scaled(0.0), ValueError, "above zero"),
        (lambda: decorrelation.Scaled(-1.0), ValueError, "negative"),
        (lambda: decorrelation.OffDiagonal(float("nan")), ValueError, "finite"),
        (lambda: decorrelation.Local("fast"), TypeError, "Python number"),
        (lambda: decorrelation.Whitening(jnp.ones(())), TypeError, "static under jit"),
        (lambda: decorrelation.Lateral(True), TypeError, "Python number"),
        (lambda: decorrelation.Blended(0.1, 1.5), ValueError, "at most 1"),
        (lambda: decorrelation.Factorised(0.1, 0.0), ValueError, "above zero"),
        (lambda: decorrelation.Factorised(0.1, 0.5, 1.5), ValueError, "at most 1"),
        (lambda: decorrelation.Factorised(0.1, seed=0.5), TypeError, "an integer"),
        (lambda: decorrelation.Polar(momentum=0.0), ValueError, "above zero"),
        (lambda: decorrelation.Polar(floor=-1e-3), ValueError, "negative"),
        (lambda: decorrelation.Polar(method="svd"), TypeError, "polar method"),
        (
            lambda: decorrelation.init_decorrelation(D, decorrelation.Polar),
            TypeError,
            "a class",
        ),
        (
            lambda: decorrelation.init_decorrelation(D, "polar"),
            TypeError,
            "decorrelation rule",
        ),
        (
            lambda: decorrelation.init_decorrelation(0, decorrelation.Polar()),
            ValueError,
            "1 or more",
        ),
        (lambda: update(X[:, 1:]), ValueError, "8 features"),
        (lambda: update(X.astype(int)), TypeError, "floating"),
        (lambda: update(X, momentum=0), ValueError, "momentum"),
        (lambda: update(X, sample=2.0), ValueError, "sample"),
        (lambda: update(X, sample=0.5), ValueError, "needs a `key`"),
        (lambda: diagnostics.off_diagonal_correlation(X[:, :1]), ValueError, "d > 1"),
        (
            lambda: diagnostics.off_diagonal_correlation(X.astype(int)),
            TypeError,
            "floating",
        ),
    ],
)
def test_bad_arguments_raise(make, error, words):
    with pytest.raises(error, match=words):
        make()


def update(x, **kwargs):
    return decorrelation.update_decorrelation(STATE, x, decorrelation.Polar(), **kwargs)


@pytest.mark.parametrize(
    "name", ["Lateral(0.1)", pytest.param("Polar()", marks=pytest.mark.slow)]
)
def test_several_layers_under_vmap_do_not_deadlock(name):
    program = f"""
import jax
from orthax import decorrelation
rule = decorrelation.{name}
state = decorrelation.init_decorrelation(64, rule)
def of_seed(key):
    def step(states, _):
        x, new = jax.random.normal(key, (64, 64)), []
        for s in states:
            new.append(decorrelation.update_decorrelation(s, x, rule))
            x = decorrelation.apply_decorrelation(s, x, rule)
        return new, None
    return jax.lax.scan(step, [state] * 3, None, length=3)[0]
states = jax.jit(jax.vmap(of_seed))(jax.random.split(jax.random.key(0), 21))
print(states[0].updates[0])
"""
    # With one device: eight of them have threads enough for anything.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert done.stdout.strip() == "3"
