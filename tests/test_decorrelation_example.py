"""examples/decorrelation.py: approximations, networks, steps, runs, rates, the page."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import math
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import orthax
from examples import decorrelation
from examples.data import load_digits
from examples.experiments.decorrelation import memory, page, report, speed, training
from examples.experiments.decorrelation.approximations import (
    Feedback,
    feedback_aligned,
    node_perturbation,
)
from examples.experiments.decorrelation.rules import (
    NAMES,
    WITHOUT_RATE,
    MeanRemoval,
    make_rule,
)
from examples.experiments.decorrelation.settings import Cifar10, Digits, mixed
from examples.models.decorrelation import (
    decorrelated,
    inputs,
    is_layer,
    make_network,
    plain,
)
from examples.models.initialisers import KAIMING_FAN_IN
from examples.training import side_by_side
from examples.training.runs import FIRST_TUNING_SEED, Limits
from orthax import nn

SHORT = (
    "digits --learning bp --rules mean scaled --together mean --conditions 1 "
    "--widths 8 --epochs 3 --seeds 2 --tuning-seeds 1 --grid 0.001 0.03 --rates 0.01 "
    "--at-once 2"
)
SHORT = shlex.split(SHORT)
SMALL = Digits(widths=(8,), rates=(0.01,))
SHAPES = {"mlp": (8, 8, 1), "conv": (8, 8, 2)}
SIZES = {
    "mlp": {"side": 4, "widths": (6, 5)},
    "conv": {"side": 8, "widths": (3, 4, 5)},
}
RULE = orthax.decorrelation.Scaled(0.1)
CASES = [("mlp", None), ("conv", None), ("mlp", RULE), ("conv", RULE)]


def folders(folder):
    return ["--results", str(folder), "--checkpoints", str(folder / "checkpoints")]


def read(folder):
    with (folder / "decorrelation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decorrelation")
    with contextlib.redirect_stdout(io.StringIO()):
        decorrelation.main([*SHORT, *folders(folder)])
    return folder


@pytest.fixture(scope="module")
def digits():
    return jax.device_put(load_digits())


# --------------------------------------------------------------------------- runs


def test_a_short_run_writes_rows_a_page_and_a_figure(finished):
    rows = read(finished)
    arms = [("bp", "sgd", "mean"), ("bp", "sgd", "scaled")]
    arms += [("bp", "orthogonal_sgd", "mean")]
    expected = [(*arm, x) for arm in arms for x in ["grid"] * 2 + ["tuned"] * 2]
    names = ("learning", "optimiser", "rule", "chosen")
    assert [tuple(row[x] for x in names) for row in rows] == expected
    for row in rows:
        assert row["status"] == "finished"
        assert bool(row["test_accuracy"]) == (row["chosen"] == "tuned")
        for name in report.CURVES:
            values = row[f"{name}_curve"].split()
            assert len(values) == 3
            assert float(values[-1]) == pytest.approx(float(row[name]), rel=1e-3)
        correlations = report.correlation([row])
        assert correlations.shape == (1, 3, 2) and (correlations > 0).all()
        assert int(row["steps"]) == 3 * (1257 // 64)
    text = (finished / "decorrelation.md").read_text()
    assert text.count("| `mean` | 0.03* |") == 2
    assert "with `orthogonalise()` before the momentum" in text
    figure = (finished / "decorrelation_digits.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert not list((finished / "checkpoints").iterdir())


def test_training_beats_chance(finished):
    for row in read(finished):
        if row["chosen"] == "tuned":  # chance is 0.1
            assert float(row["test_accuracy"]) > 0.2, row["rule"]
            losses = [*map(float, row["train_loss_curve"].split())]
            assert losses[-1] < losses[0]


def arms_of(config):
    """The recipes of every arm by what tells arms apart."""
    return {(x[0].learning, x[0].optimiser, x[0].rule): x for x in config.arms()}


def test_both_rates_are_the_best_on_validation_images(digits, tmp_path, finished):
    config = dataclasses.replace(SMALL, rates=(0.01, 1.0), epochs=2)
    config = dataclasses.replace(config, grid=(0.001, 0.03), tuning_seeds=1)
    recipes = arms_of(config)["bp", "sgd", "scaled"]
    assert [recipe.rate for recipe in recipes] == [0.01, 1.0]
    results = report.Rows(tmp_path / "rows.csv")
    data, limits = digits._replace(test=None), Limits(seeds_at_once=2)
    recipe, rate = decorrelation.tune(config, recipes, results, data, 1.0, limits)
    losses = {}
    for row in results.rows():
        assert int(row["seed"]) >= FIRST_TUNING_SEED
        curve = [*map(float, row["validation_loss_curve"].split())]
        losses[float(row["rate"]), float(row["learning_rate"])] = sum(curve)
    assert len(losses) == 4
    assert (recipe.rate, rate) == min(losses, key=losses.__getitem__)
    runs = decorrelation.plan(config, recipe, "tuned", (rate,), 1.0)[:2]
    with pytest.raises(AttributeError, match="labels"):
        side_by_side.train_runs(
            training.TRAINER, runs, results, data, test=True, limits=limits
        )


def test_finished_runs_are_skipped(finished, monkeypatch, capsys):
    before = (finished / "decorrelation.csv").read_bytes()
    monkeypatch.delattr(side_by_side, "train_together")
    decorrelation.main([*SHORT, *folders(finished)])
    assert (finished / "decorrelation.csv").read_bytes() == before
    assert "2 of 2 runs skipped" in capsys.readouterr().out


def test_what_is_stopped_goes_on_with_the_same_numbers(finished, tmp_path, capsys):
    for _ in range(2):
        decorrelation.main([*SHORT, *folders(tmp_path), "--minutes", "1e-9"])
        assert "out of time; started again, it goes on" in capsys.readouterr().out
    assert not (tmp_path / "decorrelation.csv").exists()
    assert list((tmp_path / "checkpoints").iterdir())
    decorrelation.main([*SHORT, *folders(tmp_path)])
    for ours, theirs in zip(read(tmp_path), read(finished), strict=True):
        assert {**ours, "seconds": ""} == {**theirs, "seconds": ""}


def test_a_run_that_diverges_is_a_result(digits, tmp_path, finished):
    config = dataclasses.replace(SMALL, grid=(1e30,), epochs=1, tuning_seeds=2)
    recipes = arms_of(config)["bp", "sgd", "mean"]
    results, limits = report.Rows(tmp_path / "rows.csv"), Limits(seeds_at_once=2)
    _, rate = decorrelation.tune(config, recipes, results, digits, 1.0, limits)
    assert math.isnan(rate)
    row, _ = report.Rows(results.path).rows()
    assert (row["status"], row["validation_loss"]) == ("diverged", "nan")


# ------------------------------------------------------------------------- networks


def images(model, n=6, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, *SHAPES[model])) + 0.5, jnp.float32)


@functools.cache
def _learnt(model, rule):
    rngs = nnx.Rngs(0)
    made = make_network(model, SHAPES[model], 3, rngs=rngs, **SIZES[model])
    if rule is None:
        return nnx.split(made)
    graphdef, state = nnx.split(decorrelated(made, rule, sample=1.0, rngs=rngs))

    @jax.jit
    def after(state, x):
        model = nnx.merge(graphdef, state, copy=True)
        model(x)
        return nnx.state(model)

    for seed in range(3):
        state = after(state, images(model, 32, seed))
    return graphdef, state


def learnt(model, rule):
    """A network, decorrelated if there is a rule: then R is no longer the identity."""
    return nnx.merge(*_learnt(model, rule), copy=True)


def aligned_of(made):
    return feedback_aligned(made, kernel_init=KAIMING_FAN_IN, rngs=nnx.Rngs(feedback=5))


@pytest.mark.parametrize("model", SHAPES)
def test_a_layer_multiplies_its_inputs_with_its_weights(model):
    made = learnt(model, RULE)
    made.eval()
    graphdef, state = nnx.split(made)

    @jax.jit
    def both(state, x):
        made, outputs = nnx.merge(graphdef, state, copy=True), []
        given = list(inputs(made, x))
        for layer in made.layers:
            x = layer(x)
            outputs += [x] * is_layer(layer)
        return given, outputs

    given, outputs = both(state, images(model))
    layers = [plain(x) for x in made.layers if is_layer(x)]
    assert len(layers) == (3 if model == "mlp" else 6)
    for z, y, layer in zip(given, outputs, layers, strict=True):
        kernel = np.reshape(layer.kernel[...], (z.shape[1], -1))
        expected = np.float64(z) @ kernel + layer.bias[...]
        np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "widths", "kernels"),
    [
        ("mlp", (9, 9), [(3072, 9), (9, 9), (9, 10)]),
        (
            "conv",
            (32, 64, 1000),
            [
                *((3, 3, *x) for x in ((3, 32), (32, 32), (32, 64), (64, 64))),
                (4096, 1000),
                (1000, 10),
            ],
        ),
    ],
)
def test_the_networks_are_the_papers(model, widths, kernels):
    def make():
        sizes = {"widths": widths, "side": 32, "rngs": nnx.Rngs(0)}
        return make_network(model, (32, 32, 3), 10, **sizes)

    made = nnx.eval_shape(make)
    assert [plain(x).kernel.shape for x in made.layers if is_layer(x)] == kernels


def test_an_image_is_averaged_over_squares():
    first = make_network("mlp", (4, 4, 1), 3, side=2, widths=(2,), rngs=nnx.Rngs(0))
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert first.layers[0](x).ravel().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_all_arms_of_a_seed_start_from_the_same_weights():
    def weights(learning, rule):
        recipe = arms_of(SMALL)[learning, "sgd", rule][0]
        made = training.make_model(recipe, jax.random.key(3))
        return [plain(x).kernel[...] for x in made.layers if is_layer(x)]

    expected = weights("bp", "nothing")
    for arm in (("bp", "polar"), ("fa", "scaled")):
        for ours, theirs in zip(weights(*arm), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_mean_removal_is_the_layer_of_the_centred_input():
    linear = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
    layer = nn.Decorrelated(linear, MeanRemoval())
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) + 1
    expected = (x - x.mean(0)) @ linear.kernel[...] + linear.bias[...]
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-5)
    np.testing.assert_allclose(layer.statistics.mean[...], x.mean(0), atol=1e-6)
    matrix = MeanRemoval().matrix(layer.state().transform)
    np.testing.assert_array_equal(matrix, np.eye(5))


def test_every_name_is_a_rule_of_its_own():
    rules = [make_rule(name, 0.25) for name in NAMES]
    assert rules[0] is None and len(set(rules)) == len(NAMES)
    for name, rule in zip(NAMES, rules, strict=True):
        told = getattr(rule, "learning_rate", None)
        assert told == (None if name in WITHOUT_RATE or name == "polar" else 0.25)
    assert make_rule("polar", 0.25).floor == 0.25
    with pytest.raises(ValueError, match="`name` is 'zca'; expected one of nothing"):
        make_rule("zca", 0.1)


# -------------------------------------------------------------- feedback alignment


def gradients_of(model, x):
    """A function of the model's state: gradients of its weights and of the images."""
    graphdef, *_ = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def both(params, rest):
        def loss(params, x):
            model = nnx.merge(graphdef, params, rest, copy=True)
            return jnp.mean(jnp.sin(3 * model(x)) ** 2)

        grads, to_x = jax.grad(loss, argnums=(0, 1))(params, x)
        return [*jax.tree.leaves(grads), to_x]

    def of(model):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return [np.asarray(leaf) for leaf in both(params, rest)]

    return of


@pytest.mark.parametrize(
    ("model", "rule"),
    [*CASES[:3], pytest.param(*CASES[3], marks=pytest.mark.slow)],
)
def test_feedback_that_is_the_weight_is_backpropagation(model, rule):
    made = learnt(model, rule)
    aligned, x = aligned_of(made), images(model)
    expected, of = gradients_of(made, x)(made), gradients_of(aligned, x)
    random = of(aligned)
    for layer in aligned.layers:
        if is_layer(layer):
            layer.feedback[...] = plain(layer).kernel[...]
    found = of(aligned)
    assert len(found) == len(expected)
    scale = max(abs(x).max() for x in expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * scale)
    # With its own kernels it is something else, but for the weights of the last layer.
    apart = [abs(a - b).max() for a, b in zip(random, expected, strict=True)]
    assert apart[-2] < 1e-5 * scale
    assert min(apart[0], apart[1], apart[-1]) > 0.03 * abs(expected[1]).max()


def test_errors_go_back_through_the_feedback_and_then_through_r():
    aligned = aligned_of(learnt("mlp", RULE))
    layer = next(x for x in aligned.layers if is_layer(x))
    layer.updating = False
    x = np.asarray(images("mlp")).reshape(6, 64)[:, :16]
    error = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def both(x):
        y, back = jax.vjp(nnx.merge(graphdef, state, copy=True), x)
        return y, *back(error)

    y, to_x = both(x)
    weights = plain(layer)
    arrays = (layer.layer.state().transform, layer.feedback, weights.kernel)
    r, feedback, kernel = (np.float64(a[...]) for a in arrays)
    assert abs(r - np.eye(16)).max() > 0.01
    expected = (x - x.mean(0)) @ r.T @ kernel + weights.bias[...]
    np.testing.assert_allclose(y, expected, atol=1e-4)
    # The mean of the batch is removed: so it is from the error.
    expected = error @ feedback.T @ r
    np.testing.assert_allclose(to_x, expected - expected.mean(0), atol=1e-4)


def test_an_aligned_layer_learns_once_and_only_in_training():
    made, x = learnt("mlp", RULE), images("mlp")
    aligned = aligned_of(made)
    before = jax.tree.leaves(nnx.state(made, nn.DecorrelationVariable))

    def after(model, training):
        graphdef, state = nnx.split(model)

        @jax.jit
        def call(state):
            model = nnx.merge(graphdef, state, copy=True)
            (model.train if training else model.eval)()
            return model(x), nnx.state(model, nn.DecorrelationVariable)

        y, state = call(state)
        return [y, *jax.tree.leaves(state)]

    found, expected = after(aligned, True), after(made, True)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    moved = [(a != b).any() for a, b in zip(found[1:], before, strict=True)]
    assert sum(moved) == 3 * 3  # of three layers R, mean and count; nothing is skipped
    for a, b in zip(after(aligned, False)[1:], before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_feedback_is_no_parameter():
    made = learnt("mlp", None)
    aligned = aligned_of(made)
    params = jax.tree.leaves(nnx.state(aligned, nnx.Param))
    assert len(params) == len(jax.tree.leaves(nnx.state(made, nnx.Param))) == 6
    assert len(jax.tree.leaves(nnx.state(aligned, Feedback))) == 3


# --------------------------------------------------------------- node perturbation


@pytest.mark.parametrize(
    ("model", "rule"),
    [CASES[0], CASES[2], pytest.param(*CASES[1], marks=pytest.mark.slow)],
)
def test_node_perturbation_is_the_gradient_in_the_mean(model, rule):
    made, x, labels = learnt(model, rule), images(model, 4), jnp.arange(4) % 3
    # The batch mean carries one image's noise to another; the running one does not.
    made.eval()
    graphdef, params, rest = nnx.split(made, nnx.Param, ...)

    def losses(logits):
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - picked

    def exact(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        return losses(logits).mean(), (logits, losses(logits))

    def estimate(params, key):
        model = nnx.merge(graphdef, params, rest, copy=True)
        *told, total = node_perturbation(model, x, losses, key, scale=1e-3)
        return total, tuple(told)

    keys = jax.random.split(jax.random.key(0), 2000)
    of_keys = jax.vmap(jax.grad(estimate, has_aux=True), (None, 0))
    estimates, told = jax.jit(
        lambda: jax.lax.map(lambda keys: of_keys(params, keys), keys.reshape(4, 500))
    )()
    expected, without_noise = jax.jit(jax.grad(exact, has_aux=True))(params)
    for each, truth in zip(told, without_noise, strict=True):
        np.testing.assert_allclose(each[0, 0], truth, atol=1e-5)
    pairs = zip(jax.tree.leaves(estimates), jax.tree.leaves(expected), strict=True)
    for each, truth in pairs:
        each = np.float64(each).reshape(len(keys), *truth.shape)
        error = each.std(0, ddof=1) / math.sqrt(len(keys))
        # As far apart as chance makes it; and not so noisy that anything would pass.
        size = np.sqrt(np.mean(error**2))
        apart = each.mean(0) - truth
        assert np.sqrt(np.mean(apart**2)) < 1.6 * size + 1e-4
        assert size < 0.7 * np.sqrt(np.mean(np.square(truth)))


# ----------------------------------------------------------------------------- steps


def steps_of(digits, learning, rule, count, **changes):
    """States before, between and after steps of one arm, and the losses before them."""
    config = dataclasses.replace(SMALL, **changes)
    recipe = arms_of(config)[learning, "sgd", rule][0]
    batch = jax.tree.map(lambda x: x[:64], digits.train)

    @jax.jit
    def step(state, key):
        return training.train_step(state, batch, key, jnp.float32(0.03), recipe)

    first = training.initialise(jax.random.key(0)[None], recipe)
    states, losses = [jax.tree.map(lambda x: x[0], first)], []
    for number in range(count):
        state, loss = step(states[-1], jax.random.key(number))
        states.append(state)
        losses.append(float(loss))
    return states, losses


def test_r_learns_in_every_so_manieth_step_only(digits):
    states, _ = steps_of(digits, "bp", "scaled", 4, update_every=3)

    def updates(state):
        leaves, _ = jax.tree_util.tree_flatten_with_path(state.statistics)
        return {int(x) for path, x in leaves if "updates" in str(path)}

    assert [updates(x) for x in states] == [{0}, {1}, {1}, {1}, {2}]
    weights = [np.ravel(jax.tree.leaves(x.params)[-1]) for x in states]
    assert all((a != b).any() for a, b in itertools.pairwise(weights))


@pytest.mark.parametrize("learning", ["fa", "np"])
def test_approximations_descend(digits, learning):
    states, losses = steps_of(digits, learning, "scaled", 8)
    assert losses[-1] < losses[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1].params))


# ----------------------------------------------------------------------------- data


def test_mixed_pixels_have_the_condition_that_is_asked_for():
    before = load_digits()
    after = mixed(before, 30.0)
    x, y = (np.float64(d.train.images.reshape(-1, 64)) for d in (before, after))
    assert np.mean(y**2) == pytest.approx(np.mean(x**2), rel=1e-5)
    matrix, *_ = np.linalg.lstsq(x, y, rcond=None)
    # Constant pixels say nothing about their rows.
    alive = x.std(0) > 0
    values = np.linalg.svd(matrix[alive], compute_uv=False)
    assert 15 < values[0] / values[-1] <= 30.5
    for ours, theirs in zip(after, before, strict=True):
        assert ours.images.dtype == np.float32
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        pixels = theirs.images.reshape(-1, 64)
        pixels, known = pixels[:, alive], (pixels[:, ~alive] == 0).all(1)
        rows = ours.images.reshape(-1, 64)[known]
        np.testing.assert_allclose(rows, (pixels @ matrix[alive])[known], atol=1e-5)
    assert mixed(before, 1.0) is before


def test_as_many_images_as_are_asked_for():
    data = load_digits()
    some = Digits(train_images=100, validation_images=50).some(data)
    assert [len(x.labels) for x in some] == [100, 50, len(data.test.labels)]
    np.testing.assert_array_equal(some.train.images, data.train.images[:100])
    with pytest.raises(ValueError, match="`validation_images` is 271; expected at"):
        Digits(validation_images=271).some(data)


# ------------------------------------------------------------------------- the page


def row_of(rule, seed, losses, accuracy, chosen="tuned", rate="0.1", **others):
    recipe = arms_of(Digits())["bp", "sgd", rule][0]
    run = training.Run(recipe, 2, float(rate), "constant", chosen, seed, 1.0)
    values = dict.fromkeys(report.COLUMNS, "") | run.key()
    values |= {"train_loss_curve": losses, "validation_loss_curve": losses}
    values |= {"train_loss": losses.split()[-1], "validation_loss": losses.split()[-1]}
    values |= {"validation_accuracy_curve": "0.5 0.5", "test_accuracy": accuracy}
    values |= {"seconds": "1", "steps": "10", "status": "finished", "device": "cpu"}
    return values | {"correlation_curve": "0.5 0.1; 0.25 0.125"} | others


def test_the_table_has_means_errors_and_paired_differences():
    rows = [row_of("mean", 0, "0.5 0.2", "0.9"), row_of("mean", 1, "0.7 0.4", "0.92")]
    rows += [row_of("polar", 1, "0.6 0.4", "0.95")]
    rows += [row_of("polar", 0, "0.42 0.1", "0.93")]
    rows += [row_of("nothing", 0, "1.0 0.9", "0.5", seconds="0.5")]
    tried = {"chosen": "grid"}
    rows += [row_of("mean", 9, "1 1", "", rate=x, **tried) for x in ("0.1", "1.0")]
    text = report.section(rows)
    # By hand: 0.42 and 0.6 have the standard error 0.09; -0.08 and -0.1 0.01.
    line = "| `polar` | 0.1 | 0.2 | 0.510 ± 0.090 | 0.250 ± 0.150 | 0.250 ± 0.150 | "
    line += "94.0 ± 1.0 | -0.090 ± 0.010 | 3.00 ± 0.00 | 0.25 0.12 | 2 |"
    assert line in text
    line = "| `mean` | 0.1* |  | 0.600 ± 0.100 | 0.300 ± 0.100 | 0.300 ± 0.100 | "
    assert f"{line}91.0 ± 1.0 |  |  | 0.25 0.12 | 2 |" in text
    assert "early training loss - lower: `polar`; higher: none" in text
    assert "test accuracy - lower: none; higher: `polar`" in text


def test_what_orthogonalise_adds_is_told_rule_by_rule():
    rows = [row_of("mean", 0, "0.5 0.2", "0.9"), row_of("mean", 1, "0.7 0.4", "0.92")]
    both = {"optimiser": "orthogonal_sgd", "method": "auto"}
    rows += [row_of("mean", 0, "0.4 0.2", "0.91", **both)]
    rows += [row_of("mean", 1, "0.5 0.4", "0.95", **both)]
    rows += [row_of("polar", 1, "0.5 0.4", "0.95", **both)]
    # By hand: -0.1 and -0.2, and 1 and 3 per cent.
    assert "accuracy: `mean` -0.150 ± 0.050 and 2.00 ± 1.00." in report.section(rows)


def test_a_diverged_run_is_not_averaged_away():
    rows = [row_of("mean", 0, "0.5 0.2", "0.9")]
    rows += [row_of("mean", 1, "0.5 nan", "nan", status="diverged")]
    assert "| diverged 1/2 |" in report.section(rows)
    assert report.merit(rows[:1]) == pytest.approx(-0.35)
    assert report.merit(rows) == -math.inf


def test_what_is_not_yet_run_stands_beside_its_command(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(decorrelation, "train", told.append)
    monkeypatch.setattr(memory, "measure", told.append)
    monkeypatch.setattr(speed, "measure", told.append)
    text = page.write(tmp_path).read_text()
    commands = re.findall(r"`python -m examples.decorrelation ([^`]*)`", text)
    for command in commands:
        decorrelation.main([*shlex.split(command), "--results", str(tmp_path)])
    kinds = [type(config) for config in told]
    assert kinds == [Digits, Cifar10, Cifar10, speed.Settings, memory.Settings]
    assert told[2].mlp == (1000,) * 4 and told[2].train_images == 0
    assert told[2].conv == (32, 64, 1000) and told[2].mlp_side == 32


# --------------------------------------------------------------------------- memory


def test_memory_is_that_of_the_arrays(tmp_path, monkeypatch):
    config = memory.Settings(channels=4, side=4, batch=2, rounds=1, results=tmp_path)
    names = ["plain", "dense, all patches", "polar, 0.1 of the patches"]
    names.append("factorised, k = 0.1 d, 0.1 of the patches")
    cases = {name: config.cases()[name] for name in names}
    monkeypatch.setattr(memory.Settings, "cases", lambda config: cases)
    with contextlib.redirect_stdout(io.StringIO()):
        memory.measure(config)
    rows = memory.read(tmp_path)
    found = {(x["case"], x["program"]): x for x in rows}
    assert len(found) == len(rows) == 7
    d, counters = 36, 8
    kept = {case: int(x["statistics_bytes"]) for (case, _), x in found.items()}
    # Of polar two matrices, and a count of its own.
    arrays = [-counters, 4 * (d + d * d), 4 * (d + 2 * d * d + 1), 4 * (d + 4 * d)]
    assert kept == {x: size + counters for x, size in zip(names, arrays, strict=True)}
    for (case, program), row in found.items():
        timed = not (case.startswith("polar") and program == "update")
        assert bool(row["seconds"]) == timed
        image, kernel = 4 * 2 * 4 * 4 * 4, 4 * 9 * 4 * 4
        if program == "forward":
            assert int(row["output_bytes"]) == image
            # The mean and the bias, and of two matrices the one that is needed.
            r = {"plain": 0, "dense": d * d, "polar": d * d, "factorised": 4 * d}
            needed = image + kernel + 4 * r[case.split(",")[0].split()[0]]
            assert 0 <= int(row["argument_bytes"]) - needed <= 4 * (d + 4)
    assert memory.text(rows).count("| not timed |") == 1


def test_a_step_is_timed_beside_plain_backpropagation(tmp_path, monkeypatch):
    config = speed.Settings(rounds=2, results=tmp_path)
    arms = arms_of(SMALL)
    chosen = [arms["bp", "sgd", x][0] for x in ("nothing", "mean")]
    monkeypatch.setattr(speed.Settings, "groups", lambda config: [chosen])
    # The second arm takes twice, then four times as long as the first.
    times = {"nothing": iter((1.0, 2.0)), "mean": iter((2.0, 8.0))}
    monkeypatch.setattr(speed, "step_of", lambda recipe: lambda: recipe.rule)
    monkeypatch.setattr(speed.timing, "seconds_of", lambda call: next(times[call()]))
    with contextlib.redirect_stdout(io.StringIO()):
        speed.measure(config)
    rows = speed.read(tmp_path)
    assert [(row["rule"], row["ratio"]) for row in rows] == [
        ("nothing", "1"),
        ("mean", "3"),
    ]
    assert "| `nothing` | 1.00 (1.5 s) |" in speed.text(rows)
    assert "| `mean` | 3.00 |" in speed.text(rows)


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (Digits, {"rules": ("zca",)}, r"`rules` is \('zca',\); expected names among"),
        (Digits, {"learning": ()}, "`learning` is"),
        (Digits, {"learning": ("bp", "bp")}, "each once"),
        (Digits, {"grid": (0.1, 0.01)}, "increasing order"),
        (Digits, {"rates": (math.nan,)}, "`rates`"),
        (Digits, {"floors": (0.5, 2.0)}, "`floors` is .* expected at most 1"),
        (Digits, {"seeds": 0}, "`seeds` is 0"),
        (Digits, {"update_every": 0}, "`update_every` is 0"),
        (Digits, {"noise": 0.0}, "`noise` is 0.0"),
        (Digits, {"momentum": 1.0}, "`momentum` is 1.0"),
        (Digits, {"conditions": (0.5,)}, "`conditions`"),
        (Digits, {"train_images": -1}, "`train_images` is -1"),
        (Cifar10, {"models": ()}, "`models`"),
        (Cifar10, {"mlp_side": 5}, "`mlp_side` is 5; expected a divisor of 32"),
        (Cifar10, {"conv_side": 2}, "`conv_side` is 2"),
        (Cifar10, {"sample": 0.0}, "`sample` is 0.0"),
        (memory.Settings, {"channels": 0}, "`channels` is 0"),
        (memory.Settings, {"fraction": 2.0}, "`fraction` is 2.0"),
        (speed.Settings, {"rounds": 0}, "`rounds` is 0"),
    ],
)
def test_bad_settings_say_what_was_expected(settings, change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_bad_commands_end_with_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit):
        decorrelation.main(["digits", "--rules", "zca"])
    assert "invalid choice 'zca'" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit, match="`batch_size` is 1258"):
        decorrelation.main(["digits", *folders(tmp_path), "--batch-size", "1258"])
