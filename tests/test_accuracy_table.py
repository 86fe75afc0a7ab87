"""The numbers of benchmarks/results/polar.csv, measured again and enforced."""

import functools

import numpy as np
import pytest

from benchmarks import contract, polar as table, tables

FAST = tuple(case for case, made in table.CASES.items() if not made.slow)
SLOW = tuple(case for case, made in table.CASES.items() if made.slow)

# The numerical contract of the default method, on CPU in float32.
CONTRACT = {k: v for k, v in contract.PROMISE.items() if k != "small_min"}
CONTRACT_SMALL_MIN = contract.PROMISE["small_min"]

# Rounding differs from machine to machine, by less than this factor; what is below the
# floor is rounding and nothing else.
MARGIN = 8
FLOOR = 1e-5
# CANS has no margin at its upper end, where a matrix of rank one lies: there its five
# slopes multiply the rounding of the norm by 4e4.
CANS_AT_THE_EDGE = 2e-2
# A single number, whose square is rounded to eight bits once in every step.
HALF_AT_THE_EDGE = 2.0**-7
# The part of an error that a polynomial leaves differs by less than this.
POLYNOMIAL_MARGIN = 1.25
POLYNOMIAL_FROM = 2e-2


def committed():
    rows = tables.read(tables.RESULTS / "polar.csv")
    return {
        (row["method"], row["case"], row["dtype"]): row
        for row in rows
        if row["platform"] == "cpu"
    }


def pairs(cases):
    return [(case, dtype) for case in cases for dtype in table.DTYPES]


@functools.cache
def measured(method, cases):
    found = table.errors(table.METHODS[method], pairs(cases))
    return dict(zip(pairs(cases), found, strict=True))


def floor(method, case):
    edge = case in ("one row", "one column", "rank one")
    if edge and "bfloat16" in method:
        return HALF_AT_THE_EDGE
    return CANS_AT_THE_EDGE if edge and method == "NewtonSchulz(CANS)" else FLOOR


def allowed(name, value, least=FLOOR):
    """Return the largest error that a committed or measured one may stand for."""
    if name in ("kept_error", "relative_error") and value > POLYNOMIAL_FROM:
        return value * POLYNOMIAL_MARGIN
    return max(value * MARGIN, least)


def disagreements(method, cases):
    expected, wrong = committed(), []
    for (case, dtype), row in measured(method, cases).items():
        before = expected[method, case, dtype]
        counts = ("rows", "columns", "kept", "small", "null")
        assert [row[c] for c in counts] == [int(before[c]) for c in counts]
        for name in table.ERRORS:
            assert (row[name] is None) == (before[name] == ""), (case, dtype, name)
            if row[name] is None:
                continue
            new, old = row[name], float(before[name])
            if name in ("small_min", "small_max"):
                agrees = abs(new - old) <= 2e-3 + 0.25 * abs(old)
            elif name == "null_norm" and method == "QDWH()":
                agrees = new <= 1.001  # anything from nothing to one, by its contract
            else:
                least = floor(method, case)
                agrees = new <= allowed(name, old, least)
                agrees &= old <= allowed(name, new, least)
            if not agrees:
                wrong.append(f"{case}, {dtype}: {name} is {new:.3g}, was {old:.3g}")
    return wrong


def check(method, cases):
    wrong = disagreements(method, cases)
    advice = "if the change is meant, run: python -m benchmarks.polar"
    assert not wrong, "\n".join([f"{method} ({advice})", *wrong])


# The tables of other people differ in numbers alone, and those are tested elsewhere.
OTHERS = ("CLASSIC_CUBIC", "CLASSIC_QUINTIC", "DEEPSEEK_V4", "CANS", "DION")
EACH = [
    pytest.param(name, marks=[pytest.mark.slow] * any(x in name for x in OTHERS))
    for name in table.METHODS
]


@pytest.mark.parametrize("method", EACH)
def test_every_method_still_has_the_committed_error(method):
    check(method, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("method", table.METHODS)
def test_every_method_still_has_the_committed_error_on_larger_matrices(method):
    check(method, SLOW)


def test_default_method_keeps_its_contract():
    broken = []
    rows = measured("Auto()", FAST) | measured("Auto()", SLOW)
    for (case, dtype), row in rows.items():
        for name, bound in CONTRACT.items():
            if row[name] is not None and not row[name] <= bound:
                broken.append(f"{case}, {dtype}: {name} {row[name]:.3g} > {bound}")
        low = row["small_min"]
        if low is not None and not low >= CONTRACT_SMALL_MIN:
            broken.append(f"{case}, {dtype}: small_min {low:.3g}")
    assert not broken, "\n".join(broken)


def test_table_holds_every_method_and_matrix_and_nothing_else():
    wanted = {(m, *pair) for m in table.METHODS for pair in pairs(table.CASES)}
    assert set(committed()) == wanted


def test_matrices_exercise_every_number():
    rows = [
        row for (method, *_), row in committed().items() if method == 'Auto("fast")'
    ]
    for name in ("kept", "small", "null"):
        assert any(int(row[name]) for row in rows), name
    assert any(int(row["rows"]) == 1 for row in rows)
    assert any(int(row["columns"]) == 1 for row in rows)
    aspects = {int(row["rows"]) / int(row["columns"]) for row in rows}
    assert {1 / 4, 1, 4, 64} <= aspects


def orthonormal(rng, m, k):
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


@pytest.fixture(name="directions")
def _directions():
    """Return a 12 x 6 matrix with singular values 1, 0.5, 0.1, 1e-4, 0, 0, in parts."""
    rng = np.random.default_rng(0)
    u, v = orthonormal(rng, 12, 8), orthonormal(rng, 6, 6)
    s = np.array([1, 0.5, 0.1, 1e-4, 0, 0])
    return u, v, (u[:, :6] * s) @ v.T


def test_each_deviation_is_found_where_it_belongs(directions):
    u, v, x = directions
    d = np.zeros((8, 6))
    d[range(4), range(4)] = 1, 0.99, 1.02, 0.3
    d[4:6, 4:6] = [[0.03, 0.04], [0.04, -0.03]]  # 0.05 times a reflection
    d[0, 1] = 0.002  # one direction onto another
    row = table.measure(u @ d @ v.T, table.reference(x))
    assert (row["kept"], row["small"], row["null"]) == (3, 1, 2)
    assert row["kept_error"] == pytest.approx(0.02)
    assert row["small_min"] == row["small_max"] == pytest.approx(0.3)
    assert row["coupling"] == pytest.approx(0.002)
    assert row["null_norm"] == pytest.approx(0.05)
    total = 0.01**2 + 0.02**2 + 0.7**2 + 0.002**2
    assert row["relative_error"] == pytest.approx((total / 4) ** 0.5)


@pytest.mark.parametrize(
    "place", [(7, 1), (5, 1), (1, 5)], ids=["complement", "from-null", "to-null"]
)
def test_what_leaves_the_range_counts_as_coupling(directions, place):
    u, v, x = directions
    d = np.eye(8, 6) * (np.arange(6) < 4)
    d[place] = 0.004
    for o, of in ((u @ d @ v.T, x), (v @ d.T @ u.T, x.T)):
        row = table.measure(o, table.reference(of))
        assert row["coupling"] == pytest.approx(0.004)
        assert row["null_norm"] < 1e-14
        assert row["relative_error"] == pytest.approx(0.002)


def test_nan_is_not_lost():
    x = np.random.default_rng(0).standard_normal((6, 4))
    row = table.measure(np.full((6, 4), np.nan), table.reference(x))
    assert np.isnan(row["kept_error"])
    assert np.isnan(row["relative_error"])
    assert not row["kept_error"] <= allowed("kept_error", 1e-6)


@pytest.mark.parametrize("case", ["twin columns", "rank one", "zero"])
@pytest.mark.parametrize("dtype", table.DTYPES)
def test_rank_survives_rounding(case, dtype):
    x = np.asarray(table.stored(case, dtype), np.float64)
    s = np.linalg.svd(x, compute_uv=False)
    rank = {"twin columns": 32, "rank one": 1, "zero": 0}[case]
    assert s[rank:].max() <= 1e-13 * s[0]
