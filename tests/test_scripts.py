"""The scripts that users copy: they stand alone, are short, and learn."""

import ast
import importlib.util
import pathlib
import pickle
import shutil
import sys

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
ALONE = ("classifier", "small_gpt")


@pytest.fixture(name="script")
def _script(tmp_path, monkeypatch):
    """Return a function that gives the module of a copied script, in its folder."""
    monkeypatch.chdir(tmp_path)

    def load(name):
        path = shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
        spec = importlib.util.spec_from_file_location(f"copied_{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", ALONE)
def test_scripts_are_short_and_import_nothing_of_the_project(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert "orthax" in imported and not imported & {"examples", "benchmarks", "tests"}


def test_the_classifier_learns_the_digits(script, tmp_path, capsys):
    assert script("classifier").main(["--epochs", "3"]) > 0.8
    assert "576 x 128" in capsys.readouterr().out, "what explain says"
    folder = tmp_path / "runs" / "classifier"
    curve = np.loadtxt(folder / "curve.csv", delimiter=",")
    assert curve[:, 0].tolist() == [1, 2, 3]
    assert curve[-1, 1] < curve[0, 1] / 2 and curve[-1, 2] > 0.8
    assert (folder / "curve.png").stat().st_size > 1000


def test_the_classifier_reads_the_official_archive(script, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    classifier = script("classifier")
    config = classifier.Config(data="cifar10", data_dir=tmp_path, batch_size=20)
    with pytest.raises(SystemExit, match="data_batch_1 does not exist: --data-dir"):
        classifier.load(config)
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), np.uint8)
    labels = np.repeat(np.arange(10), 6).tolist()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": images.reshape(60, -1), b"labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))
    train, validation, (test_images, test_labels) = classifier.load(config)
    assert [len(part[1]) for part in (train, validation)] == [270, 30]
    assert test_labels.tolist() == labels
    expected = images.transpose(0, 2, 3, 1) / 64 - 2
    np.testing.assert_allclose(test_images, expected, rtol=1e-6)
    batches = [*classifier.batches(config, *train, np.random.default_rng(0))]
    assert len(batches) == 13
    assert {x.shape for x, _ in batches} == {(20, 32, 32, 3)}


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_the_gpt_learns_a_text(script, tmp_path, optimiser):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    small = ("--steps", "100", "--width", "32", "--context", "16", "--depth", "1")
    loss = script("small_gpt").main([str(text), "--optimiser", optimiser, *small])
    assert loss < 0.6 * np.log(len(set(text.read_text())))
    folder = tmp_path / "runs" / "small_gpt"
    assert len((folder / "sample.txt").read_text()) == 300
    assert (folder / "curve.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("classifier", ["--epochs", "0"], "--epochs at least 1"),
        ("classifier", ["--batch-size", "5000"], "at most 1257"),
        ("small_gpt", ["nothing.txt"], r"nothing\.txt does not exist"),
    ],
)
def test_bad_input(script, name, arguments, says):
    with pytest.raises(SystemExit, match=says):
        script(name).main(arguments)


def test_what_is_stopped_keeps_its_curve(script, tmp_path, monkeypatch, capsys):
    classifier = script("classifier")
    calls = []

    def step(*_):
        calls.append(0)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return np.float32(1.0)

    monkeypatch.setattr(classifier, "step", step)
    classifier.main(["--epochs", "9"])
    assert "Stopped after 1 epochs" in capsys.readouterr().out
    assert (tmp_path / "runs" / "classifier" / "curve.csv").exists()
    with pytest.raises(SystemExit, match="no epoch was finished"):
        classifier.main(["--epochs", "9"])
