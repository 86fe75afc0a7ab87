"""The documentation: its code runs, its links lead somewhere, nothing is missing."""

import ast
import collections
import dataclasses
import doctest
import functools
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthax
from docs.generators import docstrings, learning_rates, pages, pictures
from orthax import components, polar

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = {"_build", "_generated"}
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if not BUILT & {*page.relative_to(DOCS).parts}
]
# Everything that people read and that has links.
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for page in pages.copies() if page.suffix == ".md"),
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def stem(page):
    return page.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------- code


def fences(text):
    """Return the language and the code of every fenced block."""
    found = re.findall(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1$", text, re.M | re.S)
    return [(language, code) for _, language, code in found]


@functools.cache
def run(page):
    """Run the code of a page from top to bottom, and return its names."""
    names = {"__name__": page.stem}
    runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
    for i, (language, code) in enumerate(fences(page.read_text())):
        if language == "python":
            exec(compile(code, f"{page.name}[{i}]", "exec"), names)
        elif language == "pycon":
            test = doctest.DocTestParser().get_doctest(code, names, page.name, None, i)
            runner.run(test, out=said.append, clear_globs=False)
            names.update(test.globs)
    assert not runner.failures, "".join(said)
    return names


def with_code(page):
    return any(kind in ("python", "pycon") for kind, _ in fences(page.read_text()))


@pytest.mark.parametrize("page", [*filter(with_code, PAGES)], ids=stem)
def test_code_runs(page):
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_code_of_every_kind_is_run_or_a_command(page):
    kinds = {kind for kind, _ in fences(page.read_text())}
    assert all(kind.startswith("{") for kind in kinds - {"python", "pycon", "console"})


def test_commands_are_there():
    modules, extras = set(), set()
    for page in TEXTS:
        text = page.read_text()
        modules |= set(re.findall(r"python -m ([\w.]*\w)", text))
        extras |= set(re.findall(r"-e \"\.\[(\w+)\]", text))
    assert {"orthax", "examples.train", "benchmarks.step"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module), module
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"flax", "examples"} <= extras <= {*project["optional-dependencies"]}


# ------------------------------------------------------------------------------ links


def anchors(text):
    """Return what headings are called in links, as GitHub and MyST have it."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in headings
    }


def links(text):
    """Return the targets of all links and pictures that are not in code."""
    text = re.sub(r"^(`{3,}).*?^\1$|`[^`\n]+`", "", text, flags=re.M | re.S)
    return [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in x]


def broken(page, text, home):
    """Return the links of a text that lead nowhere, seen from a folder."""
    built = {pages.GENERATED / path: source for path, source in generated().items()}
    missing = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        goal = (home / path).resolve() if path else page
        goal = built.get(goal, goal)
        lost = not goal.exists()
        if anchor and not lost:
            lost = anchor not in anchors(goal.read_text())
        missing += [target] * lost
    return missing


@functools.cache
def generated():
    """Return what the build writes, and a file that is there in its place."""
    found = {target: source for source, target in pages.copies().items()}
    found[Path("results", "digits.md")] = ROOT / "README.md"
    for name in pictures.PICTURES:
        found[Path("pictures", f"{name}.png")] = Path(pictures.__file__)
    return found


@pytest.mark.parametrize("page", TEXTS, ids=stem)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text(), page.parent) == []


@pytest.mark.parametrize(
    "page", [page for page in pages.copies() if page.suffix == ".md"], ids=stem
)
def test_links_of_copies_lead_where_they_led(page):
    path = pages.GENERATED / pages.copies()[page]
    text = page.read_text()
    moved = pages.relinked(text, page, path)
    assert broken(page, moved, path.parent) == []
    assert len(links(moved)) == len(links(text))
    assert re.sub(r"\]\([^)]*\)", "", moved) == re.sub(r"\]\([^)]*\)", "", text)


def test_links_to_copied_pages_lead_to_the_copies():
    page, path = pages.RESULTS / "low_rank.md", pages.GENERATED / "results" / "a.md"
    text = "[a](README.md#table-1) [b](https://x.org) ![c](digits.png) [d](#here)"
    moved = "[a](cifar10.md#table-1) [b](https://x.org) ![c](../../../examples/results"
    moved += "/digits.png) [d](#here)"
    assert pages.relinked(text, page, path) == moved


def test_links_of_notebooks_lead_to_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "NOTEBOOKS", tmp_path)
    for name in ("muon", "own", "one_line"):
        cells = [
            {"cell_type": "markdown", "source": ["[a](muon.md), ", "[b](c.png)"]},
            {"cell_type": "code", "source": ["'[a](muon.md)'"]},
        ]
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    page, out = tmp_path / "own.ipynb", tmp_path / "out"
    path = out / pages.copies()[page]
    first, second = json.loads(
        pages.relinked_notebook(page.read_text(), page, path, out)
    )["cells"]
    assert first["source"] == "[a](muon.ipynb), [b](../../c.png)"
    assert second["source"] == ["'[a](muon.md)'"]
    path.parent.mkdir(parents=True)
    for name in ("muon", "own", "one_line"):
        path.with_stem(name).touch()
    listed = re.findall(r"notebooks/(\w+)$", pages._notebooks(out), re.M)
    assert listed == ["one_line", "muon", "own"]


def test_the_page_on_digits_has_the_table_of_the_readme():
    path = pages.GENERATED / "results" / "digits.md"
    text = pages.digits_page(path)
    (table,) = re.findall(r"^\|.*\|$", text, re.M | re.S)
    assert table in (ROOT / "README.md").read_text()
    assert broken(path, text, path.parent) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    text = "# A heading\n[a](#a-heading) [b](#another) [c](page.md) ![d](none.png)\n"
    page.write_text(text)
    assert broken(page, text, tmp_path) == ["#another", "none.png"]


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for kind, body in fences(page.read_text()):
            if kind == "{toctree}":
                names = [x for x in body.split() if not x.startswith(":")]
                listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert {page for page in PAGES if page.name != "index.md"} <= listed
    assert DOCS / "api" / "index.md" in listed
    expected = {"anytime", "cifar10", "decorrelation", "low_rank", "imagenet"}
    copied = pages.copies().values()
    assert expected <= {x.stem for x in copied if x.parts[0] == "results"}


def test_pictures_are_those_that_are_drawn():
    text = (DOCS / "mathematics.md").read_text()
    shown = re.findall(r"_generated/pictures/(\w+)\.png", text)
    assert sorted(shown) == sorted(pictures.PICTURES)


# -------------------------------------------------------------------------------- API


def documented():
    """Return how often each name of each room has an entry."""
    found = collections.Counter()
    for room in docstrings.ROOMS:
        text = (DOCS / "api" / f"{room}.md").read_text()
        assert set(re.findall(r"currentmodule:: (\S+)", text)) == {f"orthax.{room}"}
        entries = r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)"
        found.update(f"{room}.{name}" for name in re.findall(entries, text, re.M))
    return found


def test_every_public_name_has_one_entry():
    names = docstrings.public_names()
    assert {"polar.JORDAN", "decorrelation.Polar", "low_rank.OIALR"} <= names.keys()
    assert documented() == dict.fromkeys(names, 1)


def test_names_at_the_root_are_what_the_page_says():
    text = (DOCS / "api" / "index.md").read_text()
    names = docstrings.names_at_the_root()
    for line in re.findall(r"^\| (`orthax.*)", text, re.M):
        *here, there = re.findall(r"`orthax\.([\w.]+)`", line)
        for name in here:
            home = functools.reduce(getattr, there.split("."), orthax)
            assert names.pop(name) is home
    assert not names


# Made by functions of ours, not by users: nothing to show that these do not show.
MADE = {"nn.DecorrelationVariable"}


@pytest.mark.parametrize("name", docstrings.public_names())
def test_classes_say_what_they_hold_and_show_how_to_make_them(name):
    value = docstrings.public_names()[name]
    if not inspect.isclass(value):
        return  # functions: tests/test_api.py
    text = inspect.getdoc(value)
    tuple_ = hasattr(value, "_fields")
    fields = value._fields if tuple_ else []
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    for field in fields:
        if field != "_":
            assert f"{field}:" in text, f"{field} is not documented"
    result = tuple_ or getattr(value, "_is_protocol", False) or name in MADE
    assert result or ">>> " in text, "no example"


def test_docstrings_become_restructured_text():
    text = (
        "Take `polar.SVD()` of `x`s, $a_{b}$ and |c|, `(*batch, m)`, *d.\n\n"
        "| a | b |\n|---|---|\n| `Auto` | $x$ |\n\n>>> f(`x`) * 2  # |x|\n"
    )
    done = docstrings.to_rst(text, "orthax.polar.QDWH")
    head, table, example = done.split("\n\n", 1)[0], done, done.split(">>>")[1]
    assert ":py:obj:`polar.SVD() <orthax.polar.SVD>`" in head
    assert r"``x``\ s, :math:`a_{b}` and \|c\|, ``(*batch, m)``, \*d." in head
    assert "* - :py:obj:`Auto <orthax.polar.Auto>`\n     - :math:`x`" in table
    assert example == " f(`x`) * 2  # |x|\n"


# -------------------------------------------------------------------- claims, and tests


def named_tests(text):
    return set(re.findall(r"`(tests/\w+\.py)::(\w+)`", text))


def test_tests_that_are_named_are_there():
    named = set().union(*(named_tests(page.read_text()) for page in TEXTS))
    assert len(named) > 30
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text())
        assert test in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}, (
            file,
            test,
        )


def test_every_claim_of_ours_names_a_test():
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \|(.*)", (DOCS / "comparison.md").read_text(), re.M
    )
    ours = {what: cell for what, cell, rest in rows if rest.count("|") == 6}
    ours.pop("", None)
    nothing = {what for what, cell in ours.items() if cell in ("none", "no")}
    assert nothing == {"GPU kernels of its own", "clipping of attention logits"}
    lacking = [what for what in ours.keys() - nothing if not named_tests(ours[what])]
    assert len(ours) > 25
    assert lacking == []


@pytest.mark.skipif(optax.__version__ != "0.2.8", reason="the page is about 0.2.8")
def test_optax_is_as_the_comparison_says():
    tx = optax.contrib.muon(1.0)
    params = {"kernel": jnp.ones((6, 4)), "conv": jnp.ones((3, 3, 2, 4))}
    params["embed"] = jnp.ones((5, 3))
    state = tx.init(params)
    by_muon = jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu)
    assert [x.shape for x in by_muon] == [(5, 3), (6, 4)]
    grads = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
    update = jax.jit(lambda g: tx.update(g, tx.init(g), g)[0]["kernel"])
    for scale, largest in ((0.0, 0.0), (1e-12, 0.5), (1e30, 0.0)):
        scaled = update({"kernel": scale * grads["kernel"]})
        assert np.linalg.norm(scaled, 2) <= largest
    assert np.linalg.norm(update(grads), 2) > 1
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(
            jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("d", None))
        )
        with pytest.raises(Exception, match=r"(?i)shard"):
            update({"kernel": sharded})


# ------------------------------------------------------------- coming from elsewhere


@functools.cache
def migrating():
    return run(DOCS / "migrating.md")


def trained(tx, steps, start=0, state=None, params=None):
    """Return parameters, state and the last update after some steps."""
    names = migrating()
    params = names["params"] if params is None else params
    state = tx.init(params) if state is None else state
    for step in range(start, start + steps):
        grads = names["gradients"](params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, updates


RATE = optax.linear_schedule(0.1, 0.01, 8)
HOW = {"learning_rate": RATE, "weight_decay": 0.1}


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_converted_state_goes_on_as_the_old_one(nesterov):
    convert = migrating()["from_optax_muon"]
    theirs = optax.contrib.muon(nesterov=nesterov, adam_learning_rate=1e-2, **HOW)
    jordan = polar.NewtonSchulz(polar.JORDAN, gram=False)
    rest = optax.adamw(1e-2, weight_decay=0.0, nesterov=nesterov)
    ours = orthax.muon(nesterov=nesterov, method=jordan, rest=rest, **HOW)
    params, state, _ = trained(theirs, 3)
    converted = convert(state, ours, params)
    assert jax.tree.structure(converted) == jax.tree.structure(ours.init(params))
    expected = trained(theirs, 3, 3, state, params)
    found = trained(ours, 3, 3, converted, params)
    afresh = trained(ours, 3, 3, None, params)

    def far(a, b):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y).max(), a, b)))

    # Measured: 2e-7; the counts of the schedule and of the bias are of the old state.
    assert far(found[2], expected[2]) < 5e-6
    assert far(afresh[2], expected[2]) > 1e-2


def test_states_of_other_leaves_are_not_converted():
    names = migrating()
    skipping = orthax.muon(0.1, rule=components.ByName(skip=("head",)))
    _, state, _ = trained(optax.contrib.muon(0.1), 1)
    with pytest.raises(ValueError, match="treat different leaves as matrices"):
        names["from_optax_muon"](state, skipping, names["params"])


def test_the_chain_for_torch_is_its_muon():
    """Against what `torch.optim.Muon` 2.13.0 computes, in float64; (out, in)."""
    tx, rng = migrating()["torch_muon"], np.random.default_rng(0)
    weight, buffer = rng.normal(size=(7, 3)), np.zeros((7, 3))
    params = {"kernel": jnp.asarray(weight.T, jnp.float32)}
    state = tx.init(params)
    for _ in range(4):
        grad = rng.normal(size=weight.shape)
        buffer += (grad - buffer) * (1 - 0.95)
        x = grad + (buffer - grad) * 0.95
        x = x.T / np.linalg.norm(x)
        for a, b, c in polar.JORDAN:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        weight = weight * (1 - 1e-3 * 0.1) - 1e-3 * max(1, 7 / 3) ** 0.5 * x.T
        grads = {"kernel": jnp.asarray(grad.T, jnp.float32)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.abs(params["kernel"].T - weight).max() < 2e-6


# ---------------------------------------------------------------------- learning rates

HEADER = "data,model,optimiser,learning_rate,chosen,seed,batch_size,validation_accuracy"
ROWS = """
digits,mlp,sgd,0.1,grid,0,64,0.8
digits,mlp,sgd,0.1,grid,1,64,0.6
digits,mlp,sgd,0.3,grid,0,64,0.5
digits,mlp,sgd,0.1,tuned,7,64,0.9
digits,mlp,orthogonal_sgd,0.01,grid,0,64,0.7
digits,mlp,orthogonal_sgd,0.03,grid,0,64,
digits,mlp,orthogonal_sgd,0.01,tuned,7,64,0.9
digits,mlp,adam,0.01,grid,0,128,0.7
digits,mlp,adam,0.03,grid,0,128,0.7
digits,mlp,adam,0.03,tuned,7,128,0.7
"""


def test_rates_are_those_of_the_searches(tmp_path):
    (tmp_path / "digits.csv").write_text(HEADER + ROWS)
    (search,) = learning_rates.searches(tmp_path)
    (plain,), (ours,) = search.plain, search.orthogonal
    assert (plain.name, plain.best, ours.best) == ("`sgd`", 0.1, 0.01)
    assert plain.scores == {0.1: pytest.approx(70), 0.3: pytest.approx(50)}
    assert ours.at_an_end
    text = learning_rates.page(tmp_path)
    assert "| SGD | `orthogonal_sgd` | **0.1 x** | 0.1 | 1 |" in text
    assert "| `sgd` |  |  | **70** | 50 |" in text
    assert "diverged" in text


def test_committed_results_have_searches_for_both_kinds_of_recipes():
    names = {arm.name for s in learning_rates.searches() for arm in s.plain}
    assert "`sgd`" in names and names & {"`adam`", "`adamw`"}


# ---------------------------------------------------------------------------- the build


@pytest.mark.slow
def test_the_pages_build_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", DOCS, tmp_path / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {
        path.relative_to(pages.GENERATED)
        for path in pages.GENERATED.rglob("*")
        if path.is_file() and path.parts[-2] != "parts"
    }
    assert written == {*generated()}
    html = (tmp_path / "html" / "api" / "polar.html").read_text()
    assert 'id="orthax.polar.polar_factor"' in html
