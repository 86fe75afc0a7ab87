"""The files around the package: they agree with each other and with what is there."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import orthax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contents = loaded("contents")


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def commands(job):
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_every_file_says_the_same_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == orthax.__version__
    assert citation["license"] == PROJECT["license"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == orthax.__version__
    # What CITATION.cff must have, by its format 1.2.0.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_scripts_that_are_there_and_know_no_secrets(path):
    text = path.read_text()
    assert not re.search(r"\{\{\s*secrets", text)
    jobs = yaml.safe_load(text)["jobs"]
    run = "\n".join(map(commands, jobs.values()))
    found = re.findall(r"bash (\S+)", run)
    assert found
    for script in found:
        assert (ROOT / script).exists(), script
    for job in jobs.values():
        assert job["timeout-minutes"] <= 180


def test_ci_runs_what_contributors_run():
    jobs = workflow("ci")["jobs"]
    assert "bash .ci/run" in commands(jobs["checks"])
    asked = jobs["matrix"]["strategy"]["matrix"]
    text = (ROOT / "scripts" / "matrix.sh").read_text()
    columns = [f"{p}:{d}" for p in asked["python"] for d in asked["dependencies"]]
    default = re.search(r"columns=\((3[^)]*)\)", text)[1].split()
    assert sorted(columns) == sorted(default)
    for version in asked["python"]:
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_only_what_was_built_and_tested_is_published():
    jobs = workflow("release")["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert sorted(publish["needs"]) == ["build", "matrix"]
    assert "bash scripts/package.sh dist" in commands(jobs["build"])
    steps = {step.get("uses", "").split("@")[0]: step for step in publish["steps"]}
    artifact = steps["actions/download-artifact"]["with"]["name"]
    built = [step.get("with", {}).get("name") for step in jobs["build"]["steps"]]
    assert artifact in built
    assert "pypa/gh-action-pypi-publish" in steps
    for name, job in jobs.items():
        assert name == "publish" or "permissions" not in job


def test_the_tag_of_a_release_must_be_the_version_and_dated(tmp_path):
    (check,) = (
        step["run"]
        for step in workflow("release")["jobs"]["build"]["steps"]
        if step.get("name", "").startswith("The tag is the version")
    )
    (tmp_path / "orthax").mkdir()
    for name in ("orthax/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    version, log = orthax.__version__, tmp_path / "CHANGELOG.md"
    rest = log.read_text().partition(f"## {version}")[2].partition("\n")[2]

    def released(tag, heading):
        log.write_text(f"# Changelog\n\n## {heading}\n{rest}")
        done = subprocess.run(
            ["bash", "-e", "-c", check],
            cwd=tmp_path,
            env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"},
            check=False,
        )
        return done.returncode == 0

    assert released(f"v{version}", f"{version} (2026-12-24)")
    assert not released("v9.9.9", f"{version} (2026-12-24)")
    assert not released(f"v{version}", f"{version} (unreleased)")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_matrix_runs_tests_that_are_there_from_floors_that_are_given():
    text = (ROOT / "scripts" / "matrix.sh").read_text()
    names = re.search(r"^core=\(([^)]*)\)", text, re.MULTILINE)[1].split()
    assert len(names) > 8
    for name in names:
        assert (ROOT / "tests" / f"test_{name}.py").exists(), name
    floors = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["flax"]
    for floor in floors:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", floor), "lowest() cannot read it"


@pytest.mark.parametrize(("version", "there"), [("3.0", False), (None, True)])
def test_interpreters_are_found_or_said_to_be_missing(version, there):
    version = version or "{}.{}".format(*sys.version_info)
    done = subprocess.run(
        ["bash", "-c", f"source scripts/python.sh; interpreter {version}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == there
    assert bool(done.stdout) == there


def test_what_should_not_be_in_a_wheel_is_found():
    info = "orthax_optim-0.1.0.dist-info"
    whole = contents.package() | {f"{info}/METADATA", f"{info}/licenses/LICENSE"}
    assert contents.faults_of_wheel(whole) == []
    assert len(contents.faults_of_wheel(whole - {"orthax/py.typed"})) == 2
    assert len(contents.faults_of_wheel(whole - {f"{info}/licenses/LICENSE"})) == 1
    for name in ("tests/conftest.py", "orthax/forgotten.py"):
        assert contents.faults_of_wheel(whole | {name}) == [f"wheel: {name} too much"]


def test_what_should_not_be_in_an_sdist_is_found():
    files = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md")
    files += ("CONTRIBUTING.md", ".gitignore", "pyproject.toml", ".ci/run")
    files += (
        ".github/a",
        "benchmarks/a",
        "docs/a",
        "examples/a",
        "scripts/a",
        "tests/a",
    )
    whole = contents.package() | {*files}
    assert contents.faults_of_sdist(whole) == []
    assert contents.faults_of_sdist(whole | {"runs/a"})
    assert contents.faults_of_sdist(whole | {"tests/__pycache__/a.pyc"})
    assert contents.faults_of_sdist(whole | {"docs/_build/index.html"})
    assert contents.faults_of_sdist(whole - {"CITATION.cff"})
    assert contents.faults_of_sdist(whole - {"orthax/polar/__init__.py"})
