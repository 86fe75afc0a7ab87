"""What the README says is what the files say."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from examples import readme

ROOT = Path(__file__).parents[1]
TEXT = readme.README.read_text()


def test_the_results_are_those_of_the_committed_file():
    assert readme.filled(TEXT) == TEXT


def test_the_numbers_below_the_figure_are_those_of_its_page():
    page = (ROOT / "examples" / "results" / "language.md").read_text()
    rows = {}
    for name, *cells in re.findall(
        r"^\| `(\w+)` \| whole .*\| (\d+ ± \d+) \| (\d+ ± \d+) \|", page, re.M
    ):
        rows.setdefault(name, cells)
    numbers = re.findall(r"(\d+ ± \d+) %", TEXT.partition("## Two commands")[0])
    assert numbers == [*rows["muon"], *rows["orthogonal_sgd"]]


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    install, test = re.search(r"(pip install -e .*test.*) && (pytest)", TEXT).groups()
    assert install.replace("pip install", "pip install --quiet") in ci
    assert re.search(rf"^{test}\b", ci, re.MULTILINE)


def test_extras_and_floors_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[(\w+)\]\"", TEXT):
        assert extra in project["optional-dependencies"]
    for floor in project["dependencies"]:
        assert f"`{floor}`" in TEXT


def test_the_example_runs():
    """The code block, with parameters and gradients to run it on."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    before = "import jax.numpy as jnp; params = grads = {'kernel': jnp.eye(3)}\n"
    done = subprocess.run(
        [sys.executable, "-c", before + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 of 1 leaves cut into 1 matrices" in done.stdout, done.stderr


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
