"""The command line of examples/train.py, the optimisers, the results, the digits."""

import contextlib
import csv
import io
import math

import jax
import numpy as np
import pytest
from sklearn import datasets

from examples import train
from examples.data import load_digits
from examples.training import optimisers, program, report, supervised
from examples.training.supervised import Run

SHORT = ["digits", "--epochs", "2", "--seeds", "1", "--no-tune"]


def read(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def make_run(learning_rate=0.01, seed=0):
    recipe = train.Digits().recipe("sgd")
    return Run(recipe, 2, learning_rate, "constant", "fixed", seed)


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

    def train_together(runs, train_split, validation, *, limits, told, finish):
        rate, shape = runs[0].learning_rate, (len(runs), runs[0].epochs)
        accuracy, loss = 0.6 if rate >= 0.1 else 0.5, 1 / rate
        values = loss, accuracy, loss, accuracy, 1.0
        finish("state", supervised.History(*(np.full(shape, x) for x in values)))

    looks = []

    def programs(recipe, seeds):
        def evaluate(state, split):
            looks.append(split)
            return np.zeros(seeds), np.full(seeds, 0.25)

        return None, None, evaluate

    monkeypatch.setattr(supervised, "train_together", train_together)
    monkeypatch.setattr(supervised, "programs", programs)
    return looks


def test_a_short_run_writes_a_row_per_run_and_a_figure(finished):
    folder, printed = finished
    rows = read(folder)
    assert [row["optimiser"] for row in rows] == ["sgd", "orthogonal_sgd"]
    for row in rows:
        assert tuple(row) == report.COLUMNS
        assert row["status"] == "finished"
        assert row["accuracy_3"] == row["accuracy_5"] == row["accuracy_50"] == ""
        assert float(row["seconds"]) > 0
        # 1257 images in each of the two epochs.
        rate = 2 * 1257 / float(row["seconds"])
        assert float(row["images_per_s"]) == pytest.approx(rate, rel=0.1)
        assert row["jax"] == jax.__version__
        for name in report.CURVES:
            values = report.curve(row, name)
            assert len(values) == int(row["epochs"]) == 2
            assert values[-1] == pytest.approx(float(row[name]), rel=1e-3)
            low, high = (0, 1) if name.endswith("accuracy") else (0, 5)
            assert all(low < value < high for value in values)
        first, _ = report.curve(row, "validation_accuracy")
        assert first == pytest.approx(float(row["accuracy_1"]), rel=1e-3)
        assert 0 < float(row["test_accuracy"]) < 1
        assert 0 < float(row["test_loss"]) < 5
    assert rows[0]["method"] == "" and rows[1]["method"] == "auto"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 2" in printed and "epoch 3" not in printed
    assert not list((folder / "checkpoints").iterdir())


# Seeds 0 to 3, test images: 0.35 to 0.65 and 0.80 to 0.87. Chance is 0.1.
@pytest.mark.parametrize(("at", "least"), [(0, 0.25), (1, 0.6)])
def test_two_epochs_beat_chance(finished, at, least):
    row = read(finished[0])[at]
    assert float(row["validation_accuracy"]) > least
    assert float(row["test_accuracy"]) > least


def test_finished_runs_are_skipped(finished, monkeypatch, capsys):
    folder, _ = finished
    before = (folder / "results.csv").read_bytes()
    monkeypatch.delattr(supervised, "train_together")
    train.main([*SHORT, "--output", str(folder)])
    assert (folder / "results.csv").read_bytes() == before
    assert "2 of 2 runs skipped" in capsys.readouterr().out


def test_what_is_stopped_goes_on_unless_it_is_to_start_over(
    finished, tmp_path, capsys, monkeypatch
):
    begun = []
    train_epochs = supervised.train_together

    def train_together(runs, *args, told, **options):
        def also_told(epoch, history):
            begun.append((runs[0].recipe.optimiser, epoch))
            told(epoch, history)

        return train_epochs(runs, *args, told=also_told, **options)

    monkeypatch.setattr(supervised, "train_together", train_together)
    arguments = [*SHORT, "--output", str(tmp_path)]
    for expected in (("sgd", 0), ("sgd", 1), ("orthogonal_sgd", 0)):
        train.main([*arguments, "--minutes", "1e-9"])
        assert begun[-1] == expected
        assert "out of time; started again, it goes on" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
    train.main(arguments)
    assert begun[3:] == [("orthogonal_sgd", 1)]
    clock = ("seconds", "images_per_s")
    for found, expected in zip(read(tmp_path), read(finished[0]), strict=True):
        assert all(found[x] == expected[x] for x in expected if x not in clock)

    # Neither rows, at first, nor a checkpoint, then, is taken over.
    for option, epoch in (("--fresh", 0), ("--fresh", 0), ("--no-fresh", 1)):
        begun.clear()
        train.main([*arguments, "--minutes", "1e-9", option])
        assert begun == [("sgd", epoch)]


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
        assert row["test_accuracy"] == ("" if row["chosen"] == "grid" else "0.25")
    assert len(untrained) == 8
    for split in untrained:
        np.testing.assert_array_equal(split.images, digits.test.images)
    seeds = {name: {r["seed"] for r in rows if r["chosen"] == name} for name in chosen}
    assert not seeds["grid"] & seeds["tuned"]
    # Equal accuracies: the lower loss, at the larger rate, decides.
    assert {r["learning_rate"] for r in rows if r["chosen"] == "tuned"} == {"1.0"}
    printed = capsys.readouterr().out
    assert "sgd is best at the highest rate of the grid" in printed
    assert "A demonstration: 2 seeds a rate" in printed
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    train.main(["digits", "--seeds", "10", "--output", str(tmp_path), *grid[:-1], "10"])
    assert "demonstration" not in capsys.readouterr().out


def test_another_split_has_other_test_images_and_is_another_run(tmp_path, untrained):
    for split in ("0", "1", "1"):
        train.main([*SHORT, "--split", split, "--output", str(tmp_path)])
    assert [row["data"] for row in read(tmp_path)] == [
        *["digits"] * 2,
        *["digits, split 1"] * 2,
    ]
    first, second = untrained[0], untrained[-1]
    assert len(first.labels) == len(second.labels) == 270
    assert not np.array_equal(first.labels, second.labels)


def test_tuning_needs_no_test_images(tmp_path, untrained, digits):
    config = train.Digits(optimisers=("sgd",), epochs=1, tuning_seeds=1)
    runs = train.plan(config, "grid", {"sgd": (0.01, 0.1)})
    results = report.Results(tmp_path / "results.csv")
    data = digits._replace(test=None)
    assert train.tune(runs, results, data) == {"sgd": 0.1}
    assert untrained == []


def test_a_grid_that_is_not_finished_settles_nothing(tmp_path, digits):
    config = train.Digits(optimisers=("sgd",), epochs=1, tuning_seeds=2)
    runs = train.plan(config, "grid", {"sgd": (0.01,)})
    results = report.Results(tmp_path / "results.csv")
    limits = supervised.Limits(deadline=0.0)
    assert train.tune(runs, results, digits, limits) is None
    assert len(results.rows()) == 1
    assert set(train.tune(runs, results, digits, limits)) == {"sgd"}


def test_the_same_seed_gives_the_same_numbers(digits):
    def numbers(seed):
        state, history = supervised.train_together([make_run(seed=seed)], *digits[:2])
        return [*map(np.asarray, jax.tree.leaves(state)), *history[:-1]]

    first, second, other = map(numbers, (0, 0, 1))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(first, other, strict=True):
        assert not np.array_equal(a, b)


def test_a_run_that_diverges_is_a_result(digits, tmp_path):
    results = report.Results(tmp_path / "results.csv")
    run = make_run(learning_rate=1e30)
    (row,) = supervised.train_runs([run], results, digits)
    assert row["accuracy_1"] == row["test_accuracy"] == row["train_loss"] == "nan"
    assert row["status"] == "diverged"
    arms = report.gather([row])
    assert "diverged 1/1" in report.make_table(arms)
    report.plot(arms, "diverged", tmp_path / "curves.png")


def test_table_gives_mean_and_standard_error():
    # By hand: mean 0.6, standard deviation 0.2, over the root of 3.
    assert report.spread(np.array([0.4, 0.6, 0.8])) == "0.600 ± 0.115"
    assert report.spread(np.array([0.4])) == "0.400"
    assert report.spread(np.array([0.4, np.nan])) == "diverged 1/2"


def make_optimiser(name, learning_rate, **changes):
    method = "" if name in optimisers.WITHOUT_METHOD else "svd"
    options = {"momentum": 0.9, "weight_decay": 0.1, "b2": 0.99, "method": method}
    return optimisers.make_optimiser(name, learning_rate, **options | changes)


@pytest.mark.parametrize("name", optimisers.NAMES)
def test_every_optimiser_descends(name):
    params = {"kernel": np.eye(4, 3, dtype=np.float32), "bias": np.ones(3, np.float32)}
    grads = {"kernel": params["kernel"] * [1, 2, 3], "bias": params["bias"]}
    grads = jax.tree.map(np.float32, grads)
    tx = make_optimiser(name, 0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    for update, grad in zip(*map(jax.tree.leaves, (updates, grads)), strict=True):
        assert np.vdot(update, grad) < -0.01


def polar_factor(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


# The gradient as each takes it, and what it does with the velocity.
FAMILY = {
    "sgd": lambda grad: grad,
    "n_sgd": lambda grad: grad / np.linalg.norm(grad),
    "cn_sgd": lambda grad: grad / np.linalg.norm(grad, axis=0),
    "orthogonal_sgd": polar_factor,
}


def follow(name, direction):
    """Compare three steps with the direction of a gradient and a weight, by hand."""
    rng = np.random.default_rng(0)
    weight, *gradients = rng.normal(size=(4, 5, 4))
    tx = make_optimiser(name, 0.5)
    params = {"kernel": np.float32(weight)}
    state = tx.init(params)
    for grad in gradients:
        updates, state = tx.update({"kernel": np.float32(grad)}, state, params)
        params = jax.tree.map(np.add, params, updates)
        weight = weight - 0.5 * direction(grad, weight)
        np.testing.assert_allclose(params["kernel"], weight, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_sgd_family_follows_the_equations(name):
    velocity = np.zeros((5, 4))

    def direction(grad, weight):
        velocity[:] = 0.9 * velocity + FAMILY[name](grad) + 0.1 * weight
        return velocity

    follow(name, direction)


def test_sgd_orthogonal_takes_the_factor_of_the_momentum():
    velocity = np.zeros((5, 4))

    def direction(grad, weight):
        velocity[:] = 0.9 * velocity + grad
        return polar_factor(velocity) + 0.1 * weight

    follow("sgd_orthogonal", direction)


@pytest.mark.parametrize("name", ["adam", "orthogonal_adam", "adamw"])
def test_adam_family_follows_the_equations(name):
    first, second, steps = np.zeros((5, 4)), np.zeros((5, 4)), []

    def direction(grad, weight):
        steps.append(grad)
        if name == "orthogonal_adam":
            grad = polar_factor(grad)
        decay = 0.1 * weight
        if name != "adamw":
            grad, decay = grad + decay, 0
        first[:] = 0.9 * first + 0.1 * grad
        second[:] = 0.99 * second + 0.01 * grad**2
        mean, square = (
            first / (1 - 0.9 ** len(steps)),
            second / (1 - 0.99 ** len(steps)),
        )
        return mean / (np.sqrt(square) + 1e-8) + decay

    follow(name, direction)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_qr_is_numpys_with_every_column_in_its_sense(shape):
    stack = np.random.default_rng(0).normal(size=(2, *shape))
    for matrix, found in zip(
        stack, optimisers.QR().factor(np.float32(stack)), strict=True
    ):
        tall = matrix if shape[0] >= shape[1] else matrix.T
        q, r = np.linalg.qr(tall)
        expected = q * np.sign(np.diag(r))
        expected = expected if shape[0] >= shape[1] else expected.T
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_only_the_convolutions_where_the_recipe_says_so():
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32)},
        "head": {"kernel": rng.normal(size=(6, 5)).astype(np.float32)},
    }
    for layers, orthogonal in {"all": True, "convolutions": False}.items():
        tx = make_optimiser("orthogonal_sgd", 1.0, weight_decay=0.0, layers=layers)
        updates, _ = tx.update(params, tx.init(params), params)
        conv = -updates["conv"]["kernel"].reshape(-1, 4)
        np.testing.assert_allclose(conv.T @ conv, np.eye(4), rtol=0, atol=1e-5)
        head = params["head"]["kernel"]
        expected = polar_factor(head) if orthogonal else head
        found = -updates["head"]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimisers": ("sdg",)}, r"`optimisers` is \('sdg',\).* sgd, n_sgd"),
        ({"optimisers": ("sgd", "sgd")}, "each once"),
        ({"optimisers": ()}, "one name or more"),
        ({"method": "exact"}, "`method` is 'exact'; expected one of auto, fast, svd"),
        ({"epochs": 0}, "`epochs` is 0; expected at least 1"),
        ({"seeds": 0}, "`seeds` is 0; expected at least 1"),
        ({"tuning_seeds": -1}, "`tuning_seeds` is -1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"learning_rate": -0.1}, "`learning_rate` is -0.1; expected a positive"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan"),
        ({"grid": ()}, "`grid`"),
        ({"grid": (0.1, 0.01)}, "increasing order"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"b2": -0.1}, "`b2` is -0.1"),
        ({"seeds_at_once": 0}, "`seeds_at_once` is 0"),
        ({"minutes": 0.0}, "`minutes` is 0.0; expected a positive"),
        ({"checkpoint_seconds": -1.0}, "`checkpoint_seconds` is -1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` is -1.0"),
    ],
)
def test_bad_settings_say_what_was_expected(setting, message):
    with pytest.raises(ValueError, match=message):
        train.Digits(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"model": "resnet19"},
            "`model` is 'resnet19'; expected one of basic_cnn, res",
        ),
        ({"norm_groups": 0}, "`norm_groups` is 0"),
        ({"classes": 9}, "`classes` is 9; expected at least 10"),
    ],
)
def test_bad_settings_of_cifar10_too(setting, message):
    with pytest.raises(ValueError, match=message):
        train.Cifar10(**setting)


def test_cifar10_has_the_settings_of_the_paper():
    config = train.Cifar10(method="svd", seeds=1)
    (run,) = train.plan(config, "fixed", {"orthogonal_sgd": (config.learning_rate,)})
    assert run.key() == {
        "data": "cifar10",
        "model": "basic_cnn",
        "optimiser": "orthogonal_sgd",
        "method": "svd",
        "layers": "all",
        "learning_rate": "0.01",
        "schedule": "constant",
        "chosen": "fixed",
        "seed": "0",
        "epochs": "100",
        "batch_size": "1024",
        "momentum": "0.9",
        "b2": "0.99",
        "weight_decay": "0.0005",
        "augment": "True",
        "classes": "None",
        "cifar_stem": "False",
        "dtype": "float32",
        "norm_groups": "1",
    }
    assert tuple(run.key()) == report.KEY


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


def test_bad_batches_end_with_a_message(tmp_path):
    message = "`batch_size` is 1258; expected at most the 1257"
    with pytest.raises(SystemExit, match=message):
        train.main([*SHORT, "--output", str(tmp_path), "--batch-size", "1258"])


def test_missing_data_end_with_a_message(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(SystemExit, match="Two ways to get it"):
        train.main(["cifar10", "--data-dir", str(tmp_path)])


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


def test_an_interrupted_program_says_how_to_go_on(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "digits", "--epochs", "9"])

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        program.run(main)
    assert ended.value.code == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "Finished runs are kept" in lines[0]
    assert lines[1].endswith("digits --epochs 9")
    assert program.run(lambda: 3) is None
