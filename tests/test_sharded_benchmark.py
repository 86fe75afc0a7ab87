"""Updates on many devices: what is counted in programs, and the page on scaling."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, layouts, peers, published, report, scaling, sharded, tables
from benchmarks.layouts import LAYOUTS, NETWORKS, P
from orthax import components, execution, polar

# ------------------------------------------------------------------- counting in a text

TEXT = """\
HloModule jit_f, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[4,8], p1: f32[8,16]) -> f32[4,16] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[8,16]{1,0} parameter(1)
  ROOT %dot = f32[4,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %y = f32[8,16]{1,0} broadcast(%i), dimensions={}
  %f = f32[4,16]{1,0} fusion(%all-reduce.1, %y), kind=kCustom, calls=%fused
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %all-reduce.1)
}

%condition (s.1: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%little (z: f32[4,8]) -> f32[4,8] {
  ROOT %z = f32[4,8]{1,0} parameter(0)
}

%much (z.1: f32[4,8]) -> f32[4,8] {
  %z.1 = f32[4,8]{1,0} parameter(0)
  ROOT %permuted = f32[4,8]{1,0} collective-permute(%z.1), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x.1: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %part = bf16[2,8]{1,0:T(8,128)} bitcast(%x.1)
  %all-to-all = (bf16[2,8]{1,0:T(8,128)}, bf16[2,8]{1,0:T(8,128)}, bf16[2,8]{1,0:T(8,128)}, bf16[2,8]{1,0:T(8,128)}, bf16[2,8]{1,0:T(8,128)}, /*index=5*/bf16[2,8]{1,0:T(8,128)}, bf16[2,8]{1,0:T(8,128)}, bf16[2,8]{1,0:T(8,128)}) all-to-all(%part, %part, %part, %part, %part, /*index=5*/%part, %part, %part), channel_id=2, replica_groups=[1,8]<=[8]
  %one = bf16[2,8]{1,0:T(8,128)} get-tuple-element(%all-to-all), index=0
  %gathering = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x.1), channel_id=3, replica_groups=mesh['data'=4,'model'=2] {'model'}, dimensions={0}
  %gathered = f32[8,8]{1,0} all-gather-done(%gathering)
  %init = (s32[], f32[4,8]{1,0}) tuple(%x.1, %x.1)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %index = s32[] constant(0)
  ROOT %branch = f32[4,8]{1,0} conditional(%index, %x.1, %x.1), branch_computations={%little, %much}
}
"""  # noqa: E501


def test_collectives_bytes_and_products_of_a_text_are_counted():
    found = hlo.count(TEXT)
    assert found.collectives == {
        "all-reduce": 5,
        "all-to-all": 1,
        "all-gather": 1,
        "collective-permute": 1,
    }
    x, part = 4 * 8 * 4, 2 * 8 * 2
    assert found.moved == 5 * x + 8 * part + 2 * x + x
    assert found.sent == 5 * 2 * x * 3 / 4 + 7 * part + x + x
    assert found.flops == 5 * 2 * 4 * 16 * 8
    assert found.endless == 0


def test_a_loop_of_unknown_length_is_said_to_be_one():
    unknown = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert unknown != TEXT
    found = hlo.count(unknown)
    assert (found.endless, found.collectives["all-reduce"]) == (1, 1)
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.count("ENTRY")


@pytest.mark.parametrize(
    "groups, devices",
    [
        ("{{0,2},{1,3}}", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("@mesh<'a'=2>", 8),  # written in a way that is not known: all devices
        ("{}", 8),
    ],
)
def test_the_devices_of_a_group_are_counted(groups, devices):
    (line,) = [line for line in TEXT.splitlines() if "all-gather-start" in line]
    changed = line.replace("mesh['data'=4,'model'=2] {'model'}", groups)
    assert changed != line
    sent = hlo.count(TEXT.replace(line, changed)).sent - hlo.count(TEXT).sent
    assert sent == (devices - 1) * 128 - 128


def test_a_compiled_program_of_known_work_is_counted():
    mesh = jax.make_mesh(
        (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def work(x):
        def turn(x, _):
            # 16 x 32 of each device times 32 x 32, summed over four of them.
            y = jnp.tanh(x @ jnp.ones((32, 32)))
            return jax.lax.psum(y, "a"), None

        x, _ = jax.lax.scan(turn, x, length=20)
        x = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
        return jax.lax.all_gather(x, "b", tiled=True)

    f = jax.shard_map(
        work, mesh=mesh, in_specs=P("a", None), out_specs=P("a"), check_vma=False
    )
    text = (
        jax.jit(f).lower(jax.ShapeDtypeStruct((64, 32), "float32")).compile().as_text()
    )
    found = hlo.count(text)
    assert "while(" in text  # else loops are not what is tested
    assert found.collectives == {"all-reduce": 20, "all-to-all": 1, "all-gather": 1}
    size = 16 * 32 * 4
    assert found.flops == 20 * 2 * 16 * 32 * 32
    assert found.moved == 20 * size + size + 2 * size
    assert found.sent == 20 * 2 * size * 3 / 4 + size / 2 + size


# -------------------------------------------------------------------- how it is sharded


network_of = functools.cache(lambda tree: NETWORKS[tree]())


def lies(tree, layout):
    """Return the axes of every leaf that is sharded, by path."""
    network = network_of(tree)
    leaves = components.resolve(network.params, network.rule)
    specs = {leaf.path: tuple(LAYOUTS[layout].spec(leaf)) for leaf in leaves}
    return {path: spec for path, spec in specs.items() if any(spec)}


def test_layouts_shard_what_they_say():
    for tree in NETWORKS:
        assert not lies(tree, "data parallel")
    gpt = lies("gpt2_small_scanned", "FSDP")
    assert gpt["blocks/up/kernel"] == (None, None, "data")  # 12, 768, 3072
    assert gpt["blocks/down/kernel"] == (None, "data")
    gpt = lies("gpt2_small_scanned", "tensor parallel")
    assert gpt["blocks/attention/query/kernel"] == (None, None, "model")  # by head
    assert gpt["blocks/attention/out/kernel"] == (None, "model")
    assert gpt["blocks/up/kernel"] == (None, None, "model")
    assert gpt["blocks/down/kernel"] == (None, "model")
    assert len(gpt) == 6
    resnet = lies("resnet50", "tensor parallel")
    assert resnet["blocks/layers/0/conv1/kernel"] == (None, None, None, "model")
    assert resnet["blocks/layers/0/conv2/kernel"] == (None, None, "model")
    assert len(resnet) == len(lies("resnet50", "FSDP")) == 54
    experts = lies("moe32", "tensor parallel")
    assert experts["experts/up/kernel"] == experts["experts/down/kernel"] == ("model",)
    blocks = network_of("gpt2_small_scanned").params["blocks"]
    assert blocks["up"]["kernel"].shape == (12, 768, 3072)


# ------------------------------------------------------------------------------ one row


def tiny():
    """Return a stack of eight matrices, one matrix and a vector."""
    leaf = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    params = {
        "experts": {"kernel": leaf((8, 16, 32))},
        "head": {"kernel": leaf((32, 64)), "bias": leaf((64,))},
    }
    return layouts.trees.Network(params, components.ByName(stacked=("experts",)))


@pytest.fixture(name="run")
def _run(tmp_path, monkeypatch):
    monkeypatch.setitem(sharded.NETWORKS, "tiny", tiny)
    page = tmp_path / "page.md"
    page.write_text("<!-- sharded: begin -->\n<!-- sharded: end -->\n")

    def run(*options):
        paths = ["--results", str(tmp_path), "--readme", str(page)]
        sharded.main(["--trees", "tiny", *paths, *options])
        return tables.read(tmp_path / "sharded.csv"), page.read_text()

    return run


NEWTON_SCHULZ = "orthogonalise(NewtonSchulz())"


def test_a_row_says_what_every_device_does(run):
    rows, text = run("--layouts", "FSDP", "--updates", NEWTON_SCHULZ, peers.OPTAX)
    ours = [row for row in rows if row["update"] == NEWTON_SCHULZ]
    theirs = {row["axes"]: row for row in rows if row["update"] == peers.OPTAX}
    assert [row["axes"] for row in ours] == ["auto", "given", "explicit"]
    assert [row["plan"] for row in ours] == ["compiler", "stack", "stack"]
    method = polar.NewtonSchulz()
    stack, matrix = 8 * 16 * 32 * 4, 32 * 64 * 4
    for row in ours:
        # A matrix of the stack for each device, and one of them has the other, too,
        # for which all have as much room.
        assert row["collectives"] == "4 all-to-all"
        sent = 2 * (stack / 8 + matrix) * 7 / 8
        assert float(row["sent_mib"]) == pytest.approx(sent / 2**20, rel=1e-3)
        assert row["plan_sent_mib"] == row["sent_mib"]
        flops = method.flops(16, 32) + method.flops(32, 64)
        assert float(row["product_gflop"]) == pytest.approx(flops / 1e9, rel=1e-3)
        assert row["plan_gflop"] == row["product_gflop"]
        whole = 8 * method.flops(16, 32) + method.flops(32, 64)
        assert float(row["undivided_gflop"]) == pytest.approx(whole / 1e9, rel=1e-3)
        assert float(row["matrices_mib"]) == pytest.approx(
            (stack + matrix) / 2**20, 1e-3
        )
        assert float(row["temporary_mib"]) > 0
        assert float(row["compile_s"]) > 0
        assert row["devices"] == "8"
        assert row["note"] == row.get("median_ms", "") == ""
    assert "all-reduce" in theirs["auto"]["collectives"]
    assert theirs["explicit"]["note"].startswith("raises ShardingTypeError")
    assert "#### tiny, FSDP: mesh 8 data" in text
    assert "| explicit | raises ShardingTypeError |" in text
    assert text.count("not yet run") == 2
    command = "`python -m benchmarks.sharded --run --trees "
    assert text.count(command) == 2 and " resnet50" in text
    shown = [line for line in text.splitlines() if NEWTON_SCHULZ in line]
    assert len(shown) == 3
    assert all("4 all-to-all" in line for line in shown)


def test_rows_that_are_there_are_left_out(run, monkeypatch):
    options = ("--layouts", "data parallel", "--axes", "auto", "--updates")
    before, _ = run(*options, peers.SVD_PER_LEAF)
    assert before[0]["collectives"] == "none"
    assert float(before[0]["sent_mib"]) == 0
    asked, row = [], sharded.row
    monkeypatch.setattr(sharded, "row", lambda *args: asked.append(args) or row(*args))
    after, _ = run(*options, peers.SVD_PER_LEAF, peers.OPTAX)
    assert len(asked) == 1
    assert after[0] == before[0]
    run(*options, peers.SVD_PER_LEAF, "--again")
    assert len(asked) == 2


def test_time_is_measured_where_it_is_asked_for(run, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("--run")
    assert "not parts of one CPU" in capsys.readouterr().err
    found = sharded.row(
        sharded.UPDATES[NEWTON_SCHULZ], tiny(), LAYOUTS["FSDP"], "explicit", 3
    )
    assert 0 < found["quartile1_ms"] <= found["median_ms"] <= found["quartile3_ms"]
    assert found["calls"] == 3
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(SystemExit):
        run()
    assert "needs 8 devices, there are 4" in capsys.readouterr().err


def test_what_has_been_timed_is_not_planned_any_more():
    assert sharded.report([]).count("not yet run") == 2
    device = dict.fromkeys(tables.circumstances(), "1")
    row = device | {
        "platform": "gpu",
        "load": "1.0",
        "tree": "resnet50",
        "layout": "FSDP",
        "axes": "auto",
        "update": "orthogonalise()",
        "collectives": "none",
        "endless_loops": "0",
        "median_ms": "1.5",
        "quartile1_ms": "1.4",
        "quartile3_ms": "1.7",
    }
    text = sharded.report([row])
    assert text.count("not yet run") == 2
    assert "1.5 (1.4, 1.7)" in text
    assert "sharded" in report.KEYS


# ----------------------------------------------------------------------------- on paper


def test_models_have_the_parameters_that_were_published():
    for name, model in published.MODELS.items():
        # The published figures are rounded; norms are not counted here.
        assert published.parameters(model) == pytest.approx(model.parameters, 5e-3), (
            name
        )
    maverick = published.MODELS["Llama 4 Maverick"]
    assert published.active(maverick) == pytest.approx(17e9, rel=0.02)
    dense = published.MODELS["Llama 3 8B"]
    assert published.active(dense) == published.parameters(dense)


def test_meshes_have_as_many_devices_as_they_should():
    for model in published.MODELS.values():
        for devices in scaling.DEVICES:
            mesh = published.mesh(model, devices)
            assert mesh.size == devices
            specs = jax.tree.leaves(published.shardings(model, mesh))
            shapes = jax.tree.leaves(published.matrices(model))
            for lie, leaf in zip(specs, shapes, strict=True):
                # All devices have a part, and none the same.
                assert math.prod(lie.shard_shape(leaf.shape)) * devices == leaf.size


def test_the_cost_of_an_update_is_what_can_be_counted_by_hand():
    method, machine = polar.NewtonSchulz(), execution.Machine(1e12, 1e9, 1e-3)
    way = scaling.Way("", "", method, machine)
    mesh = published.explicit_mesh((8,), ("fsdp",))
    params = {"x": published.leaf(16, 256, 512)}
    shardings = {"x": {"kernel": jax.NamedSharding(mesh, P(None, "fsdp"))}}
    found = scaling.cost(params, shardings, way)
    sent = 2 * 2 * 256 * 512 * 4 * 7 / 8
    flops = 2 * method.flops(256, 512)
    assert found.plans == ("stack",)
    assert (found.collectives, found.sent, found.flops) == (2, sent, flops)
    assert found.seconds == pytest.approx(flops / 1e12 + sent / 1e9 + 2e-3)


def test_dividing_pays_earlier_where_the_network_is_faster():
    sides = [scaling.pays_from(b, 64, scaling.EXACT) for b in (1e9, 1e10, 1e11)]
    assert sides == sorted(sides, reverse=True)
    assert sides[0] > sides[-1]
    assert scaling.pays_from(1.0, 64, scaling.EXACT) is None
    # Of 64 matrices a device works on one instead of all, and sends it to 63 others.
    side, way = sides[1], scaling.EXACT
    flops, machine = way.method.flops, way.machine

    def gain(m):
        return 63 * flops(m, m) / machine.flops - 63 * m * m * 4 / 1e10 - 2e-5

    assert gain(side) > 0 > gain(side // 2)


def test_the_page_on_scaling_is_what_the_script_writes(tmp_path):
    scaling.main(["--no-plots", "--page", str(tmp_path / "docs" / "page.md")])
    written = (tmp_path / "docs" / "page.md").read_text()
    assert written == scaling.PAGE.read_text(), "run python -m benchmarks.scaling"
    assert written.count("\n| 4,096 |") == 2 * len(published.MODELS)
    assert not (tmp_path / "docs" / "page.png").exists()


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert scaling.draw(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
