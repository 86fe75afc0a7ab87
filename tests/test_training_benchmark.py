"""benchmarks/training.py on a few images, and what it stands on: timing and trees."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import tables, timing, trainers, training, trees
from orthax import components

OPTIMISERS = [trainers.SGD, "orthogonalise(), sgd", "optax.contrib.muon()"]
TEXT = "above\n<!-- training: begin -->\nold\n<!-- training: end -->\nbelow\n"


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """Return a function that trains BasicCNN on four images: rows and page."""
    folder = tmp_path_factory.mktemp("training")
    readme = folder / "README.md"
    readme.write_text(TEXT)

    def run(*options):
        small = ["--networks", "basic_cnn", "--batch", "4", "--size", "8"]
        paths = ["--results", str(folder), "--readme", str(readme)]
        training.main([*small, "--rounds", "2", *paths, *options])
        return tables.read(folder / "training.csv"), readme.read_text()

    return run


def test_optimisers_are_timed_beside_sgd(run):
    rows, readme = run("--optimisers", *OPTIMISERS[1:])
    assert [row["optimiser"] for row in rows] == OPTIMISERS
    for row in rows:
        setting = [row[name] for name in trainers.Setting._fields]
        assert setting == ["basic_cnn", "4", "8", "float32"]
        numbers = ["median_ms", "quartile1_ms", "quartile3_ms", "compile_s", "loss"]
        assert all(math.isfinite(float(row[name])) for name in numbers)
        assert 0 < float(row["quartile1_ms"]) <= float(row["quartile3_ms"])
        assert float(row["overhead_percent"]) > -100
        assert row["calls"] == "2"
    assert rows[0]["optimiser"] == trainers.SGD
    assert float(rows[0]["overhead_percent"]) == 0
    assert readme.startswith("above\n") and readme.endswith("below\n")
    assert "old" not in readme
    assert "basic_cnn, batch 4, size 8, float32" in readme
    assert all(f"`{name}`" in readme for name in OPTIMISERS)
    # Only its own rows are replaced, and SGD is always beside.
    again, _ = run("--optimisers", trainers.SGD, "--steps", "2", "--again")
    assert [row["steps_per_call"] for row in again] == ["3"] * (len(rows) - 1) + ["2"]
    assert again[-1]["optimiser"] == trainers.SGD


def test_what_no_gpu_was_asked_says_so():
    report = training.report([])
    names = " ".join(trainers.CASES)
    assert f"Not yet run: `python -m benchmarks.training --networks {names}`" in report
    row = dict.fromkeys(("device", "cpus", "lapack_threads", "load"), "1")
    row |= dict.fromkeys(("jax", "jaxlib", "optax", "calls", "steps_per_call"), "1")
    row |= {"platform": "gpu", "optimiser": trainers.SGD}
    chosen = trainers.setting("resnet20")._asdict()
    measured = training.report([row | {k: str(v) for k, v in chosen.items()}])
    assert "Not yet run: " in measured and "resnet20 " not in measured.split("run: ")[1]


def test_a_trainer_goes_on_from_where_it_was():
    chosen = trainers.setting("basic_cnn", 4, 8)
    batch = trainers.CASES["basic_cnn"].feed(4, 8)
    start = trainers.initialise(chosen)
    for _ in range(2):  # the second starts where the first did
        program = trainers.program(start, optax.sgd(1e-2), batch)
        trainer = trainers.Trainer(program, batch, steps=3)
        losses = [float(trainer()) for _ in range(3)]
        # A batch of four is learned.
        assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ["resnet18", "vit_ti16", "gpt2_small", "moe32"])
@pytest.mark.slow
def test_the_steps_that_a_gpu_is_asked_for_are_steps(name):
    start = trainers.initialise(trainers.setting(name), abstract=True)
    tx = trainers.OPTIMISERS["orthogonalise(), sgd"](trees.MODELS[name].rule)

    def begin(start):
        return trainers.State(*start, tx.init(start[0]))

    before = jax.eval_shape(begin, start[1:])
    batch = trainers.CASES[name].feed(2, trees.MODELS[name].size)
    step = trainers.step_of(start.graphdef, tx)
    after, loss = jax.eval_shape(step, before, batch)
    # Donation needs states that are alike.
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("name", trainers.OPTIMISERS)
def test_every_optimiser_takes_stacked_experts(name):
    params, rule = trees.NETWORKS["moe32"]()
    tx = trainers.OPTIMISERS[name](rule)
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    same = jax.tree.map(lambda x, y: x.shape == y.shape, updates, params)
    assert all(jax.tree.leaves(same))


def test_optax_muon_cuts_as_we_do():
    """Every expert is brought to the same norm: the leading axis is a batch axis."""
    params = {"experts": {"up": {"kernel": jnp.zeros((3, 8, 16))}, "b": jnp.zeros(4)}}
    grads = jax.tree.map(lambda x: trees.gaussian(x), params)
    sizes = jnp.asarray([1.0, 10.0, 100.0])[:, None, None]
    grads["experts"]["up"]["kernel"] *= sizes
    rule = components.ByName(stacked=("experts",))
    tx = trainers.OPTIMISERS["optax.contrib.muon()"](rule)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    norms = np.linalg.norm(updates["experts"]["up"]["kernel"], axis=(1, 2))
    np.testing.assert_allclose(norms, norms[0], rtol=0.2)


@pytest.mark.slow
def test_every_network_is_trained_and_has_a_tree():
    assert set(trainers.CASES) == set(trees.MODELS) == set(trees.NETWORKS)
    for name, make in trees.NETWORKS.items():
        network = make()
        assert any(leaf.cut for leaf in components.resolve(*network)), name


def test_decaying_gradients_are_nearly_of_low_rank():
    network = trees.NETWORKS["resnet20"]()
    one, again, other = (trees.decaying(network, seed) for seed in (0, 0, 1))
    same = jax.tree.map(lambda x, y: x.shape == y.shape, one, network.params)
    assert all(jax.tree.leaves(same))
    for x, y, z in zip(*map(jax.tree.leaves, (one, again, other)), strict=True):
        assert (x == y).all() and (x != z).any()
    for leaf in components.resolve(one, network.rule):
        for stack in leaf.cut.fold(leaf.value) if leaf.cut else ():
            for x in np.asarray(stack, np.float64):
                s = np.linalg.svd(x, compute_uv=False)
                assert 1e6 < s[0] / s[-1] < 1e8
                assert 0.4 < np.mean(s < 1e-3 * np.linalg.norm(s)) < 0.7


def test_every_call_is_made_in_every_round_of_its_own_in_another_order():
    made = []
    calls = {name: lambda name=name: made.append(name) for name in ("a", "b", "c")}
    seconds = timing.interleaved(calls, {"a": 12, "b": 12, "c": 2}, 0.0)
    rounds = {name: sorted(spent) for name, spent in seconds.items()}
    assert rounds == {"a": [*range(12)], "b": [*range(12)], "c": [0, 1]}
    late = [tuple(made[i : i + 2]) for i in range(6, 26, 2)]
    assert set(late) == {("a", "b"), ("b", "a")}
    assert all(value > 0 for spent in seconds.values() for value in spent.values())


def test_ratios_are_taken_inside_a_round():
    theirs, ours = {0: 2.0, 1: 8.0, 2: 3.0}, {0: 1.0, 1: 2.0, 3: 9.0}
    assert timing.ratios(theirs, ours) == [2.0, 4.0]
    assert timing.ratio(theirs, ours) == 3.0
    assert timing.quartiles([1, 2, 3, 4, 5]) == (2.0, 3.0, 4.0)
