"""The notebooks agree with their sources, and what is stored in them may be shown.

That they run is seen by `bash scripts/notebooks.sh --check`.
"""

import ast
import json
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md"))
# What Colab has, and what a notebook installs or does without.
PACKAGES = {"flax", "jax", "matplotlib", "numpy", "optax", "sklearn"}
PACKAGES |= {"equinox", "haiku", "orthax"}
MACHINE = re.compile(r"/(home|root|tmp|usr|work|opt|Users|var)/|site-packages|C:\\")

each_notebook = pytest.mark.parametrize("name", NAMES)


def source(name):
    return jupytext.read(FOLDER / f"{name}.md")


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_has_both_files():
    assert len(NAMES) >= 7
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@each_notebook
def test_both_files_are_in_step(name):
    # If not: bash scripts/notebooks.sh NAME
    ours, theirs = (
        [(cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (source(name), stored(name))
    )
    assert ours == theirs
    formats = [x(name).metadata["jupytext"]["formats"] for x in (source, stored)]
    assert formats == ["md:myst,ipynb"] * 2


@each_notebook
def test_outputs_are_those_of_one_whole_run_without_errors(name):
    cells = code(stored(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "display_data",
        "execute_result",
        "stream",
    }
    # Warnings are of the machine that the notebook ran on.
    assert not [x for x in outputs if x.get("name") == "stderr"]


@each_notebook
def test_outputs_name_no_machine(name):
    notebook = stored(name)
    for cell in code(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)  # may spell anything
        text = json.dumps(cell.outputs)
        assert not MACHINE.search(text), text
        assert str(ROOT) not in text
        assert str(Path.home()) not in text


@each_notebook
def test_only_packages_that_readers_have_are_imported(name):
    lines = "\n".join(cell.source for cell in code(source(name))).splitlines()
    text = "\n".join(re.sub(r"^(\s*)%.*", r"\1pass", line) for line in lines)
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert "orthax" in imported
    assert imported - set(sys.stdlib_module_names) <= PACKAGES


@each_notebook
def test_the_first_cell_installs_from_a_checkout_or_by_name_only_where_it_must(name):
    first = code(source(name))[0].source
    assert 'SOURCE = "orthax-optim"' in first and 'SOURCE = "../.."' in first
    assert '%pip install --quiet "{SOURCE}"' in first and "git+" not in first
    for i, line in enumerate(first.splitlines()):
        if "%pip" in line:
            assert re.fullmatch(
                r"if importlib\.util\.find_spec\(\"\w+\"\) is None:",
                first.splitlines()[i - 1],
            )
    assert not re.search(r"--upgrade|-U\b|\bjax\b(?! as it is)", first)


@each_notebook
def test_switches_and_checks_are_out_of_sight(name):
    for notebook in (source(name), stored(name)):
        for cell in code(notebook):
            # In a cell that is seen an assertion explains what follows it.
            last = cell.source.splitlines()[-1]
            hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
            assert hidden or not last.startswith("assert")
            assert "SMALL" not in cell.source
            small = cell.metadata.get("small", ())
            for line, other in () if small == "skip" else small:
                assert line in cell.source and line != other


@each_notebook
def test_it_says_where_to_read_on(name):
    notebook = source(name)
    assert notebook.cells[-1].source.startswith("## Read on")
    text = "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target
    for target in re.findall(r"`((?:examples|docs)/[\w/.]+)`", text):
        assert (ROOT / target).exists(), target
    for module in re.findall(r"`python -m ([\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


@each_notebook
def test_numbers_that_are_claimed_are_in_the_outputs_or_checked(name):
    # A number with a decimal point, with its error where it has one.
    notebook = stored(name)
    claimed = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", notebook.cells[0].source)
    shown = "".join(cell.source for cell in code(notebook))
    for cell in code(notebook):
        shown += "".join(output.get("text", "") for output in cell.outputs)
    shown = re.sub(r"± +", "± ", shown)
    for number in claimed:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", shown), number
