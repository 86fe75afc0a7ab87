"""Our own signatures and docstrings, inspected."""

import inspect
import re

import pytest

import orthax
from orthax import (
    components,
    decorrelation,
    diagnostics,
    execution,
    low_rank,
    nn,
    optimisers,
    polar,
    tasks,
    transforms,
)

ROOMS = {
    "polar": polar,
    "components": components,
    "execution": execution,
    "transforms": transforms,
    "optimisers": optimisers,
    "diagnostics": diagnostics,
    "low_rank": low_rank,
    "nn": nn,
    "decorrelation": decorrelation,
    "tasks": tasks,
}
PUBLIC = {
    f"{room}.{name}": value
    for room, module in ROOMS.items()
    for name, value in vars(module).items()
    if not name.startswith("_")
    and (inspect.isfunction(value) or inspect.isclass(value))
    and value.__module__.startswith(f"orthax.{room}")
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
NAMES_AT_THE_ROOT = [
    *("polar_factor", "orthogonalise", "orthogonalize", "explain", "scale_by_shape"),
    *("normalise", "normalise_components", "muon", "normuon"),
    *("orthogonal_sgd", "orthogonal_adam", "orthogonal_lars"),
    *(
        "polar",
        "components",
        "execution",
        "transforms",
        "optimisers",
        "diagnostics",
        "low_rank",
    ),
]
each = pytest.mark.parametrize("name", PUBLIC)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def test_there_is_something_to_inspect():
    assert {"polar.polar_factor", "transforms.orthogonalise", "optimisers.muon"} <= set(
        FUNCTIONS
    )
    assert len(PUBLIC) > 40


def test_root_names_are_those_of_the_design():
    for name in NAMES_AT_THE_ROOT:
        assert hasattr(orthax, name)
    assert orthax.orthogonalize is orthax.orthogonalise


AMERICAN = {
    f"{room}.{name}": name.replace("isation", "ization").replace("ise", "ize")
    for room, module in {"": orthax, **ROOMS}.items()
    for name in vars(module)
    if re.search(r"(?<![wr])is(e|ation)", name) and not name.startswith("_")
}


@pytest.mark.parametrize("name", AMERICAN)
def test_american_spellings_are_found(name):
    room, _, british = name.rpartition(".")
    module = ROOMS.get(room, orthax)
    assert getattr(module, AMERICAN[name]) is getattr(module, british)
    with pytest.raises(AttributeError, match="has no attribute 'realize'"):
        module.realize  # noqa: B018


@each
def test_documented(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text
    assert len(text.splitlines()[0]) <= 80
    assert text.splitlines()[0].rstrip().endswith((".", ":"))


@each_function
def test_arguments_documented_annotated_and_keyword_only(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters.values()
    # Optimisers keep the order of optax's, whose hyper-parameters are positional.
    positional_defaults = 4 if name.startswith("optimisers.") else 2
    count = 0
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty, parameter
        assert f"{parameter.name}:" in text, f"{parameter.name} is not documented"
        if parameter.default is not parameter.empty:
            count += parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    assert count <= positional_defaults
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@each_function
def test_signatures_can_be_read(name):
    signature = str(inspect.signature(FUNCTIONS[name]))
    arguments = len(inspect.signature(FUNCTIONS[name]).parameters)
    assert len(signature) < 160 + 70 * arguments, signature


@each_function
def test_sections(name):
    text = inspect.getdoc(FUNCTIONS[name])
    assert ">>> " in text, "no example"
    for section in ("Args:", "Returns:", "Example:"):
        assert section in text, f"no section {section}"
