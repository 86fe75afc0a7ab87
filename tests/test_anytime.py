"""examples/anytime.py: its networks, steps, runs, the choice of rates, the tables."""

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
from flax import nnx

from examples import anytime
from examples.data import Dataset, Split, load_digits
from examples.experiments.anytime import report, training
from examples.experiments.anytime.task_rules import RULES
from examples.models.anytime import MODELS, make_mlp, make_resnet
from examples.training import side_by_side
from examples.training.runs import Limits

SHORT = (
    "digits --models width --rules sum osgd --stages 2 --width 8 --epochs 3 --seeds 2 "
    "--tuning-seeds 1 --grid 0.001 0.1 --at-once 2"
)
SHORT = SHORT.split()
SIZES = {"stages": 2, "width": 8, "epochs": 3}  # of SHORT
SMALL = anytime.Digits(stages=2, width=4, momentum=0.0, weight_decay=0.0)


def folders(folder):
    return ["--results", str(folder), "--checkpoints", str(folder / "checkpoints")]


def read(folder):
    with (folder / "anytime.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anytime")
    with contextlib.redirect_stdout(io.StringIO()):
        anytime.main([*SHORT, *folders(folder)])
    return folder


@pytest.fixture(scope="module")
def digits():
    return jax.device_put(load_digits())


# --------------------------------------------------------------------------- runs


def test_a_short_run_writes_rows_a_page_and_a_figure(finished):
    rows = read(finished)
    arms = [("sum", "2"), ("osgd", "2"), ("independent", "1"), ("independent", "2")]
    expected = [(*arm, x) for arm in arms for x in ["grid"] * 2 + ["tuned"] * 2]
    assert [(r["rule"], r["exit"], r["chosen"]) for r in rows] == expected
    for row in rows:
        exits = 1 if row["rule"] == "independent" else 2
        assert row["status"] == "finished"
        assert len(row["validation_accuracy"].split()) == exits
        assert len(row["flops"].split()) == int(row["exit"])
        assert [len(x.split()) for x in row["cosines"].split(";")] == [exits - 1] * 3
        assert bool(row["test_accuracy"]) == (row["chosen"] == "tuned")
        cosines = [float(x) for x in row["cosines"].replace(";", " ").split()]
        assert all(-1 <= x <= 1 for x in cosines)
    page = (finished / "anytime.md").read_text()
    assert page.count("| `sum` | 0.1* |") == 1 and "reconstruction" in page
    figure = (finished / "anytime_digits.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert not list((finished / "checkpoints").iterdir())


def test_training_beats_chance_at_every_exit(finished):
    for row in read(finished):
        if row["chosen"] == "tuned":  # chance is 0.1
            assert min(map(float, row["test_accuracy"].split())) > 0.2, row["rule"]


def test_the_rate_is_the_best_on_validation_images(finished):
    rows = read(finished)
    for row in rows:
        if row["chosen"] != "tuned":
            continue
        grid = [
            r
            for r in rows
            if (r["rule"], r["exit"]) == (row["rule"], row["exit"])
            and r["chosen"] == "grid"
        ]
        score = {
            r["learning_rate"]: np.mean([*map(float, r["validation_accuracy"].split())])
            for r in grid
        }
        assert len(score) == 2 and len(set(score.values())) == 2
        assert row["learning_rate"] == max(score, key=score.get)
        assert not {r["seed"] for r in grid} & {row["seed"]}


def test_tuning_needs_no_test_images(tmp_path, finished, digits):
    config = anytime.Digits(tuning_seeds=1, grid=(0.001, 0.1), **SIZES)
    recipe = config.recipe("width", "sum", 2)
    results = report.Rows(tmp_path / "anytime.csv")
    data = digits._replace(test=None)
    limits = Limits(seeds_at_once=2)
    assert anytime.tune(config, recipe, results, data, limits) == 0.1
    runs = anytime.plan(config, recipe, "tuned", (0.1,))
    with pytest.raises(AttributeError, match="labels"):
        side_by_side.train_runs(
            training.TRAINER, runs[:2], results, data, test=True, limits=limits
        )


def test_finished_runs_are_skipped(finished, monkeypatch, capsys):
    before = (finished / "anytime.csv").read_bytes()
    monkeypatch.delattr(side_by_side, "train_together")
    anytime.main([*SHORT, *folders(finished)])
    assert (finished / "anytime.csv").read_bytes() == before
    assert "2 of 2 runs skipped" in capsys.readouterr().out


def test_what_is_stopped_goes_on_with_the_same_numbers(
    finished, tmp_path, capsys, monkeypatch
):
    for _ in range(2):
        anytime.main([*SHORT, *folders(tmp_path), "--minutes", "1e-9"])
        assert "out of time; started again, it goes on" in capsys.readouterr().out
    assert not (tmp_path / "anytime.csv").exists()
    begun = []
    train_epochs = side_by_side.train_together

    def train_together(trainer, runs, data, limits, told, finish):
        def also_told(epoch, metrics):
            begun.append(epoch)
            told(epoch, metrics)

        return train_epochs(trainer, runs, data, limits, also_told, finish)

    monkeypatch.setattr(side_by_side, "train_together", train_together)
    anytime.main([*SHORT, *folders(tmp_path)])
    assert begun[:4] == [2, 0, 1, 2]
    for ours, theirs in zip(read(tmp_path), read(finished), strict=True):
        assert {**ours, "seconds": ""} == {**theirs, "seconds": ""}


def test_a_run_that_diverges_is_a_result(tmp_path, finished, digits):
    config = anytime.Digits(tuning_seeds=2, grid=(1e30,), **SIZES)
    recipe = config.recipe("width", "sum", 2)
    results = report.Rows(tmp_path / "anytime.csv")
    best = anytime.tune(config, recipe, results, digits, Limits(seeds_at_once=2))
    assert math.isnan(best)
    (row, _) = results.rows()
    assert (row["status"], row["validation_accuracy"]) == ("diverged", "nan nan")


# ------------------------------------------------------------------------- networks


def shapes(model):
    """The shapes of the parameters, by the stage that owns them."""
    found = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))
    for path, leaf in flat:
        name = jax.tree_util.keystr(path)
        stage = int(re.search(r"'(?:stages|trunk|exits)'\]\[(\d+)", name).group(1))
        found.setdefault(stage, []).append((name, leaf.shape))
    return found


@pytest.mark.parametrize("make", [make_mlp, make_resnet])
@pytest.mark.parametrize("model", MODELS)
def test_an_independent_network_is_the_first_stages(make, model):
    def built(count):
        options = {"stages": 3, "width": 2, "depth": 1, "built": count}
        return nnx.eval_shape(lambda: make(model, 3, 10, rngs=nnx.Rngs(0), **options))

    whole = shapes(built(None))
    assert sorted(whole) == [0, 1, 2]
    for count in (1, 2):
        assert shapes(built(count)) == {k: whole[k] for k in range(count)}


@pytest.mark.parametrize("model", MODELS)
def test_an_exit_costs_what_its_own_network_costs_and_later_ones_more(model):
    costs = training.flops(SMALL.recipe(model, "sum", 2))
    assert costs[0] < costs[1]
    for k, cost in enumerate(costs, 1):
        alone = training.flops(SMALL.recipe(model, "independent", k))
        assert alone[-1] == cost


def test_operations_are_those_of_the_products():
    # Widths 4 and 4: a product of m x n takes 2 m n; norms and ReLU come on top.
    first = 2 * (64 * 4 + 4 * 4 + 4 * 10)
    both = 2 * (64 * 8 + 4 * 4 + 8 * 4 + 8 * 10)
    costs = training.flops(SMALL.recipe("width", "sum", 2))
    for cost, products in zip(costs, (first, both), strict=True):
        assert products < cost < 1.3 * products


# ----------------------------------------------------------------------------- steps


@functools.cache
def _steps(config, rule):
    recipe = config.recipe("width", rule, 2)

    @jax.jit
    def step(state, batch):
        key = jax.random.key(0)
        return training.train_step(state, batch, key, jnp.float32(0.05), recipe)

    return recipe, step


def two_steps(digits, rule, **changes):
    """States before, between and after two steps on one batch; losses; the batch."""
    recipe, step = _steps(dataclasses.replace(SMALL, **changes), rule)
    batch = jax.tree.map(lambda x: x[:64], digits.train)
    first = training.initialise(jax.random.key(0)[None], recipe)
    states, losses = [jax.tree.map(lambda x: x[0], first)], []
    for _ in range(2):
        state, (values, _) = step(states[-1], batch)
        states.append(state)
        losses.append(np.asarray(values))
    return states, losses, batch


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_descends(digits, rule):
    states, losses, _ = two_steps(digits, rule)
    assert np.isfinite(flat(states[-1].params)).all()
    assert losses[1].sum() < losses[0].sum()


def test_osgd_keeps_the_slope_of_the_exit_that_comes_first(digits):
    (before, after, _), _, batch = two_steps(digits, "sum")

    def losses(params):
        model = nnx.merge(before.graphdef, params, before.statistics)
        logits = jnp.stack(model(batch.images.reshape(64, 64)))
        picked = logits[:, jnp.arange(64), batch.labels]
        return jnp.mean(jax.nn.logsumexp(logits, axis=2) - picked, axis=1)

    jacobian = jax.jit(jax.jacrev(losses))(before.params)
    leaves = [np.reshape(x, (2, -1)) for x in jax.tree.leaves(jacobian)]
    grads = np.concatenate(leaves, axis=1)

    def slopes(state):
        """How fast every loss falls, in units of falling alone."""
        step = (flat(before.params) - flat(state.params)) / 0.05
        return grads @ step / np.sum(grads**2, axis=1), step

    found, step = slopes(after)
    np.testing.assert_allclose(step, grads.sum(0), rtol=0, atol=1e-4)
    assert min(abs(found - 1)) > 0.05
    for rule, kept in (("osgd", 0), ("osgd_reversed", 1)):
        found, _ = slopes(two_steps(digits, rule)[0][1])
        assert found[kept] == pytest.approx(1, abs=1e-3)
        assert abs(found[1 - kept] - 1) > 0.01


def test_an_independent_network_learns_by_its_last_exit_alone(digits):
    (before, after, _), losses, _ = two_steps(digits, "independent")
    assert losses[0].shape == (1,)
    old, new = shapes_and_values(before), shapes_and_values(after)
    still = [name for name in old if np.array_equal(old[name], new[name])]
    # Its first exit, and nothing else.
    heads = [name for name, x in old.items() if x.shape[-1] == 10]
    assert len(heads) == 4
    assert still == [name for name in heads if "['stages'][0]" in name]


def shapes_and_values(state):
    leaves, _ = jax.tree_util.tree_flatten_with_path(state.params)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def test_two_passes_make_the_same_steps(digits):
    one, _, _ = two_steps(digits, "osgd")
    two, _, _ = two_steps(digits, "osgd", two_passes=True, rules=("osgd",))
    a, b = flat(one[-1].params), flat(two[-1].params)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_cosines_are_those_of_whole_gradients():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(3, 4, 2)), "b": rng.normal(size=(3, 5))}
    tree = jax.tree.map(np.float32, tree)
    rows = np.concatenate([tree["a"].reshape(3, -1), tree["b"]], axis=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = [rows[0] @ rows[1], rows[0] @ rows[2], rows[1] @ rows[2]]
    found = training.cosines_of(jax.tree.map(jnp.asarray, tree))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ------------------------------------------------------------------------- the page


def made(rule, seed, accuracies, last=2, chosen="tuned", rate="0.1"):
    row = SMALL.recipe("width", rule, last)
    run = training.Run(row, 2, float(rate), "constant", chosen, seed)
    values = dict.fromkeys(report.COLUMNS, "") | run.key()
    values |= {"test_accuracy": accuracies, "validation_accuracy": accuracies}
    values |= {"flops": "1000 2000", "seconds": "1", "device": "cpu"}
    return values | {"cosines": "0.5; -0.1", "conflicts": "0; 0.5"}


def test_the_table_has_means_errors_and_paired_differences():
    rows = [made("sum", 0, "0.5 0.6"), made("sum", 1, "0.7 0.6")]
    rows += [made("osgd", 1, "0.75 0.65"), made("osgd", 0, "0.52 0.62")]
    rows += [made("sum", 9, "0.1 0.1", chosen="grid", rate=x) for x in ("0.1", "1.0")]
    table = report.text(rows, "digits")
    # By hand: 0.5 and 0.7 have the standard error 0.1; +0.02 and +0.05 0.015.
    assert "| `sum` | 0.1* | 60.0 ± 10.0 | 60.0 ± 0.0 |  | +0.20 | 25 | 2 |" in table
    assert "| `osgd` | 0.1* | 63.5 ± 11.5 | 63.5 ± 1.5 | 3.50 ± 1.50 |" in table
    assert "above: `osgd`; below: none; no further: none" in table
    assert table.count(report.NOT_YET) >= len(RULES) - 1


def test_what_is_not_yet_run_stands_beside_its_command(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(anytime, "finish", lambda config, *_: told.append(config))
    monkeypatch.setattr(anytime, "load_cifar10", lambda folder: load_digits())
    page = report.write(tmp_path, [made("sum", 0, "0.5 0.6")]).read_text()
    commands = re.findall(r"`python -m examples.anytime ([^`]*)`", page)
    commands = [x for x in commands if x]
    for command in commands:
        anytime.main([*shlex.split(command), *folders(tmp_path)])
    assert len(commands) == len(told) == (len(MODELS) - 1) + len(RULES) + 1
    assert {config.rules for config in told} >= {("osgd",), ("cagrad",), RULES}


def test_a_broken_row_is_left_out_and_other_columns_are_an_error(tmp_path, capsys):
    path = tmp_path / "anytime.csv"
    results = report.Rows(path)
    results.append(made("sum", 0, "0.5 0.6"))
    with path.open("a") as file:
        file.write("digits,2,4")
    assert len(report.Rows(path).rows()) == 1
    assert "line 3: broken" in capsys.readouterr().err
    report.Rows(path).append(made("sum", 1, "0.5 0.6"))
    assert [row["seed"] for row in report.Rows(path).rows()] == ["0", "1"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        report.Rows(path)


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"rules": ("osdg",)},
            r"`rules` is \('osdg',\); expected names among sum, osgd",
        ),
        ({"rules": ("sum", "sum")}, "each once"),
        ({"models": ()}, "at least one"),
        ({"models": ("wide",)}, "names among branched, width"),
        ({"two_passes": True}, "none of gradvac with `two_passes`: it keeps a state"),
        ({"stages": 1}, "`stages` is 1; expected at least 2"),
        ({"seeds": 0}, "`seeds` is 0"),
        ({"grid": (0.1, 0.01)}, "increasing order"),
        ({"grid": (math.nan,)}, "`grid`"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"minutes": 0.0}, "`minutes` is 0.0"),
        ({"train_images": -1}, "`train_images` is -1"),
    ],
)
def test_bad_settings_say_what_was_expected(setting, message):
    with pytest.raises(ValueError, match=message):
        anytime.Digits(**setting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--rules", "osdg"], "invalid choice 'osdg'"),
        (["digits", "--two-passes"], "none of gradvac"),
        (["letters"], "digits"),
    ],
)
def test_bad_commands_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        anytime.main(arguments)
    assert stopped.value.code not in (0, None)
    assert message in " ".join(capsys.readouterr().err.split())


def test_bad_batches_and_missing_data_end_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match="`batch_size` is 1258"):
        anytime.main(["digits", *folders(tmp_path), "--batch-size", "1258"])
    with pytest.raises(SystemExit, match="at most 1257: there are no more"):
        anytime.main(["digits", *folders(tmp_path), "--train-images", "1258"])
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(SystemExit, match="Two ways to get it"):
        anytime.main(["cifar10", *folders(tmp_path), "--data-dir", str(tmp_path)])


# -------------------------------------------------------------------------- CIFAR-10


def test_as_many_images_as_are_asked_for_and_no_fewer_to_choose_by():
    whole = SMALL.load()
    some = anytime.Digits(train_images=100).some(whole)
    assert len(some.train.labels) == len(some.train.images) == 100
    assert np.array_equal(some.train.images, whole.train.images[:100])
    assert len(some.validation.labels) == len(whole.validation.labels)
    assert len(SMALL.some(whole).train.labels) == len(whole.train.labels)


@pytest.mark.slow
@pytest.mark.skipif("ORTHAX_DATA" not in os.environ, reason="needs ORTHAX_DATA")
@pytest.mark.parametrize("passes", ["--no-two-passes", "--two-passes"])
@pytest.mark.parametrize("model", MODELS)
def test_a_few_steps_on_cifar10(tmp_path, monkeypatch, model, passes):
    whole = anytime.load_cifar10()
    few = Dataset(*(Split(x.images[:16], x.labels[:16]) for x in whole))
    monkeypatch.setattr(anytime, "load_cifar10", lambda folder: few)
    settings = f"cifar10 --models {model} --rules osgd --no-independent --width 2"
    settings += " --stages 2 --batch-size 8 --epochs 1 --seeds 1 --grid 0.03"
    anytime.main([*settings.split(), passes, *folders(tmp_path)])
    _, row = read(tmp_path)
    assert row["chosen"] == "tuned" and row["status"] == "finished"
    costs = [*map(int, row["flops"].split())]
    assert costs == sorted(set(costs)) and len(costs) == 2
    assert len(row["test_accuracy"].split()) == 2
