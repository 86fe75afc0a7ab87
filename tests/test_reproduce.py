"""The paper's numbers, its settings, and what is made of our rows beside them."""

import collections
import csv
import dataclasses
import itertools
import math

import numpy as np
import pytest

from examples import reproduce
from examples.data import Dataset, Split
from examples.paper import comparison
from examples.paper.studies import STUDIES
from examples.training import supervised
from examples.training.report import COLUMNS, CURVES, Results

PNG = b"\x89PNG"


def cell_of(table, model, optimiser, **settings):
    """Return the one cell of a table with these settings."""
    (cell,) = (
        cell
        for cell in STUDIES[table]().cells
        if (cell.run.recipe.model, cell.run.recipe.optimiser) == (model, optimiser)
        and all(cell.run.key()[name] == value for name, value in settings.items())
    )
    return cell


# ------------------------------------------------------------- what the paper says

# Typed from arXiv 2202.07052.
PRINTED = [
    ("table1", "basic_cnn", "sgd", {}, (73.60, 0.19, 0.7603, 0.0061)),
    ("table1", "basic_cnn", "orthogonal_sgd", {}, (76.67, 0.10, 0.6808, 0.0038)),
    (
        "table2",
        "resnet20",
        "adam",
        {"learning_rate": "0.1", "momentum": "0.5"},
        (18.39, 4.84, 15683.8291, 15681.5332),
    ),
    ("table3", "resnet20", "sgd", {}, (91.17, None, None, None)),
    ("table3", "resnet20", "orthogonal_sgd", {}, (90.18, None, None, None)),
    (
        "table5",
        "resnet20",
        "orthogonal_sgd",
        {"layers": "convolutions"},
        (87.70, None, 0.4824, None),
    ),
]


@pytest.mark.parametrize(("table", "model", "optimiser", "settings", "typed"), PRINTED)
def test_the_numbers_are_those_of_the_paper(table, model, optimiser, settings, typed):
    published = cell_of(table, model, optimiser, **settings).published
    for found, expected in zip(published, typed, strict=True):
        assert expected is None or found == expected


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "densenet121"])
def test_what_diverged_in_the_paper_is_not_a_number(model):
    assert np.isnan(cell_of("table4", model, "cn_sgd").published).all()
    accuracies = [cell.published.accuracy for cell in STUDIES["table4"]().cells]
    assert sum(map(math.isnan, accuracies)) == 3


def test_the_tables_have_all_their_cells():
    counts = {f"table{i}": n for i, n in enumerate((20, 48, 2, 20, 9), 1)}
    assert {name: len(STUDIES[name]().cells) for name in counts} == counts
    # Two optimisers on ten networks; four, three rates and four momenta on one.
    first, second = (STUDIES[name]().cells for name in ("table1", "table2"))
    names = [(cell.run.recipe.model, cell.run.recipe.optimiser) for cell in first]
    assert set(collections.Counter(names).values()) == {1}
    assert len({model for model, _ in names}) == 10
    grid = itertools.product(
        ("sgd", "orthogonal_sgd", "adam", "orthogonal_adam"),
        (0.1, 0.01, 0.001),
        (0.95, 0.9, 0.8, 0.5),
    )
    assert {
        (cell.run.recipe.optimiser, cell.run.learning_rate, cell.run.recipe.momentum)
        for cell in second
    } == set(grid)


# ------------------------------------------------------------------ what is to be run


@pytest.mark.parametrize("name", STUDIES)
def test_no_run_of_a_study_is_run_twice(name):
    study = STUDIES[name]()
    runs = [cell.run for cell in study.cells]
    runs += itertools.chain.from_iterable(study.arms.values())
    assert 0 < len(runs) == len({tuple(run.key().items()) for run in runs})
    final = {run.seed for run in runs if run.chosen == "fixed"}
    searched = {run.seed for run in runs if run.chosen == "grid"}
    assert final <= {0}
    assert all(seed >= 1_000_000 for seed in searched)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "table5"])
def test_the_settings_are_those_of_the_paper(name):
    for cell in STUDIES[name]().cells:
        run, recipe = cell.run, cell.run.recipe
        assert (recipe.data, recipe.augment) == ("cifar10", True)
        assert (recipe.classes, recipe.cifar_stem) == (None, False)
        assert (recipe.dtype, recipe.norm_groups) == ("float32", 1)
        assert (run.chosen, recipe.b2) == ("fixed", 0.99)
        orthogonal = recipe.optimiser.startswith("orthogonal")
        assert recipe.method == ("svd" if orthogonal else "")
        if name != "table2":
            assert recipe.momentum == 0.9
        found = run.epochs, recipe.batch_size, recipe.weight_decay, run.schedule
        if name == "table3":
            assert found == (200, 128, 1e-4, "steps")
            assert run.learning_rate == 0.1
        else:
            assert found == (100, 1024, 5e-4, "constant")
            assert name == "table2" or run.learning_rate == 0.01


@pytest.mark.parametrize("name", ["order", "budget", "recipe"])
def test_every_arm_is_searched_equally(name):
    arms = STUDIES[name]().arms
    assert len({len(runs) for runs in arms.values()}) == 1
    for runs in arms.values():
        assert len({run.recipe.optimiser for run in runs}) == 1
        assert {run.chosen for run in runs} == {"grid"}


def test_a_study_is_restricted_to_networks_and_epochs():
    study = STUDIES["table4"]().restricted(["resnet18", "resnet44"], 7)
    assert study.models() == ["resnet18", "resnet44"]
    assert len(study.cells) == 8
    assert {cell.run.epochs for cell in study.cells} == {7}
    whole = STUDIES["table4"]()
    assert whole.restricted([], None) == whole
    arms = STUDIES["budget"]().restricted(["resnet20"], None).arms
    assert len(arms) == 5 and all(name.startswith("resnet20") for name in arms)


# -------------------------------------------------------------- ours beside theirs


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "cifar10.csv")


def add(results, run, *, accuracy=math.nan, curve=None, **others):
    """Write a finished row; `curve` holds the validation accuracies."""
    curve = [0.5] * run.epochs if curve is None else curve
    numbers = {
        "test_accuracy": accuracy,
        "test_loss": 0.5,
        "validation_accuracy": curve[-1],
        "train_loss": 0.25,
        "validation_loss": 0.75,
        "seconds": 60.0,
        "images_per_s": 1000.0,
    }
    series = {f"{name}_curve": " ".join(map(str, curve)) for name in CURVES}
    values = {
        **dict.fromkeys(COLUMNS, ""),
        **run.key(),
        **{name: str(value) for name, value in numbers.items()},
        **series,
        "status": "diverged" if math.isnan(curve[-1]) else "finished",
        "device": "abacus",
    }
    results.append(values | {name: str(value) for name, value in others.items()})


def seeds(run, count):
    return [dataclasses.replace(run, seed=i) for i in range(count)]


def lines_of(text, *words):
    """Return the lines with all of some words."""
    return [line for line in text.splitlines() if all(word in line for word in words)]


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def small():
    """Return Table 1 on BasicCNN alone, for four epochs, and its two runs."""
    study = STUDIES["table1"]().restricted(["basic_cnn"], 4)
    return study, *(cell.run for cell in study.cells)


def table_of(text):
    """Return the rows of the first table, by the names of its columns."""
    lines = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_means_and_standard_errors_by_hand(results, small):
    study, sgd, orthogonal = small
    for run, x, loss in zip(seeds(sgd, 3), (0.70, 0.72, 0.74), (1, 2, 3), strict=True):
        add(results, run, accuracy=x, test_loss=loss)
    for run, x, rate in zip(
        seeds(orthogonal, 2), (0.772, 0.774), (100, 300), strict=True
    ):
        add(results, run, accuracy=x, images_per_s=rate, seconds=rate)
    first, second = table_of(comparison.text(study, results.rows(), "table1"))
    # Standard deviation 2 over the root of 3; 1 of two losses apart by 1 over it.
    assert first["accuracy, %"] == "72.00 ± 1.15"
    assert first["loss"] == "2.0000 ± 0.5774"
    assert first["paper, %"] == "73.60 ± 0.19"
    assert first["paper, loss"] == "0.7603 ± 0.0061"
    assert first["n"] == "3"
    # -1.6 / hypot(1.1547, 0.19) and 0.63 / hypot(0.1, 0.1).
    assert first["standard errors apart"] == "-1.4"
    assert second["accuracy, %"] == "77.30 ± 0.10"
    assert second["standard errors apart"] == "+4.5"
    assert second["n"] == "2"
    assert (second["s a run"], second["images/s"]) == ("200", "200")
    assert second["settings"] == "svd"
    assert second["device"] == "abacus, float32"


def test_one_run_has_no_standard_error(results, small):
    study, sgd, _ = small
    add(results, sgd, accuracy=0.75)
    text = comparison.text(study, results.rows(), "table1")
    (line,) = table_of(text)
    assert (line["accuracy, %"], line["standard errors apart"]) == ("75.00", "")
    command = "`python -m examples.reproduce table1 --models basic_cnn`"
    assert text.endswith(f"\n\nnot yet run (1 cells): {command}")


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (0.75, "+3.00 % of test accuracy over SGD (as in the paper, +3.07)"),
        (0.715, "-0.50 % of test accuracy over SGD (not as in the paper, +3.07)"),
    ],
)
def test_who_is_ahead_as_in_the_paper_or_not(results, small, accuracy, said):
    study, sgd, orthogonal = small
    for run, x in zip(seeds(sgd, 2), (0.71, 0.73), strict=True):
        add(results, run, accuracy=x)
    add(results, orthogonal, accuracy=accuracy)
    (line,) = lines_of(comparison.text(study, results.rows()), "over SGD")
    assert said in line
    assert line.startswith("- basic_cnn, `orthogonal_sgd`, svd: ")


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        # SGD ends at 0.625, in 30 s.
        ([0.25, 0.75, 0.5, 1.0], "after 2 of 4 epochs, 20 s against 30 s"),
        ([0.25, 0.5, 0.625, 0.5], "after 3 of 4 epochs, 30 s against 30 s"),
        ([0.25, 0.5, 0.5, 0.5], "did not reach SGD's last validation accuracy, 62.5 %"),
    ],
)
def test_epochs_and_seconds_to_where_sgd_ends(results, small, curve, said):
    study, sgd, orthogonal = small
    ends = [0.125, 0.25, 0.375, 0.5], [0.25, 0.5, 0.875, 0.75]
    for run, its, seconds in zip(seeds(sgd, 2), ends, (20, 40), strict=True):
        add(results, run, accuracy=0.7, curve=its, seconds=seconds)
    # Two seeds whose mean is the curve.
    for run, sign in zip(seeds(orthogonal, 2), (-1, 1), strict=True):
        its = [x + sign * 0.125 for x in curve]
        add(results, run, accuracy=0.8, curve=its, seconds=40 + sign)
    (line,) = lines_of(comparison.text(study, results.rows()), "over SGD")
    assert line.endswith(said)


def test_what_diverged_is_said(results):
    study = STUDIES["table4"]().restricted(["resnet18"], 2)
    runs = {cell.run.recipe.optimiser: cell.run for cell in study.cells}
    lost = [0.5, math.nan]
    add(results, runs["sgd"], accuracy=0.75)
    add(results, runs["cn_sgd"], curve=lost)
    add(results, runs["n_sgd"], curve=lost)
    add(results, seeds(runs["n_sgd"], 2)[1], accuracy=0.5)
    text = comparison.text(study, results.rows())
    lines = {line["optimiser"].strip("`"): line for line in table_of(text)}
    assert lines["cn_sgd"]["paper, %"] == lines["cn_sgd"]["paper, loss"] == "diverged"
    assert lines["cn_sgd"]["accuracy, %"] == "diverged 1/1"
    assert lines["n_sgd"]["accuracy, %"] == "diverged 1/2"
    assert lines["n_sgd"]["standard errors apart"] == ""
    assert "orthogonal_sgd" not in lines
    (line,) = lines_of(text, "- resnet18, `cn_sgd`")
    assert line == "- resnet18, `cn_sgd`: diverged, as in the paper"
    (line,) = lines_of(text, "- resnet18, `n_sgd`")
    assert line == "- resnet18, `n_sgd`: diverged, not as in the paper"


def test_what_diverged_in_the_paper_alone_is_said(results):
    study = STUDIES["table4"]().restricted(["resnet18"], 2)
    runs = {cell.run.recipe.optimiser: cell.run for cell in study.cells}
    add(results, runs["sgd"], accuracy=0.5)
    add(results, runs["cn_sgd"], accuracy=0.75)
    (line,) = lines_of(comparison.text(study, results.rows()), "- resnet18, `cn_sgd`")
    assert "+25.00 % of test accuracy over SGD (diverged in the paper)" in line


def test_nothing_is_ahead_of_a_sgd_that_diverged(results, small):
    study, sgd, orthogonal = small
    add(results, sgd, curve=[0.5, 0.5, math.nan, math.nan])
    add(results, orthogonal, accuracy=0.75)
    text = comparison.text(study, results.rows())
    assert "nan" not in text
    assert "over SGD" not in text


def test_rows_of_another_kind_stand_apart(results, small):
    study, sgd, orthogonal = small
    variants = {
        "abacus, float32": (sgd, {}),
        "abacus, bfloat16": (change(sgd, dtype="bfloat16"), {}),
        "abacus, float32, 4 norm groups": (change(sgd, norm_groups=4), {}),
        "slide rule, float32": (seeds(sgd, 2)[1], {"device": "slide rule"}),
    }
    for i, (run, others) in enumerate(variants.values()):
        add(results, run, accuracy=(i + 1) / 8, **others)
    add(results, change(orthogonal, dtype="bfloat16"), accuracy=0.5)
    text = comparison.text(study, results.rows())
    lines = {x["device"]: x for x in table_of(text) if x["optimiser"] == "`sgd`"}
    found = {where: line["accuracy, %"] for where, line in lines.items()}
    means = ("12.50", "25.00", "37.50", "50.00")
    assert found == dict(zip(variants, means, strict=True))
    assert {line["n"] for line in lines.values()} == {"1"}
    # Compared with its own kind alone.
    (line,) = lines_of(text, "over SGD")
    assert "+25.00 %" in line


def change(run, **changes):
    recipe = dataclasses.replace(run.recipe, **changes)
    return dataclasses.replace(run, recipe=recipe)


@pytest.mark.parametrize("other", ["epochs", "learning_rate", "chosen", "momentum"])
def test_rows_of_other_settings_are_not_of_the_cell(results, small, other):
    study, sgd, _ = small
    if other == "momentum":
        run = change(sgd, momentum=0.8)
    else:
        values = {"epochs": 5, "learning_rate": 0.02, "chosen": "tuned"}
        run = dataclasses.replace(sgd, **{other: values[other]})
    add(results, run, accuracy=0.75)
    text = comparison.text(study, results.rows())
    assert "|" not in text and "not yet run (2 cells)" in text


# ---------------------------------------------------------------------- the search


def candidates(count=3):
    (first, *_) = STUDIES["order"]().restricted(["basic_cnn"], 2).arms.values()
    return first[:count]


def test_the_best_is_chosen_by_validation_alone(results):
    runs = candidates()
    for run, valid, tested in zip(runs, (0.5, 0.75, 0.25), (0.9, 0.1, 1), strict=True):
        add(results, run, curve=[1.0, valid], accuracy=tested)
    best = comparison.best(runs, results, 1)
    assert best == dataclasses.replace(runs[1], chosen="tuned", seed=0)


def test_the_best_is_so_over_the_seeds_of_the_search(results):
    runs = candidates(2)
    for run, pair in zip(runs, ((0.75, 0.25), (0.625, 0.5)), strict=True):
        for i, valid in enumerate(pair):
            its = dataclasses.replace(run, seed=run.seed + i)
            add(results, its, curve=[0.5, valid])
    assert comparison.best(runs, results, 1).learning_rate == runs[0].learning_rate
    assert comparison.best(runs, results, 2).learning_rate == runs[1].learning_rate


def test_the_lower_loss_decides_and_what_diverged_is_never_best(results):
    runs = candidates(4)
    losses = zip(runs[:3], (0.75, 0.5, 0.625), strict=True)
    for run, loss in losses:
        add(results, run, validation_loss=loss)
    add(results, runs[3], curve=[1.0, math.nan])
    assert comparison.best(runs, results, 1).learning_rate == runs[1].learning_rate
    assert comparison.best(runs[3:], results, 1) is None


def test_the_winner_of_an_arm_is_reported_with_its_settings(results):
    study = STUDIES["order"]().restricted(["basic_cnn"], 2)
    name = next(iter(study.arms))
    run = dataclasses.replace(study.arms[name][2], chosen="tuned", seed=0)
    for its, x in zip(seeds(run, 2), (0.5, 0.75), strict=True):
        add(results, its, accuracy=x, curve=[0.5, x])
    # The other arm was searched, but nothing of it tested.
    add(results, study.arms[[*study.arms][1]][0])
    text = comparison.text(study, results.rows(), "order")
    (winner,) = table_of(text)
    assert (winner["arm"], winner["best of"], winner["n"]) == (name, "6", "2")
    assert winner["test, %"] == winner["validation, %"] == "62.50 ± 12.50"
    assert "learning_rate 0.01" in winner["its settings"]
    assert "not yet run (1 cells)" in text
    assert "python -m examples.reproduce order --models basic_cnn" in text


# ------------------------------------------------------------------------ the page


def test_the_page_has_every_study_and_its_figures(results, tmp_path):
    curve = np.linspace(0.1, 0.9, 100).tolist()
    for optimiser in ("sgd", "orthogonal_sgd"):
        run = cell_of("table1", "basic_cnn", optimiser).run
        for its in seeds(run, 2):
            add(results, its, accuracy=0.75, curve=curve)
    lost = cell_of("table4", "basic_cnn", "cn_sgd").run
    add(results, lost, curve=[*curve[:50], *[math.nan] * 50])
    comparison.write(tmp_path / "new", results.rows())
    page = (tmp_path / "new" / "README.md").read_text()
    for name, make in STUDIES.items():
        assert f"## {make().title}\n" in page
        assert f"python -m examples.reproduce {name} " in page
    # Its runs are cells of tables 1, 4 and 5, and of the study of batches it has none.
    figures = {path.name for path in (tmp_path / "new").glob("*.png")}
    expected = {f"table{i}_basic_cnn.png" for i in (1, 4, 5)}
    assert figures == expected
    for name in expected:
        assert f"]({name})" in page
        assert (tmp_path / "new" / name).read_bytes().startswith(PNG)


def test_figures_of_one_network_have_names_of_their_own(results, tmp_path):
    study = STUDIES["table2"]().restricted([], 3)
    for cell in study.cells:
        add(results, cell.run, accuracy=0.5)
    groups = list(comparison._groups(study))
    assert [len(group) for group in groups] == [4] * 12
    drawn = comparison.draw("table2", study, results.rows()[:8], tmp_path)
    assert len(set(drawn)) == 2
    assert all(path.read_bytes().startswith(PNG) for path in drawn)


# --------------------------------------------------------------------- the program


@pytest.fixture
def data(monkeypatch):
    """Put noise in place of CIFAR-10: one batch of 1024 and a smaller one."""
    rng = np.random.default_rng(0)

    def split(count):
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return Split(images, rng.integers(0, 10, count).astype(np.int32))

    made = Dataset(split(1040), split(40), split(40))
    monkeypatch.setattr(reproduce, "load_cifar10", lambda folder: made)
    return made


def command(folder, *arguments):
    """Return the arguments, all files in one folder."""
    folders = ["--results", str(folder), "--checkpoints", str(folder / "checkpoints")]
    return [*arguments, *folders]


def test_the_study_is_run_stopped_and_gone_on_with(data, tmp_path, monkeypatch, capsys):
    short = ["table1", "--models", "basic_cnn", "--seeds", "1", "--epochs", "2"]
    arguments = command(tmp_path, *short)
    epochs = []
    for rows in (0, 1, 1):
        reproduce.main([*arguments, "--minutes", "1e-9"])
        printed = capsys.readouterr().out
        assert "out of time; started again, it goes on" in printed
        again = "`python -m examples.reproduce table1 --models basic_cnn`"
        assert lines_of(printed, f"not yet run ({2 - rows} cells)", again)
        assert len(Results(tmp_path / "cifar10.csv").rows()) == rows
        epochs.append(len(list((tmp_path / "checkpoints").iterdir())))
    assert epochs == [1, 0, 1]
    reproduce.main(arguments)
    printed = capsys.readouterr().out
    assert "out of time" not in printed and "1 of 2 runs skipped" in printed
    assert len(lines_of(printed, "| basic_cnn |", "73.60 ± 0.19")) == 1
    assert len(lines_of(printed, "basic_cnn, `orthogonal_sgd`, svd:", "over SGD")) == 1
    rows = Results(tmp_path / "cifar10.csv").rows()
    assert [row["optimiser"] for row in rows] == ["sgd", "orthogonal_sgd"]
    for row in rows:
        assert row["status"] == "finished" and row["epochs"] == "2"
        assert 0 <= float(row["test_accuracy"]) < 0.5
    assert "not yet run" in (tmp_path / "README.md").read_text()

    before = (tmp_path / "cifar10.csv").read_bytes()
    monkeypatch.delattr(supervised, "train_together")
    reproduce.main(arguments)
    assert "2 of 2 runs skipped" in capsys.readouterr().out
    (tmp_path / "README.md").unlink()
    monkeypatch.delattr(reproduce, "load_cifar10")
    reproduce.main(command(tmp_path, "report"))
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "cifar10.csv").read_bytes() == before


@pytest.fixture
def untrained(data, monkeypatch):
    """Replace training: the best rate is 0.03 on validation, 0.3 on the test."""

    def together(runs, train, validation, *, limits, told, finish):
        shape, rate = (len(runs), runs[0].epochs), runs[0].learning_rate
        values = 1.0, 0.5, 1.0, 0.75 if rate == 0.03 else 0.5, 1.0
        finish(rate, supervised.History(*(np.full(shape, x) for x in values)))

    monkeypatch.setattr(supervised, "train_together", together)

    def programs(recipe, count):
        def evaluate(rate, split):
            assert split is data.test or (split.labels == data.test.labels).all()
            return np.ones(count), np.full(count, min(1.0, 2 * rate))

        return None, None, evaluate

    monkeypatch.setattr(supervised, "programs", programs)


def test_what_is_searched_is_tested_with_other_seeds(untrained, tmp_path, capsys):
    options = ["--models", "basic_cnn", "--epochs", "1", "--seeds", "2"]
    options += ["--search-seeds", "2", "--seeds-at-once", "2"]
    reproduce.main(command(tmp_path, "order", *options, "--dtype", "bfloat16"))
    rows = Results(tmp_path / "cifar10.csv").rows()
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    grid = [row for row in rows if row["chosen"] == "grid"]
    assert len(grid) == 2 * 6 * 2
    assert {row["seed"] for row in grid} == {"1000000", "1000001"}
    assert {row["test_accuracy"] for row in grid} == {""}
    tuned = [row for row in rows if row["chosen"] == "tuned"]
    found = [(row["optimiser"], row["learning_rate"], row["seed"]) for row in tuned]
    names = ("orthogonal_sgd", "sgd_orthogonal")
    assert found == [(name, "0.03", seed) for name in names for seed in "01"]
    assert {row["test_accuracy"] for row in tuned} == {"0.06"}
    assert "6.00 ± 0.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "invalid choice 'table9'"),
        (
            ["table1", "--models", "resnet19"],
            "expected names among basic_cnn, resnet20",
        ),
        (["table3", "--models", "basic_cnn"], "expected names among resnet20"),
        (["table1", "--seeds", "0"], "`seeds` is 0; expected at least 1"),
        (["order", "--search-seeds", "-1"], "`search_seeds` is -1"),
        (["table1", "--seeds-at-once", "0"], "`seeds_at_once` is 0"),
        (["table1", "--epochs", "-1"], "`epochs` is -1; expected at least 1"),
        (["table1", "--minutes", "0"], "`minutes` is 0.0; expected a positive"),
        (["table1", "--norm-groups", "0"], "`norm_groups` is 0"),
        ([], "study"),
    ],
)
def test_bad_commands_end_with_a_message(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(command(tmp_path, *arguments))
    assert stopped.value.code not in (0, None)
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message.lower() in printed.lower()
    assert list(tmp_path.iterdir()) == []


def test_missing_data_end_with_the_two_ways_to_get_them(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    arguments = command(tmp_path / "out", "table1", "--data-dir", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(arguments)
    message = str(stopped.value.code)
    assert "python -m examples.prepare_cifar10" in message
    assert "download_and_prepare()" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the results file


def test_a_file_of_another_version_is_left_alone(untrained, tmp_path, capsys):
    path = tmp_path / "cifar10.csv"
    content = b"data,optimiser,accuracy\r\ncifar10,sgd,0.5\r\n"
    path.write_bytes(content)
    options = ["table1", "--models", "basic_cnn", "--seeds", "1", "--epochs", "1"]
    for _ in range(2):  # the second time the rows are found again
        reproduce.main(command(tmp_path, *options))
        printed = capsys.readouterr()
        assert f"{path}, line 1: other columns" in printed.err
        assert path.read_bytes() == content
        with (tmp_path / "cifar10-2.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 2
    assert "2 of 2 runs skipped" in printed.out
    assert sorted(x.name for x in tmp_path.glob("*.csv")) == [
        "cifar10-2.csv",
        "cifar10.csv",
    ]


def broken(kind, row):
    """Return a line in which something is wrong with a row."""
    values = dict(row)
    if kind == "short":
        values.popitem()
    elif kind == "long":
        values["more"] = "1"
    elif kind == "word":
        values["train_loss"] = "much"
    elif kind == "curve":
        values["validation_accuracy_curve"] += " 0.5"
    return ",".join(values.values())


@pytest.mark.parametrize("kind", ["short", "long", "word", "curve"])
def test_a_broken_row_is_named_and_skipped(results, small, kind, capsys):
    _, sgd, orthogonal = small
    for run in (sgd, orthogonal, seeds(sgd, 2)[1]):
        add(results, run, accuracy=0.5)
    lines = results.path.read_text().splitlines()
    lines[2] = broken(kind, results.rows()[1])
    results.path.write_text("\n".join([*lines, ""]))
    again = Results(results.path)
    assert capsys.readouterr().err == f"{results.path}, line 3: a broken row; skipped\n"
    assert [row["seed"] for row in again.rows()] == ["0", "1"]
    assert again.find(orthogonal.key()) is None
    assert again.find(sgd.key()) == results.find(sgd.key())


@pytest.mark.parametrize("left", [0.25, 0.5, 0.75, "quoted"])
def test_half_a_row_does_not_spoil_the_next(results, small, left):
    """Of a program that was killed while it wrote; also between quotation marks."""
    _, sgd, orthogonal = small
    add(results, sgd, accuracy=0.5, device="abacus, 2 beads")
    whole = results.path.read_text()
    add(results, orthogonal, accuracy=0.5, device="abacus, 2 beads")
    row = results.path.read_text().removeprefix(whole)
    kept = row.index(", 2 beads") if left == "quoted" else int(left * len(row))
    results.path.write_text(whole + row[:kept])
    add(Results(results.path), orthogonal, accuracy=0.75)
    again = Results(results.path)
    assert again.find(orthogonal.key())["test_accuracy"] == "0.75"
    assert again.find(sgd.key())["test_accuracy"] == "0.5"
