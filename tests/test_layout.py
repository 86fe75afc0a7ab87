"""The rooms and the arrows between them, read off the code."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import orthax

ROOT = pathlib.Path(__file__).parents[1] / "orthax"
# What each room may import, besides the standard library and numpy.
ALLOWED = {
    "_linalg": {"jax"},
    "polar": {"jax"},
    "components": {"jax", "optax"},
    "execution": {"jax", "polar", "components", "optax"},
    "decorrelation": {"jax", "polar"},
    "transforms": {"jax", "polar", "components", "execution", "optax"},
    "tasks": {"jax", "execution", "optax"},
    "low_rank": {"jax", "polar", "components", "execution", "optax"},
    "diagnostics": {"jax", "polar", "components"},
    "nn": {"jax", "polar", "decorrelation", "flax"},
    "optimisers": {"jax", "transforms", "execution", "components", "polar", "optax"},
    # `python -m orthax`, outside of the house.
    "__main__": {"jax", "polar", "_self_check", "__version__"},
    "_self_check": {"jax", "polar"},
    "_repr": set(),
    "_spelling": set(),
}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Return (top package, full module) of every import; `orthax.x` for our own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "orthax":
                yield from (("orthax", f"orthax.{alias.name}") for alias in node.names)
            else:
                yield node.module.split(".")[0], node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_floors_below(path):
    room = room_of(path)
    if room == "internal":
        room = path.stem
    for package, module in imports(path):
        if package == "orthax":
            target, *private = module.split(".")[1:]
            if target in (room, "_linalg", "_repr", "_spelling"):
                continue
            if target == "internal":
                target, *private = private
            assert target in ALLOWED[room], f"{room} may not import {target}"
            assert not private, f"{module}: import {target} by its public names"
        elif package not in sys.stdlib_module_names and package != "numpy":
            assert package in ALLOWED[room], f"{room} may not import {package}"


def test_modules_are_private_and_names_say_something():
    for path in FILES:
        inside_room = len(path.relative_to(ROOT).parts) > 1
        if inside_room and room_of(path) != "internal" and path.name != "__init__.py":
            assert path.name.startswith("_")
        assert path.stem.strip("_") not in (
            "utils",
            "helpers",
            "common",
            "misc",
            "base",
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_one_idea(path):
    assert len(path.read_text().splitlines()) <= 300


def test_linear_algebra_is_on_the_ground_floor():
    """What can hang, or be of a lower precision than it says, is written once."""
    words = re.compile(r"jnp\.linalg|lax\.linalg\.|promote_types\(")
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # Not what docstrings say.
            if isinstance(node, ast.Attribute | ast.Call):
                text = ast.unparse(node) + "("
                found = words.search(text)
                assert path.stem == "_linalg" or not found, f"{path}: {text}"


def test_the_walk_of_a_leaf_is_the_one_in_contributing():
    """Each step is called with the leaf or what was made of it, in this order."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    walk = re.findall(r"^(?:\d+\.|and back through) `(\w+/\w+\.py):(\w+)`", text, re.M)
    assert 8 <= len({file for file, _ in walk}) <= 10
    calls = {}

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            file = pathlib.Path(code.co_filename).relative_to(ROOT).as_posix()
            calls.setdefault((file, code.co_name), len(calls))

    tx = orthax.orthogonalise()
    params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    state = tx.init(params)
    jax.clear_caches()
    sys.setprofile(note)
    try:
        jax.jit(tx.update).lower(params, state, params)
    finally:
        sys.setprofile(None)
    first_calls = [calls[step] for step in walk]
    assert first_calls == sorted(first_calls)


def test_import_is_light():
    program = (
        "import orthax, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "jax" in loaded
    assert not {"flax", "equinox", "haiku", "chex", "tensorflow", "sklearn"} & set(
        loaded
    )


def test_flax_is_imported_when_it_is_asked_for():
    program = "import orthax, sys; orthax.nn.NestedConv; print('flax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        orthax.nothing  # noqa: B018


def test_the_other_orthax_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "orthax-0.2.11.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: orthax\nVersion: 0.2.11\n"
    (tmp_path / "orthax-0.2.11.dist-info" / "METADATA").write_text(metadata)
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import orthax"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError: The distribution 'orthax' 0.2.11" in done.stderr
    assert "pip install orthax-optim" in done.stderr


def test_the_report_explains_a_package_that_was_overwritten(tmp_path):
    (tmp_path / "orthax").mkdir()
    (tmp_path / "orthax" / "__init__.py").write_text("polynomials = True")
    shutil.copy(ROOT / "__main__.py", tmp_path / "orthax")
    done = subprocess.run(
        [sys.executable, "-m", "orthax"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip uninstall -y orthax orthax-optim" in done.stderr
    assert "Traceback" not in done.stderr
