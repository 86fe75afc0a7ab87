"""Every program compiles for TPUs and GPUs, by their compilers, without a device."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import accelerators
import pytest

from benchmarks import aot, compiled

pytestmark = pytest.mark.compilers
ROOT = pathlib.Path(__file__).parents[1]
WHOLE = [program.name for program in accelerators.whole()]
MANY = ["orthogonalise", *accelerators.OPTIMISERS]


@functools.cache
def outcomes(chip, *way):
    """Return what became of every program, by its name."""
    if reason := compiled.missing(aot.MACHINES[chip].platform):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "accelerators.py", chip, *way],
        env=os.environ | compiled.VARIABLES | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = map(json.loads, filter(None, done.stdout.splitlines()))
    found = {row.pop("name"): row for row in rows}
    assert done.returncode == 0, done.stderr[-2000:]
    return found


@pytest.mark.parametrize("chip", ["v5e", "h100"])
@pytest.mark.parametrize("name", WHOLE)
def test_compiles_for_one_chip(name, chip):
    found = outcomes(chip)[name]
    assert found["error"] is None
    assert found["called"] == {}


@pytest.mark.parametrize("way", accelerators.WAYS)
@pytest.mark.parametrize("chip", ["v5e-4", "h100-8"])
@pytest.mark.parametrize("name", MANY)
def test_compiles_for_several_chips_and_leaves_shardings_alone(name, chip, way):
    found = outcomes(chip, way)[name]
    assert found["error"] is None
    assert found["alike"]


@pytest.mark.parametrize("way", accelerators.WAYS)
@pytest.mark.parametrize("chip", ["v5e-4", "h100-8"])
def test_collectives_are_those_that_explain_names(chip, way):
    found = outcomes(chip, way)["orthogonalise"]
    explained, called = found["explained"], found["called"]
    if way == "automatic":
        # A single matrix may be gathered by a sum.
        for counts in (explained, called):
            gathered = counts.pop("all-reduce", 0) + counts.pop("all-gather", 0)
            counts["all-gather"] = gathered
    assert called == explained
