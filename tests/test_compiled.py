"""What compilers say of whole updates: the readers of their texts, and the script."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import aot, compiled, costs, layouts, products, tables, trees
from benchmarks.hlo import KINDS
from orthax import components

# ---------------------------------------------------------------------- reading a text

# A loop of 3 turns around one of 5, a condition, a call, something asynchronous.
TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%fused (p0: bf16[512,300], p1: bf16[300,256]) -> f32[512,256] {
  %p0 = bf16[512,300]{1,0:T(8,128)} parameter(0)
  %p1 = bf16[300,256]{1,0:T(8,128)} parameter(1)
  ROOT %product = f32[512,256]{1,0:T(8,128)} convolution(%p0, %p1), dim_labels=bf_io->bf, operand_precision={highest,highest}, backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

%inner (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %doubled = f32[4,8]{1,0} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"10"}}
  %a = bf16[512,300]{1,0} broadcast(%x), dimensions={}
  %b = bf16[300,256]{1,0} broadcast(%x), dimensions={}
  %f = f32[512,256]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0}) tuple(%s, %doubled)
}

%below (s.1: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

%outer (s.2: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s.2 = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %permuting = (f32[4,8]{1,0}, f32[4,8]{1,0}) collective-permute-start(%s.2), channel_id=1, source_target_pairs={{0,1}}, backend_config={"estimated_cycles":"1"}
  %permuted = f32[4,8]{1,0} collective-permute-done(%permuting)
  ROOT %loop = (s32[]{:T(128)}, f32[4,8]{1,0}) while(%s.2), condition=%below, body=%inner
}

%always (s.3: (s32[], f32[4,8])) -> pred[] {
  %s.3 = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%little (z: f32[4,8]) -> f32[4,8] {
  %z = f32[4,8]{1,0} parameter(0)
  ROOT %copied = f32[4,8]{1,0} copy(%z), backend_config={"estimated_cycles":"7"}
}

%much (z.1: f32[4,8]) -> f32[4,8] {
  %z.1 = f32[4,8]{1,0} parameter(0)
  %first = f32[4,8]{1,0} copy(%z.1), backend_config={"estimated_cycles":"2000"}
  ROOT %all-reduce = f32[4,8]{1,0} all-reduce(%first), channel_id=2, replica_groups={{0,1}}, to_apply=%little
}

%sliced (z.2: f32[4,8]) -> f32[4,8] {
  %z.2 = f32[4,8]{1,0} parameter(0)
  ROOT %slice = f32[4,8]{1,0} slice(%z.2), backend_config={"estimated_cycles":"30000"}
}

ENTRY %main (x.1: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[4,8]{1,0}) tuple(%zero, %x.1)
  %loops = (s32[], f32[4,8]{1,0}) while(%init), condition=%always, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %either = f32[4,8]{1,0} conditional(%zero, %x.1, %x.1), branch_computations={%much, %little}
  %called = f32[4,8]{1,0} call(%x.1), to_apply=%little
  %slicing = ((f32[4,8]{1,0}), f32[4,8]{1,0}, s32[]) async-start(%x.1), calls=%sliced
  ROOT %done = f32[4,8]{1,0} async-done(%slicing), calls=%sliced
}
"""  # noqa: E501


def test_cycles_follow_loops_branches_calls_and_what_is_asynchronous():
    found = costs.read(TPU)
    # Of the fusion its own 100, not what is inside; of the branches the dearer.
    assert found.cycles == 3 * (1 + 5 * (10 + 100)) + 2000 + 7 + 30_000
    assert found.collectives == {"collective-permute": 3, "all-reduce": 1}
    assert set(found.collectives) <= set(KINDS)
    assert found.products == {"bf16": 15}
    assert found.endless == 0


def test_loops_of_unknown_length_count_as_one_turn():
    found = costs.read(TPU.replace('"known_trip_count":{"n":"3"}', ""))
    assert found.cycles == 1 + 5 * (10 + 100) + 2000 + 7 + 30_000
    assert found.endless == 1


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        costs.read("HloModule jit_f")


# A loop of 4 turns that works on one matrix of a stack and replaces it in its place.
GPU = """\
HloModule jit_f, is_scheduled=true

%one (p0: f32[4,1024,512], p1: s32[]) -> bf16[1024,512] {
  %p0 = f32[4,1024,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %at = f32[1,1024,512]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,1024,512}
  ROOT %half = bf16[1024,512]{1,0} convert(%at)
}

%gemm (p2: bf16[1024,512]) -> f32[1024,1024] {
  %p2 = bf16[1024,512]{1,0} parameter(0)
  ROOT %dot = f32[1024,1024]{1,0} dot(%p2, %p2), lhs_contracting_dims={1}, rhs_contracting_dims={1}, operand_precision={highest,highest}
}

%put (p3: f32[4,1024,512], p4: f32[1,1024,512], p5: s32[]) -> f32[4,1024,512] {
  %p3 = f32[4,1024,512]{2,1,0} parameter(0)
  %p4 = f32[1,1024,512]{2,1,0} parameter(1)
  %p5 = s32[] parameter(2)
  ROOT %new = f32[4,1024,512]{2,1,0} dynamic-update-slice(%p3, %p4, %p5)
}

%body (s: (s32[], f32[4,1024,512])) -> (s32[], f32[4,1024,512]) {
  %s = (s32[], f32[4,1024,512]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,1024,512]{2,1,0} get-tuple-element(%s), index=1
  %taken = bf16[1024,512]{1,0} fusion(%x, %i), kind=kLoop, calls=%one
  %gram = f32[1024,1024]{1,0} fusion(%taken), kind=kCustom, calls=%gemm
  %exact = (f32[1024,512]{1,0}, s8[1024]{0}) custom-call(%gram, %y), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}}}
  %y = f32[1024,512]{1,0} bitcast(%x)
  %z = f32[1,1024,512]{2,1,0} bitcast(%y)
  %kept = f32[4,1024,512]{2,1,0} fusion(%x, %z, %i), kind=kLoop, calls=%put
  ROOT %t = (s32[], f32[4,1024,512]{2,1,0}) tuple(%i, %kept)
}

%condition (s.1: (s32[], f32[4,1024,512])) -> pred[] {
  %s.1 = (s32[], f32[4,1024,512]{2,1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x.1: f32[4,1024,512]) -> (s32[], f32[4,1024,512]) {
  %x.1 = f32[4,1024,512]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[4,1024,512]{2,1,0}) tuple(%zero, %x.1)
  ROOT %loop = (s32[], f32[4,1024,512]{2,1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""  # noqa: E501


def test_kernels_and_the_model_of_their_time():
    found = costs.read(GPU, costs.H100())
    assert found.kernels == 4 * 4
    assert found.products == {"bf16": 4, "f32 HIGHEST": 4}
    matrix = 1024 * 512
    # An index is four bytes. The product of halves is shorter than its bytes.
    moved = [
        (4 * matrix + 4 + 2 * matrix) / 3.35e12,
        (2 * matrix + 4 * 1024**2) / 3.35e12,
        (4 * matrix + 4 + 4 * matrix) / 3.35e12,
    ]
    exact = 2 * 1024 * 1024 * 512 / 67e12
    expected = 4 * (sum(max(2.5e-6, each) for each in moved) + exact)
    assert found.seconds == pytest.approx(expected, rel=1e-12)


def test_bytes_count_where_memory_is_slow():
    slow = costs.H100(launch=0.0, bandwidth=1.0, f32=1e30)
    matrix = 1024 * 512
    moved = 6 * matrix + 4 + 2 * matrix + 4 * 1024**2
    moved += 4 * 1024**2 + 4 * matrix + 4 * matrix + 1024  # with the library's own room
    moved += 8 * matrix + 4
    assert costs.read(GPU, slow).seconds == pytest.approx(4 * moved, rel=1e-12)


def test_what_starts_no_kernel():
    free = """\
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} bitcast(%x)
  %room = f32[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %gathering = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%y), channel_id=1
  %gathered = f32[16,8]{1,0} all-gather-done(%gathering)
  %copying = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) copy-start(%y)
  ROOT %copied = f32[4,8]{1,0} copy-done(%copying)
}
"""
    found = costs.read(free, costs.H100())
    assert found.kernels == 2
    assert found.seconds == pytest.approx(2 * 2.5e-6)
    assert found.collectives == {"all-gather": 1}


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("bf16", 990),
        ("f16", 990),
        ("f32 HIGHEST", 67),
        ("f32 F32_F32_F32", 67),
        ("f32 DEFAULT", 495),
        ("f32 HIGH", 495),
        ("f32 BF16_BF16_F32", 990),
        ("f32 BF16_BF16_F32_X3", 330),
        ("f32 TF32_TF32_F32", 495),
        ("f32 TF32_TF32_F32_X3", 165),
        ("f64 DEFAULT", 67),
    ],
)
def test_rates_of_an_h100(kind, tera):
    assert costs.H100().rate(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ("lhs_contracting_dims={1}", "f32 DEFAULT"),
        ("operand_precision={high,high}", "f32 HIGH"),
        ("operand_precision={highest,default}", "f32 HIGHEST/DEFAULT"),
        ('"operand_precision":["HIGHEST","HIGHEST"]', "f32 HIGHEST"),
        ("algorithm=dot_bf16_bf16_f32_x3", "f32 BF16_BF16_F32_X3"),
        ('"algorithm":"ALG_DOT_TF32_TF32_F32_X3"', "f32 TF32_TF32_F32_X3"),
        ('"algorithm":"ALG_UNSET"', "f32 DEFAULT"),
    ],
)
def test_how_a_product_is_computed(attributes, kind):
    assert products.kind("f32", attributes) == kind
    assert products.kind("bf16", attributes) == "bf16"


def test_sides_of_a_product_with_its_stack_as_a_window():
    """As the TPU compiler writes 7 products of 16 x 144 with their transposes."""
    line = "window={size=7 stride=6 lhs_dilate=7}, dim_labels=0bf_0oi->0bf"
    module = costs.Module(
        "ENTRY %main (x: f32[7,16,144]) -> f32[7,16,16] {\n"
        "  %x = f32[7,16,144]{2,1,0} parameter(0)\n"
        f"  ROOT %c = f32[7,16,16]{{2,1,0}} convolution(%x, %x), {line}\n}}"
    )
    (_, _), (each, _) = module.schedule(costs.cycles)[0]
    (found,) = module.products(each)
    assert (found.stack, found.sides) == (7, (16, 16, 144))
    assert found.flops == 2 * 7 * 16 * 16 * 144
    assert not found.large


# -------------------------------------------------------------------- trees and updates


@pytest.mark.parametrize(
    ("tree", "leaves", "matrices"),
    [("resnet20", 20, 20), ("vit_ti16", 74, 74), ("resnet18", 21, 21)],
)
def test_trees_are_the_leaves_that_are_cut(tree, leaves, matrices):
    network = compiled.TREES[tree]()
    found = aot.shape_of(network)
    assert (found["leaves"], found["matrices"]) == (leaves, matrices)
    kept = jax.tree.leaves(aot.matrices(network).params)
    assert len(kept) == leaves
    assert {leaf.dtype for leaf in kept} == {np.dtype("float32")}
    assert found["bytes"] == sum(4 * leaf.size for leaf in kept)
    cut = {x.path: x.cut for x in components.resolve(network.params, network.rule)}
    for leaf in components.resolve(aot.matrices(network).params, network.rule):
        assert leaf.cut == cut[leaf.path]


def test_a_scanned_network_has_the_matrices_of_the_other():
    scanned, other = (
        aot.shape_of(compiled.TREES[name]())
        for name in ("gpt2_small_scanned", "gpt2_small")
    )
    assert scanned["matrices"] == other["matrices"] > scanned["leaves"]
    assert scanned["bytes"] == other["bytes"]


def test_every_tree_is_known_to_the_other_benchmarks():
    assert set(compiled.TREES) <= {*trees.NETWORKS, *layouts.NETWORKS}
    assert len(compiled.TREES) == 8


@pytest.mark.parametrize("arm", aot.ARMS)
def test_an_arm_is_a_whole_update(arm):
    network = aot.matrices(compiled.TREES["resnet20"]())
    transform = aot.ARMS[arm](network, aot.Stacking())
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), network.params)
    state = jax.eval_shape(transform.init, zeros)
    updates, new = jax.eval_shape(transform.update, zeros, state, zeros)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, zeros)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    momentum = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
    sizes = sum(x.size for x in jax.tree.leaves(zeros))
    kept = {"default": 0, "fast": 0, "muon": sizes, "optax": sizes}[arm]
    assert kept <= momentum <= kept + 100  # and optax's coefficients


def test_leaves_and_what_is_kept_of_them_lie_alike():
    network = aot.matrices(compiled.TREES["resnet20"]())
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1] * 4), ("data",))
    lie = aot.shardings(network, mesh)
    specs = {
        jax.tree_util.keystr(path): (leaf.shape, where.spec)
        for (path, leaf), where in zip(
            jax.tree_util.tree_leaves_with_path(network.params),
            jax.tree.leaves(lie),
            strict=True,
        )
    }
    for shape, spec in specs.values():
        (axis,) = [i for i, name in enumerate(spec) if name == "data"]
        assert shape[axis] % 4 == 0
        assert shape[axis] == max(n for n in shape if n % 4 == 0)
    whole = jax.sharding.NamedSharding(mesh, aot.P())
    state = jax.eval_shape(
        aot.ARMS["muon"](network, aot.Stacking()).init, network.params
    )
    found = aot.beside(state, lie, whole)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    split = [where for leaf, where in pairs if leaf.ndim]
    assert sorted(map(str, split)) == sorted(map(str, jax.tree.leaves(lie)))


# -------------------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("chip", "command"),
    [(chip, r'pip install -e "\.\[compilers\]"') for chip in ("v5e-4", "h100")],
)
def test_a_missing_compiler_is_named_with_what_to_install(chip, command, monkeypatch):
    monkeypatch.setattr(compiled, "_there", lambda module: False)
    with pytest.raises(SystemExit, match=command) as stopped:
        compiled.main(["--chips", chip])
    # Python prints a sentence and ends with status 1.
    assert isinstance(stopped.value.code, str)
    assert f"{chip}" in stopped.value.code
    assert "not installed" in stopped.value.code


def test_a_module_is_looked_for_without_importing_it():
    assert compiled._there("numpy")
    assert not compiled._there("no_such_package.no_such_module")


@pytest.mark.parametrize(
    ("status", "stdout", "stderr", "found"),
    [
        (0, 'warnings\n{"cycles": 3}\n', "", {"cycles": 3}),
        (-signal.SIGALRM, "", "", {"note": "did not finish in 9 s"}),
        (
            -signal.SIGABRT,
            "",
            "Check failed: it is\n",
            {"note": "the compiler ended with status -6: Check failed: it is"},
        ),
    ],
)
def test_how_a_child_ended(status, stdout, stderr, found, monkeypatch):
    asked = []

    def run(command, env, **_):
        asked.append((command, env))
        return subprocess.CompletedProcess(command, status, stdout, stderr)

    monkeypatch.setattr(compiled.subprocess, "run", run)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "WARNING: could not be determined")
    case = aot.Case("v5e", "whole", "resnet20", "fast")
    assert compiled.row(case, 9) == found
    ((command, env),) = asked
    assert command[3:] == ["--child", *case, "9"]
    assert env.items() >= compiled.VARIABLES.items()


def test_a_case_that_raises_is_a_row_too(monkeypatch, capsys):
    def measured(case, network, limit):
        assert (case.tree, limit) == ("resnet20", 2.5)
        raise ValueError("cannot\nbe, in /a/file/of/this/machine")

    monkeypatch.setattr(compiled, "measured", measured)
    compiled.main(["--child", "v5e", "whole", "resnet20", "fast", "2.5"])
    assert json.loads(capsys.readouterr().out) == {"note": "raises ValueError: cannot"}


FOUND = {
    "leaves": 20,
    "matrices": 20,
    "bytes": 1,
    "lower_s": 0.25,
    "compile_s": 4.0,
    "temporary_bytes": 2**20,
    "collectives": "2 all-to-all",
    "products": "bf16 x 12; f32 HIGHEST x 4",
    "endless_loops": 0,
    "code_bytes": 2**21,
    "cycles": 337_163,
}
FEW = ["--chips", "v5e-4", "--trees", "resnet20"]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Return a function that runs the script without compilers, and what it asked."""
    asked = []

    def row(case, limit):
        asked.append(case)
        if case[1::2] == ("automatic", "fast"):
            return {"note": "raises ValueError: no"}
        return FOUND | {"compile_s": 8.0 if case.arm == "optax" else 4.0}

    monkeypatch.setattr(compiled, "row", row)
    monkeypatch.setattr(compiled, "missing", lambda platform: None)
    monkeypatch.setattr(compiled.importlib.metadata, "version", lambda name: "1.2")

    def run(*arguments):
        asked.clear()
        compiled.main([*FEW, "--results", str(tmp_path), *arguments])
        return list(asked)

    return run


def test_a_run_goes_on_where_it_stopped(ran, tmp_path):
    first = ran("--arms", "fast")
    assert [case.layout for case in first] == ["explicit", "given", "automatic"]
    second = ran()
    assert len(second) == 9
    assert not set(first) & set(second)
    assert ran() == []
    assert len(ran("--again")) == 12
    rows = tables.read(tmp_path / "compiled.csv")
    assert len(rows) == 12
    assert {row["compiler"] for row in rows} == {"libtpu 1.2"}


def test_the_tables_say_whose_word_they_are(ran, tmp_path):
    ran()
    text = compiled.report(tables.read(tmp_path / "compiled.csv"))
    assert "the compiler's word, not a measurement on a device" in text
    assert text.count("2 x 2 chips, explicit axes: the compiler's word") == 1
    row = "| resnet20 | `fast` | 4.0 (0.2) | 0.50 | 337 | 1.00 | 2.0 | 1.0 "
    assert row + "| 2 all-to-all | bf16 x 12; f32 HIGHEST x 4 |" in text
    assert "| resnet20 | `fast` | raises ValueError |" in text
    assert len({line.count("|") for line in text.splitlines() if "|" in line}) == 1
    assert "Not yet run" in compiled.report([])


def test_a_limit_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        compiled.parsed(["--limit", "0"])
    assert "--limit must be positive" in capsys.readouterr().err


# ---------------------------------------------------------------------- with compilers

PROGRAM = """
import json, jax, numpy as np
from benchmarks import aot, costs
machine = aot.MACHINES["{chip}"]
one = jax.sharding.SingleDeviceSharding(machine.devices()[0])
x = jax.ShapeDtypeStruct((3, 512, 1024), np.float32, sharding=one)
gram = lambda x: jax.numpy.matmul(x, x.mT, precision="highest")
program = jax.jit(gram).lower(x).compile()
print(json.dumps(aot.read(program, machine)))
"""


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_a_product_that_a_compiler_has_made(chip):
    if reason := compiled.missing(aot.MACHINES[chip].platform):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(chip=chip)],
        env=os.environ | compiled.VARIABLES,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["products"] == "f32 HIGHEST x 1"
    assert (found["collectives"], found["endless_loops"]) == ("none", 0)
    flops = 2 * 3 * 512 * 512 * 1024
    if chip == "h100":
        assert found["kernels"] == 1
        assert found["model_ms"] == pytest.approx(flops / 67e12 * 1e3)
    else:
        # 197 TFLOP/s at 1.5 GHz, a sixth of it in float32: not less than three quarters
        # of that time, and not three times as much.
        ideal = 6 * flops / (197e12 / 1.5e9)
        assert 0.75 * ideal < found["cycles"] < 3 * ideal


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_a_whole_update_that_a_compiler_has_made(chip):
    if reason := compiled.missing(aot.MACHINES[chip].platform):
        pytest.skip(reason)
    found = compiled.row(aot.Case(chip, "whole", "resnet20", "fast"), 300)
    assert found["matrices"] == 20
    assert found["compile_s"] > 0
    assert found["kernels" if chip == "h100" else "cycles"] > 100
    stopped = compiled.row(aot.Case(chip, "whole", "resnet20", "fast"), 0.01)
    assert stopped == {"note": "did not finish in 0.01 s"}
