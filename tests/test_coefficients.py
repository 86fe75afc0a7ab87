"""Every coefficient table against its formula or its published values."""

import inspect
import math

import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from orthax import polar
from orthax.polar._coefficients import minimax


def compose(table, x):
    for row in table:
        x = sum(c * x ** (2 * k + 1) for k, c in enumerate(row))
    return x


def band(table, lower):
    values = compose(table, np.geomspace(lower, 1, 100_001))
    return values.min(), values.max()


# Amsel et al. 2025, the list printed in the paper's implementation: l = 1e-3, before
# the division by powers of 1.01.
PUBLISHED = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def test_generator_reproduces_the_published_polar_express():
    table = polar.polar_express(1e-3, 8, safety=0, cushion=0.02407327424182761)
    assert_allclose(table[:6], PUBLISHED[:6], rtol=1e-12)
    assert_allclose(table, PUBLISHED, rtol=1e-8)


def test_safety_divides_by_its_powers_on_all_but_the_last():
    plain = np.array(polar.polar_express(1e-3, 1, safety=0))
    assert_allclose(polar.polar_express(1e-3, 1, safety=0.01), plain)
    first = np.array(polar.polar_express(1e-3, 2, safety=0.01)[0])
    assert_allclose(first, plain[0] / 1.01 ** np.array([1, 3, 5]))


@pytest.mark.parametrize("lower", [0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_default_length_brings_the_interval_to_one_and_no_shorter_one_does(lower):
    table = polar.polar_express(lower)
    assert_allclose(band(table, lower), 1, atol=2e-7)
    if len(table) > 1:
        shorter = polar.polar_express(lower, len(table) - 1)
        assert np.abs(np.subtract(band(shorter, lower), 1)).max() > 1e-7


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_each_row_equioscillates(steps):
    """Four points of equal, alternating error: the mark of the best approximation."""
    low, high = 1e-2, 1.0
    for row in polar.polar_express(low, steps, safety=0, cushion=0):
        x = np.linspace(low, high, 400_001)
        error = 1 - compose([row], x)
        bound = np.abs(error).max()
        touching = error[np.abs(error) > bound * (1 - 1e-7)]
        assert (np.diff(np.sign(touching)) != 0).sum() == 3
        low = compose([row], low)
        high = 2 - low


@pytest.mark.parametrize("length", [3, 4, 5, 6])
@pytest.mark.parametrize("low", [1e-2, 0.5, 0.81, 0.99])
def test_minimax_polynomials_of_any_degree_equioscillate(low, length):
    row = minimax(low, 1.0, length)
    x = np.linspace(low, 1, 400_001)
    error = 1 - compose([row], x)
    bound = np.abs(error).max()
    if bound > 1e-9:  # below, rounding of the coefficients decides
        touching = error[np.abs(error) > bound * (1 - 1e-4)]
        assert (np.diff(np.sign(touching)) != 0).sum() == length
    assert bound < (1 - low) ** length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": 0.0}, "0 < lower < 1"),
        ({"lower": 1.5}, "0 < lower < 1"),
        ({"steps": 0}, "positive integer"),
        ({"steps": 2.5}, "positive integer"),
        ({"safety": -0.1}, "safety >= 0"),
        ({"cushion": 1.0}, "cushion < 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        polar.polar_express(**arguments)


def test_jordan_is_optaxs_default():
    default = inspect.signature(optax.contrib.muon).parameters["ns_coeffs"].default
    assert len(polar.JORDAN) == 5
    assert set(polar.JORDAN) == {tuple(default)}


def test_dion_is_optaxs_preset():
    params = {"w": np.zeros((4, 4), np.float32)}
    state = optax.contrib.muon(0.1, ns_coeffs="dion").init(params)
    inner = state.inner_states["muon"].inner_state[0]
    assert_allclose(np.asarray(inner.ns_coeffs), polar.DION, rtol=1e-6)


def test_cans_is_the_minimax_composition_to_its_printed_digits():
    table = polar.polar_express(1e-3, 5, safety=0, cushion=0)
    assert_allclose(polar.CANS[0], table[0], atol=5e-5)
    # Later rows were fitted to rounded intervals.
    assert_allclose(polar.CANS, table, rtol=0.02)
    # The band that the authors' coefficients reach, and their slope at zero.
    assert_allclose(band(polar.CANS, 1e-3), (0.884, 1.120), atol=1e-3)
    assert_allclose(np.prod([row[0] for row in polar.CANS]), 1049, atol=1)


def test_published_bands():
    """Ranges that the authors of the tables state, or that follow from them."""
    assert_allclose(band(polar.JORDAN, 1e-2), (0.682, 1.134), atol=1e-3)
    assert_allclose(band(polar.DION, 1e-2), (0.978, 1.032), atol=1e-3)
    assert_allclose(band(polar.DEEPSEEK_V4, 1e-3), (1.0, 1.0006), atol=1e-4)
    assert_allclose(polar.DEEPSEEK_V4[:8], polar.JORDAN[:1] * 8)
    assert_allclose(polar.DEEPSEEK_V4[8:], [(2.0, -1.5, 0.5)] * 2)


@pytest.mark.parametrize("table", [polar.CLASSIC_CUBIC, polar.CLASSIC_QUINTIC])
def test_classic_is_the_taylor_polynomial(table):
    """x (1 - (1 - x^2))^(-1/2), the binomial series cut behind its second term."""
    terms = len(table[0])
    x = np.linspace(0, 1, 11)
    series = sum(math.comb(2 * k, k) / 4**k * (1 - x**2) ** k for k in range(terms))
    assert_allclose(compose(table[:1], x), x * series, rtol=1e-13)
    assert len(set(table)) == 1
    assert_allclose(band(table, 1e-3), 1, atol=1e-6)
