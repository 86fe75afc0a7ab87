"""The CPU default: weighted Halley steps, their inverses, and who gets them."""

import decimal
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import factor, gaussian, to_double, with_spectrum

import orthax
from orthax import components, execution, polar
from orthax.internal.execution import Factors
from orthax.polar._halley import final_polynomial, halley_weights
from orthax.polar._inverse import positive_definite_inverse
from orthax.polar._products import gram

DWH = polar.DWH
# Compiled once for every method and shape, whichever test comes first.
dwh = jax.jit(orthax.polar_factor, static_argnames="method")


def spectra(k):
    """Return the singular values of matrices that are hard to bring to one."""
    return {
        **{f"1e{e}": np.geomspace(1, 10.0**-e, k) for e in range(2, 7)},
        "half rank": np.geomspace(1, 1e-1, k // 2),
        "rank one": np.ones(1),
        "one giant": np.r_[1, np.full(k - 1, 1.1e-3)],
        "one giant, tail below": np.r_[1, np.full(k - 1, 5e-4)],
        "repeated": np.repeat([1, 1e-1, 1e-2], [k - 2 * (k // 3), k // 3, k // 3]),
    }


def hard(name, m, n, **kwargs):
    x = with_spectrum(m, n, spectra(min(m, n))[name], **kwargs)
    return x.astype(np.complex64 if np.iscomplexobj(x) else np.float32)


def per_direction(x, o):
    """Return singular values over the Frobenius norm, and O in the singular basis."""
    u, s, vh = np.linalg.svd(to_double(x), full_matrices=False)
    inside = u.conj().T @ to_double(o) @ vh.conj().T
    assert np.abs(o - u @ inside @ vh).max() < 1e-4
    return s / np.linalg.norm(s), inside


def check_contract(s, inside, kept=1e-4, coupled=1e-3):
    diagonal = np.diag(inside)
    assert np.abs(diagonal[s >= 1e-3] - 1).max() < kept
    assert (diagonal[s < 1e-3].real > -1e-3).all()
    assert (diagonal.real < 1.001).all()
    assert np.abs(inside - np.diag(diagonal)).max() < coupled
    null = inside[s < 1e-7][:, s < 1e-7]
    assert np.linalg.norm(null, 2 if null.size else None) < 1e-2


def test_weights_are_those_of_the_formula_in_fifty_digits():
    number = decimal.Decimal
    with decimal.localcontext(prec=50):
        low = number("0.001")
        for w in halley_weights(3):
            d = (4 * (1 - low**2) / low**4) ** (number(1) / 3)
            under = 8 - 4 * d + 8 * (2 - low**2) / (low**2 * (1 + d).sqrt())
            a = (1 + d).sqrt() + under.sqrt() / 2
            b = (a - 1) ** 2 / 4
            c = a + b - 1
            low = low * (a + b * low**2) / (1 + c * low**2)
            expected = [float(v) for v in (a, b, c, low)]
            assert np.allclose(w[:4], expected, rtol=1e-9, atol=0)


def test_weights_are_optimal_for_their_interval():
    """Both ends of the image are reached twice: nothing brings the lower end higher."""
    low = 1e-3
    for w in halley_weights(2):
        x = np.geomspace(low, 1, 400_001)
        y = x * (w.a + w.b * x**2) / (1 + w.c * x**2)
        assert np.isclose(w.lower, y[0], rtol=1e-12)
        assert np.isclose(y[-1], 1, rtol=1e-12)
        assert y.min() > w.lower * (1 - 1e-9)
        assert y.max() < 1 + 1e-9
        peak = y[:-1000].argmax()
        assert 0 < peak < len(x) - 1001
        assert np.isclose(y[peak], 1, rtol=1e-8)
        assert np.isclose(y[peak:].min(), w.lower, rtol=1e-8)
        low = w.lower


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("polish", [True, False])
def test_both_plans_bring_the_interval_to_one(dtype, polish):
    left = {True: 1e-5 if dtype == "float32" else 1e-12, False: 4e-2}[polish]
    for plan in DWH(polish=polish)._plans(dtype):
        x = np.geomspace(1e-3, 1, 100_001)
        for w in plan:
            x = x * (w.a + w.b * x**2) / (1 + w.c * x**2)
            assert np.isclose(x.min(), w.lower, rtol=1e-9)
        if polish:
            row = final_polynomial(plan[-1].lower)
            x = sum(a * x ** (2 * k + 1) for k, a in enumerate(row))
        assert np.abs(x - 1).max() < left


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("long", [9, 128, 129, 500, 1009])
def test_gram_matrix_in_parts_is_the_gram_matrix(long, dtype):
    """Also where parts do not divide the long side, as they do not a prime."""
    x = np.stack([gaussian(long, 7, seed=i, complex_="c" in dtype) for i in range(3)])
    x = x.astype(dtype)
    expected = to_double(x).mT.conj() @ to_double(x)
    for found in (gram(x, rows=128), gram(x.mT, rows=128).mT):
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(64, 16), (96, 96), (200, 97), (200, 200)], ids=str)
@pytest.mark.parametrize("name", [*spectra(9)])
def test_contract_on_hard_matrices(shape, name):
    x = hard(name, *shape)
    check_contract(*per_direction(x, dwh(x, DWH())))


@pytest.mark.parametrize("name", ["rank one", "one giant", "1e6"])
def test_contract_on_a_long_side_of_2048_and_on_complex_matrices(name):
    for x in (hard(name, 128, 2048), hard(name, 130, 110, complex_=True)):
        check_contract(*per_direction(x, dwh(x, DWH())))


@pytest.mark.slow
def test_contract_on_a_short_side_of_2048():
    """A cosine transform for singular vectors: no decomposition of this size.

    All entries of the largest direction are equal in magnitude, so that rounding errors
    add up: coupling of 4e-5, random vectors 1e-6.
    """
    n = 2048
    rows, columns = np.ogrid[:n, :n]
    q = np.cos(np.pi * (2 * rows + 1) * columns / (2 * n)) * np.sqrt(2 / n)
    q[:, 0] /= np.sqrt(2)
    u = np.random.default_rng(0).choice([-1, 1], (n, 1)) * q
    s = np.r_[1, np.full(n - 1, 1.1e-3)]
    o = np.asarray(dwh(((u * s) @ q.T).astype(np.float32), DWH()), float)
    check_contract(s / np.linalg.norm(s), u.T @ o @ q, coupled=3.3e-4)


@pytest.mark.parametrize("shape", [(64, 16), (200, 97)], ids=str)
def test_fast_tier_on_hard_matrices(shape):
    for name in spectra(9):
        x = hard(name, *shape)
        s, inside = per_direction(x, dwh(x, polar.Auto("fast")))
        assert np.abs(np.diag(inside)[s >= 1e-3] - 1).max() < 0.15
        assert np.linalg.norm(inside, 2) < 1.15


def test_float64_is_accurate_to_1e_10(x64):
    f = jax.jit(DWH().factor)
    for complex_ in (False, True):
        for name in ("1e3", "1e6", "rank one", "one giant"):
            x = with_spectrum(130, 110, spectra(110)[name], complex_=complex_)
            check_contract(*per_direction(x, f(x[None])[0]), kept=1e-10, coupled=1e-10)
        x = gaussian(24, 12, complex_=complex_)
        assert np.abs(f(x[None])[0] - factor(x)).max() < 1e-10


@pytest.mark.parametrize("shape", [(64, 16), (100, 200), (1024, 256)], ids=str)
def test_gaussian_matrices_are_not_restarted(shape):
    """To the bit what comes out without the branch."""
    x = gaussian(*shape).astype(np.float32)
    out, without = (np.asarray(dwh(x, m)) for m in (DWH(), DWH(restart=False)))
    assert (out == without).all()


@pytest.mark.parametrize("name", ["1e3", "1e5", "one giant"])
@pytest.mark.parametrize("shape", [(64, 16), (96, 96)], ids=str)
def test_hard_matrices_are_restarted(name, shape):
    """Without, directions couple by more than the contract allows."""
    x = hard(name, *shape)
    found = [per_direction(x, dwh(x, m))[1] for m in (DWH(), DWH(restart=False))]
    coupling, without = (np.abs(o - np.diag(np.diag(o))).max() for o in found)
    assert coupling < 3e-4
    assert without > max(1e-3, 5 * coupling)


@pytest.mark.parametrize("shape", [(40, 20), (110, 200)], ids=str)
def test_each_matrix_of_a_mixed_stack_as_if_alone(shape):
    easy, tough = gaussian(*shape), hard("one giant", *shape)
    x = np.stack([easy, tough, easy, easy, 0 * easy, easy[::-1]]).astype(np.float32)
    x[2, 3, 4], x[3, 5, 6] = np.nan, np.inf
    out = np.asarray(dwh(x, DWH()))
    assert np.isnan(out[2:4]).all()
    assert (out[4] == 0).all()
    for i in (0, 1, 5):
        # The easy ones are restarted because of the tough one: two polynomials, one to
        # within 4e-6 and one 7e-6. Rounding of A times c / 2 is 610 eps = 7e-5.
        assert np.abs(out[i] - np.asarray(dwh(x[i], DWH()))).max() < 8e-5
        assert np.abs(out[i] - factor(x[i])).max() < 1e-4
    # What is not finite, or zero, asks for no restart.
    rest = [0, 2, 3, 4, 5]
    unbranched = np.asarray(dwh(x[rest], DWH(restart=False)))
    assert np.array_equal(np.asarray(dwh(x[rest], DWH())), unbranched, equal_nan=True)


def test_scale_does_not_matter_to_hard_matrices():
    for name in ("one giant", "1e4"):
        x = hard(name, 200, 97)
        x /= np.abs(x).max()
        for scale in (1e-30, 1e37):
            check_contract(*per_direction(x, dwh(x * np.float32(scale), DWH())))


def inverted_by_a_step(m, values, dtype):
    """Return three matrices I + c R, and c."""
    c = next(iter(halley_weights(1))).c
    x = [with_spectrum(m, m, values, seed=i, complex_="c" in dtype) for i in range(3)]
    x = np.stack(x) / np.linalg.norm(values)
    return (np.eye(m) + c * (x @ x.mT.conj())).astype(dtype), c


@pytest.mark.parametrize(
    ("m", "dtype"),
    [(m, "float32") for m in (1, 2, 95, 96, 97, 192, 193, 300, 512)]
    + [(m, t) for m in (2, 97) for t in ("float64", "complex64", "complex128")]
    + [
        pytest.param(193, t, marks=pytest.mark.slow)
        for t in ("float64", "complex64", "complex128")
    ],
)
def test_inverse_against_numpy(m, dtype, x64):
    invert = jax.jit(positive_definite_inverse)
    for values in (np.ones(1), np.geomspace(1, 0.1, -(-m // 2))):
        x, c = inverted_by_a_step(m, values, dtype)
        out = invert(x)
        assert out.dtype == x.dtype
        error = np.linalg.norm(out - np.linalg.inv(to_double(x)), axis=(1, 2)).max()
        # eps times the condition, which is at most c, up to a small factor.
        assert error < 3 * np.finfo(dtype).eps * c


def test_vmap_jit_and_scan_give_what_a_stack_gives():
    x = np.stack([hard(name, 105, 100) for name in ("1e3", "1e6", "one giant", "1e2")])
    f = lambda x: orthax.polar_factor(x, DWH())  # noqa: E731

    @jax.jit
    def in_many_ways(x):
        return {
            "stack": f(x),
            "vmap of vmap": jax.vmap(jax.vmap(f))(x.reshape(2, 2, 105, 100)),
            "vmap of stacks": jax.vmap(f)(x.reshape(2, 2, 105, 100)),
            "last axis": jax.vmap(f, -1, -1)(jnp.moveaxis(x, 0, -1)).transpose(2, 0, 1),
            "scan": jax.lax.scan(lambda _, y: (None, f(y)), None, x)[1],
        }

    one_by_one = np.stack([np.asarray(dwh(y, DWH())) for y in x])
    for name, out in in_many_ways(x).items():
        assert np.abs(out.reshape(x.shape) - one_by_one).max() < 5e-4, name


def test_inside_shard_map_with_the_check_of_varying_axes():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    x = np.stack([gaussian(105, 100, seed=i) for i in range(8)]).astype(np.float32)
    x[3] = hard("one giant", 105, 100)
    f = lambda x: orthax.polar_factor(x, DWH())  # noqa: E731
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    expected = np.stack([factor(y) for y in x])
    assert np.abs(jax.jit(mapped)(x) - expected).max() < 1e-3


def test_derivative_on_many_stacks_is_that_of_every_stack(x64):
    """Joined and padded with others, and beside what is of rank one, zero and NaN."""
    xs = [gaussian(2 * 6, 4).reshape(2, 6, 4), gaussian(4, 7), gaussian(5, 4, seed=1)]
    xs += [with_spectrum(6, 4, [1.0]), np.zeros((4, 6)), np.full((6, 4), np.nan)]
    weights = [gaussian(x.size, 1, seed=9).reshape(x.shape) for x in xs]

    def weighted(outs):
        return [jnp.vdot(w, out) for w, out in zip(weights, outs, strict=True)]

    def together(xs):
        rule = components.ByPath([("", components.Matricisation((-2,), (-1,)))])
        return weighted(execution.map_matrices(Factors(DWH()), xs, rule))

    def apart(xs):
        return weighted([orthax.polar_factor(x, polar.SVD()) for x in xs])

    xs, weights = jax.tree.map(jnp.asarray, (xs, weights))
    _, tangents = jax.jit(lambda: jax.jvp(together, (xs,), (weights,)))()
    assert np.isnan(tangents[-1])
    xs[-1] = jnp.ones((6, 4))
    ours, expected = (
        jax.jit(jax.grad(lambda xs, f=f: sum(f(xs))))(xs) for f in (together, apart)
    )
    for grad, exact, w, tangent in zip(ours, expected, weights, tangents, strict=True):
        assert np.isfinite(grad).all()
        assert np.abs(grad - exact).max() < 1e-9 * max(1, np.abs(exact).max())
        assert np.isnan(tangent) or np.isclose(tangent, np.vdot(exact, w))


def test_six_shapes_in_one_program_do_not_deadlock():
    """Stacks of four, inverted in one block and in two, plain and under vmap."""
    script = """
        import jax, jax.numpy as jnp
        from orthax import polar
        xs = [jax.random.normal(jax.random.key(i), (4, 150 + 9 * i, 80 + 9 * i))
              for i in range(6)]
        plain = lambda xs: [polar.polar_factor(x, polar.DWH()) for x in xs]
        for f in (plain, jax.vmap(plain)):
            f = jax.jit(f)
            for _ in range(9):
                assert all(jnp.isfinite(o).all() for o in f(xs))
        print("finished")
    """
    call = [sys.executable, "-c", textwrap.dedent(script)]
    # With one device: eight of them have threads enough for anything.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    assert subprocess.check_output(call, env=env, timeout=120) == b"finished\n"


def test_auto_uses_it_on_cpu_alone():
    assert polar.Auto().on("cpu") == DWH()
    assert polar.Auto("fast").on("cpu") == DWH(restart=False, polish=False)
    for accuracy, dtype in (("exact", None), ("fast", "bfloat16")):
        platforms = ("gpu", "cuda", "rocm", "tpu", "abacus")
        (method,) = {polar.Auto(accuracy).on(p) for p in platforms}
        assert isinstance(method, polar.NewtonSchulz)
        assert method.dtype == dtype
