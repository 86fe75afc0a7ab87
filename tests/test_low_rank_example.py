"""examples/low_rank.py: its steps, runs, arms, the choice of rates, the page."""

import contextlib
import csv
import dataclasses
import functools
import io
import math
import os
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import low_rank as program
from examples.data import Dataset, Split, load_digits
from examples.experiments.low_rank import page, report, runs, settings, training
from examples.experiments.low_rank.training import Arm, Run
from examples.training.report import curve
from examples.training.runs import Limits, OutOfTime
from orthax import low_rank

SIZES = {"width": 16, "rank_multiple": 4, "frequency": 1, "train_images": 640}
SHORT = (
    "digits --width 16 --rank-multiple 4 --frequency 1 --train-images 640 --epochs 4 "
    "--delay 1 --delays 1 2 --betas 0.5 --parts truncated fixed joint --seeds 2 "
    "--tuning-seeds 1 --grid 0.003 0.03"
)
SHORT = SHORT.split()
SMALL = settings.Digits(**SIZES)


def folders(folder):
    return ["--results", str(folder), "--checkpoints", str(folder / "checkpoints")]


def read(folder):
    with (folder / "low_rank.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits():
    return jax.device_put(SMALL.some(SMALL.load()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("low_rank")
    with contextlib.redirect_stdout(io.StringIO()):
        program.main([*SHORT, *folders(folder)])
    return folder


def rows_of(folder, arm, chosen="tuned"):
    found = [r for r in read(folder) if (r["arm"], r["chosen"]) == (arm, chosen)]
    return sorted(found, key=lambda row: row["seed"])


# --------------------------------------------------------------------------- runs


def test_a_short_run_writes_rows_a_page_and_a_figure(finished):
    rows = read(finished)
    each = [("full", "tuned"), ("oialr", "tuned"), ("truncated", "tuned")]
    each += [("fixed", "tuned"), ("oialr", "joint")]
    for arm, chosen in each:
        assert [r["seed"] for r in rows_of(finished, arm, chosen)] == ["0", "1"]
    assert len(rows) == 2 * len(each) + 2 * 4  # delay 1 is in the joint search anyway
    for row in rows:
        assert row["status"] == "finished"
        assert bool(row["test_accuracy"]) == (row["chosen"] != "grid")
    text = (finished / "low_rank.md").read_text()
    assert text.count("| `adam`, OIALR, beta 0.5 | 0.0") == 1
    assert re.findall(r"`--parts (\w+)`: not yet run", text) == ["orthogonal"]
    figure = (finished / "low_rank_mlp.png").read_bytes()
    assert figure.startswith(b"\x89PNG")


def test_fractions_and_ranks_follow_the_conversion(finished):
    for row in rows_of(finished, "oialr"):
        trains, stored = curve(row, "trainable"), curve(row, "stored")
        assert trains[0] == stored[0] == 1 and max(trains[1:]) < 1
        assert trains[1:] == sorted(trains[1:], reverse=True)
        ranks = [int(x) for x in row["ranks_at_end"].split()]
        assert row["layers"].split() == ["layers/1/kernel", "layers/3/kernel"]
        # 64 x 16, 16 x 16 and 16 x 10, and a bias for each.
        rest = 16 + 16 + 160 + 10
        dense = 64 * 16 + 16 * 16 + rest
        assert trains[-1] == pytest.approx(
            (sum(r * r for r in ranks) + rest) / dense, 1e-3
        )
        each = (r * (m + 16) + r * r for r, m in zip(ranks, (64, 16), strict=True))
        assert stored[-1] == pytest.approx((sum(each) + rest) / dense, 1e-3)
        # The optimiser holds two moments of what trains.
        memory = curve(row, "memory_mib")
        assert 0 < memory[-1] < 10 and len(memory) == 4


def test_looks_at_the_bases_are_cosines_of_every_matrix(finished):
    for arm in ("full", "oialr"):
        for row in rows_of(finished, arm):
            looks = np.array([x.split() for x in row["stability"].split(";")], float)
            assert looks.shape == (4, 3) and (looks <= 1 + 1e-5).all()
            assert (looks[:, :2] > 0.2).all()
    # Without training nothing moves: the control of these numbers.
    row = rows_of(finished, "fixed")[0]
    assert set(row["stability"].replace(";", " ").split()) == {"nan"}


def test_controls_have_the_ranks_of_oialr(finished):
    ranks = [row["ranks_at_end"] for row in rows_of(finished, "oialr")]
    assert [row["ranks"] for row in rows_of(finished, "truncated")] == ranks
    fixed = rows_of(finished, "fixed")
    median = np.median([[int(x) for x in r.split()] for r in ranks], axis=0)
    for row in fixed:
        assert [int(x) for x in row["ranks"].split()] == [int(x) for x in median]
        assert len(set(curve(row, "trainable"))) == 1
    losses = {row["train_loss"] for row in rows_of(finished, "truncated")}
    assert losses == {"nan"}


def test_training_beats_chance(finished):
    for row in read(finished):
        if row["chosen"] != "grid" and row["arm"] != "fixed":  # chance is 0.1
            assert float(row["test_accuracy"]) > 0.3, row["arm"]


def test_settings_are_the_best_on_validation_images(finished):
    grid = [row for row in read(finished) if row["chosen"] == "grid"]
    for arm, chosen in (("full", "tuned"), ("oialr", "tuned"), ("oialr", "joint")):
        row = rows_of(finished, arm, chosen)[0]
        tried = [x for x in grid if x["arm"] == arm]
        if chosen == "tuned" and arm == "oialr":
            tried = [x for x in tried if x["delay"] == "1"]
        assert len(tried) == (4 if chosen == "joint" else 2)
        best = max(
            tried,
            key=lambda x: (
                float(x["validation_accuracy"]),
                -float(x["validation_loss"]),
            ),
        )
        for name in ("learning_rate", "beta", "delay"):
            assert row[name] == best[name]
        assert int(best["seed"]) >= 1_000_000


def test_finished_runs_are_skipped(finished, monkeypatch, capsys):
    before = (finished / "low_rank.csv").read_bytes()
    monkeypatch.delattr(runs, "train")
    program.main([*SHORT, *folders(finished)])
    assert (finished / "low_rank.csv").read_bytes() == before
    assert "2 of 2 runs skipped" in capsys.readouterr().out


def test_tuning_needs_no_test_images(tmp_path, finished, digits):
    config = settings.Digits(
        **SIZES, epochs=4, delay=1, delays=(1,), grid=(0.001,), seeds=1, tuning_seeds=1
    )
    results = report.Rows(tmp_path / "low_rank.csv")
    data = digits._replace(test=None)
    study = program.Study(config, results, data, Limits())
    with pytest.raises(AttributeError, match="labels"):
        study.tuned(config.recipe("mlp"), [Arm()])
    assert [row["chosen"] for row in results.rows()] == ["grid"]


def test_what_is_stopped_goes_on_with_the_same_numbers(tmp_path, finished, digits):
    recipe = SMALL.recipe("mlp")
    run = Run(recipe, 4, 0.01, "cosine", "tuned", 0, Arm("oialr", 0.9, 1))
    whole = runs.train(run, digits)
    late = Limits(tmp_path, deadline=-math.inf)
    for _ in range(3):  # dense, at the first ranks, and cut further
        with pytest.raises(OutOfTime):
            runs.train(run, digits, late)
    parts = runs.train(run, digits, late)
    measured = ("step_ms", "memory_mib")
    for name, ours, theirs in zip(
        runs.History._fields, parts[0], whole[0], strict=True
    ):
        if name not in measured:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert len({tuple(x) for x in whole[0].ranks.tolist()}) >= 3
    weights = (x[1].training.weights for x in (parts, whole))
    ours, theirs = map(jax.tree.leaves, weights)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not list(tmp_path.iterdir())


def test_a_network_to_be_cut_is_not_trained_again(finished, digits, monkeypatch):
    monkeypatch.delattr(runs, "compiled")
    row = rows_of(finished, "full")[1]
    rate = float(row["learning_rate"])
    run = Run(SMALL.recipe("mlp"), 4, rate, "cosine", "tuned", 1)
    limits = Limits(finished / "checkpoints")
    history, _, _ = runs.train(run, digits, limits)
    found = " ".join(f"{x:.4g}" for x in history.validation_accuracy)
    assert found == row["validation_accuracy_curve"]
    assert len(list(limits.folder.iterdir())) == 2


def test_a_run_that_diverges_is_a_result(tmp_path, finished, digits):
    config = settings.Digits(
        **SIZES, epochs=4, delay=1, delays=(1,), grid=(1e30,), tuning_seeds=1
    )
    results = report.Rows(tmp_path / "low_rank.csv")
    study = program.Study(config, results, digits, Limits())
    for arm in (Arm(), Arm("oialr", 0.5, 1)):
        assert study.tuned(config.recipe("mlp"), [arm]) == []
    assert [row["status"] for row in results.rows()] == ["diverged"] * 2


def test_a_trained_network_is_cut_to_its_best_approximation(finished, digits):
    run = Run(SMALL.recipe("mlp"), 4, 0.01, "cosine", "tuned", 0)
    tree = runs.train(run, digits)
    cut = dataclasses.replace(run, arm=Arm("truncated", 0.5, 1, (8, 4)))
    history, state, _ = runs.truncate(cut, tree, digits)
    before, after = (low_rank.materialise(x.training.weights) for x in (tree[1], state))
    for i, rank in ((1, 8), (3, 4)):
        weight = np.asarray(before["layers"][i]["kernel"][...], np.float64)
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = after["layers"][i]["kernel"][...]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    kept = (x["layers"][5]["kernel"][...] for x in (before, after))
    np.testing.assert_array_equal(*kept)
    assert 0.1 < history.validation_accuracy[-1] < 1


# ----------------------------------------------------------------------------- steps


def first_step(digits, optimiser, arm, **changes):
    """States before and after one step at rate 0.1, and the batch."""
    config = dataclasses.replace(SMALL, momentum=0.0, weight_decay=0.0, **changes)
    recipe = config.recipe("mlp", "orthogonal_sgd" if optimiser else "")
    if not optimiser:
        recipe = dataclasses.replace(recipe, optimiser="sgd")
    run = Run(recipe, 1, 0.1, "constant", "grid", 0, arm)
    state = training.initialise(run)
    if arm.arm == "oialr":
        checked = training.make_trainer(recipe, 1.0, arm).check(state.training, 0)
        state = state._replace(training=checked)
    batch = jax.tree.map(lambda x: x[:64], digits.train)
    step = functools.partial(training.train_step, recipe=recipe)
    after, _ = jax.jit(step)(state, batch, jax.random.key(0), jnp.float32(0.1))
    return state.training, after.training, batch


def gradients(params, batch):
    """Gradients of the dense kernels, from the MLP written out, in float64."""
    x = np.asarray(batch.images, np.float64).reshape(64, 64)
    layers = [params["layers"][i] for i in (1, 3, 5)]
    kernels = [np.asarray(y["kernel"][...], np.float64) for y in layers]
    inputs, masks = [], []
    for k, (kernel, layer) in enumerate(zip(kernels, layers, strict=True)):
        inputs.append(x)
        x = x @ kernel + np.asarray(layer["bias"][...], np.float64)
        masks.append(x > 0)
        x = np.maximum(x, 0) if k < 2 else x
    shares = np.exp(x - x.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    delta = (shares - np.eye(10)[np.asarray(batch.labels)]) / 64
    found = []
    for k in (2, 1, 0):
        found.insert(0, inputs[k].T @ delta)
        if k:
            delta = (delta @ kernels[k].T) * masks[k - 1]
    return found


def test_a_step_at_full_rank_is_that_of_sgd(digits):
    before, after, batch = first_step(digits, None, Arm())
    before, after = (x.weights.trainable["layers"] for x in (before, after))
    for i, grad in zip((1, 3, 5), gradients({"layers": before}, batch), strict=True):
        old, new = (x[i]["kernel"][...] for x in (before, after))
        np.testing.assert_allclose(new, old - 0.1 * grad, rtol=0, atol=1e-6)


def test_a_step_of_sigma_is_the_gradient_between_the_bases(digits):
    before, after, batch = first_step(digits, None, Arm("oialr", 0.3, 0))
    dense = low_rank.materialise(before.weights)
    grads = dict(zip((1, 3), gradients(dense, batch), strict=False))
    for i, grad in grads.items():
        bases = before.weights.frozen[f"layers/{i}/kernel"]
        u, vt = (np.asarray(x[0], np.float64) for x in (bases.u, bases.vt))
        trees = (x.weights.trainable["layers"] for x in (before, after))
        old, new = (x[i]["kernel"] for x in trees)
        old, new = (np.asarray(x[...]) for x in (old, new))
        np.testing.assert_allclose(
            new, old - 0.1 * u.T @ grad @ vt.T, rtol=0, atol=1e-6
        )
        assert (after.weights.frozen[f"layers/{i}/kernel"].u == bases.u).all()


def test_the_orthogonal_step_is_orthogonal_inside_the_bases(digits):
    before, after, batch = first_step(digits, "orthogonal", Arm("oialr", 0.3, 0))
    grad = gradients(low_rank.materialise(before.weights), batch)[0]
    bases = before.weights.frozen["layers/1/kernel"]
    u, vt = (np.asarray(x[0], np.float64) for x in (bases.u, bases.vt))
    a, s, bt = np.linalg.svd(u.T @ grad @ vt.T)
    there = s > 1e-3 * s[0]  # a unit that no image excites has no gradient
    assert 10 < there.sum() <= 16
    trees = (x.weights.trainable["layers"] for x in (before, after))
    old, new = (x[1]["kernel"] for x in trees)
    old, new = (np.asarray(x[...], np.float64) for x in (old, new))
    expected = (a * there) @ bt
    np.testing.assert_allclose((old - new) / 0.1, expected, rtol=0, atol=2e-3)


# -------------------------------------------------------------------------- networks


def test_networks_are_those_of_the_papers():
    config = settings.Cifar10()

    def count(model):
        leaves = jax.tree.leaves(training.shapes(config.recipe(model)))
        return sum(math.prod(x.shape) for x in leaves)

    assert count("resnet") == 269_722  # ResNet-20
    width, patches = 768, 192 * 768 + 768
    block = 12 * width**2 + 13 * width  # two norms, four and two matrices, biases
    tables = 18 * width  # class token and positions
    assert count("vit") == 6 * block + patches + tables + 2 * width + 7690


@pytest.mark.parametrize(("model", "count"), [("vit", 13), ("resnet", 7)])
def test_every_layer_but_the_head_is_factorised(model, count):
    sizes = {"vit_width": 24, "vit_depth": 2, "vit_heads": 2}
    sizes |= {"resnet_width": 4, "resnet_depth": 1}
    recipe = settings.Cifar10(**sizes, layer_step=0.5).recipe(model)
    layers, matrices = training.layers_of(recipe), training.matrices_of(recipe)
    assert len(layers) == count and set(matrices) - set(layers) == {"head/kernel"}
    trainer = training.make_trainer(recipe, 0.1, Arm("oialr", 0.3, 1))
    # Its order fits the network.
    state = jax.eval_shape(trainer.init, training.shapes(recipe))
    assert not low_rank.ranks(state)


# -------------------------------------------------------------------------- the page


def made(arm, seed, accuracy, *, chosen="tuned", ranks=(), trains=1.0, beta=0.3):
    beta = 0.0 if arm == "full" else beta
    own = Arm(arm, beta, 0 if arm == "full" else 1, ranks)
    run = Run(SMALL.recipe("mlp"), 5, 0.01, "cosine", chosen, seed, own)
    values = dict.fromkeys(report.COLUMNS, "") | run.key()
    middle = (1 + trains) / 2 if trains < 1 else trains
    curves = dict.fromkeys(("trainable", "stored"), f"1 1 {middle} {trains} {trains}")
    curves |= {"step_ms": "9 2 2 4 3" if trains == 1 else "9 2 1 5 3"}
    curves |= {"memory_mib": "4 4 4 4 4" if trains == 1 else "4 4 6 5 5"}
    values |= {f"{name}_curve": text for name, text in curves.items()}
    values |= {"trainable": str(trains), "stored": str(trains), "train_loss": "1"}
    values |= {"test_accuracy": str(accuracy), "test_loss": "1", "seconds": "1"}
    values |= {"layers": "a b", "ranks_at_end": "4 8" if trains < 1 else ""}
    values |= {"matrices": "a b", "stability": "0.9 0.8; 0.95 0.9; 1 0.99"}
    return values | {"status": "finished", "load": "1.0", "device": "cpu"}


def test_the_table_has_means_errors_and_paired_differences():
    rows = [made("full", 0, 0.5), made("full", 1, 0.7)]
    rows += [made("oialr", 1, 0.75, trains=0.25), made("oialr", 0, 0.52, trains=0.25)]
    table = report.comparison(rows)
    # By hand: 0.5 and 0.7 have the standard error 0.1; +0.02 and +0.05 0.015.
    assert "| `adam`, full rank | 0.01 | 60.00 ± 10.00 |  | 100 | 100 |" in table
    expected = "| 0.01 | 63.50 ± 11.50 | 3.50 ± 1.50 | 25 | 25 |"
    # By hand: the first epoch left out, the fastest dense one, the fastest at the end.
    expected += " 2.00 → 3.00 | 4.0 → 5.0, peak 6.0 | 2 |"
    assert f"| `adam`, OIALR, beta 0.3 {expected}" in table
    assert "| 2.00 | 4.0 | 2 |" in table
    assert "| a | 4 |" in report.rank_table(rows).replace("`", "")


def test_a_claim_holds_two_standard_errors_away():
    assert page.verdict(np.array([1.0, 1.2, 0.8])) == "holds"
    assert page.verdict(np.array([-1.0, -1.2, -0.8])) == "does not hold"
    assert page.verdict(np.array([1.0, -1.2, 0.8])) == "no difference seen"
    assert page.verdict(np.array([1.0])) == "too few runs"


def test_claims_name_what_does_not_hold():
    full = [made("full", k, 0.5 + 0.01 * k) for k in range(3)]
    low = [made("oialr", k, 0.6 + 0.011 * k, trains=0.25) for k in range(3)]
    cut = [made("truncated", k, 0.7 + 0.01 * k, trains=0.25) for k in range(3)]
    tuned = [made("oialr", k, 0.4, chosen="joint", trains=1.5) for k in range(3)]
    found = {what: held for what, _, held in page.claims(full + low + cut + tuned)}
    ours = "`adam`, OIALR, beta 0.3: "
    assert found[ours + "as good as full rank"] == "holds"
    assert found[ours + "better than cutting the trained network"] == "does not hold"
    assert found[ours + "fewer numbers to store"] == "holds"
    name = "`adam`, OIALR, tuned: beta 0.3, delay 1: "
    assert found[name + "better than full rank"] == "does not hold"
    assert found[name + "fewer numbers to store"] == "does not hold"
    settling = next(what for what in found if "settle" in what)
    assert found[settling] == "holds"
    for row in full:
        row["stability"] = "0.9 0.8; 0.95 0.9; 0.8 0.7"
    (line,) = (x for x in page.claims(full) if "settle" in x[0])
    assert line[2] == "does not hold"


def test_what_is_not_yet_run_stands_beside_its_command(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(program.Study, "all_of", lambda self, model: told.append(self))
    monkeypatch.setattr(settings, "load_cifar10", lambda folder: load_digits())
    text = page.write(tmp_path, []).read_text()
    commands = re.findall(r"`python -m examples.low_rank ([^`]+)`", text)
    for command in commands:
        program.main([*shlex.split(command), *folders(tmp_path)])
    assert len(commands) == len(told) == 5
    assert {x.config.epochs for x in told} == {30, 200, 300}
    assert all(x.config.sizes("resnet")["width"] == 16 for x in told[2:])


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"delay": 30}, "`delay` is 30; expected below 30 epochs"),
        ({"delays": ()}, "`delays`"),
        ({"delays": (3, 40)}, "at least one, from 0 to 29"),
        ({"betas": (0.0,)}, r"`betas` is \(0.0,\); expected in \(0, 1\)"),
        ({"betas": (0.3, 0.3)}, "each once"),
        ({"orthogonal_beta": 1.0}, "`orthogonal_beta` is 1.0"),
        ({"grid": (0.1, 0.01)}, "increasing order"),
        ({"orthogonal_grid": (math.nan,)}, "`orthogonal_grid`"),
        ({"frequency": 0}, "`frequency` is 0"),
        ({"layer_step": 2.0}, "`layer_step` is 2.0"),
        ({"seeds": 0}, "`seeds` is 0"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"minutes": 0.0}, "`minutes` is 0.0"),
        ({"train_images": -1}, "`train_images` is -1"),
    ],
)
def test_bad_settings_say_what_was_expected(setting, message):
    with pytest.raises(ValueError, match=message):
        settings.Digits(**setting)


def test_delays_of_an_arm_that_is_left_out_do_not_matter():
    assert settings.Digits(epochs=8, delay=2, parts=("fixed",)).delays == (3, 6, 12)


def test_bad_commands_end_with_a_message(tmp_path, capsys):
    for arguments, message in (
        (["digits", "--parts", "fixd"], "invalid choice 'fixd'"),
        (["digits", "--delay", "40"], "`delay` is 40"),
        (["letters"], "digits"),
        (["cifar10", "--vit-heads", "5"], "a divisor of 768"),
    ):
        with pytest.raises(SystemExit) as stopped:
            program.main(arguments)
        assert stopped.value.code not in (0, None)
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit, match="`batch_size` is 1258"):
        program.main(["digits", *folders(tmp_path), "--batch-size", "1258"])
    with pytest.raises(SystemExit, match="at most 1257: there are no more"):
        program.main(["digits", *folders(tmp_path), "--train-images", "1258"])


# -------------------------------------------------------------------------- CIFAR-10


@pytest.mark.slow
@pytest.mark.skipif("ORTHAX_DATA" not in os.environ, reason="needs ORTHAX_DATA")
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_a_few_steps_on_cifar10(tmp_path, monkeypatch, model):
    whole = settings.load_cifar10()
    few = Dataset(*(Split(x.images[:16], x.labels[:16]) for x in whole))
    monkeypatch.setattr(settings, "load_cifar10", lambda folder: few)
    command = f"cifar10 --models {model} --vit-width 16 --vit-depth 1 --vit-heads 2 "
    command += "--resnet-width 4 --resnet-depth 1 --batch-size 8 --epochs 3 --seeds 1 "
    command += "--delay 1 --delays 1 --frequency 1 --grid 0.003 --betas 0.9 "
    command += "--orthogonal-grid 0.01 --rank-multiple 1 --layer-step 0.5"
    program.main([*command.split(), *folders(tmp_path)])
    rows = [row for row in read(tmp_path) if row["chosen"] != "grid"]
    kinds = ["full", "oialr", "truncated", "fixed", "oialr", "full", "oialr"]
    assert [row["arm"] for row in rows] == kinds
    assert all(row["status"] == "finished" for row in rows)
