"""Folding leaves into matrices and back, and the one function that works on them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from orthax import components
from orthax.components import ByName, ByPath, Matricisation
from orthax.execution import Stacking, Work, map_matrices

CUTS = {
    "dense": ((4, 6), Matricisation((0,), (1,)), [(1, 4, 6)]),
    "convolution": ((3, 3, 2, 8), Matricisation((0, 1, 2), (3,)), [(1, 18, 8)]),
    "negative axes": ((3, 3, 2, 8), Matricisation((-4, -3, -2), -1), [(1, 18, 8)]),
    "equinox": ((8, 2, 3, 3), Matricisation((1, 2, 3), (0,)), [(1, 18, 8)]),
    "batch in the middle": ((4, 5, 6), Matricisation((0,), (2,)), [(5, 4, 6)]),
    "heads": ((4, 2, 3), Matricisation((0, 2), (1,)), [(1, 12, 2)]),
    "groups": ((3, 2, 8), Matricisation((0, 1), (2,), groups=4), [(4, 6, 2)]),
    "equal blocks": ((6, 12), Matricisation((0,), (1,), blocks=3), [(3, 6, 4)]),
    "stacked blocks": ((5, 6, 12), Matricisation(1, 2, blocks=3), [(15, 6, 4)]),
    "row blocks": ((12, 6), Matricisation(0, 1, blocks=3, split="rows"), [(3, 4, 6)]),
    "sized blocks": (
        (6, 7),
        Matricisation((0,), (1,), blocks=(4, 2, 1)),
        [(1, 6, 4), (1, 6, 2), (1, 6, 1)],
    ),
}


@pytest.mark.parametrize(("shape", "cut", "expected"), CUTS.values(), ids=CUTS)
def test_fold_and_back(shape, cut, expected):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    stacks = cut.fold(x)
    assert [s.shape for s in stacks] == expected == list(cut.matrices(shape))
    assert (cut.unfold(stacks, shape) == x).all()


def test_fold_puts_every_entry_where_the_definition_says():
    x = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    (stack,) = Matricisation((0, 2), (3,), groups=2).fold(jnp.asarray(x))
    for batch, r0, r1, column in np.ndindex(3, 2, 4, 6):
        group, within = divmod(column, 3)
        found = stack[batch * 2 + group, r0 * 4 + r1, within]
        assert found == x[r0, batch, r1, column]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_fold_round_trip_for_any_axes(data):
    ndim = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    axes = data.draw(st.permutations(range(ndim)))
    rows = data.draw(st.integers(1, ndim - 1))
    columns = data.draw(st.integers(1, ndim - rows))
    cut = Matricisation(tuple(axes[:rows]), tuple(axes[rows : rows + columns]))
    x = np.arange(np.prod(shape)).reshape(shape)
    (stack,) = cut.fold(jnp.asarray(x))
    assert (np.asarray(cut.unfold((stack,), shape)) == x).all()
    m = np.prod([shape[a] for a in cut.rows])
    assert stack.shape[1] == m
    assert sorted(np.ravel(stack)) == list(range(x.size))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Matricisation((), (1,)), ValueError, "at least one axis"),
        (lambda: Matricisation((0,), (0, 1)), ValueError, "may occur once"),
        (lambda: Matricisation((0, 0), (1,)), ValueError, "may occur once"),
        (lambda: Matricisation((0.5,), (1,)), TypeError, "`rows` must be integers"),
        (lambda: Matricisation(0, 1, groups=0), ValueError, "must be positive"),
        (lambda: Matricisation(0, 1, groups=2, blocks=2), ValueError, "give one"),
        (lambda: Matricisation(0, 1, split="batch"), ValueError, '"columns" or "rows"'),
        (lambda: Matricisation(0, 1, spatial=(1,)), ValueError, "among `rows`"),
        (lambda: Matricisation(0, 3).on(2), ValueError, "rank 2 lacks"),
        (lambda: Matricisation(0, -2).on(2), ValueError, "may occur once"),
        (
            lambda: Matricisation(0, 1, blocks=4).matrices((3, 6)),
            ValueError,
            "cannot be divided",
        ),
        (
            lambda: Matricisation(0, 1, blocks=(4, 1)).matrices((3, 6)),
            ValueError,
            "add up to 5",
        ),
        (lambda: Stacking(max_bytes=0), ValueError, "must be positive"),
        (lambda: ByName(attention="half"), ValueError, "'per_head'"),
        (lambda: ByName(stacked="layers"), TypeError, "sequence of names"),
        (lambda: ByName(skip=(1,)), TypeError, "sequence of names"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def record(calls):
    def f(x):
        calls.append((x.shape, x.dtype.name))
        return x * 2

    return f


def test_equal_shapes_make_one_call():
    tree = {
        "a": {"kernel": jnp.ones((4, 6))},
        "b": {"kernel": jnp.ones((4, 6))},
        "c": {"kernel": jnp.ones((6, 4))},
        "d": {"kernel": jnp.ones((4, 6), jnp.bfloat16)},
        "stack": {"kernel": jnp.ones((3, 4, 6))},
    }
    rule = ByName(stacked=("stack",))
    calls = []
    out = map_matrices(record(calls), tree, rule)
    assert sorted(calls) == [
        ((1, 4, 6), "bfloat16"),
        ((1, 6, 4), "float32"),
        ((5, 4, 6), "float32"),
    ]
    calls = []
    map_matrices(Work(record(calls), commutes_with_transpose=True), tree, rule)
    assert sorted(calls) == [((1, 4, 6), "bfloat16"), ((6, 4, 6), "float32")]
    assert jax.tree.all(jax.tree.map(lambda x, y: (y == 2 * x).all(), tree, out))


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("limit", [None, 96, 200, 480])
def test_stacked_equals_leaf_by_leaf(turn, limit):
    """A function that tells matrices apart, on leaves of many shapes."""
    key = jax.random.key(0)
    tree = {
        f"m{i}": jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(4, 6), (6, 4), (4, 6), (2, 3), (3, 2), (4, 6)])
    }
    f = lambda x: x / jnp.linalg.norm(x, axis=(1, 2), keepdims=True)  # noqa: E731
    work = Work(f, commutes_with_transpose=turn)
    out = map_matrices(work, tree, stacking=Stacking(max_bytes=limit))
    for name, x in tree.items():
        assert np.allclose(out[name], x / np.linalg.norm(x), atol=1e-6)


def test_max_bytes_bounds_every_call():
    calls = []
    tree = [jnp.ones((4, 6)) for _ in range(7)]
    map_matrices(record(calls), tree, stacking=Stacking(max_bytes=3 * 96 + 10))
    assert calls
    assert all(b * 96 <= 3 * 96 + 10 for (b, _, _), _ in calls)
    with pytest.raises(ValueError, match="smaller than one 4 x 6 matrix"):
        map_matrices(lambda x: x, tree, stacking=Stacking(max_bytes=95))


def test_what_is_no_matrix_passes_through_untouched():
    tree = {
        "kernel": jnp.ones((2, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
        "int": jnp.ones((2, 3), jnp.int32),
        "bool": jnp.ones((2, 3), bool),
        "float0": np.zeros((2, 3), jax.dtypes.float0),
        "key": jax.random.split(jax.random.key(0), (2, 3)),
        "scalar": jnp.ones(()),
        "python": 3.0,
        "empty": jnp.ones((0, 3)),
        "one": jnp.ones((1, 1)),
        "vector": jnp.ones(5),
    }
    out = map_matrices(lambda x: x * 2, tree)
    assert (out["kernel"] == 2).all()
    for name in tree:
        if name not in ("kernel", "masked"):
            assert out[name] is tree[name]
    assert jax.tree.structure(out) == jax.tree.structure(tree)


def test_trees_without_matrices_pass_and_trees_with_none_cut_raise():
    assert map_matrices(lambda x: x * 2, {"bias": jnp.ones(3)})["bias"].sum() == 3
    with pytest.raises(ValueError, match=r"cuts no leaf of this tree.*'a/embedding'"):
        map_matrices(lambda x: x, {"a": {"embedding": jnp.ones((3, 4))}})


def test_a_function_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match="must keep the shape"):
        map_matrices(lambda x: x[:, :1], [jnp.ones((2, 3))])


def test_all_ambiguous_leaves_are_named_at_once():
    tree = {f"conv{i}": {"kernel": jnp.ones((3, 2, 4))} for i in range(12)}
    with pytest.raises(ValueError, match="ambiguous") as caught:
        components.resolve(tree, ByName())
    assert "'conv0/kernel'" in str(caught.value)
    assert "ByName(stacked=" in str(caught.value)
    assert "and 11 like it" in str(caught.value)


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TypeError, match=r"Leaf 'layer/activation' is <function"):
        components.resolve({"layer": {"activation": lambda x: x}}, ByName())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ByName, r"a class; write ByName\(\)"),
        ([("kernel", None)], r"use components\.ByPath"),
        ("kernel", "of type str"),
        (lambda path, leaf: None, "must be a rule"),
    ],
)
def test_what_is_no_rule_is_refused(rule, message):
    with pytest.raises(TypeError, match=message):
        components.resolve({"kernel": jnp.ones((2, 3))}, rule)


def test_a_callable_rule_is_refused_because_of_inject_hyperparams():
    class Callable:
        def resolve(self, path, leaf):
            return None

        def __call__(self):
            return None

    with pytest.raises(TypeError, match="inject_hyperparams"):
        components.resolve({"kernel": jnp.ones((2, 3))}, Callable())


def test_own_rules_are_asked_about_matrices_alone():
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Own:
        def resolve(self, path, leaf):
            asked.append(path)
            return Matricisation((-2,), (-1,))

    tree = {"a": [jnp.ones((2, 3)), jnp.ones(3)], "b": (jnp.ones((5, 2, 3)), 1)}
    out = map_matrices(lambda x: x * 2, tree, Own())
    assert asked == ["a/0", "b/0"]
    assert float(out["b"][0].sum()) == 60


def test_a_rule_that_does_not_fit_its_leaf_is_reported_by_path():
    rule = ByPath([("kernel", Matricisation((0, 1, 2), (3,)))])
    with pytest.raises(ValueError, match=r"'dense/kernel'.*rank 2 lacks"):
        components.resolve({"dense": {"kernel": jnp.ones((2, 3))}}, rule)


def test_only_convolutions():
    rule = components.OnlyConvolutions(ByName())
    tree = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
        "head": {"kernel": jnp.ones((4, 2))},
    }
    cuts = {leaf.path: leaf.cut for leaf in components.resolve(tree, rule)}
    assert cuts["conv/kernel"].columns == (3,)
    assert cuts["head/kernel"] is None


def test_no_transposition_or_copy_under_jit_for_a_single_dense_leaf():
    """Folding a plain matrix must cost nothing: one multiply in the program."""
    doubled = jax.jit(lambda tree: map_matrices(lambda x: x * 2.0, tree))
    text = doubled.lower([jnp.ones((4, 6))]).compile().as_text()
    called = re.findall(r" = \S+ ([a-z-]+)\(", text)
    assert called.count("multiply") == 1
    free = {"parameter", "constant", "broadcast", "bitcast", "fusion", "tuple"}
    assert {*called} <= {"multiply", "call", *free}
