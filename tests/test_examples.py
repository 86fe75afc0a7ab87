import contextlib
import csv
import dataclasses
import io
import math
from typing import get_args

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn import datasets

from examples import report, train
from examples.data import load_digits
from examples.models.basic_cnn import BasicCNN

SHORT = ["digits", "--epochs", "2", "--seeds", "1", "--no-tune"]


def read(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def make_run(name="sgd", **changes):
    config = train.Digits(optimisers=(name,), epochs=2, seeds=1)
    (run,) = train.plan(config, "fixed", {name: (config.learning_rate,)})
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main([*SHORT, "--output", str(folder)])
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def digits():
    return jax.device_put(load_digits())


@pytest.fixture
def untrained(monkeypatch):
    """Replace training: accuracy 0.6 from rate 0.1 on, else 0.5; loss 1 / rate."""

    def train_run(run, train_split, validation):
        accuracy = 0.6 if run.learning_rate >= 0.1 else 0.5
        loss = 1 / run.learning_rate
        return "state", train.Outcome(loss, loss, [accuracy] * run.epochs, 0.0)

    looks = []

    def evaluate(state, split):
        looks.append(split)
        return 0.0, 0.25

    monkeypatch.setattr(train, "train_run", train_run)
    monkeypatch.setattr(train, "evaluate", evaluate)
    return looks


def test_a_short_run_writes_a_row_per_run_and_a_figure(finished):
    folder, printed = finished
    rows = read(folder)
    assert [row["optimiser"] for row in rows] == ["sgd", "orthogonal_sgd"]
    for row in rows:
        assert tuple(row) == report.COLUMNS
        assert row["curve"].split()[0] == row["accuracy_1"]
        assert len(row["curve"].split()) == int(row["epochs"]) == 2
        assert row["accuracy_3"] == row["accuracy_5"] == row["accuracy_20"] == ""
        assert 0 <= float(row["test_accuracy"]) <= 1
        assert math.isfinite(float(row["train_loss"]))
        assert float(row["seconds"]) > 0
        assert row["jax"] == jax.__version__
    assert rows[0]["method"] == "" and rows[1]["method"] == "auto"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 2" in printed and "epoch 3" not in printed


def test_two_epochs_beat_chance(finished):
    for row in read(finished[0]):
        # Measured: 0.615 and 0.878 after two epochs; chance is 0.1.
        assert float(row["curve"].split()[-1]) > 0.4
        assert float(row["test_accuracy"]) > 0.4


def test_finished_runs_are_skipped(finished, monkeypatch, capsys):
    folder, _ = finished
    before = (folder / "results.csv").read_bytes()
    monkeypatch.delattr(train, "train_run")
    train.main([*SHORT, "--output", str(folder)])
    assert (folder / "results.csv").read_bytes() == before
    assert "2 of 2 runs skipped" in capsys.readouterr().out


def test_other_settings_are_other_runs_and_fresh_forgets(tmp_path, untrained):
    arguments = ["digits", "--no-tune", "--output", str(tmp_path), "--seeds"]
    train.main([*arguments, "2"])
    train.main([*arguments, "2", "--method", "svd"])  # sgd has no method
    assert len(read(tmp_path)) == 4 + 2
    train.main([*arguments, "3"])
    assert len(read(tmp_path)) == 6 + 2
    for change in ["--epochs=2", "--learning-rate=1", "--batch-size=2", "--momentum=0"]:
        count = len(read(tmp_path))
        train.main([*arguments, "1", change])
        assert len(read(tmp_path)) == count + 2
    train.main([*arguments, "1", "--fresh"])
    assert len(read(tmp_path)) == 2


def test_the_test_images_are_seen_once_a_final_run(tmp_path, untrained, capsys, digits):
    grid = ["--grid", "0.01", "0.1", "1", "--tuning-seeds", "2"]
    train.main(["digits", "--seeds", "2", "--output", str(tmp_path), *grid])
    rows = read(tmp_path)
    chosen = [row["chosen"] for row in rows]
    assert chosen == ["grid"] * 12 + ["fixed"] * 4 + ["tuned"] * 4
    for row in rows:
        assert row["test_accuracy"] == ("" if row["chosen"] == "grid" else "0.2500")
    assert len(untrained) == 8
    for split in untrained:
        np.testing.assert_array_equal(split.images, digits.test.images)
    seeds = {name: {r["seed"] for r in rows if r["chosen"] == name} for name in chosen}
    assert not seeds["grid"] & seeds["tuned"]
    # Equal accuracies: the lower loss, at the larger rate, decides.
    assert {r["learning_rate"] for r in rows if r["chosen"] == "tuned"} == {"1.0"}
    assert "sgd is best at the highest rate of the grid" in capsys.readouterr().out


def test_tuning_needs_no_test_images(tmp_path, untrained):
    config = train.Digits(optimisers=("sgd",), epochs=1, tuning_seeds=1)
    runs = train.plan(config, "grid", {"sgd": (0.01, 0.1)})
    results = report.Results(tmp_path / "results.csv")
    assert train.tune(runs, results, None, None) == {"sgd": 0.1}
    assert untrained == []


def test_the_same_seed_gives_the_same_numbers(digits):
    def curve_and_weights(seed):
        state, outcome = train.train_run(make_run(seed=seed), *digits[:2])
        return outcome, jax.tree.leaves(state.params)

    first, weights = curve_and_weights(0)
    second, same_weights = curve_and_weights(0)
    other, _ = curve_and_weights(1)
    assert first.curve == second.curve
    assert first.train_loss == second.train_loss != other.train_loss
    for a, b in zip(weights, same_weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_diverges_is_a_result(digits, tmp_path):
    results = report.Results(tmp_path / "results.csv")
    run = make_run(learning_rate=1e30)
    (row,) = train.train_runs([run], results, *digits)
    assert row["accuracy_1"] == row["test_accuracy"] == row["train_loss"] == "nan"
    arms = report.gather([row])
    assert "diverged 1/1" in report.make_table(arms)
    report.plot(arms, "diverged", tmp_path / "curves.png")


def test_table_gives_mean_and_standard_error():
    # By hand: mean 0.6, standard deviation 0.2, over the root of 3.
    assert report.spread(np.array([0.4, 0.6, 0.8])) == "0.600 ± 0.115"
    assert report.spread(np.array([0.4])) == "0.400"
    assert report.spread(np.array([0.4, np.nan])) == "diverged 1/2"


@pytest.mark.parametrize("name", get_args(train.Optimiser))
def test_every_optimiser_descends(name):
    params = {"kernel": np.eye(4, 3, dtype=np.float32), "bias": np.ones(3, np.float32)}
    grads = {"kernel": params["kernel"] * [1, 2, 3], "bias": params["bias"]}
    grads = jax.tree.map(np.float32, grads)
    tx = train.make_optimiser(make_run(name).recipe, 0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    for update, grad in zip(*map(jax.tree.leaves, (updates, grads)), strict=True):
        assert np.vdot(update, grad) < -0.01


@pytest.mark.parametrize("name", ["sgd", "n_sgd", "cn_sgd", "orthogonal_sgd"])
def test_sgd_family_follows_the_equations(name):
    rng = np.random.default_rng(0)
    weight, first, second = rng.normal(size=(3, 5, 4))

    def change(grad):
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        return {
            "sgd": grad,
            "n_sgd": grad / np.linalg.norm(grad),
            "cn_sgd": grad / np.linalg.norm(grad, axis=0),
            "orthogonal_sgd": u @ vt,
        }[name]

    method = "svd" if name == "orthogonal_sgd" else ""
    tx = train.make_optimiser(train.Recipe(name, method, 0.9, 0.1, 1), 0.5)
    params = {"kernel": np.float32(weight)}
    state = tx.init(params)
    velocity = np.zeros_like(weight)
    for grad in (first, second):
        updates, state = tx.update({"kernel": np.float32(grad)}, state, params)
        params = jax.tree.map(np.add, params, updates)
        velocity = 0.9 * velocity + change(grad) + 0.1 * weight
        weight = weight - 0.5 * velocity
        np.testing.assert_allclose(params["kernel"], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimisers": ("sdg",)}, r"`optimisers` is \('sdg',\).* sgd, n_sgd"),
        ({"optimisers": ("sgd", "sgd")}, "each once"),
        ({"optimisers": ()}, "one name or more"),
        ({"method": "qr"}, "`method` is 'qr'; expected one of auto, svd"),
        ({"epochs": 0}, "`epochs` is 0; expected at least 1"),
        ({"seeds": 0}, "`seeds` is 0; expected at least 1"),
        ({"tuning_seeds": -1}, "`tuning_seeds` is -1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"learning_rate": -0.1}, "`learning_rate` is -0.1; expected a positive"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan"),
        ({"grid": ()}, "`grid`"),
        ({"grid": (0.1, 0.01)}, "increasing order"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` is -1.0"),
    ],
)
def test_bad_settings_say_what_was_expected(setting, message):
    with pytest.raises(ValueError, match=message):
        train.Digits(**setting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--optimisers", "sdg"], "invalid choice 'sdg'"),
        (["digits", "--epochs", "0"], "`epochs` is 0; expected at least 1"),
        (["letters"], "digits"),
        ([], "digits"),
    ],
)
def test_bad_commands_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code not in (0, None)
    assert message in " ".join(capsys.readouterr().err.split())


def test_bad_batches_and_files_end_with_a_message(tmp_path):
    arguments = [*SHORT, "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="`batch_size` is 1258; expected at most the"):
        train.main([*arguments, "--batch-size", "1258"])
    for text in ["a,b\n", ",".join(report.COLUMNS) + "\n1,2\n"]:
        (tmp_path / "results.csv").write_text(text)
        with pytest.raises(SystemExit, match=r"line .: expected the .* columns"):
            train.main(arguments)


def test_digits_are_divided_without_loss_and_by_class():
    parts = load_digits()
    assert [len(split.labels) for split in parts] == [1257, 270, 270]
    pixels, labels = datasets.load_digits(return_X_y=True)
    rows = np.concatenate([split.images.reshape(-1, 64) * 16 for split in parts])
    rows = np.column_stack([rows, np.concatenate([split.labels for split in parts])])
    whole = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(
        rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)].astype(rows.dtype)
    )
    for split in parts:
        shares = np.bincount(split.labels) / len(split.labels)
        np.testing.assert_allclose(
            shares, np.bincount(labels) / 1797, rtol=0, atol=4e-3
        )


def test_basic_cnn_is_the_network_of_the_paper():
    model = BasicCNN((32, 32, 3), 10, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 24714
    assert model(np.zeros((2, 32, 32, 3), np.float32)).shape == (2, 10)
