"""The benchmarks on tiny inputs: what they report, what they skip, what they lack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthax
from benchmarks import (
    errors,
    gemm,
    peers,
    plots,
    polar as benchmarks_polar,
    report,
    speed,
    step,
    summary,
    tables,
    timing,
    training,
    trees,
    updates,
)
from orthax import components, polar

RULE = components.ByName(stacked=("experts",))
SECTIONS = ("summary", "plots", "training", "step", "sharded", "speed", "tasks")
SECTIONS += ("polar", "contract", "compiled", "models")


def tiny():
    """Return a tall, a wide and a square matrix, a stack and vectors."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, "float32")

    params = {
        "conv": {"kernel": leaf(3, 3, 2, 4), "bias": leaf(4)},
        "experts": {"kernel": leaf(3, 8, 4)},
        "head": {"kernel": leaf(4, 10), "bias": leaf(10)},
        "square": {"kernel": leaf(6, 6)},
    }
    return trees.Network(params, RULE)


@pytest.fixture(name="network", autouse=True)
def _network(monkeypatch):
    monkeypatch.setitem(trees.NETWORKS, "tiny", tiny)
    monkeypatch.setattr(updates, "_PAUSE", 0.0)
    monkeypatch.setattr(gemm, "peak", lambda products: 1e9)
    return tiny()


def page(folder):
    """Return a page with all markers and nothing between them."""
    path = folder / "page.md"
    marks = [f"<!-- {name}: begin -->\n<!-- {name}: end -->" for name in SECTIONS]
    path.write_text("\n".join(["above", *marks, "below\n"]))
    return path


def run_step(folder, *options):
    paths = ["--results", str(folder), "--readme", str(folder / "page.md")]
    kinds = [] if "--gradients" in options else ["--gradients", "gaussian"]
    step.main(["--trees", "tiny", "--rounds", "3", *kinds, *paths, *options])
    return tables.read(folder / "step.csv")


FEW = ("--methods", "identity", updates.OURS)

# ------------------------------------------------------------------ one whole update


@pytest.fixture(name="all_methods", scope="module")
def _all_methods(tmp_path_factory):
    """Return the folder of one run of everything but torch."""
    folder = tmp_path_factory.mktemp("step")
    page(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trees.NETWORKS, "tiny", tiny)
        patch.setattr(updates, "_PAUSE", 0.0)
        patch.setattr(gemm, "peak", lambda products: 1e9)
        run_step(folder, "--methods", *updates.ENTRIES)
    return folder


def test_step_times_every_method_and_fills_every_column(all_methods):
    rows = tables.read(all_methods / "step.csv")
    assert [row["method"] for row in rows] == list(updates.ENTRIES)
    for row in rows:
        empty = {name for name, value in row.items() if value == ""}
        assert empty <= {"note", "torch", "commit"}, row["method"]
        assert row["calls"] == "3"
        assert float(row["quartile1_ms"]) <= float(row["median_ms"])
        assert float(row["median_ms"]) <= float(row["quartile3_ms"])
        assert row["checked"] == "6 of 6"
        assert row["gradients"] == "gaussian"
        assert row["products"] == "float32"
    by_name = {row["method"]: row for row in rows}
    assert float(by_name[peers.OPTAX]["speed_over_optax"]) == 1
    assert float(by_name[peers.OPTAX]["compile_over_optax"]) == 1
    assert float(by_name[peers.SVD_PER_LEAF]["speed_over_svd"]) == 1
    text = (all_methods / "page.md").read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert all(f"`{name}`" in text for name in updates.ENTRIES)


def test_step_reports_the_error_of_every_method(all_methods):
    rows = {row["method"]: row for row in tables.read(all_methods / "step.csv")}
    exact = set(rows) - {"identity", updates.FAST, peers.OPTAX, peers.OPTAX_ROWS}
    for kind in ("worst_error", "worst_error_square", "worst_kept_error"):
        found = {name: float(row[kind]) for name, row in rows.items()}
        assert found["identity"] > 0.9
        assert all(found[name] < 2e-4 for name in exact), (kind, found)
        assert found[updates.FAST] < 0.15
    for name in (peers.OPTAX, peers.OPTAX_ROWS):
        assert 0.05 < float(rows[name]["worst_error"]) < 0.5


def test_step_counts_operations_and_bytes(all_methods):
    rows = {row["method"]: row for row in tables.read(all_methods / "step.csv")}
    # Five steps of 4 k^2 l + 2 k^3 for every matrix.
    sides = [(4, 18), *[(4, 8)] * 3, (4, 10), (6, 6)]
    flops = 5 * sum(4 * k * k * n + 2 * k**3 for k, n in sides)
    row = rows[peers.OPTAX]
    assert float(row["gflop"]) == pytest.approx(flops / 1e9, rel=1e-3)
    rate = float(row["gflop"]) / float(row["median_ms"]) * 1e3
    assert float(row["gflop_per_s"]) == pytest.approx(rate, rel=1e-2)
    assert float(row["fraction_of_peak"]) == pytest.approx(rate, rel=1e-2)
    matrices = 4 * sum(k * n for k, n in sides)
    ratio = float(row["temporary_mib"]) * 2**20 / matrices
    assert float(row["temporary_over_matrices"]) == pytest.approx(ratio, rel=1e-2)


def test_step_leaves_out_what_is_there(tmp_path, monkeypatch):
    page(tmp_path)
    before = run_step(tmp_path, *FEW)
    monkeypatch.setattr(step, "compiled", None)  # cannot be called
    assert run_step(tmp_path, *FEW) == before
    with pytest.raises(TypeError, match="not callable"):
        run_step(tmp_path, *FEW, "--gradients", "decaying")
    with pytest.raises(TypeError, match="not callable"):
        run_step(tmp_path, *FEW, "--again")
    monkeypatch.undo()


def test_step_replaces_its_own_rows_only(tmp_path, monkeypatch):
    page(tmp_path)
    run_step(tmp_path, *FEW)
    both = run_step(tmp_path, *FEW, "--gradients", "decaying")
    again = ("--methods", updates.OURS, "--rounds", "4", "--again")
    after = run_step(tmp_path, *again, "--gradients", "decaying")
    assert [row["gradients"] for row in both] == ["gaussian"] * 2 + ["decaying"] * 2
    assert after[:3] == both[:3]
    assert after[3]["calls"] == "4"
    assert float(after[3]["worst_kept_error"]) < 1e-4


def test_step_does_not_call_what_needs_too_much_memory(tmp_path):
    page(tmp_path)
    rows = run_step(tmp_path, *FEW, "--most-gib", "1e-9")
    notes = {row["method"]: row["note"] for row in rows}
    assert notes["identity"] == ""
    assert "temporary memory" in notes[updates.OURS]
    assert rows[1]["median_ms"] == ""
    assert "temporary memory" in (tmp_path / "page.md").read_text()


def wrong_by(network, grads, at, factor):
    """Return an update that gives exact factors, those at some leaves too long."""

    def long(leaf):
        if leaf.cut is None:
            return leaf.value
        stacks = [np.asarray(x, np.float64) for x in leaf.cut.fold(leaf.value)]
        u, _, vh = np.linalg.svd(stacks[0], full_matrices=False)
        size = factor if at in leaf.path else 1.0
        return leaf.cut.unfold([size * (u @ vh)], leaf.value.shape)

    leaves = [long(leaf) for leaf in components.resolve(grads, network.rule)]
    return jax.tree.unflatten(jax.tree.structure(grads), leaves)


@pytest.mark.parametrize(
    "at, expected", [("conv", (0.1, 0, 0.1)), ("square", (0, 0.1, 0.1))]
)
def test_a_known_error_is_the_one_that_is_reported(network, at, expected):
    grads = trees.gaussian(network.params)
    program = updates.Program(
        lambda grads: wrong_by(network, grads, at, 1.1), {"products": "float32"}, None
    )
    limits = updates.Limits(2, 2, 1.0, 1.0)
    found, checked = updates.measure(network, grads, {"long": program}, limits)
    assert checked == "6 of 6"
    assert list(found["long"].errors.values()) == pytest.approx(expected, abs=1e-5)
    assert len(found["long"].seconds) == 2


def test_of_large_shapes_two_matrices_are_compared():
    params = {
        f"{i}": {"kernel": jax.ShapeDtypeStruct((n, 200), "float32")}
        for i, n in enumerate([300, 300, 300, 400, 50])
    }
    network = trees.Network(params, components.ByName())
    assert [place.number for place in errors.sample(network)] == [0, 2, 3, 4]
    grads = trees.gaussian(params)
    (last,) = errors.pick(grads, network, errors.sample(network)[-1:])
    assert (last == grads["4"]["kernel"]).all()


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("lowest", [0.1, 1e-8])
def test_directions_are_those_of_the_svd(shape, lowest):
    """By the Gram matrix, and where that has lost them by the SVD."""
    rng = np.random.default_rng(0)
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in shape)
    x = (u * np.geomspace(1, lowest, k)) @ v.T
    found = errors.directions(x)
    assert errors.relative(u @ v.T, found) < 1e-7
    assert found.kept.sum() == (k if lowest == 0.1 else 2)


def test_nan_is_not_lost(network):
    (x,) = errors.pick(trees.gaussian(network.params), network, errors.sample(network))[
        :1
    ]
    found = errors.worst([np.full_like(x, np.nan)] * 2, [errors.directions(x)] * 2)
    assert np.isnan(found["worst_error"])
    assert np.isnan(found["worst_kept_error"])


def test_slow_calls_are_made_in_the_first_rounds_only():
    limits = updates.Limits(rounds=9, slow_rounds=4, patience=3.0, most_gib=1)
    counts = [updates._count(s, limits) for s in (0.1, 0.6, 1.0, 1.4, 2.0, 9.0)]
    assert counts == [9, 4, 3, 2, 0, 0]
    made = []
    calls = {name: functools.partial(made.append, name) for name in "abc"}
    seconds = timing.interleaved(calls, {"a": 3, "b": 1, "c": 0}, 0.0)
    assert [list(spent) for spent in seconds.values()] == [[0, 1, 2], [0], []]
    assert sorted(made) == ["a", "a", "a", "b"]


def test_gradients_are_seeded_and_keep_the_tree(network):
    for make in updates.KINDS.values():
        one, again = make(network), make(network)
        assert jax.tree.structure(one) == jax.tree.structure(network.params)
        kernel = one["conv"]["kernel"]
        assert (kernel.shape, kernel.dtype) == ((3, 3, 2, 4), jnp.float32)
        assert (kernel == again["conv"]["kernel"]).all()
    gaussian = updates.KINDS["gaussian"](network)["conv"]["kernel"]
    assert (kernel != gaussian).any()


# ------------------------------------------------------------------------------ peers


def test_optax_cuts_as_we_do():
    """Five steps of its Muon and ours agree, on axes in any order and in batches."""
    shapes = {"a": (5, 3, 2, 4), "b": (4, 2, 6), "v": (7,)}
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
    cuts = {"a": components.Matricisation((1, 3), (0,)), "b": None}
    cuts["b"] = components.Matricisation((2,), (1,))
    rule = components.ByPath([(f"^{name}$", cut) for name, cut in cuts.items()])
    grads = trees.gaussian(params)
    muon = peers.optax_muon(params, rule)
    theirs, _ = muon.update(grads, muon.init(grads))
    jordan = polar.NewtonSchulz(polar.JORDAN, gram=False)
    ours, _ = orthax.orthogonalise(jordan, rule=rule).update(grads, optax.EmptyState())
    for name in shapes:
        assert jnp.abs(theirs[name] - ours[name]).max() < 1e-4, name
    # and so they do not if the axes are others
    other = components.ByPath([("a", components.Matricisation((0, 1), (2, 3)))])
    x = {"a": grads["a"]}
    wrong, _ = orthax.orthogonalise(jordan, rule=other).update(x, optax.EmptyState())
    assert jnp.abs(theirs["a"] - wrong["a"]).max() > 0.05


def test_optax_refuses_what_it_cannot_cut():
    params = {"gates": jax.ShapeDtypeStruct((6, 32), "float32")}
    rule = components.ByPath([("g", components.Matricisation((0,), (1,), blocks=4))])
    with pytest.raises(ValueError, match="cannot cut 'gates'"):
        peers.optax_muon(params, rule)


STUB = """
import sys
import numpy as np
with np.load(sys.argv[1]) as file:
    np.savez(sys.argv[2], **{name: 2 * file[name] for name in file})
print("done", flush=True)
steps = 0
for line in sys.stdin:
    steps += line == "step\\n"
    open(sys.argv[2] + ".steps", "w").write(f"{steps} {sys.argv[3]}")
    if steps > 2:
        sys.exit(0)
    print("done", flush=True)
"""


def test_a_peer_in_another_process_is_called_and_ended(tmp_path, monkeypatch):
    server = tmp_path / "server.py"
    server.write_text(STUB)
    monkeypatch.setattr(peers, "_SERVER", server)
    matrices = [np.ones((2, 3), np.float32), np.zeros((4, 4), np.float32)]
    with peers.torch_muon(matrices) as (found, call):
        assert [x.tolist() for x in found] == [(2 * x).tolist() for x in matrices]
        call()
        call()
        with pytest.raises(RuntimeError, match="process ended"):
            call()


@pytest.mark.skipif(peers.find_torch() is None, reason="needs the extra peers")
def test_torch_gives_factors_of_wide_and_tall_matrices():
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal(s).astype("float32") for s in ((8, 30), (30, 8))]
    with peers.torch_muon(matrices) as (found, call):
        call()
    for x, o in zip(matrices, found, strict=True):
        assert 0.05 < errors.relative(o, errors.directions(x)) < 0.4


# ------------------------------------------------------------------------ single stacks


def run_speed(folder, *options):
    paths = ["--results", str(folder), "--readme", str(folder / "page.md")]
    sizes = ["--sides", "4", "--aspects", "1", "2", "--rounds", "2"]
    speed.main([*sizes, *paths, *options])
    return tables.read(folder / "speed.csv")


@dataclasses.dataclass(frozen=True)
class TooLong:
    """Factors that are a quarter too long."""

    def factor(self, x):
        return 1.25 * polar.SVD().factor(x)

    def flops(self, m, n):
        return 1000.0 * m


def test_speed_reports_time_operations_and_error(tmp_path, monkeypatch):
    page(tmp_path)
    monkeypatch.setitem(speed.METHODS, "long", TooLong())
    rows = run_speed(tmp_path, "--methods", "SVD()", "long", "--batches", "3")
    assert [(row["rows"], row["columns"]) for row in rows] == [("4", "4")] * 2 + [
        ("8", "4")
    ] * 2
    for exact, long in (rows[:2], rows[2:]):
        assert float(exact["error"]) < 1e-5
        assert float(long["error"]) == pytest.approx(0.25, abs=1e-4)
        assert float(long["kept_error"]) == pytest.approx(0.25, abs=1e-4)
        assert float(long["gflop"]) == pytest.approx(3e-6 * int(long["rows"]))
        assert long["calls"] == "2"
    text = (tmp_path / "page.md").read_text()
    assert "| 8 x 4 |" in text
    assert "Not yet run" in text


def test_speed_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    page(tmp_path)
    cheap = ("--methods", "SVD()")
    before = run_speed(tmp_path, *cheap, "--batches", "2")
    seen, measure = [], speed.measure

    def counted(name, stack, limits):
        seen.append(stack.batch)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(name, stack, limits)

    monkeypatch.setattr(speed, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        run_speed(tmp_path, *cheap, "--batches", "2", "3")
    after = tables.read(tmp_path / "speed.csv")
    assert after[:2] == before  # those of batch 2 are not measured again
    assert [row["batch"] for row in after] == ["2", "2", "3"]
    run_speed(tmp_path, *cheap, "--batches", "2", "3")
    assert seen == [3, 3, 3]


def test_speed_knows_every_method_that_the_library_exports():
    exported = {
        kind
        for kind in vars(polar).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
    assert {type(method) for method in speed.METHODS.values()} == exported
    assert len(exported) >= 5


def test_speed_leaves_out_what_is_too_much():
    args = speed.parsed(["--sides", "16", "512", "--most-gflop", "1"])
    sides = {stack.side for _, stack in speed.selection(args)}
    assert sides == {16}
    assert {64, 512} <= {s.side for _, s in speed.selection(speed.parsed([]))}


@pytest.mark.parametrize(
    "method, expected",
    [
        (polar.NewtonSchulz(), "float32"),
        (polar.NewtonSchulz(dtype="bfloat16"), "bfloat16"),
    ],
)
def test_a_program_shows_what_it_multiplies(method, expected):
    x = jax.ShapeDtypeStruct((2, 8, 4), "bfloat16")
    lowered = jax.jit(lambda x: polar.polar_factor(x, method)).lower(x)
    assert gemm.inputs_of_products(lowered.as_text()) == expected


def test_low_precision_of_an_accelerator_has_a_peak_of_its_own(monkeypatch):
    lowered = jax.jit(jnp.matmul).lower(jnp.eye(3), jnp.eye(3)).as_text()
    assert gemm.inputs_of_products(lowered) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert gemm.inputs_of_products(lowered) == "float32 at default"


def test_the_peak_is_a_rate_of_products(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(gemm, "_SIDES", {"cpu": (64, 256)})
    gemm.peak.cache_clear()
    assert 1e8 < gemm.peak("float32") < 1e14
    gemm.peak.cache_clear()


# ----------------------------------------------------------------- tables and pictures


def gpu(**labels):
    return {name: labels.get(name, "1") for name in tables.circumstances()} | {
        "platform": "gpu",
        "device": "a GPU",
        **labels,
    }


def test_what_no_gpu_has_been_asked_says_so_and_how(tmp_path):
    text = summary.markdown(tmp_path)
    assert text.count("not yet run") == 4
    for script in ("training", "step", "speed"):
        assert f"`python -m benchmarks.{script} " in text


def test_what_a_gpu_has_shown_stands_in_the_summary(tmp_path):
    ours = {"gradients": "gaussian", "method": updates.OURS}
    rows = [
        gpu(tree="resnet18", median_ms="2.0", speed_over_optax="5.25", **ours),
        gpu(tree="gpt2_small", median_ms="2.0", speed_over_optax="3.0", **ours),
        gpu(**{**ours, "method": peers.OPTAX_EXACT}, tree="gpt2_small", median_ms="4"),
    ]
    for row in rows:
        row.setdefault("speed_over_optax", "")
    tables.write(tmp_path / "step.csv", rows, step.KEY)
    row = {"method": 'Auto("fast")', "products": "bfloat16", "fraction_of_peak": "0.71"}
    large = gpu(**row, rows="2048", columns="1024", batch="8", dtype="bfloat16")
    small = large | {"rows": "64", "columns": "64", "fraction_of_peak": "0.1"}
    tables.write(tmp_path / "speed.csv", [large, small], speed.KEY)
    text = summary.markdown(tmp_path)
    assert "resnet18 5.2x" in text
    assert "2.00x" in text
    assert "71% (71% to 71%)" in text
    assert text.count("not yet run") == 1


def test_networks_with_a_target_stand_in_the_summary(all_methods):
    text = summary.markdown(all_methods)
    assert text.count("not yet run") == 4 + len(summary.TARGETS)
    (line,) = [line for line in text.splitlines() if line.startswith("| tiny |")]
    row = tables.read(all_methods / "step.csv")[1]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == f"{float(row['speed_over_optax']):.2f}"
    assert cells[9] == f"{float(row['worst_error']):.1e}"


def test_rows_of_other_columns_stay_readable(tmp_path):
    path = tmp_path / "rows.csv"
    tables.write(path, [{"name": "a", "old": 1.0}], ("name",))
    tables.write(path, [{"name": "b", "new": None}], ("name", "kind"))
    assert tables.read(path) == [
        {"name": "a", "old": "1", "new": ""},
        {"name": "b", "old": "", "new": ""},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_a_copy_without_git_can_be_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "HERE", tmp_path / "benchmarks")
    monkeypatch.delenv("ORTHAX_COMMIT", raising=False)
    tables.commit.cache_clear()
    assert tables.commit() == ""
    monkeypatch.setenv("ORTHAX_COMMIT", "abc123")
    tables.commit.cache_clear()
    assert tables.commit() == "abc123"
    tables.commit.cache_clear()


def test_pictures_are_drawn_from_the_files_and_linked(all_methods, tmp_path):
    pytest.importorskip("matplotlib")
    page(tmp_path)
    (tmp_path / "step.csv").write_text((all_methods / "step.csv").read_text())
    written = plots.draw(tmp_path)
    assert [path.name for path in written] == ["step_cpu.png"]
    first = [path.read_bytes() for path in written]
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert [path.read_bytes() for path in plots.draw(tmp_path)] == first
    assert plots.markdown(tmp_path).count(f"({tmp_path.name}/") == 1
    assert "No picture yet" in plots.markdown(tmp_path / "empty")


def test_the_page_shows_what_the_results_hold():
    text = tables.README.read_text()
    for name, section in report.sections(tables.RESULTS).items():
        shown = tables.put(section, name, text)
        assert shown == text, f"{name}: run python -m benchmarks.report"


# --------------------------------------------------------------------- another machine


def test_what_is_there_is_left_out_and_rows_are_merged(tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--trees", "tiny", "--gradients", "gaussian", *FEW, "--rounds", "2"]
    step.main([*arguments, "--results", str(out)])
    before = (out / "step.csv").read_text()
    monkeypatch.setattr(step, "compiled", None)  # cannot be called
    step.main([*arguments, "--results", str(out)])
    assert (out / "step.csv").read_text() == before
    results = tmp_path / "results"
    paths = ["--results", str(results), "--readme", str(page(tmp_path))]
    report.main(["--merge", str(out), "--no-plots", *paths])
    assert tables.read(results / "step.csv") == tables.read(out / "step.csv")
    text = (tmp_path / "page.md").read_text()
    assert "| tiny |" in text
    assert text.count("<details>") == 1


def test_missing_are_the_cases_without_a_row_on_this_device(tmp_path):
    path, key = tmp_path / "rows.csv", ("name", "device")
    tables.write(path, [{"name": "a"} | tables.circumstances()], key)
    tables.write(path, [{"name": "b", "device": "another"}], key)
    for again, complete, names in (
        (False, bool, ["b"]),
        (True, bool, ["a", "b"]),
        (False, lambda row: row.get("median_ms"), ["a", "b"]),
    ):
        assert names == tables.missing(
            path, key, "ab", lambda x: {"name": x}, again=again, complete=complete
        )
    assert tables.missing(path, key, [("a",), ("b",)]) == [("b",)]


@pytest.mark.parametrize(
    ("script", "run"), [(benchmarks_polar, "errors"), (training, "measure")]
)
def test_methods_and_optimisers_that_are_there_are_left_out(
    script, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, run, None)  # cannot be called
    where = ["--results", str(tmp_path)]
    few = {"errors": ["--cases", "zero"], "measure": ["--networks", "basic_cnn"]}[run]
    with pytest.raises(TypeError, match="not callable"):
        script.main([*few, *where])
    around = tables.circumstances()
    if run == "errors":
        rows = [
            {"method": method, "case": "zero", "dtype": dtype} | around
            for method in script.METHODS
            for dtype in script.DTYPES
        ]
    else:
        chosen = script.setting("basic_cnn", script.CPU_BATCH)._asdict()
        rows = [chosen | {"optimiser": x} | around for x in script.OPTIMISERS]
    name = "polar.csv" if run == "errors" else "training.csv"
    tables.write(tmp_path / name, rows, script.KEY)
    monkeypatch.setattr(tables, "publish", lambda *_, **__: None)
    monkeypatch.setattr(tables, "by_device", lambda *_: "")
    script.main([*few, *where])
