"""Weights into factors and back, the rank rule, refactoring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthax import components, diagnostics, low_rank
from orthax.components import Matricisation

QUIET = low_rank.OIALR(delay=0, frequency=1, beta=1e-6)


def random(shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return jnp.asarray(x, dtype)


def with_spectrum(s, m=None, n=None, seed=0):
    """An m x n matrix with the singular values `s`."""
    m, n = m or len(s), n or len(s)
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((k, k)))[0][:, : len(s)] for k in (m, n))
    return jnp.asarray(u * np.asarray(s) @ v.T, jnp.float32)


def close(a, b, tol=1e-6):
    scale = max(1.0, float(np.max(np.abs(np.asarray(b, np.complex128)), initial=0)))
    a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
    assert a.shape == b.shape
    assert np.max(np.abs(a - b), initial=0) <= tol * scale


def trees_close(a, b, tol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(close, tol=tol), a, b)


# --- Factorise and materialise ------------------------------------------------------

# Rule, path and shape of the leaf, shape of its Sigma.
LEAVES = {
    "dense": (components.ByName(), "dense/kernel", (12, 8), (8, 8)),
    "wide": (components.ByName(), "dense/kernel", (5, 9), (5, 5)),
    "conv": (components.ByName(), "conv/kernel", (3, 3, 2, 6), (6, 6)),
    "query": (components.ByName(), "query/kernel", (8, 2, 3), (6, 6)),
    "out": (components.ByName(), "out/kernel", (2, 3, 8), (6, 6)),
    "per_head": (
        components.ByName(attention="per_head"),
        "query/kernel",
        (8, 2, 3),
        (2, 3, 3),
    ),
    "fused qkv": (
        components.ByPath([("qkv", Matricisation((0,), (1,), blocks=3))]),
        "qkv/kernel",
        (4, 12),
        (3, 4, 4),
    ),
    "grouped conv": (
        components.ByPath([("conv", Matricisation((0, 1), (2,), groups=2))]),
        "conv/kernel",
        (3, 2, 8),
        (2, 4, 4),
    ),
    "scanned": (
        components.ByName(stacked=("layers",)),
        "layers/kernel",
        (3, 6, 4),
        (3, 4, 4),
    ),
}
WHOLE = components.ByPath([("", Matricisation((0,), (1,)))])
each_leaf = pytest.mark.parametrize("case", LEAVES)


def nested(path, x):
    for name in reversed(path.split("/")):
        x = {name: x}
    return x


@each_leaf
def test_factorised_and_materialised_is_the_same(case):
    rule, path, shape, expected = LEAVES[case]
    params = {**nested(path, random(shape)), "bias": random((3,))}
    state = low_rank.factorise(params, rule)
    (sigma,) = (x for x in jax.tree.leaves(state.trainable) if x.ndim > 1)
    assert sigma.shape == expected
    trees_close(low_rank.materialise(state), params)
    assert state.trainable["bias"] is params["bias"]
    # The factors are what they are said to be.
    (leaf,) = [leaf for leaf in components.resolve(params, rule) if leaf.cut]
    bases, (stack,) = state.frozen[path], leaf.cut.fold(leaf.value)
    sigma = sigma.reshape(-1, *sigma.shape[-2:])
    u, vt, sigma, stack = (
        np.asarray(x, np.float64) for x in (bases.u, bases.vt, sigma, stack)
    )
    s = np.linalg.svd(stack, compute_uv=False)
    close(sigma, s[:, :, None] * np.eye(s.shape[1]))
    close(u.swapaxes(1, 2) @ u, np.broadcast_to(np.eye(s.shape[1]), sigma.shape))
    close(vt @ vt.swapaxes(1, 2), np.broadcast_to(np.eye(s.shape[1]), sigma.shape))


def test_blocks_of_unequal_sizes_stay_dense():
    rule = components.ByPath([("", Matricisation((0,), (1,), blocks=(6, 3)))])
    params = {"qkv": random((6, 9)), "out": random((6, 9), 1)}
    with pytest.raises(ValueError, match=r"'qkv' \(6, 9\).*blocks of unequal sizes"):
        low_rank.factorise(params, rule)
    mixed = components.ByPath([("qkv", rule.patterns[0][1]), *WHOLE.patterns])
    state = low_rank.factorise(params, mixed)
    assert low_rank.ranks(state) == {"out": 6}
    assert state.trainable["qkv"] is params["qkv"]
    assert low_rank.ranks(low_rank.factorise(params, WHOLE)) == {"qkv": 6, "out": 6}
    with pytest.raises(ValueError, match=r"'qkv' .*blocks \(6, 3\) have unequal"):
        low_rank.factorise(params, mixed, ranks={"qkv": 2})


@pytest.mark.parametrize(
    ("dtype", "tol"), [(jnp.bfloat16, 2e-2), (np.float16, 2e-3), (np.complex64, 1e-6)]
)
def test_other_dtypes(dtype, tol):
    params = {"kernel": random((6, 4), dtype=dtype)}
    state = low_rank.factorise(params)
    assert state.trainable["kernel"].dtype == dtype
    wide = jnp.complex64 if dtype == np.complex64 else jnp.float32
    assert state.frozen["kernel"].u.dtype == wide
    found = low_rank.materialise(state)
    assert found["kernel"].dtype == dtype
    close(found["kernel"], params["kernel"], tol)
    # A dense Sigma with phases, through a refactorisation.
    sigma = random((4, 4), 1, dtype)
    state = state._replace(trainable={"kernel": sigma})
    before = low_rank.materialise(state)["kernel"]
    after = low_rank.refactor(state, QUIET)
    values = np.diagonal(np.asarray(after.trainable["kernel"], np.complex128))
    expected = np.linalg.svd(np.asarray(sigma, np.complex128), compute_uv=False)
    close(values, expected, tol)
    close(low_rank.materialise(after)["kernel"], before, tol)


def test_double_precision(x64):
    params = {"kernel": random((6, 4), dtype=np.float64)}
    close(
        low_rank.materialise(low_rank.factorise(params))["kernel"],
        params["kernel"],
        1e-14,
    )


def test_a_rank_gives_the_best_approximation():
    x = random((7, 5))
    state = low_rank.factorise({"kernel": x}, ranks=2)
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64))
    close(low_rank.materialise(state)["kernel"], u[:, :2] * s[:2] @ vt[:2])
    assert low_rank.ranks(state) == {"kernel": 2}


def test_ranks_by_path_name_the_leaves():
    params = {name: {"kernel": random((6, 4))} for name in "abc"}
    params["a"]["kernel"] = random((40, 2))  # that would be left alone by its aspect
    state = low_rank.factorise(params, ranks={"a/kernel": 1, "c/kernel": 3})
    assert low_rank.ranks(state) == {"a/kernel": 1, "c/kernel": 3}
    again = low_rank.factorise(params, ranks=low_rank.ranks(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert state.trainable["b"] == params["b"]


def test_the_gradient_of_sigma_is_that_of_the_weight_in_the_bases():
    params = {"conv": {"kernel": random((3, 3, 2, 6))}, "bias": random((6,))}
    g = jax.tree.map(lambda x: random(x.shape, 5), params)
    state = low_rank.factorise(params, ranks=4)

    def loss(trainable):
        dense = low_rank.materialise(state, trainable)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), dense, g)))

    grads = jax.grad(loss)(state.trainable)
    u, vt = state.frozen["conv/kernel"].u, state.frozen["conv/kernel"].vt
    flat = np.asarray(g["conv"]["kernel"], np.float64).reshape(18, 6)
    close(grads["conv"]["kernel"], np.asarray(u[0]).T @ flat @ np.asarray(vt[0]).T)
    close(grads["bias"], g["bias"])
    whole = jax.grad(
        lambda s: jnp.sum(low_rank.materialise(s)["conv"]["kernel"]), allow_int=True
    )
    assert not np.any(whole(state).frozen["conv/kernel"].u)


def test_what_is_eligible():
    params = {
        "square": {"kernel": random((8, 8))},
        "flat": {"kernel": random((40, 4))},
        "stacked": {"embedding": random((20, 8))},
        "bias": random((4,)),
    }
    assert set(low_rank.factorise(params).frozen) == {"square/kernel"}
    some = low_rank.factorise(params, min_aspect=0.0999)
    assert set(some.frozen) == {"square/kernel", "flat/kernel"}


# --- Layers in their order ----------------------------------------------------------

STACK = {
    "stem": {"kernel": random((6, 6))},
    "blocks": {str(i): {"kernel": random((6, 6), i)} for i in range(11)},
    "head": {"kernel": random((6, 5))},
}
ORDER = ("stem", *(f"blocks/{i}/" for i in range(11)), "head")


def test_first_and_last_layers_are_kept():
    state = low_rank.factorise(STACK, order=ORDER, keep_first=True, keep_last=True)
    assert set(state.frozen) == {f"blocks/{i}/kernel" for i in range(11)}
    assert [state.frozen[f"blocks/{i}/kernel"].layer for i in range(11)] == [*range(11)]
    state = low_rank.factorise(STACK, order=ORDER, keep_last=True)
    assert state.frozen["stem/kernel"].layer == 0
    assert "head/kernel" not in state.frozen


@pytest.mark.parametrize(
    ("layer_step", "expected"),
    # 13 layers: a tenth of 12 is one, a quarter three; a hundredth is still one.
    [(0.0, [13, 13]), (0.1, [1, 2, 3]), (0.25, [3, 6, 9, 12, 13]), (0.01, [1, 2])],
)
def test_layers_come_in_from_the_output(layer_step, expected):
    state = low_rank.factorise(STACK, order=ORDER)
    config = low_rank.OIALR(
        delay=0, frequency=1, beta=0.9, max_drop=1.0, layer_step=layer_step
    )
    paths = [*(f"{pattern}/kernel".replace("//", "/") for pattern in ORDER)]
    for check, count in enumerate(expected):
        new = low_rank.refactor(state, config, check=check)
        worked = [path for path in paths if new.frozen[path] is not state.frozen[path]]
        assert worked == paths[len(paths) - count :]
        assert all(low_rank.ranks(new)[path] < 5 for path in worked)


# --- The rank rule on hand-made spectra ---------------------------------------------

SPECTRA = {
    # spectrum, fields of OIALR, rank
    "below beta": ([8, 4, 2, 1, 0.5, 0.4], {"beta": 0.2}, 3),
    "exactly beta stays": ([8, 4, 2, 1.6, 0.1, 0.1], {"beta": 0.25}, 3),
    "nothing": ([1, 1, 0.9, 0.9, 0.9, 0.9], {"beta": 0.5}, 6),
    "at most half": ([100, 1, 1, 1, 1, 1], {"beta": 0.5}, 3),
    "at most half of five": ([100, 1, 1, 1, 1], {"beta": 0.5}, 3),
    "at most a third": ([100, 1, 1, 1, 1, 1], {"max_drop": 1 / 3}, 4),
    "all but one": ([100, 1, 1, 1, 1, 1], {"max_drop": 1.0}, 1),
    "lowest rank": ([100] + [1] * 9, {"max_drop": 1.0, "min_rank_fraction": 0.39}, 3),
    "multiples": ([100, 99, 98] + [1] * 7, {"rank_multiple": 4, "max_drop": 0.9}, 4),
    "multiples above": ([100] * 5 + [1] * 5, {"rank_multiple": 8}, 8),
    "multiples beyond": ([100] * 9 + [1], {"rank_multiple": 8}, 10),
    "zero": ([0] * 6, {}, 6),
    "one": ([3], {}, 1),
}


@pytest.mark.parametrize("case", SPECTRA)
def test_rank_rule(case):
    spectrum, fields, expected = SPECTRA[case]
    config = low_rank.OIALR(delay=0, frequency=1, **{"beta": 0.15, **fields})
    k = len(spectrum)
    state = low_rank.factorise({"kernel": jnp.eye(k + 1, k)}, min_aspect=0)
    # A dense Sigma, its singular values in no order.
    sigma = with_spectrum(spectrum[::-1])
    state = state._replace(trainable={"kernel": sigma})
    new = low_rank.refactor(state, config)
    assert low_rank.ranks(new) == {"kernel": expected}
    assert new.trainable["kernel"].shape == (expected, expected)
    kept = np.diag(np.sort(spectrum)[::-1][:expected])
    close(new.trainable["kernel"], kept, 1e-5)


def test_many_checks_come_down_by_halves():
    state = low_rank.factorise({"kernel": with_spectrum([1.0] + [1e-3] * 15)})
    config = low_rank.OIALR(delay=0, frequency=1, min_rank_fraction=0.13)
    found = []
    for _ in range(5):
        state = low_rank.refactor(state, config)
        found.append(low_rank.ranks(state)["kernel"])
    assert found == [8, 4, 2, 2, 2]


def test_matrices_of_a_leaf_share_the_largest_rank():
    stack = jnp.stack([with_spectrum([1, 1, 1, 0.01]), with_spectrum([1, 0.01, 0, 0])])
    rule = components.ByName(stacked=("layers",))
    state = low_rank.factorise({"layers": {"kernel": stack}}, rule)
    config = low_rank.OIALR(delay=0, frequency=1, beta=0.1)
    new = low_rank.refactor(state, config)
    assert low_rank.ranks(new) == {"layers/kernel": 3}
    expected = np.asarray(stack).copy()
    u, s, vt = np.linalg.svd(expected[0])
    expected[0] = u[:, :3] * s[:3] @ vt[:3]
    close(low_rank.materialise(new)["layers"]["kernel"], expected)


# --- Numbers ------------------------------------------------------------------------


def test_fractions():
    rule = components.ByName(stacked=("layers",))
    params = {
        "conv": {"kernel": random((3, 3, 2, 6))},
        "layers": {"kernel": random((4, 8, 5))},
        "bias": random((7,)),
    }
    state = low_rank.factorise(
        params, rule, ranks={"conv/kernel": 2, "layers/kernel": 3}
    )
    dense, trainable = 108 + 160, 2 * 2 + 4 * 3 * 3
    stored = trainable + 2 * (18 + 6) + 4 * 3 * (8 + 5)
    assert low_rank.fractions(state) == {
        "trainable": (trainable + 7) / (dense + 7),
        "stored": (stored + 7) / (dense + 7),
    }
    unfactorised = low_rank.LowRankState(params, {})
    assert low_rank.fractions(unfactorised) == {"trainable": 1, "stored": 1}


STABILITY = {
    # before, after, the value
    "the same, scaled": (np.eye(4, 3), 7 * np.eye(4, 3), 1.0),
    "turned round": (np.eye(4, 3), -np.eye(4, 3), -1.0),
    "one of three": (np.eye(3), np.diag([1.0, -1.0, -1.0]), -1 / 3),
    "zero": (np.zeros((4, 3)), np.zeros((4, 3)), 0.0),
    "from zero": (np.zeros((4, 3)), np.eye(4, 3), 0.0),
    "a column without a basis": (np.diag([1.0, 1.0, 0.0]), np.eye(3), 2 / 3),
    "nan": (np.full((4, 3), np.nan), np.eye(4, 3), np.nan),
}


@pytest.mark.parametrize("case", STABILITY)
@pytest.mark.parametrize("turned", [False, True])
def test_stability_by_hand(case, turned):
    *pair, expected = STABILITY[case]
    before, after = ({"kernel": jnp.asarray(x.T if turned else x)} for x in pair)
    found = diagnostics.basis_stability(before, after)["kernel"]
    assert found.shape == (1,)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_stability_of_random_weights():
    rule = components.ByName(attention="per_head")
    before, after = ({"query": {"kernel": random((8, 2, 5), i)}} for i in (0, 1))
    found = diagnostics.basis_stability(before, after, rule)["query/kernel"]
    for i, value in enumerate(found):
        e, f = (
            np.matmul(
                *np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)[::2]
            )
            for x in (before["query"]["kernel"][:, i], after["query"]["kernel"][:, i])
        )
        close(value, np.mean(np.sum(e * f, 0)), 1e-5)
    same = diagnostics.basis_stability(before, before, rule)["query/kernel"]
    close(same, np.ones(2), 1e-5)
    with pytest.raises(ValueError, match="`before` has leaves that `after` lacks"):
        diagnostics.basis_stability(before, {"key": before["query"]})


# --- Refactoring --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["conv", "per_head", "fused qkv"])
def test_nothing_truncated_nothing_changed(case):
    rule, path, shape, _ = LEAVES[case]
    state = low_rank.factorise(nested(path, random(shape)), rule)
    noise = jax.tree.map(lambda x: x + random(x.shape, 7), state.trainable)
    state = low_rank.LowRankState(noise, state.frozen)
    before = low_rank.materialise(state)
    new = low_rank.refactor(state, QUIET)
    trees_close(low_rank.materialise(new), before, 3e-6)
    (sigma,) = jax.tree.leaves(new.trainable)
    assert not np.any(sigma * (1 - jnp.eye(sigma.shape[-1])))  # diagonal
    u = new.frozen[path].u
    gram = jnp.einsum("bmr,bms->brs", u, u)
    close(gram, np.broadcast_to(np.eye(u.shape[-1]), gram.shape), 3e-6)


def test_the_axes_keep_their_sense():
    state = low_rank.factorise({"kernel": with_spectrum([4.0, 3.0, 2.0, 1.0], 6)})
    moved = {"kernel": state.trainable["kernel"] + 0.05 * random((4, 4), 3)}
    new = low_rank.refactor(state._replace(trainable=moved), QUIET)
    for name in ("u", "vt"):
        before, after = (getattr(s.frozen["kernel"], name)[0] for s in (state, new))
        inner = np.diagonal(before.T @ after if name == "u" else before @ after.T)
        assert np.all(inner > 0.9)


def test_nan_in_one_leaf_is_refused_with_its_path():
    params = {"a": {"kernel": random((4, 4))}, "b": {"kernel": random((4, 4))}}
    bad = {**params, "b": {"kernel": params["b"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"NaN or infinity.*: b/kernel\. .*diverged"):
        low_rank.factorise(bad)
    state = low_rank.factorise(params)
    state = state._replace(trainable=bad)
    with pytest.raises(ValueError, match=r"Sigma holds NaN or infinity.*: b/kernel"):
        low_rank.refactor(state, QUIET)
