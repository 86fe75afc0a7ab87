"""Weights on a sphere, decay that agrees with the update, and masks of decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthax
from orthax import components, transforms

STACKED = components.ByName(stacked=("experts",))


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def double_norm(x, axis=None):
    return np.linalg.norm(np.asarray(x, np.float64), axis=axis)


def stepping(tx):
    @jax.jit
    def step(params, updates):
        changed, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, changed)

    return step


# Of the entries that are rounded once a step: independent, 2^-24 at most.
@pytest.mark.parametrize("shape", [(64, 32), (3, 3, 8, 16), (3, 3), (200, 2)])
def test_norms_stay_for_a_thousand_steps(shape):
    step, params = stepping(transforms.on_sphere()), {"conv": {"kernel": normal(shape)}}
    before, size = double_norm(params["conv"]["kernel"]), np.prod(shape)
    bound = max(1e-6, 3 * 2**-24 * 1000**0.5 / size**0.5 * 3)
    for seed in range(1000):
        updates = {"conv": {"kernel": 0.05 * normal(shape, seed)}}
        params = step(params, updates)
    assert abs(double_norm(params["conv"]["kernel"]) / before - 1) < bound


def test_bfloat16_weights_drift_as_the_docstring_says():
    step, params = stepping(transforms.on_sphere()), {"kernel": normal((64, 32))}
    params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    before = double_norm(params["kernel"])
    for seed in range(200):
        params = step(params, {"kernel": 0.05 * normal((64, 32), seed)})
    drift = abs(double_norm(params["kernel"]) / before - 1)
    assert 1e-6 < drift < 1e-2


def test_every_expert_has_a_sphere_of_its_own():
    weights, updates = normal((4, 6, 5)), normal((4, 6, 5), 1)
    weights = weights.at[1].set(0)  # not yet initialised
    updates = updates.at[2].set(-weights[2])  # would vanish
    updates = updates.at[3, 0, 0].set(jnp.nan)
    params = {"experts": {"kernel": weights}}
    updates = {"experts": {"kernel": updates}}
    tx = transforms.on_sphere(rule=STACKED)
    out = stepping(tx)(params, updates)["experts"]["kernel"]
    w, u = weights[0], updates["experts"]["kernel"][0]
    expected = (w + u) * double_norm(w) / double_norm(w + u)
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[1], updates["experts"]["kernel"][1])
    np.testing.assert_array_equal(out[2], weights[2])
    assert np.isnan(out[3]).all()

    scaled, _ = transforms.scale_to_weights(rule=STACKED).update(
        updates, optax.EmptyState(), params
    )
    scaled, u = scaled["experts"]["kernel"], updates["experts"]["kernel"]
    for i in (0, 2):
        assert double_norm(scaled[i]) == pytest.approx(double_norm(weights[i]), 1e-5)
    np.testing.assert_array_equal(scaled[1], u[1])
    assert np.isnan(scaled[3]).all()


def test_an_update_that_nearly_cancels_its_weight():
    weight = normal((8, 4))
    params, other = {"kernel": weight}, normal((8, 4), 1)
    for size in (1e-1, 1e-3, 1e-5):
        out = stepping(transforms.on_sphere())(
            params, {"kernel": -weight + size * other}
        )["kernel"]
        assert double_norm(out) == pytest.approx(double_norm(weight), 1e-6)
        # Of W + U, whose entries are rounded to 2^-24 of those of W.
        direction = other * double_norm(weight) / double_norm(other)
        assert np.abs(out - direction).max() < 3 * 2**-24 / size * 10


def test_what_is_not_a_matrix_is_not_on_a_sphere_and_zero_stays_zero():
    params = {"kernel": normal((4, 3)), "bias": normal((3,))}
    updates = {"kernel": jnp.zeros((4, 3)), "bias": jnp.ones(3)}
    for tx in (transforms.on_sphere(), transforms.scale_to_weights()):
        out, _ = tx.update(updates, tx.init(params), params)
        np.testing.assert_array_equal(out["kernel"], 0)
        np.testing.assert_array_equal(out["bias"], 1)
        with pytest.raises(ValueError, match="params"):
            tx.update(updates, tx.init(params))


def test_muon_on_a_sphere_turns_weights_by_the_learning_rate():
    params = {"up": {"kernel": normal((16, 8))}, "bias": jnp.zeros(8)}
    tx = optax.chain(
        orthax.muon(0.1, scale=transforms.scale_to_weights()), transforms.on_sphere()
    )
    grads = {"up": {"kernel": normal((16, 8), 1)}, "bias": jnp.ones(8)}
    updates, _ = tx.update(grads, tx.init(params), params)
    out = optax.apply_updates(params, updates)["up"]["kernel"]
    w = np.asarray(params["up"]["kernel"], np.float64)
    u, _, vh = np.linalg.svd(np.asarray(grads["up"]["kernel"], np.float64), False)
    o = u @ vh * np.linalg.norm(w) / 8**0.5
    expected = (w - 0.1 * o) * np.linalg.norm(w) / np.linalg.norm(w - 0.1 * o)
    assert np.abs(out - expected).max() < 0.05 * np.abs(0.1 * o).max()
    assert double_norm(out) == pytest.approx(np.linalg.norm(w), 1e-6)


# --- decay ----------------------------------------------------------------------------


def test_cautious_decay_follows_a_schedule_and_a_mask():
    params = {"a": jnp.array([2.0, -2.0]), "b": jnp.array([2.0, 2.0])}
    updates = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([1.0, 0.0])}
    decay = optax.linear_schedule(0.5, 0.0, 2)
    tx = transforms.add_cautious_decay(decay, {"a": True, "b": False})
    state = tx.init(params)
    for rate in (0.5, 0.25, 0.0):
        out, state = tx.update(updates, state, params)
        assert out["a"].tolist() == [1 + 2 * rate, 1.0]
        assert out["b"].tolist() == [1.0, 0.0]


def test_after_a_descent_step_no_entry_has_grown_by_decay():
    params, grads = {"kernel": normal((8, 4))}, {"kernel": normal((8, 4), 1)}
    # Small enough for no entry to change its sign.
    grads = jax.tree.map(lambda g, p: g * jnp.minimum(1, jnp.abs(p)), grads, params)

    def stepped(*decay):
        tx = optax.chain(*decay, optax.scale_by_learning_rate(0.1))
        updates, _ = tx.update(grads, tx.init(params), params)
        return np.abs(optax.apply_updates(params, updates)["kernel"])

    plain, decayed = stepped(), stepped(transforms.add_cautious_decay(0.1))
    assert (decayed <= plain).all() and (decayed < plain).any()


def test_learning_rates_and_methods_are_no_decay():
    with pytest.raises(TypeError, match="weight_decay"):
        transforms.add_cautious_decay("0.1")


MASKS = {
    "tree": {"a": {"kernel": True, "bias": True}, "b": {"kernel": False}},
    "prefix": {"a": True, "b": False},
    "function": lambda params: {"a": True, "b": False},
}


@pytest.mark.parametrize("make", [orthax.muon, orthax.normuon])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_says_which_matrices_decay(make, mask):
    params = {
        "a": {"kernel": normal((5, 4)), "bias": jnp.ones(4)},
        "b": {"kernel": normal((4, 3))},
    }
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(**options):
        tx = make(0.1, **options)
        return tx.update(grads, tx.init(params), params)[0]

    plain = updates()
    decay = optax.constant_schedule(0.5)
    masked = updates(weight_decay=decay, weight_decay_mask=MASKS[mask])
    expected = plain["a"]["kernel"] - 0.1 * 0.5 * params["a"]["kernel"]
    np.testing.assert_allclose(masked["a"]["kernel"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(masked["b"]["kernel"], plain["b"]["kernel"])
    np.testing.assert_array_equal(masked["a"]["bias"], plain["a"]["bias"])


# --- rows, columns, or the short ones -------------------------------------------------


def test_the_short_vectors_of_a_polar_factor_are_those_that_differ():
    tall = orthax.polar_factor(normal((12, 4)))
    for x, side in ((tall, 1), (tall.T, 0)):
        tx = orthax.normalise_components(axis="short")
        out = tx.update({"kernel": x}, tx.init({"kernel": x}))[0]["kernel"]
        np.testing.assert_allclose(double_norm(out, side), 1, rtol=1e-6)
        assert np.ptp(double_norm(x, side)) > 0.1
        np.testing.assert_allclose(double_norm(x, 1 - side), 1, rtol=1e-4)


def test_several_matrices_in_one_kernel_have_rows_of_their_own():
    cut = components.Matricisation((0,), (1,), blocks=2)
    rule = components.ByPath([("kernel", cut)])
    x = normal((6, 4))
    tx = transforms.scale_by_component_rms(0.0, 0.0, axis="rows", rule=rule)
    state = tx.init({"kernel": x})
    out, state = tx.update({"kernel": x}, state)
    for half, done in zip(
        np.split(x, 2, axis=1), np.split(out["kernel"], 2, axis=1), strict=True
    ):
        lengths = double_norm(half, 1)
        expected = half / lengths[:, None] * double_norm(half) / 6**0.5
        np.testing.assert_allclose(done, expected, rtol=1e-5)
    assert state.nu["kernel"].shape == (12,)


def test_an_unknown_axis_is_refused():
    for make in (orthax.normalise_components, transforms.scale_by_component_rms):
        with pytest.raises(ValueError, match="'columns', 'rows', 'short'"):
            make(axis="long")
