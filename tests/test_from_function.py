"""`components.from_function` against `programs.TABLE`, and what it raises."""

import pickle
import time

import jax
import jax.numpy as jnp
import layers
import matrices
import numpy as np
import programs
import pytest
from jax import lax
from layers import Cut
from programs import DENSE, D, X, shape

import orthax
from orthax import components
from orthax.components import from_function
from orthax.internal.components import decide_all


def cuts(tree, rule):
    """Return the cut of every leaf of rank 2 or more, or the error it raises."""
    return {
        leaf.path: leaf.error or leaf.decision.cut
        for leaf in decide_all(tree, rule)
        if len(leaf.value.shape) > 1
    }


@pytest.mark.parametrize("row", programs.TABLE, ids=lambda row: row.name)
def test_table(row):
    apply, params, *inputs = row.build()
    rule = from_function(apply, params, *inputs, **row.options)
    assert cuts(params, rule) == dict(row.leaves)


def test_table_has_no_row_twice():
    names = [row.name for row in programs.TABLE]
    assert len(set(names)) == len(names) > 150


# --- the updates ----------------------------------------------------------------------
#
# Written with numpy alone: how a leaf becomes matrices, and the matrices a leaf.


def transposed(f):
    return lambda x: np.swapaxes(f(np.swapaxes(x, -1, -2)), -1, -2)


def each(f):
    """Apply to every matrix of the last two axes."""
    return lambda x: np.stack([f(y) for y in x])


def as_matrix(m, order):
    """Apply to the matrix of `m` rows that a leaf is in this order of its axes."""

    def on(x):
        y = x.transpose(order)
        z = matrices.factor(y.reshape(m, -1)).reshape(y.shape)
        return z.transpose(np.argsort(order))

    return on


def columns_of(*ends):
    def on(x):
        parts = np.split(x, ends, -1)
        return np.concatenate([matrices.factor(part) for part in parts], -1)

    return on


UPDATES = {
    "fused attention": {"qkv": columns_of(8, 16), "o": matrices.factor},
    "attention as Gemma's": {
        "q": as_matrix(8, (1, 0, 2)),
        "kv": each(as_matrix(8, (1, 0, 2))),
        "o": as_matrix(8, (0, 1, 2)),
    },
    "scan with remat": {"up": each(columns_of(12)), "down": each(matrices.factor)},
    "experts, dense": {
        "router": matrices.factor,
        "up": each(matrices.factor),
        "down": each(matrices.factor),
    },
    "Mamba": {"in": columns_of(16), "x": columns_of(3, 7), "dt": matrices.factor},
    "LoRA, merged": dict.fromkeys("wab", matrices.factor),
    "linen ConvTranspose, transposed": {"kernel": as_matrix(36, (0, 1, 3, 2))},
    "equinox GRUCell": {
        "weight_ih": transposed(columns_of(5, 10)),
        "weight_hh": transposed(columns_of(5, 10)),
    },
    "nnx Conv, groups": {
        "kernel": lambda x: np.concatenate(
            [as_matrix(18, (0, 1, 2, 3))(part) for part in np.split(x, 2, -1)], -1
        )
    },
    "haiku layer_stack": {"__layer_stack_no_per_layer/linear/w": each(matrices.factor)},
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_the_polar_factors(name, x64):
    (row,) = (row for row in programs.TABLE if row.name == name)
    apply, params, *inputs = row.build()
    rule = from_function(apply, params, *inputs, **row.options)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    transform = orthax.orthogonalise(orthax.polar.SVD(), rule=rule)
    updates = transform.update(grads, transform.init(grads))[0]
    before, after = layers.leaves_of(grads), layers.leaves_of(updates)
    for path, factor in UPDATES[name].items():
        expected = factor(np.asarray(before[path]))
        np.testing.assert_allclose(after[path], expected, atol=1e-10)


# --- what a rule is -------------------------------------------------------------------


def test_rule_is_plain_data():
    params = {"up": shape(D, 12), "down": shape(12, D)}
    rule = from_function(programs.mlp, params, X)
    assert hash(rule) == hash(from_function(programs.mlp, params, X))
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert not callable(rule)
    line = programs.mlp.__code__.co_firstlineno + 1
    where = f"contracted over (0,) by dot_general at programs.py:{line}"
    assert rule.decide("up", params["up"]).reason == where
    assert str(rule).splitlines()[1] == (
        f"down  (12, 8)  Matricisation((0,), (1,))  {where}"
    )


def test_arrays_do_as_well_as_shapes():
    params = {"up": jnp.ones((D, 12)), "down": np.ones((12, D), np.float32)}
    rule = from_function(programs.mlp, params, jnp.ones((2, D)))
    assert rule == from_function(programs.mlp, params, shape(2, D))


def test_keywords_and_what_is_no_array():
    def apply(params, x, mode, *, training, mask):
        assert mode == "train"
        return (x * mask) @ params["w"] if training else x

    found = from_function(
        apply, {"w": shape(D, 3)}, X, "train", training=True, mask=shape(7, 1)
    )
    assert found.resolve("w", shape(D, 3)) == DENSE


def test_data_that_the_function_holds():
    x = np.ones((5, D), np.float32)
    rule = from_function(
        lambda p: jnp.sum((x @ p["w"] + p["b"]) ** 2),
        {"w": shape(D, 3), "b": shape(5, 3)},
    )
    assert rule.resolve("w", shape(D, 3)) == DENSE
    assert rule.resolve("b", shape(5, 3)) is None


def test_integers_and_keys_are_no_matrices():
    params = {
        "w": shape(D, 3),
        "steps": shape(4, 4, dtype="int32"),
        "key": jax.random.key(0),
    }
    rule = from_function(lambda p, x: x @ p["w"], params, X)
    assert [path for path, *_ in rule.decisions] == ["w"]


def test_reasons():
    reasons = {}
    for name in (
        "fused attention",
        "tied embedding",
        "latent attention",
        "experts, dense",
    ):
        (row,) = (row for row in programs.TABLE if row.name == name)
        rule = from_function(*row.build())
        reasons |= {path: decision.reason for path, _, decision in rule.decisions}
    assert "its columns split into 3 blocks" in reasons["qkv"]
    assert reasons["embed"].startswith("a look-up, by gather at programs.py:")
    assert reasons["embed"].endswith("; also multiplied")
    assert "its columns split into 2 blocks" in reasons["kv_down"]
    assert "axis 0 kept apart by dot_general" in reasons["up"]


def test_lines_are_those_of_the_call():
    """`jnp.fft.rfft` is jitted: the second call finds what the first one traced."""

    def apply(p, x):
        y = x * jnp.fft.rfft(p["a"])
        return y + jnp.fft.rfft(p["b"])

    params = {"a": shape(D, D), "b": shape(D, D)}
    rule = from_function(apply, params, shape(D, D // 2 + 1))
    first = apply.__code__.co_firstlineno + 1
    for i, name in enumerate("ab"):
        reason = rule.decide(name, params[name]).reason
        assert reason.endswith(f"by fft at test_from_function.py:{first + i}")


def test_overrides_come_first():
    params = {"w": shape(D, 3), "v": shape(3, D, 2)}
    overrides = [("w", None), ("v", Cut((2,), (1,)))]
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    rule = from_function(apply, params, X, overrides=overrides)
    assert cuts(params, rule) == {"v": Cut((2,), (1,)), "w": None}
    assert rule.unused(["w"]) == ("pattern 'v'",)
    wrong = from_function(apply, params, X, overrides=[("w", Cut((0,), (4,)))])
    assert "raises  Pattern 'w'" in str(wrong)


# --- what is raised -------------------------------------------------------------------


def error_of(apply, params, *inputs, **options):
    """Return what resolving raises, once the rule has been built."""
    rule = from_function(apply, params, *inputs, **options)
    with pytest.raises(ValueError) as error:
        components.resolve(params, rule)
    return str(error.value)


def test_leaf_that_is_not_used():
    params = {"w": shape(D, 3), "old/w": shape(3, D), "older": shape(3, 3)}
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    message = error_of(apply, params, X)
    assert "'old/w' of shape (3, 8) is not used by the program" in message
    assert "'older'" in message and "unused=None" in message
    rule = from_function(apply, params, X, unused=None)
    assert cuts(params, rule) == {"w": DENSE, "old/w": None, "older": None}


def monarch(p, x):
    return jnp.einsum("bij,ijk->bik", x.reshape(-1, 2, 4), p["w"]).reshape(-1, 8) @ (
        p["w"].transpose(0, 2, 1).reshape(8, 4)
    )


def test_leaf_with_two_uses():
    message = error_of(monarch, {"w": shape(2, 4, 4)}, shape(3, 8))
    assert (
        "used in two ways: contracted over (0, 2) by dot_general at test_from"
        in (message)
        or "used in two ways: contracted over (1,) by dot_general at test_from"
        in message
    )
    assert "overrides=[('^w$', Matricisation(rows=..., columns=...))]" in message


def test_matrix_that_is_also_added():
    def apply(p, x):
        return (x @ p["w"] + p["w"][None]).sum()

    message = error_of(apply, {"w": shape(D, D)}, shape(3, D, D))
    assert "contracted over (0,)" in message and "element by element, by add" in message


def test_matrix_to_which_data_are_added():
    """A fast weight, or positions of one example: the program does not tell."""
    apply = lambda p, x, s: x @ (p["w"] + s)  # noqa: E731
    message = error_of(apply, {"w": shape(D, 3)}, X, shape(D, 3))
    assert "has data added to it, and is then contracted over (0,)" in message


def test_unknown_primitive_raises_with_its_name():
    def called(p, x):
        w = jax.pure_callback(lambda w: w, p["w"], p["w"])
        return x @ w @ p["v"]

    params = {"w": shape(D, 4), "v": shape(4, 3)}
    message = error_of(called, params, X)
    assert (
        "Leaf 'w' of shape (8, 4) is used by pure_callback at test_from_fun" in message
    )
    assert "'v'" not in message

    def factored(p, x):
        return x @ jnp.linalg.qr(p["w"])[0] @ p["v"]

    assert "is used by" in error_of(factored, params, X)


def test_pallas_kernel_raises_with_its_name():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def copy(w, out):
        out[...] = w[...]

    def apply(p, x):
        return x @ pallas.pallas_call(copy, jax.ShapeDtypeStruct((D, 4), "float32"))(
            p["w"]
        )

    assert "is used by pallas_call" in error_of(apply, {"w": shape(D, 4)}, X)


def test_unknown_primitive_on_activations_is_no_problem():
    def apply(p, x):
        x = jax.pure_callback(lambda x: x, x, x @ p["w"])
        return x @ p["v"]

    params = {"w": shape(D, D), "v": shape(D, 3)}
    assert cuts(params, from_function(apply, params, X)) == {"w": DENSE, "v": DENSE}


def test_slices_of_a_parameter_by_data():
    """Rows that data choose are a look-up; matrices that they choose are a batch."""

    def row(p, i, x):
        return x + lax.dynamic_slice(p["w"], (i, 0), (1, D))

    def matrix(p, i, x):
        return x @ lax.dynamic_index_in_dim(p["w"], i, 0, False)

    i = shape(dtype="int32")
    rule = from_function(row, {"w": shape(5, D)}, i, X)
    assert rule.decide("w", shape(5, D)).reason.startswith(
        "a look-up, by dynamic_slice"
    )
    rule = from_function(matrix, {"w": shape(5, D, 3)}, i, X)
    assert rule.resolve("w", shape(5, D, 3)) == programs.STACK


def test_errors_of_the_function_are_its_own():
    def apply(p, x):
        raise KeyError("mine")

    with pytest.raises(KeyError) as error:
        from_function(apply, {"w": shape(D, 3)}, X)
    assert error.value.args == ("mine",)
    note = error.value.__notes__[0]
    assert "called apply(params, float32[2, 7, 8])" in note and "'w'" in note


def test_other_trees_than_those_traced():
    rule = from_function(lambda p, x: x @ p["w"], {"w": shape(D, 3)}, X)
    with pytest.raises(ValueError, match="have no leaf 'v'"):
        components.resolve({"v": shape(D, 3)}, rule)
    with pytest.raises(ValueError, match=r"had the shape \(8, 3\)"):
        components.resolve({"w": shape(3, D)}, rule)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((programs.mlp, {}), TypeError, "holds no array"),
        (
            (programs.linen.Dense, {"w": shape(D, 3)}, X),
            TypeError,
            "must be a function",
        ),
        ((3, {"w": shape(D, 3)}, X), TypeError, "must be a function"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        from_function(*arguments)


def test_bad_options():
    params = {"w": shape(D, 3)}
    with pytest.raises(ValueError, match="`unused`"):
        from_function(programs.mlp, params, X, unused="skip")
    with pytest.raises(ValueError, match="`attention`"):
        from_function(programs.mlp, params, X, attention="head")
    with pytest.raises(TypeError, match="pairs"):
        from_function(programs.mlp, params, X, overrides=("w", None))


# --- size -----------------------------------------------------------------------------


def gpt2(p, tokens):
    def norm(x, q):
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * q["scale"] + q["bias"]

    x = p["wte"][tokens] + p["wpe"][: tokens.shape[1]]
    for q in p["blocks"]:
        h = norm(x, q["norm1"]) @ q["qkv"] + q["qkv_bias"]
        split = (y.reshape(*y.shape[:2], 12, 64) for y in jnp.split(h, 3, -1))
        x = x + programs.attend(*split).reshape(x.shape) @ q["out"]
        x = x + jax.nn.gelu(norm(x, q["norm2"]) @ q["up"]) @ q["down"]
    return norm(x, p["norm"]) @ p["wte"].T


def test_gpt2_takes_less_than_three_seconds():
    n = 768
    norm = {"scale": shape(n), "bias": shape(n)}
    block = {
        "norm1": norm,
        "norm2": norm,
        "qkv": shape(n, 3 * n),
        "qkv_bias": shape(3 * n),
        "out": shape(n, n),
        "up": shape(n, 4 * n),
        "down": shape(4 * n, n),
    }
    params = {
        "wte": shape(50257, n),
        "wpe": shape(1024, n),
        "norm": norm,
        "blocks": [block] * 12,
    }
    start = time.perf_counter()
    rule = from_function(gpt2, params, shape(8, 1024, dtype="int32"))
    assert time.perf_counter() - start < 3
    found = cuts(params, rule)
    assert found.pop("wte") is None and found.pop("wpe") is None
    for i in range(12):
        assert found.pop(f"blocks/{i}/qkv") == Cut((0,), (1,), blocks=3)
    assert set(found.values()) == {DENSE} and len(found) == 36
