"""The numbers of benchmarks/results/polar.csv, measured again and enforced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import polar as table, step, tables, trees

FAST = tuple(case for case, made in table.CASES.items() if not made.slow)
SLOW = tuple(case for case, made in table.CASES.items() if made.slow)

# DESIGN: the numerical contract of the default method, on CPU in float32.
CONTRACT = {
    "kept_error": 1e-4,
    "small_max": 1.001,
    "coupling": 1e-3,
    "null_norm": 1e-2,
}
CONTRACT_SMALL_MIN = -1e-3

# Rounding differs from machine to machine, by less than this factor; what is below the
# floor is rounding and nothing else.
MARGIN = 8
FLOOR = 1e-5
# CANS has no margin at its upper end, where a matrix of rank one lies: there its five
# slopes multiply the rounding of the norm by 4e4.
CANS_AT_THE_EDGE = 2e-2
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


@pytest.mark.parametrize("method", table.METHODS)
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


def test_readme_shows_what_the_results_hold():
    text = tables.README.read_text()
    for name, module in (("polar", table), ("step", step)):
        rows = tables.read(tables.RESULTS / f"{name}.csv")
        assert rows, name
        shown = tables.put(tables.by_device(rows, module.markdown), name, text)
        assert shown == text, f"run: python -m benchmarks.{name}"


def tiny():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, "float32")

    return {
        "conv": {"kernel": leaf(3, 3, 2, 4), "bias": leaf(4)},
        "square": {"kernel": leaf(6, 6)},
        "head": {"kernel": leaf(4, 10), "bias": leaf(10)},
    }


@pytest.fixture(name="tiny_run")
def _tiny_run(tmp_path, monkeypatch):
    """Return a function that runs the script on a tiny tree, and its two files."""
    monkeypatch.setitem(trees.TREES, "tiny", tiny)
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- step: begin -->\nold\n<!-- step: end -->\nbelow\n")

    def run(*options):
        paths = ["--results", str(tmp_path), "--readme", str(readme)]
        step.main(["--trees", "tiny", "--rounds", "3", *paths, *options])
        return tables.read(tmp_path / "step.csv"), readme.read_text()

    return run


def test_step_times_every_method_and_fills_every_column(tiny_run):
    rows, readme = tiny_run()
    assert [row["method"] for row in rows] == list(step.ENTRIES)
    for row in rows:
        assert all(row.values()), row
        assert row["calls"] == "3"
        assert float(row["quartile1_ms"]) <= float(row["median_ms"])
        assert float(row["median_ms"]) <= float(row["quartile3_ms"])
    by_name = {row["method"]: row for row in rows}
    assert float(by_name[step.OPTAX]["speed_over_optax"]) == 1
    assert float(by_name[step.PER_LEAF]["speed_over_svd"]) == 1
    errors = {name: float(row["worst_error"]) for name, row in by_name.items()}
    assert errors["identity"] > 1
    assert errors["orthogonalise()"] < 1e-4
    assert errors["nesterov_ema(), orthogonalise()"] < 1e-4
    assert errors[step.PER_LEAF] < 1e-5
    assert 0.05 < errors[step.OPTAX] < 0.5
    # 18 x 4 and 10 x 4, once each, and 6 x 6: five steps of 4 k^2 l + 2 k^3.
    flops = 5 * sum(4 * k * k * n + 2 * k**3 for k, n in ((4, 18), (6, 6), (4, 10)))
    assert float(by_name[step.OPTAX]["gflop"]) == pytest.approx(flops / 1e9, rel=1e-3)
    assert readme.startswith("above\n")
    assert readme.endswith("below\n")
    assert "old" not in readme
    assert all(f"`{name}`" in readme for name in step.ENTRIES)


def test_step_replaces_its_own_rows_only(tiny_run):
    before, _ = tiny_run("--methods", "identity", "orthogonalise()")
    after, _ = tiny_run("--methods", "orthogonalise()", "--rounds", "4")
    assert [row["method"] for row in after] == ["identity", "orthogonalise()"]
    assert after[0] == before[0]
    assert after[1]["calls"] == "4"


@pytest.mark.parametrize(
    "name, parameters, kernels",
    [("resnet18", 11_689_512, 21), ("resnet20", 269_722, 20)],
)
def test_trees_have_the_published_number_of_parameters(name, parameters, kernels):
    leaves = jax.tree.leaves(trees.TREES[name]())
    assert sum(leaf.size for leaf in leaves) == parameters
    assert sum(leaf.ndim > 1 for leaf in leaves) == kernels


def test_gradients_are_seeded_and_keep_the_tree():
    tree = tiny()
    one, again, other = (trees.gaussian(tree, seed) for seed in (0, 0, 1))
    assert jax.tree.structure(one) == jax.tree.structure(tree)
    kernel = one["conv"]["kernel"]
    assert kernel.shape == (3, 3, 2, 4)
    assert kernel.dtype == jnp.float32
    assert (kernel == again["conv"]["kernel"]).all()
    assert (kernel != other["conv"]["kernel"]).any()
