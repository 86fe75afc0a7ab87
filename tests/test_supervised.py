"""The engine of the trainers: killed or not, alone or beside others, the same run."""

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.data import Dataset, Split
from examples.models import CLASSIFIERS
from examples.training import optimisers, supervised
from examples.training.report import Results
from examples.training.supervised import History, Limits, Recipe, Run

ROOT = Path(__file__).parents[1]
EPOCHS = 3


def make_split(count, seed):
    """Return noise of the shape of CIFAR-10."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return Split(images, rng.integers(0, 10, count).astype(np.int32))


# Batches of 16: three and a smaller one to train on, one and a smaller one to validate.
DATA = Dataset(make_split(52, 0), make_split(20, 1), make_split(24, 2))


class Linear(nnx.Module):
    """A network without batch normalisation, compiled at once."""

    def __init__(self, *, classes, cifar_stem, dtype, rngs):
        self.head = nnx.Linear(32 * 32 * 3, classes or 10, rngs=rngs)

    def __call__(self, images):
        return self.head(images.reshape(len(images), -1))


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "linear", Linear)


def make_run(
    optimiser="sgd", *, seed=0, epochs=EPOCHS, rate=0.01, method="svd", **others
):
    method = "" if optimiser in optimisers.WITHOUT_METHOD else method
    schedule = others.pop("schedule", "constant")
    settings = {
        "model": "linear",
        "layers": "all",
        "batch_size": 16,
        "momentum": 0.9,
        "b2": 0.99,
        "weight_decay": 5e-4,
    } | others
    recipe = Recipe("cifar10", optimiser=optimiser, method=method, **settings)
    return Run(recipe, epochs, rate, schedule, "fixed", seed)


def make_cnn(optimiser="sgd", seed=0):
    return make_run(optimiser, seed=seed, model="basic_cnn", augment=True)


def initialise(recipe):
    start = functools.partial(supervised.initialise, recipe=recipe)
    return jax.jit(start)(jax.random.key(0))


def train_together(runs, **options):
    return supervised.train_together(runs, DATA.train, DATA.validation, **options)


def numbers(state, history):
    """Return all that does not depend on the clock: weights, statistics, curves."""
    return [*map(np.asarray, jax.tree.leaves(state)), *history[:-1]]


@functools.cache
def uninterrupted(optimiser):
    return numbers(*train_together([make_cnn(optimiser)]))


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------- stopped, and going on


def be_killed(optimiser, folder):
    """Train with a checkpoint every epoch, until the process ends after the third."""

    def told(epoch, history):
        if epoch == EPOCHS - 1:
            os._exit(9)

    limits = Limits(Path(folder), every=0)
    train_together([make_cnn(optimiser)], limits=limits, told=told)


@pytest.mark.parametrize(
    "optimiser",
    [
        "sgd",
        pytest.param("orthogonal_sgd", marks=pytest.mark.slow),
        pytest.param("adam", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_with_the_same_numbers(optimiser, tmp_path):
    code = "import sys, test_supervised; test_supervised.be_killed(*sys.argv[1:])"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    killed = subprocess.run(
        [sys.executable, "-c", code, optimiser, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == 9, killed.stderr
    assert len(list(tmp_path.iterdir())) == 1
    epochs = []
    found = train_together(
        [make_cnn(optimiser)],
        limits=Limits(tmp_path),
        told=lambda epoch, history: epochs.append(epoch),
    )
    assert epochs == [EPOCHS - 1]  # those before are not done again
    assert_same(numbers(*found), uninterrupted(optimiser))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "optimiser",
    [
        "orthogonal_sgd",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("sgd", "adam")),
    ],
)
def test_out_of_time_is_not_the_end(optimiser, tmp_path):
    runs, limits = [make_cnn(optimiser)], Limits(tmp_path, deadline=0.0)
    for _ in range(EPOCHS - 1):  # one epoch at a time
        with pytest.raises(supervised.OutOfTime):
            train_together(runs, limits=limits)
        assert len(list(tmp_path.iterdir())) == 1
    found = train_together(runs, limits=limits)
    assert_same(numbers(*found), uninterrupted(optimiser))
    assert np.isfinite(found[1].seconds).all()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_of_their_own_runs(tmp_path):
    stopped = Limits(tmp_path, deadline=0.0)
    for seed in (0, 1):
        with pytest.raises(supervised.OutOfTime):
            train_together([make_run(seed=seed)], limits=stopped)
    for seed in (0, 1):
        found = train_together([make_run(seed=seed)], limits=Limits(tmp_path))
        assert_same(numbers(*found), numbers(*train_together([make_run(seed=seed)])))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_stays_until_the_rows_are_written(tmp_path):
    """Whoever is stopped while the network is tested, say, goes on from there."""
    seen = []

    def finish(state, history):
        seen.append(len(list(tmp_path.iterdir())))
        raise KeyboardInterrupt

    limits = Limits(tmp_path, every=0)
    with pytest.raises(KeyboardInterrupt):
        train_together([make_run()], limits=limits, finish=finish)
    epochs = []
    train_together(
        [make_run()], limits=limits, told=lambda epoch, _: epochs.append(epoch)
    )
    assert seen == [1]
    assert epochs == []
    assert list(tmp_path.iterdir()) == []


def test_no_folder_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(supervised.OutOfTime):
        train_together([make_run()], limits=Limits(every=0, deadline=0.0))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- side by side


def test_seeds_side_by_side_are_those_seeds_one_by_one():
    together = numbers(*train_together([make_cnn(seed=0), make_cnn(seed=1)]))
    alone = [uninterrupted("sgd"), numbers(*train_together([make_cnn(seed=1)]))]
    for both, first, second in zip(together, *alone, strict=True):
        assert len(both) == 2
        np.testing.assert_allclose(both[:1], first, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(both[1:], second, rtol=1e-4, atol=1e-4)
    assert np.abs(alone[0][0] - alone[1][0]).max() > 0.01  # the seeds are others


def test_what_differs_in_more_than_seeds_cannot_be_side_by_side():
    with pytest.raises(ValueError, match="may differ in their seeds alone"):
        train_together([make_run(), make_run(seed=1, rate=0.1)])


def test_a_diverging_seed_leaves_the_others_alone(monkeypatch, tmp_path):
    """In the second epoch seed 1 loses its weights, seed 2 only has a loss of inf."""

    def first_key(seed):
        """Return the key of the first step of the second epoch."""
        key = jax.random.fold_in(jax.random.key(seed), 1 + 1)
        return jax.random.key_data(jax.random.fold_in(key, 1))

    step, lost, high = supervised.train_step, first_key(1), first_key(2)

    def train_step(state, batch, key, rate, recipe):
        state, sums = step(state, batch, key, rate, recipe)
        key = jax.random.key_data(key)
        now = (key == lost).all()
        params = jax.tree.map(lambda x: jnp.where(now, jnp.nan, x), state.params)
        sums = jnp.where((key == high).all(), jnp.inf, sums)
        return state._replace(params=params), sums

    # A recipe of their own: programs are kept by recipe and number of seeds.
    runs = [make_run(seed=seed, momentum=0.8) for seed in range(4)]
    results, limits = Results(tmp_path / "results.csv"), Limits(seeds_at_once=4)
    with monkeypatch.context() as patched:
        patched.setattr(supervised, "train_step", train_step)
        state, history = train_together(runs)
        rows = supervised.train_runs(runs, results, DATA, limits=limits)

    sound, diverged = [False] * 3, [False, True, True]
    for curve in history[:-1]:
        expected = [sound, diverged, diverged, sound]
        np.testing.assert_array_equal(np.isnan(curve), expected)
    for seed in (0, 3):
        alone, its = train_together([runs[seed]])
        for ours, theirs in zip(history[:-1], its[:-1], strict=True):
            np.testing.assert_allclose(ours[seed], theirs[0], rtol=1e-4)
        for a, b in zip(*map(jax.tree.leaves, (state, alone)), strict=True):
            np.testing.assert_allclose(a[seed], b[0], rtol=0, atol=1e-4)

    status = ["finished", "diverged", "diverged", "finished"]
    assert [row["status"] for row in rows] == status
    for row in rows:
        for name in ("train_loss", "validation_accuracy", "test_loss", "test_accuracy"):
            finite = math.isfinite(float(row[name]))
            assert finite == (row["status"] == "finished")
        assert math.isfinite(float(row["accuracy_1"]))
    assert rows[1]["accuracy_3"] == "nan"
    assert rows[1]["train_loss_curve"].split()[1:] == ["nan", "nan"]


def test_a_run_whose_loss_is_not_finite_stops(tmp_path):
    run, epochs = make_run(rate=1e30), []
    train_together([run], told=lambda epoch, history: epochs.append(epoch))
    assert epochs == [0]
    results = Results(tmp_path / "results.csv")
    (row,) = supervised.train_runs(
        [run], results, DATA, limits=Limits(tmp_path / "checkpoints", every=0)
    )
    assert row["status"] == "diverged"
    assert row["train_loss"] == row["test_loss"] == row["accuracy_1"] == "nan"
    assert row["validation_loss_curve"] == "nan nan nan"
    assert float(row["images_per_s"]) > 0
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert results.find(run.key()) == row  # and is not trained again


# --------------------------------------------------------------------- the images


def test_augmented_images_are_crops_of_their_own_image():
    count, keys = 6, 600
    images = make_split(count, 3).images
    framed = np.zeros((count, 40, 40, 3), np.uint8)
    framed[:, 4:36, 4:36] = images
    crops = {}
    for top, left, i in itertools.product(range(9), range(9), range(count)):
        crop = framed[i, top : top + 32, left : left + 32]
        crops[crop.tobytes()] = i, top, left, False
        crops[crop[:, ::-1].tobytes()] = i, top, left, True
    assert len(crops) == count * 81 * 2

    augment = jax.jit(jax.vmap(supervised.augmented, (None, 0)))
    found = np.asarray(augment(images, jax.random.split(jax.random.key(0), keys)))
    assert (found.shape, found.dtype) == ((keys, *images.shape), np.uint8)
    places = np.array([[crops[x.tobytes()] for x in batch] for batch in found])
    np.testing.assert_array_equal(places[..., 0], np.tile(np.arange(count), (keys, 1)))
    drawn = places[..., 1:].reshape(-1, 3)
    assert len(np.unique(drawn, axis=0)) == 81 * 2
    # Standard deviations of these means: 0.043, 0.043, 0.0083.
    means, far = [4, 4, 0.5], np.array([0.2, 0.2, 0.04])
    assert (np.abs(drawn.mean(0) - means) < far).all()
    for where in np.moveaxis(places[..., 1:], -1, 0):  # every image draws its own
        assert (where != where[:, :1]).any()


def test_images_are_normalised_colour_by_colour():
    images = make_split(4, 4).images
    mean = np.array([0.4914, 0.4822, 0.4465])
    expected = (images / 255 - mean) / np.array([0.2023, 0.1994, 0.2010])
    found = supervised.normalised(images, make_run().recipe)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
    digits = dataclasses.replace(make_run().recipe, data="digits")
    np.testing.assert_array_equal(supervised.normalised(images, digits), images)


# ---------------------------------------------------------------------- the steps


def test_every_image_is_seen_once_an_epoch(monkeypatch):
    """With the rate of its step, and a key that no other step has."""
    count, size, steps = 52, 16, 4
    images = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    train = Split(images, np.arange(count, dtype=np.int32))

    def train_step(state, batch, key, rate, recipe):
        rows = batch.images[:, 0, 0, 0]
        at, seen = state["step"], state["seen"]
        return {
            "seen": seen.at[rows].add(1),
            "labels": state["labels"].at[rows].set(batch.labels),
            "order": jax.lax.dynamic_update_slice(state["order"], rows, (at * size,)),
            "rates": state["rates"].at[at].set(rate),
            "keys": state["keys"].at[at].set(jax.random.key_data(key)),
            "step": at + 1,
        }, jnp.array([2.0 * len(rows), len(rows) / 2])

    monkeypatch.setattr(supervised, "train_step", train_step)
    monkeypatch.setattr(supervised, "evaluate", lambda *args: (3.0, 0.75))
    epoch = jax.jit(functools.partial(supervised.train_epoch, recipe=make_run().recipe))
    start = {
        "seen": jnp.zeros(count, int),
        "labels": jnp.zeros(count, "int32"),
        "order": jnp.zeros(count, "uint8"),
        "rates": jnp.zeros(steps),
        "keys": jnp.zeros((steps, 2), "uint32"),
        "step": 0,
    }
    rates = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    ends = [epoch(start, jax.random.key(i), rates, train, None) for i in range(2)]
    for state, metrics in ends:
        np.testing.assert_array_equal(state["seen"], np.ones(count))
        np.testing.assert_array_equal(state["labels"], train.labels)
        np.testing.assert_array_equal(state["rates"], rates)
        np.testing.assert_allclose(metrics, [2.0, 0.5, 3.0, 0.75])
    keys = np.concatenate([state["keys"] for state, _ in ends])
    assert len(np.unique(keys, axis=0)) == 2 * steps
    orders = [state["order"].tolist() for state, _ in ends]
    assert orders[0] != orders[1] != list(range(count)) != orders[0]


def test_the_loss_along_the_way_is_that_before_every_step():
    """At rate 0, without batch normalisation: that of the initial weights."""
    state, history = train_together([make_run(rate=0.0, epochs=1)])
    first = jax.tree.map(lambda x: x[0], state)
    loss, accuracy = reference(first, DATA.train, make_run().recipe)
    np.testing.assert_allclose(history.train_loss, [[loss]], rtol=1e-5)
    np.testing.assert_allclose(history.train_accuracy, [[accuracy]], rtol=1e-6)


def test_a_step_is_one_of_gradient_descent():
    """Against the gradient of the cross entropy of a linear network, by hand."""
    run = make_run(rate=0.125, momentum=0.0, weight_decay=0.25)
    state = initialise(run.recipe)
    batch = make_split(16, 5)
    step = jax.jit(functools.partial(supervised.train_step, recipe=run.recipe))
    after, sums = step(state, batch, jax.random.key(1), run.rates(4, 0)[0])

    x = np.asarray(supervised.normalised(batch.images, run.recipe), float)
    x = x.reshape(16, -1)
    weight = np.asarray(jax.tree.leaves(state.params["head"]["kernel"])[0], float)
    shares, chances = np.eye(10)[batch.labels], np.exp(x @ weight)
    chances /= chances.sum(1, keepdims=True)
    gradient = x.T @ (chances - shares) / 16 + 0.25 * weight
    (found,) = jax.tree.leaves(after.params["head"]["kernel"])
    np.testing.assert_allclose(found, weight - 0.125 * gradient, rtol=0, atol=1e-5)
    losses = -np.log((chances * shares).sum(1))
    hits = (chances.argmax(1) == batch.labels).sum()
    np.testing.assert_allclose(sums, [losses.sum(), hits], rtol=1e-5)


def reference(state, split, recipe):
    """Return loss and accuracy from the logits of one pass, in float64."""

    def network(state, images):
        model = nnx.merge(state.graphdef, state.params, state.statistics)
        model.eval()
        return model(supervised.normalised(images, recipe))

    logits = np.asarray(jax.jit(network)(state, split.images), float)
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    losses = -np.log(chances[np.arange(len(logits)), split.labels])
    return losses.mean(), (logits.argmax(1) == split.labels).mean()


@pytest.mark.parametrize("size", [8, 24, 52])
def test_evaluation_in_batches_is_one_pass(size):
    """Whole batches only, one and a smaller one, and less than one."""
    recipe = make_run(model="basic_cnn", batch_size=size).recipe
    split = make_split(40, 6)
    state = initialise(recipe)
    other = jax.tree.map(lambda x: x + 0.25, state.statistics)
    state = state._replace(statistics=other)
    evaluate = jax.jit(functools.partial(supervised.evaluate, recipe=recipe))
    found = evaluate(state, split)
    np.testing.assert_allclose(found, reference(state, split, recipe), rtol=1e-4)


def test_groups_have_their_own_statistics():
    recipe = make_run(model="basic_cnn").recipe
    state = initialise(recipe)
    images = supervised.normalised(make_split(12, 7).images, recipe)
    images = images * jnp.linspace(0.5, 2, 12)[:, None, None, None]
    forward = jax.jit(supervised.forward, static_argnums=3)
    logits, statistics = forward(state, state.params, images, 3)
    parts = [forward(state, state.params, images[i : i + 4], 1) for i in (0, 4, 8)]
    expected = jnp.concatenate([part for part, _ in parts])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    whole, _ = forward(state, state.params, images, 1)
    assert np.abs(logits - whole).max() > 1e-2
    leaves = [jax.tree.leaves(x) for x in (statistics, parts[0][1], parts[1][1])]
    for found, first, second in zip(*leaves, strict=True):
        np.testing.assert_allclose(found, first, rtol=1e-5, atol=1e-6)
        assert np.abs(found - second).max() > 1e-3


@pytest.mark.parametrize(
    ("size", "groups", "message"),
    [
        (16, 3, "`norm_groups` is 3; expected a divisor .* 16 and for the last 4"),
        (16, 8, "`norm_groups` is 8; expected a divisor .* 16 and for the last 4"),
        (53, 1, "`batch_size` is 53; expected at most the 52"),
    ],
)
def test_images_that_cannot_be_divided_are_refused(size, groups, message):
    with pytest.raises(ValueError, match=message):
        train_together([make_run(batch_size=size, norm_groups=groups)])


def test_rates_by_hand():
    def rates(schedule, epochs, steps):
        run = make_run(rate=0.4, schedule=schedule, epochs=epochs)
        parts = [run.rates(steps, epoch) for epoch in range(epochs)]
        assert all(part.shape == (steps,) for part in parts)
        return np.concatenate(parts)

    np.testing.assert_allclose(rates("constant", 3, 2), [0.4] * 6)
    by_tens = [0.4] * 12 + [0.04] * 6 + [0.004] * 6
    np.testing.assert_allclose(rates("steps", 8, 3), by_tens, rtol=1e-6)
    # 15 steps: a half is 7 and a half, three quarters 11 and a quarter.
    by_tens = [0.4] * 7 + [0.04] * 4 + [0.004] * 4
    np.testing.assert_allclose(rates("steps", 5, 3), by_tens, rtol=1e-6)
    cosine = 0.2 * (1 + np.cos(np.pi * np.arange(24) / 24))
    np.testing.assert_allclose(rates("cosine", 8, 3), cosine, rtol=0, atol=1e-6)
    assert rates("cosine", 100, 1)[-1] < 1e-3 * 0.4


# ---------------------------------------------------------------------- many runs


@pytest.fixture
def recorded(monkeypatch):
    """Replace training, whose numbers tell the seed; return what was asked for."""
    asked = {"trained": [], "tested": []}

    def together(runs, train, validation, *, limits, told, finish):
        asked["trained"].append([(run.learning_rate, run.seed) for run in runs])
        if runs[0].learning_rate == asked.get("fails at"):
            raise KeyboardInterrupt
        assert train is DATA.train and validation is DATA.validation
        seeds = np.array([run.seed for run in runs], float)
        values = np.arange(1, 6)[:, None] + seeds / 10
        shape = (5, len(runs), runs[0].epochs)
        finish("state", History(*np.broadcast_to(values[..., None], shape)))

    def programs(recipe, seeds):
        def evaluate(state, split):
            asked["tested"].append(split)
            return jnp.arange(seeds) + 0.5, jnp.arange(seeds) / 4

        return None, None, evaluate

    monkeypatch.setattr(supervised, "train_together", together)
    monkeypatch.setattr(supervised, "programs", programs)
    return asked


def make_runs():
    """Return three seeds at two rates, one rate after the other."""
    return [make_run(rate=x, seed=i) for x in (0.1, 0.2) for i in range(3)]


def test_runs_are_trained_by_seeds_and_written_row_by_row(recorded, tmp_path):
    results = Results(tmp_path / "results.csv")
    limits = Limits(seeds_at_once=2)
    rows = supervised.train_runs(make_runs(), results, DATA, limits=limits)
    assert recorded["trained"] == [
        [(rate, i) for i in seeds] for rate in (0.1, 0.2) for seeds in ((0, 1), (2,))
    ]
    assert rows == Results(tmp_path / "results.csv").rows()
    for row, run in zip(rows, make_runs(), strict=True):
        assert {name: row[name] for name in run.key()} == run.key()
        assert row["train_loss"] == f"{1 + run.seed / 10:g}"
        curve = " ".join([f"{4 + run.seed / 10:g}"] * 3)
        assert row["validation_accuracy_curve"] == curve
        assert row["test_accuracy"] == ("0.25" if run.seed == 1 else "0")
        assert row["test_loss"] == ("1.5" if run.seed == 1 else "0.5")
        seconds = 3 * (5 + run.seed / 10)
        assert float(row["seconds"]) == pytest.approx(seconds, abs=0.005)
        assert float(row["images_per_s"]) == pytest.approx(3 * 52 / seconds, rel=1e-3)


def test_finished_runs_are_not_trained_again(recorded, tmp_path, capsys):
    results = Results(tmp_path / "results.csv")
    supervised.train_runs(make_runs()[1:2], results, DATA)
    recorded["trained"].clear()
    rows = supervised.train_runs(make_runs(), Results(tmp_path / "results.csv"), DATA)
    trained = [run for group in recorded["trained"] for run in group]
    assert trained == [(0.1, 0), (0.1, 2), (0.2, 0), (0.2, 1), (0.2, 2)]
    assert [row["seed"] for row in rows] == ["0", "1", "2"] * 2
    assert "1 of 6 runs skipped" in capsys.readouterr().out


def test_rows_are_written_as_soon_as_they_are_known(recorded, tmp_path):
    recorded["fails at"] = 0.2
    results = Results(tmp_path / "results.csv")
    with pytest.raises(KeyboardInterrupt):
        supervised.train_runs(make_runs(), results, DATA)
    rows = Results(tmp_path / "results.csv").rows()
    assert [row["learning_rate"] for row in rows] == ["0.1"] * 3


@pytest.mark.parametrize("test", [True, False])
def test_the_test_images_are_looked_at_once_or_never(recorded, tmp_path, test):
    results = Results(tmp_path / "results.csv")
    rows = supervised.train_runs(make_runs(), results, DATA, test=test)
    assert len(recorded["tested"]) == (len(rows) if test else 0)
    assert all(split is DATA.test for split in recorded["tested"])
    for row in rows:
        assert (row["test_loss"] != "") == (row["test_accuracy"] != "") == test


def test_no_run_is_begun_after_the_deadline(recorded, tmp_path):
    results, limits = Results(tmp_path / "results.csv"), Limits(deadline=0.0)
    for count in range(1, 7):  # but one, so that starting again leads somewhere
        rows = supervised.train_runs(make_runs(), results, DATA, limits=limits)
        assert len(rows) == len(recorded["trained"]) == count


# ---------------------------------------------------------- every network, and more

BATCH = make_split(4, 8)


def drawn(shapes, seed):
    """Return arrays of these shapes; compiling the initialisers takes far longer."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.random(leaf.shape, leaf.dtype) / 10 - leaf.dtype.type(0.05),
        shapes,
    )


def check_two_steps(run, step):
    """Train two steps; every parameter and running statistic changes and is finite.

    Without weight decay, so that nothing but its gradient moves a parameter.
    """
    start = functools.partial(supervised.initialise, recipe=run.recipe)
    state = jax.eval_shape(start, jax.random.key(0))
    optimiser = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.optimiser)
    state = state._replace(
        params=drawn(state.params, 0),
        statistics=jax.tree.map(np.abs, drawn(state.statistics, 1)),
        optimiser=optimiser,
    )
    for rate in run.rates(2, 0):
        after, sums = step(state, BATCH, jax.random.key(1), rate)
        assert np.isfinite(sums).all()
        before, found = (
            jax.tree_util.tree_leaves_with_path((x.params, x.statistics))
            for x in (state, after)
        )
        for (path, a), (_, b) in zip(before, found, strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert np.isfinite(b).all(), name
            # A norm takes no notice of the bias before it.
            if not ("conv" in name and "bias" in name):
                assert not np.array_equal(a, b), name
        state = after


def make_short_run(model, optimiser):
    """Return a run of a whole network; the method is the cheapest at this size."""
    others = {"model": model, "classes": None, "weight_decay": 0.0}
    return make_run(optimiser, method="fast", **others)


@pytest.fixture
def traced_in_linear_time(monkeypatch):
    """Assign running statistics without asking a tracer for its sharding.

    Flax asks, and jax words its refusal by a search of the whole program: for every
    batch normalisation of DenseNet, more than half of all tracing.
    """
    if not hasattr(nnx.Variable, "set_value"):
        return  # flax 0.11 does not ask
    assign = nnx.Variable.__setitem__

    def setitem(self, index, value):
        if index is ...:
            self.set_value(value)
        else:
            assign(self, index, value)

    monkeypatch.setattr(nnx.Variable, "__setitem__", setitem)


# The largest of a kind take half a minute each.
LARGE = (
    *("densenet121", "densenet161", "resnet34", "resnet44", "resnet50"),
    *("resnext50_32x4d", "wide_resnet50_2"),
)
EACH = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE))
    for name in CLASSIFIERS
]


@pytest.mark.usefixtures("traced_in_linear_time")
@pytest.mark.parametrize("model", EACH)
def test_every_network_trains(model):
    run = make_short_run(model, "sgd")
    step = functools.partial(supervised.train_step, recipe=run.recipe)
    check_two_steps(run, jax.jit(step))


@functools.lru_cache(maxsize=1)
def gradient_of(model):
    """Return `train_step` of a network with an optimiser that keeps the gradient."""

    def update(grads, state, params):
        return jax.tree.map(jnp.zeros_like, grads), grads

    keeper = optax.GradientTransformation(lambda params: (), update)
    run = make_short_run(model, "sgd")

    def step(state, batch, key, rate):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(supervised, "make_optimiser", lambda recipe, rate: keeper)
            return supervised.train_step(state, batch, key, rate, run.recipe)

    return jax.jit(step)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_in_linear_time")
@pytest.mark.parametrize("optimiser", optimisers.NAMES)  # one after another, so that
@pytest.mark.parametrize("model", list(CLASSIFIERS))  # each gradient is compiled once
def test_every_network_trains_with_every_optimiser(model, optimiser):
    run = make_short_run(model, optimiser)
    gradient = gradient_of(model)

    @jax.jit
    def update(grads, state, params, rate):
        tx = supervised.make_optimiser(run.recipe, rate)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(state, batch, key, rate):
        after, sums = gradient(state._replace(optimiser=()), batch, key, rate)
        params, kept = update(after.optimiser, state.optimiser, state.params, rate)
        return after._replace(params=params, optimiser=kept), sums

    check_two_steps(run, step)
