"""What every transformation and optimiser owes its user, in one table.

Each row has an oracle: the same update, leaf by leaf, in float64 numpy. Wherever a
transformation is put (jit, scan, vmap, a mask, an accumulator, injected
hyper-parameters ...), what comes out is held against the oracle, so that doing nothing
passes no test.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import orthax
from orthax import components, execution, polar, transforms
from orthax.internal.transforms import masked

STEPS = 3
SHAPES = {
    "attention/query/kernel": (3, 2, 2),
    "conv/kernel": (2, 2, 1, 3),
    "dense/bias": (3,),
    "dense/kernel": (4, 3),
}
# P parameters, N components, kernel taps: of every leaf that is a matrix.
MATRICES = {
    "attention/query/kernel": (3, 4, 1),
    "conv/kernel": (4, 3, 4),
    "dense/kernel": (4, 3, 1),
}


# --- The mathematics, leaf by leaf --------------------------------------------------


class At(NamedTuple):
    """One leaf at one step: matrices as P x N, everything in float64."""

    g: np.ndarray
    p: np.ndarray
    t: int  # counts from one
    is_matrix: bool
    taps: int
    memory: dict[str, Any]


Oracle = Callable[[At], np.ndarray]


def expected(
    oracle: Oracle,
    gradients: Iterable[Mapping[str, Any]],
    params: Mapping[str, Any],
    matrices: Mapping[str, tuple[int, int, int]] = MATRICES,
) -> list[dict[str, np.ndarray]]:
    """The updates that an oracle gives for a sequence of gradients."""
    memory = {path: {} for path in params}

    def update(path, g, t):
        *side, taps = matrices.get(path, (*np.shape(g), 1))
        g, p = (np.asarray(x, np.float64) for x in (g, params[path]))
        at = At(g.reshape(side), p.reshape(side), t, path in matrices, taps, {})
        return np.reshape(oracle(at._replace(memory=memory[path])), g.shape)

    return [
        {path: update(path, g, t) for path, g in tree.items()}
        for t, tree in enumerate(gradients, 1)
    ]


def exact(g):
    u, _, vh = np.linalg.svd(g, full_matrices=False)
    return u @ vh


def polynomial(table):
    def factor(g):
        u, s, vh = np.linalg.svd(g, full_matrices=False)
        s = s / np.linalg.norm(s)
        for row in table:
            s = sum(c * s ** (2 * i + 1) for i, c in enumerate(row))
        return u @ np.diag(s) @ vh

    return factor


def halley(steps):
    """Two dynamically weighted Halley steps, from 1e-3 of the Frobenius norm up.

    Nakatsukasa, Bai, Gygi 2010, Section 3.
    """

    def factor(g):
        u, s, vh = np.linalg.svd(g, full_matrices=False)
        s = s / np.linalg.norm(s)
        low = 1e-3
        for _ in range(steps):
            d = np.cbrt(4 * (1 - low**2) / low**4)
            a = np.sqrt(1 + d)
            a += np.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * a)) / 2
            b = (a - 1) ** 2 / 4
            s, low = (t * (a + b * t**2) / (1 + (a + b - 1) * t**2) for t in (s, low))
        return u @ np.diag(s) @ vh

    return factor


def on_matrices(f: Callable[[np.ndarray], np.ndarray]) -> Oracle:
    return lambda at: f(at.g) if at.is_matrix else at.g


def by_shape(f: Callable[[int, int, int], float]) -> Oracle:
    return lambda at: at.g * (f(*at.g.shape, at.taps) if at.is_matrix else 1)


def rms_match(fan_in, fan_out, taps):
    return 0.2 * math.sqrt(max(fan_in, fan_out))


def width(fan_in, fan_out, taps):
    return math.sqrt(max(1, fan_out / fan_in))


def with_weights(f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Oracle:
    return lambda at: f(at.g, at.p) if at.is_matrix else at.g


def on_sphere(u, w):
    return (w + u) * np.linalg.norm(w) / np.linalg.norm(w + u) - w


def rate(learning_rate, t):
    """Optax counts steps from zero."""
    return learning_rate(t - 1) if callable(learning_rate) else learning_rate


def mean(at, g, beta, name="m"):
    at.memory[name] = beta * at.memory.get(name, 0) + (1 - beta) * g
    return at.memory[name]


def nesterov_ema(at, decay):
    ahead = mean(at, at.g, decay) / (1 - decay ** (at.t + 1))
    return decay * ahead + (1 - decay) * at.g / (1 - decay**at.t)


def reduced(axis, g):
    """The axis along which the vectors lie that are called so."""
    return int(axis == "rows" or (axis == "short" and g.shape[0] > g.shape[1]))


def component_rms(at, b2, eps, g=None, axis="columns"):
    g = at.g if g is None else g
    if not at.is_matrix:
        return g
    v = mean(at, np.mean(g**2, axis=reduced(axis, g), keepdims=True), b2, "v")
    out = g / (np.sqrt(v) + eps)
    return out * np.linalg.norm(g) / np.linalg.norm(out)


def adam(at, g, b1, b2, eps, nesterov=False):
    m, v = mean(at, g, b1, "m"), mean(at, g**2, b2, "v")
    first = m / (1 - b1**at.t)
    if nesterov:
        now = g / (1 - b1**at.t)
        first = b1 * m / (1 - b1 ** (at.t + 1)) + (1 - b1) * now
    return first / (np.sqrt(v / (1 - b2**at.t)) + eps)


def orthogonal_sgd(
    *, learning_rate, momentum, weight_decay, nesterov=False, factor=exact
):
    def oracle(at):
        g = on_matrices(factor)(at) + weight_decay * at.p
        at.memory["v"] = v = momentum * at.memory.get("v", 0) + g
        return -rate(learning_rate, at.t) * (g + momentum * v if nesterov else v)

    return oracle


def orthogonal_adam(*, learning_rate, b1, b2, eps, weight_decay, factor=exact):
    def oracle(at):
        g = on_matrices(factor)(at) + weight_decay * at.p
        return -rate(learning_rate, at.t) * adam(at, g, b1, b2, eps)

    return oracle


def orthogonal_lars(
    *,
    learning_rate,
    bias_learning_rate,
    momentum,
    weight_decay,
    trust_coefficient,
    factor=exact,
):
    def oracle(at):
        g = on_matrices(factor)(at)
        step = rate(bias_learning_rate, at.t)
        if at.g.ndim > 1:
            g = g + weight_decay * at.p
            norms = np.linalg.norm(at.p), np.linalg.norm(g)
            g = g * (trust_coefficient * norms[0] / norms[1] if all(norms) else 1)
            step = rate(learning_rate, at.t)
        at.memory["v"] = v = momentum * at.memory.get("v", 0) + g
        return -step * v

    return oracle


def muon(
    *,
    learning_rate,
    momentum,
    weight_decay,
    adam_learning_rate,
    adam_b1,
    adam_b2,
    adam_eps,
    adam_weight_decay,
    nesterov=False,
    factor=exact,
    scale=width,
    rms=None,
):
    def matrix(at):
        if nesterov:
            m = nesterov_ema(at, momentum)
        else:
            m = mean(at, at.g, momentum) / (1 - momentum**at.t)
        o = factor(m)
        if rms is not None:
            o = component_rms(at, *rms, g=o)
        o = o * scale(*o.shape, at.taps) + weight_decay * at.p
        return -rate(learning_rate, at.t) * o

    def rest(at):
        ahead = nesterov and rms is None
        u = adam(at, at.g, adam_b1, adam_b2, adam_eps, ahead)
        return -rate(adam_learning_rate, at.t) * (u + adam_weight_decay * at.p)

    return lambda at: matrix(at) if at.is_matrix else rest(at)


def normuon(*, b2, eps, scale=rms_match, **kwargs):
    return muon(rms=(b2, eps), scale=scale, **kwargs)


# --- The table ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: how it is made, and what it should do."""

    name: str
    make: Callable[[], optax.GradientTransformation]
    oracle: Oracle
    tolerance: float = 1e-5
    needs_params: bool = False
    # Leaves of the state that are like parameters.
    memories: int = 0


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """An optimiser with all of its numbers, none of which is a default or inert."""

    factory: Callable[..., optax.GradientTransformation]
    oracle: Callable[..., Oracle]
    numbers: Mapping[str, float]
    memories: int

    @property
    def name(self) -> str:
        return self.factory.__name__

    @property
    def rates(self) -> list[str]:
        return [name for name in self.numbers if name.endswith("learning_rate")]


ADAM = ("learning_rate", "b1", "b2", "eps", "weight_decay")


def with_adam(factory, looks_ahead):
    """Return an optimiser whose `rest` is AdamW, by arguments `adam_...`."""

    def made(*args, **kwargs):
        names = [name for name in ADAM if f"adam_{name}" in kwargs]
        if not names:
            return factory(*args, **kwargs)
        numbers = {"learning_rate": kwargs.get("learning_rate")}
        numbers |= {name: kwargs.pop(f"adam_{name}") for name in names}
        nesterov = looks_ahead and kwargs.get("nesterov", True)
        dtype = kwargs.get("mu_dtype")
        rest = optax.adamw(**numbers, mu_dtype=dtype, nesterov=nesterov)
        return factory(*args, rest=rest, **kwargs)

    signature = inspect.signature(factory)
    own = [p for name, p in signature.parameters.items() if name != "rest"]
    only = inspect.Parameter.KEYWORD_ONLY
    own += [inspect.Parameter(f"adam_{name}", only) for name in ADAM]
    made.__signature__ = signature.replace(parameters=own)
    made.__kwdefaults__, made.__name__ = factory.__kwdefaults__, factory.__name__
    return made


ADAM_NUMBERS = {
    "adam_learning_rate": 0.3,
    "adam_b1": 0.7,
    "adam_b2": 0.8,
    "adam_eps": 0.05,
    "adam_weight_decay": 0.3,
}
# Muon's default, on CPU.
FAST = halley(2)
OPTIMISERS = [
    Optimiser(
        orthax.orthogonal_sgd,
        orthogonal_sgd,
        {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.05},
        memories=4,
    ),
    Optimiser(
        orthax.orthogonal_adam,
        orthogonal_adam,
        {"learning_rate": 0.1, "b1": 0.7, "b2": 0.8, "eps": 0.05, "weight_decay": 0.05},
        memories=8,
    ),
    Optimiser(
        orthax.orthogonal_lars,
        orthogonal_lars,
        {
            "learning_rate": 0.2,
            "bias_learning_rate": 0.1,
            "momentum": 0.8,
            "weight_decay": 0.05,
            "trust_coefficient": 0.02,
        },
        memories=4,
    ),
    Optimiser(
        with_adam(orthax.muon, True),
        functools.partial(muon, factor=FAST),
        {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.2, **ADAM_NUMBERS},
        memories=3 + 2,
    ),
    Optimiser(
        with_adam(orthax.normuon, False),
        functools.partial(normuon, factor=FAST),
        {
            "learning_rate": 0.1,
            "momentum": 0.8,
            "b2": 0.6,
            "eps": 0.05,
            "weight_decay": 0.2,
            **ADAM_NUMBERS,
        },
        memories=3 + 3 + 2,
    ),
]


def method_cases() -> list[Case]:
    express = polynomial(polar.polar_express())
    rows = [
        ("Auto", polar.Auto(), exact, 2e-4),
        # On CPU, where the default run of these tests is.
        ("Auto_fast", polar.Auto("fast"), halley(2), 0),
        ("SVD", polar.SVD(), exact, 0),
        ("SVD_complete", polar.SVD(null_space="complete"), exact, 0),
        ("QDWH", polar.QDWH(), exact, 0),
        ("GramEigh", polar.GramEigh(), exact, 1e-4),
        ("NewtonSchulz", polar.NewtonSchulz(gram=False), express, 0),
        ("NewtonSchulz_gram", polar.NewtonSchulz(gram=True), express, 0),
        ("NewtonSchulz_adaptive", polar.NewtonSchulz(tolerance=1e-4), exact, 1e-3),
        (
            "NewtonSchulz_JORDAN",
            polar.NewtonSchulz(polar.JORDAN, gram=False),
            polynomial(polar.JORDAN),
            0,
        ),
    ]
    return [
        Case(
            f"orthogonalise_{name}",
            functools.partial(orthax.orthogonalise, method),
            on_matrices(factor),
            tolerance or 2e-5,
        )
        for name, method, factor, tolerance in rows
    ]


def scale_cases() -> list[Case]:
    rows = [
        (transforms.Width(), width),
        (transforms.Spectral(), lambda i, o, taps: math.sqrt(o / i)),
        (transforms.MaxDim(), lambda i, o, taps: math.sqrt(max(i, o))),
        (transforms.RMSMatch(), rms_match),
        (transforms.ConvSpectral(), lambda i, o, taps: math.sqrt(o * taps / i) / taps),
    ]
    return [
        Case(
            f"scale_by_shape_{type(scale).__name__}",
            functools.partial(orthax.scale_by_shape, scale),
            by_shape(factor),
        )
        for scale, factor in rows
    ]


def restore_norm(norm):
    return transforms.restore_norm(orthax.orthogonalise(polar.SVD()), norm)


METHOD_CASES = method_cases()
SCALE_CASES = scale_cases()
TRANSFORM_CASES = [
    Case("normalise", orthax.normalise, on_matrices(lambda g: g / np.linalg.norm(g))),
    Case(
        "normalise_components",
        orthax.normalise_components,
        on_matrices(lambda g: g / np.linalg.norm(g, axis=0)),
    ),
    *(
        Case(
            f"normalise_components_{axis}",
            functools.partial(orthax.normalise_components, axis=axis),
            on_matrices(
                lambda g, axis=axis: (
                    g / np.linalg.norm(g, axis=reduced(axis, g), keepdims=True)
                )
            ),
        )
        for axis in ("rows", "short")
    ),
    Case(
        "scale_to_weights",
        transforms.scale_to_weights,
        with_weights(lambda u, w: u * np.linalg.norm(w) / np.linalg.norm(u)),
        needs_params=True,
    ),
    Case("on_sphere", transforms.on_sphere, with_weights(on_sphere), needs_params=True),
    Case(
        "add_cautious_decay",
        functools.partial(transforms.add_cautious_decay, 0.3),
        lambda at: np.where(at.g * at.p > 0, at.g + 0.3 * at.p, at.g),
        needs_params=True,
    ),
    Case(
        "restore_norm_OriginalNorm",
        functools.partial(restore_norm, transforms.OriginalNorm()),
        on_matrices(lambda g: exact(g) * np.linalg.norm(g) / math.sqrt(min(g.shape))),
    ),
    Case(
        "restore_norm_NuclearNorm",
        functools.partial(restore_norm, transforms.NuclearNorm()),
        on_matrices(lambda g: exact(g) * np.linalg.norm(g, "nuc")),
    ),
    Case(
        "scale_by_component_rms",
        functools.partial(transforms.scale_by_component_rms, 0.6, 0.05),
        lambda at: component_rms(at, 0.6, 0.05),
        memories=3,
    ),
    Case(
        "scale_by_component_rms_short",
        functools.partial(transforms.scale_by_component_rms, 0.6, 0.05, axis="short"),
        lambda at: component_rms(at, 0.6, 0.05, axis="short"),
        memories=3,
    ),
    Case(
        "nesterov_ema",
        functools.partial(transforms.nesterov_ema, 0.8),
        lambda at: nesterov_ema(at, 0.8),
        memories=4,
    ),
]
OPTIMISER_CASES = [
    Case(
        row.name,
        functools.partial(row.factory, **row.numbers),
        row.oracle(**row.numbers, **extra),
        tolerance=2e-4,
        needs_params=True,
        memories=row.memories,
    )
    for row in OPTIMISERS
    for extra in [{"nesterov": True} if row.name == "muon" else {}]
]
CASES = [*METHOD_CASES, *SCALE_CASES, *TRANSFORM_CASES, *OPTIMISER_CASES]
# Wrappers see no difference between methods, or between scale rules.
KINDS = [METHOD_CASES[0], SCALE_CASES[3], *TRANSFORM_CASES, *OPTIMISER_CASES]
CUTTING = [
    case for case in KINDS if case.name not in ("nesterov_ema", "add_cautious_decay")
]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


each_optimiser = pytest.mark.parametrize("row", OPTIMISERS, ids=lambda row: row.name)


# --- What the tests share -----------------------------------------------------------


@functools.cache
def trees(seed: int = 0) -> tuple[dict[str, jax.Array], ...]:
    """Parameters, and the gradients of three steps: Gaussian, so of full rank."""
    rng = np.random.default_rng(seed)
    return tuple(
        {
            path: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for path, shape in SHAPES.items()
        }
        for _ in range(1 + STEPS)
    )


def difference(actual, wanted) -> float:
    """Largest difference over all leaves, relative to the leaf's largest entry."""
    assert set(actual) == set(wanted)
    worst = 0.0
    for path, w in wanted.items():
        a = np.asarray(actual[path], np.float64)
        assert a.shape == w.shape
        worst = max(worst, float(np.max(np.abs(a - w)) / np.max(np.abs(w))))
    return worst


def assert_close(actual, wanted, tolerance):
    assert difference(actual, wanted) <= tolerance  # False where there is a NaN


def types(tree):
    """Structure, shapes and dtypes: what a compiled step depends on."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype) for x in leaves]


def counted(f, jit=jax.jit):
    """The compiled function, and a list with one entry for each time it is traced."""
    traces = []

    def traced(*args, **kwargs):
        traces.append(None)
        return f(*args, **kwargs)

    return jit(traced), traces


def optional(case, params):
    return params if case.needs_params else None


def double_precision():
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()


# --- Every row, everywhere ----------------------------------------------------------


@each(CASES)
def test_update_with_unknown_arguments_compiles_once(case):
    params, *gradients = trees()
    wanted = expected(case.oracle, gradients, params)
    tx = case.make()
    update, traces = counted(tx.update)
    state = tx.init(params)
    for g, w in zip(gradients, wanted, strict=True):
        before = types(state)
        updates, state = update(
            g, state, optional(case, params), unexpected_argument=jnp.ones(2)
        )
        assert types(state) == before
        assert_close(updates, w, case.tolerance)
        assert difference(g, w) > 10 * case.tolerance
    assert len(traces) == 1


@each(METHOD_CASES)
def test_eager_updates_are_right_and_compile_nothing_anew(case, caplog):
    params, *gradients = trees()
    wanted = expected(case.oracle, gradients, params)
    tx = case.make()
    state = tx.init(params)
    tx.update(gradients[0], state, params)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        updates, _ = tx.update(gradients[1], state, params)
    assert_close(updates, wanted[1], case.tolerance)
    assert not [r for r in caplog.records if "ompiling" in r.getMessage()]


@each([*SCALE_CASES, *TRANSFORM_CASES, *OPTIMISER_CASES, METHOD_CASES[0]])
def test_init_needs_shapes_alone(case):
    params = trees()[0]
    shapes = jax.eval_shape(lambda: params)
    tx = case.make()
    state = tx.init(params)
    assert len(jax.tree.leaves(state)) >= case.memories
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)
    assert types(jax.eval_shape(tx.init, params)) == types(state)
    assert types(tx.init(shapes)) == types(state)
    # It does look: a leaf that cannot be decided is found before the first step.
    if case.name not in ("nesterov_ema", "add_cautious_decay"):
        with pytest.raises(ValueError, match="'lone/kernel'"):
            tx.init({"lone/kernel": jax.ShapeDtypeStruct((2, 3, 4), "float32")})


@each(CASES)
def test_init_and_scanned_updates_vmap_over_seeds(case):
    runs = [trees(seed) for seed in (1, 2)]
    tx = case.make()

    def train(params, gradients):
        def step(state, grads):
            updates, state = tx.update(grads, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    def stack(*leaves):
        return jnp.stack(leaves)

    params = jax.tree.map(stack, *[run[0] for run in runs])
    gradients = jax.tree.map(stack, *[jax.tree.map(stack, *run[1:]) for run in runs])
    updates = jax.jit(jax.vmap(train))(params, gradients)
    for seed, (params, *gradients) in enumerate(runs):
        wanted = expected(case.oracle, gradients, params)
        for step in range(STEPS):
            found = jax.tree.map(lambda x: x[seed, step], updates)  # noqa: B023
            # Other seeds are worse conditioned, and low precision is not the point.
            assert_close(found, wanted[step], 5 * case.tolerance)


DTYPES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 0.0, "float64": 0.0}


@each(CASES)
def test_dtypes_are_kept_inside_cond(case):
    # Methods work in float32 or float64, whatever they are given.
    dtypes = ["bfloat16", "float64"] if case in METHOD_CASES else list(DTYPES)

    def cast(tree):
        return {
            f"{dtype}/{path}": jnp.asarray(tree[path], dtype)
            for dtype in dtypes
            for path in ("dense/kernel", "dense/bias")
        }

    matrices = {f"{dtype}/dense/kernel": (4, 3, 1) for dtype in dtypes}
    with double_precision():
        params, *gradients = map(cast, trees())
        wanted = expected(case.oracle, gradients, params, matrices)
        tx = case.make()

        @jax.jit
        def update(taken, grads, state, params):
            skipped = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.cond(
                taken,
                lambda: tx.update(grads, state, params),
                lambda: (skipped, state),
            )

        start = state = tx.init(params)
        for g, w in zip(gradients, wanted, strict=True):
            updates, state = update(True, g, state, params)
            assert types(updates) == types(params)
            assert types(state) == types(start)
            for path in params:
                dtype, _ = path.split("/", 1)
                tolerance = max(5 * case.tolerance, DTYPES[dtype])
                assert_close({path: updates[path]}, {path: w[path]}, tolerance)
        skipped, same = update(False, g, state, params)
        assert not any(x.any() for x in jax.tree.leaves(skipped))
        chex.assert_trees_all_equal(same, state)


@each([case for case in KINDS if case.memories])
def test_map_params_finds_what_is_like_a_parameter(case):
    params = trees()[0]
    tx = case.make()
    state = tx.init(params)
    seen = []

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    marked = optax.tree.map_params(tx, lambda x: seen.append(x) or "found", state)
    assert len(seen) == case.memories
    assert sum(x == "found" for x in jax.tree.leaves(marked)) == case.memories

    # With a tree beside it, which is how optimiser states are given shardings.
    names = {path: path for path in params}
    named = optax.tree.map_params(
        tx, lambda x, name: x if is_masked(x) else name, state, names, is_leaf=is_masked
    )
    found = [x for x in jax.tree.leaves(named) if isinstance(x, str)]
    assert len(found) == case.memories
    assert set(found) >= set(MATRICES)


# --- Wrappers -----------------------------------------------------------------------


@each(KINDS)
def test_masked_leaves_the_rest_alone_eagerly(case):
    params, grads, *_ = trees()
    mask = {path: path.startswith("dense") for path in params}
    tx = optax.masked(case.make(), mask)
    grads = {path: np.asarray(g) for path, g in grads.items()}
    updates, _ = tx.update(grads, tx.init(params), params)
    (wanted,) = expected(case.oracle, [grads], params)
    for path in params:
        if mask[path]:
            assert_close({path: updates[path]}, {path: wanted[path]}, case.tolerance)
        else:
            assert updates[path] is grads[path]


@each(KINDS)
def test_partition_by_labels(case):
    params, *gradients = trees()
    ours = [path for path in params if path.startswith(("conv", "dense/bias"))]
    tx = optax.partition(
        {"ours": case.make(), "theirs": optax.scale(3.0)},
        lambda tree: {path: "ours" if path in ours else "theirs" for path in tree},
    )
    update, state = jax.jit(tx.update), tx.init(params)
    wanted = expected(case.oracle, gradients, params)
    for g, w in zip(gradients, wanted, strict=True):
        updates, state = update(g, state, params)
        w = {path: w[path] if path in ours else 3 * np.asarray(g[path]) for path in w}
        assert_close(updates, w, case.tolerance)


@each(KINDS)
def test_multi_steps_works_on_the_mean_gradient(case):
    params, *gradients = trees()
    tx = optax.MultiSteps(case.make(), every_k_schedule=STEPS)
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for g in gradients[:-1]:
        updates, state = update(g, state, params)
        assert types(updates) == types(params)
        assert not any(x.any() for x in jax.tree.leaves(updates))
    updates, state = update(gradients[-1], state, params)
    mean_gradient = jax.tree.map(lambda *g: sum(g) / STEPS, *gradients)
    (wanted,) = expected(case.oracle, [mean_gradient], params)
    assert_close(updates, wanted, 5 * case.tolerance)
    # The mean of the updates is another thing, unless the transformation is linear.
    each_alone = [expected(case.oracle, [g], params)[0] for g in gradients]
    of_updates = {path: sum(w[path] for w in each_alone) / STEPS for path in params}
    if not case.name.startswith(("scale_by_shape", "nesterov_ema")):
        assert difference(of_updates, wanted) > 0.1


@each(KINDS)
def test_apply_if_finite_skips_a_bad_step_and_goes_on_behind_it(case):
    params, *gradients = trees()
    tx = optax.apply_if_finite(case.make(), max_consecutive_errors=5)
    update, state = jax.jit(tx.update), tx.init(params)
    broken = {
        path: g.at[(0,) * g.ndim].set(jnp.nan) for path, g in gradients[0].items()
    }
    wanted = expected(case.oracle, gradients, params)
    for g, w in zip(gradients, wanted, strict=True):
        zero, state = update(broken, state, params)
        assert not any(x.any() for x in jax.tree.leaves(zero))
        updates, state = update(g, state, params)
        assert_close(updates, w, case.tolerance)
    assert int(state.total_notfinite) == STEPS


@each(KINDS)
def test_chain_hands_everything_through(case):
    params, *gradients = trees()
    seen = []

    def see(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    last = optax.GradientTransformationExtraArgs(optax.init_empty_state, see)
    tx = optax.chain(optax.scale(2.0), case.make(), optax.scale(-0.5), last)
    update, state = jax.jit(tx.update), tx.init(params)
    doubled = [jax.tree.map(lambda x: 2 * x, g) for g in gradients]
    wanted = expected(case.oracle, doubled, params)
    for g, w in zip(gradients, wanted, strict=True):
        updates, state = update(g, state, params, value=jnp.ones(()))
        w = {path: -0.5 * x for path, x in w.items()}
        assert_close(updates, w, case.tolerance)
    assert [set(extra) for extra in seen] == [{"value"}]


@each(KINDS)
def test_parameters_and_state_can_be_donated(case):
    params, *gradients = trees()
    wanted = expected(case.oracle, gradients[:1], params)[0]
    wanted = {path: np.asarray(params[path]) + wanted[path] for path in params}
    tx = case.make()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    old = jax.tree.map(jnp.array, params)
    old = old, tx.init(old)
    new = step(*old, gradients[0])
    # An unusable donation would be a warning, which is an error here.
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert_close(new[0], wanted, case.tolerance)
    step(*new, gradients[1])


SMALL = ("scalar", "empty", "no_rows", "one")


def strange_leaves():
    return {
        "none": None,
        "masked": optax.MaskedNode(),
        "int": jnp.ones((2, 2), jnp.int32),
        "bool": jnp.ones((2, 2), bool),
        "float0": np.zeros((2, 2), jax.dtypes.float0),
        "key": jax.random.split(jax.random.key(0), (2, 2)),
        "python": 2.5,
        "scalar": jnp.asarray(1.5),
        "empty": jnp.zeros((0,)),
        "no_rows": jnp.zeros((0, 3)),
        "one": jnp.ones((1, 1)),
    }


@each([case for case in CUTTING if not case.needs_params])
def test_leaves_that_are_no_matrices_come_back_as_the_same_objects(case):
    params, grads, *_ = trees()
    strange = strange_leaves()
    tx = case.make()
    state = tx.init({**params, **strange})
    updates, _ = tx.update({**grads, **strange}, state)
    for path in strange:
        # MaskedNode is an empty node, not a leaf: trees make it anew.
        assert updates[path] is strange[path] or path == "masked"
    assert updates["masked"] == optax.MaskedNode()
    (wanted,) = expected(case.oracle, [grads], params)
    assert_close({path: updates[path] for path in wanted}, wanted, case.tolerance)


@each([case for case in KINDS if case.needs_params or case.name == "nesterov_ema"])
def test_none_masked_scalar_empty_and_tiny_leaves_do_no_harm(case):
    params, grads, *_ = trees()
    small = {
        path: leaf
        for path, leaf in strange_leaves().items()
        if path in ("none", "masked", *SMALL)
    }
    tx = case.make()
    state = tx.init({**params, **small})
    updates, new = jax.jit(tx.update)({**grads, **small}, state, {**params, **small})
    assert types(new) == types(state)
    (wanted,) = expected(case.oracle, [grads], params)
    assert_close({path: updates[path] for path in wanted}, wanted, case.tolerance)
    assert updates["none"] is None and updates["masked"] == optax.MaskedNode()
    for path in SMALL:
        assert types(updates[path]) == types(small[path])
        assert np.isfinite(updates[path]).all()
    # "one" and the scalar are no matrices; to them, an optimiser is its plain self.
    vectors = {path: small[path] for path in ("scalar", "one")}
    (wanted,) = expected(case.oracle, [vectors], vectors, {})
    assert_close({path: updates[path] for path in vectors}, wanted, case.tolerance)


# --- Hyper-parameters ---------------------------------------------------------------


def run(update, state, params, gradients):
    for grads in gradients:
        updates, state = update(grads, state, params)
    return updates, state


@each_optimiser
def test_injected_numbers_act_and_can_be_changed(row):
    params, *gradients = trees()
    rule = components.ByName(skip=("conv",))
    settings = {
        "method": polar.NewtonSchulz(polar.JORDAN, gram=False),
        "rule": rule,
        "stacking": execution.Stacking(max_bytes=64),
    }
    of_oracle = {"factor": polynomial(polar.JORDAN)}
    if "mu_dtype" in row.factory.__kwdefaults__:
        settings |= {"mu_dtype": "float32", "scale": transforms.MaxDim()}
        of_oracle["scale"] = lambda fan_in, fan_out, taps: math.sqrt(
            max(fan_in, fan_out)
        )
    if "nesterov" in row.factory.__kwdefaults__:
        settings["nesterov"] = of_oracle["nesterov"] = True
    matrices = {path: MATRICES[path] for path in MATRICES if "conv" not in path}

    def wanted(**changed):
        oracle = row.oracle(**{**row.numbers, **changed}, **of_oracle)
        return expected(oracle, gradients, params, matrices)[-1]

    tx = optax.inject_hyperparams(row.factory)(**row.numbers, **settings)
    update, traces = counted(tx.update, jax.jit)
    state = jax.jit(tx.init)(params)
    assert set(state.hyperparams) == set(row.numbers)
    updates, _ = run(update, state, params, gradients)
    assert_close(updates, wanted(), 1e-4)

    plain = row.factory(**row.numbers, **settings)
    same, _ = run(jax.jit(plain.update), plain.init(params), params, gradients)
    chex.assert_trees_all_close(updates, same, rtol=1e-5, atol=1e-6)

    for name, value in row.numbers.items():
        hyperparams = {**state.hyperparams, name: jnp.float32(value / 2)}
        changed = state._replace(hyperparams=hyperparams)
        updates, _ = run(update, changed, params, gradients)
        assert_close(updates, wanted(**{name: value / 2}), 1e-4)
        assert difference(updates, wanted()) > 2e-3, f"{name} does nothing"
    assert len(traces) == 1


JORDAN = {"method": polar.NewtonSchulz(polar.JORDAN, gram=False)}
SKIP = {"rule": components.ByName(skip=("conv",))}


@pytest.mark.parametrize(
    ("factory", "arguments", "oracle"),
    [
        (
            orthax.orthogonalise,
            {**JORDAN, **SKIP, "stacking": execution.Stacking(max_bytes=64)},
            on_matrices(polynomial(polar.JORDAN)),
        ),
        (
            orthax.normalise,
            {**SKIP, "safe": False},
            on_matrices(lambda g: g / np.linalg.norm(g)),
        ),
        (
            orthax.normalise_components,
            {**SKIP, "safe": False},
            on_matrices(lambda g: g / np.linalg.norm(g, axis=0)),
        ),
        (
            orthax.scale_by_shape,
            {**SKIP, "scale": transforms.RMSMatch()},
            by_shape(rms_match),
        ),
        (
            transforms.restore_norm,
            {
                **SKIP,
                "inner": orthax.normalise_components(**SKIP),
                "norm": transforms.NuclearNorm(),
            },
            on_matrices(
                lambda g: (
                    g / np.linalg.norm(g, axis=0) * np.sum(np.linalg.norm(g, axis=0))
                )
            ),
        ),
        (
            transforms.scale_by_component_rms,
            {**SKIP, "b2": 0.6, "eps": 0.05},
            lambda at: component_rms(at, 0.6, 0.05),
        ),
        (
            transforms.nesterov_ema,
            {"decay": 0.8, "mu_dtype": "float32"},
            lambda at: nesterov_ema(at, 0.8),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_injected_transformations_obey_their_arguments(factory, arguments, oracle):
    params, *gradients = trees()
    matrices = {path: MATRICES[path] for path in MATRICES if "conv" not in path}
    tx = optax.inject_hyperparams(factory)(**arguments)
    state = jax.jit(tx.init)(params)
    numbers = {"b2", "eps", "decay"} & set(arguments)
    assert set(state.hyperparams) == numbers
    updates, _ = run(jax.jit(tx.update), state, params, gradients)
    wanted = expected(oracle, gradients, params, matrices)[-1]
    assert_close(updates, wanted, 2e-5)


@each_optimiser
def test_a_schedule_is_followed(row):
    params, *gradients = trees()

    def constant(value):
        return lambda count: value

    def falling(value):
        return lambda count: value * 0.5**count

    def last_update(**rates):
        tx = row.factory(**{**row.numbers, **rates})
        return run(jax.jit(tx.update), tx.init(params), params, gradients)[0]

    wanted = expected(row.oracle(**row.numbers), gradients, params)[-1]
    flat = {name: constant(row.numbers[name]) for name in row.rates}
    falls = {name: falling(row.numbers[name]) for name in row.rates}
    nesterov = {"nesterov": False} if row.name == "muon" else {}
    assert_close(last_update(**flat, **nesterov), wanted, 2e-4)
    # The rate stands outside of every momentum, so it scales the last update alone.
    wanted = {path: x * 0.5 ** (STEPS - 1) for path, x in wanted.items()}
    assert_close(last_update(**falls, **nesterov), wanted, 2e-4)


@pytest.mark.parametrize(
    "row", [row for row in OPTIMISERS if len(row.rates) > 1], ids=lambda row: row.name
)
def test_second_rate_defaults_to_the_first(row):
    second = [name for name in row.rates if name != "learning_rate"]
    params, *gradients = trees()
    numbers = {name: row.numbers[name] for name in row.numbers if name not in second}
    same = dict.fromkeys(second, numbers["learning_rate"])
    wanted = expected(row.oracle(**numbers, **same), gradients, params)[-1]
    extra = {"nesterov": False} if row.name == "muon" else {}
    tx = row.factory(**numbers, **extra)
    updates, _ = run(jax.jit(tx.update), tx.init(params), params, gradients)
    assert_close(updates, wanted, 2e-4)


@pytest.mark.parametrize("factory", [orthax.muon, orthax.normuon])
def test_the_rest_is_adamw_at_the_same_rate_by_default(factory):
    params, *gradients = trees()
    adamw = optax.adamw(0.1, weight_decay=0.0, nesterov=factory is orthax.muon)
    plain, written = (
        run(jax.jit(tx.update), tx.init(params), params, gradients)[0]
        for tx in (factory(0.1), factory(0.1, rest=adamw))
    )
    chex.assert_trees_all_equal(plain, written)
    with pytest.raises(TypeError, match="`rest` must be an optimiser"):
        factory(0.1, rest=0.01)


# --- Optimisers ---------------------------------------------------------------------


TARGETS = {
    "vectors": (
        jnp.array([-1.0, 10.0, 1.0]),
        jnp.array([1.0, -1.0, 1.0]),
        None,
    ),
    "rosenbrock": (
        jnp.zeros(2),
        jnp.ones(2),
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
    ),
    "matrix": (jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]]), None),
    "mixed": (
        (jnp.zeros(3), jnp.zeros((2, 2))),
        (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
        None,
    ),
}
# The largest rates; they fall to zero, without which steps of constant size would
# oscillate about the minimum.
RATES = {
    "orthogonal_sgd": {"learning_rate": 1e-3},
    "orthogonal_adam": {"learning_rate": 5e-2},
    "orthogonal_lars": {"learning_rate": 1e-3, "trust_coefficient": 1.0},
    "muon": {"learning_rate": 5e-2},
    "normuon": {"learning_rate": 5e-2},
}


@each_optimiser
@pytest.mark.parametrize("target", TARGETS)
def test_convergence(row, target):
    start, finish, loss = TARGETS[target]
    settings = dict(RATES[row.name])
    steps = 4000
    settings["learning_rate"] = optax.cosine_decay_schedule(
        settings["learning_rate"], steps
    )
    if row.name == "orthogonal_lars":
        settings["weight_decay"] = 0.0
    tx = row.factory(**settings)
    if loss is None:

        def loss(params):
            return optax.tree.norm(optax.tree.sub(params, finish), squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    chex.assert_trees_all_close(train(start), finish, rtol=3e-2, atol=3e-2)


def written_out(row) -> optax.GradientTransformation:
    """The optimiser of a row, spelt with optax's own pieces."""
    n = row.numbers
    decay = optax.add_decayed_weights(n["weight_decay"])
    if row.name == "orthogonal_sgd":
        sgd = optax.sgd(n["learning_rate"], n["momentum"], nesterov=True)
        return optax.chain(orthax.orthogonalise(), decay, sgd)
    if row.name == "orthogonal_adam":
        adam = optax.adam(n["learning_rate"], n["b1"], n["b2"], n["eps"])
        return optax.chain(orthax.orthogonalise(), decay, adam)
    step = optax.scale_by_learning_rate(n["learning_rate"])
    if row.name == "orthogonal_lars":
        ratio = optax.scale_by_trust_ratio(trust_coefficient=n["trust_coefficient"])
        velocity = optax.trace(n["momentum"])
        matrices = optax.chain(orthax.orthogonalise(), decay, ratio, velocity, step)
        rest = optax.sgd(n["bias_learning_rate"], n["momentum"])
    else:
        pieces = {
            "muon": (
                transforms.nesterov_ema(n["momentum"]),
                orthax.orthogonalise(polar.Auto("fast")),
                orthax.scale_by_shape(transforms.Width()),
            ),
            "normuon": (
                optax.ema(n["momentum"]),
                orthax.orthogonalise(polar.Auto("fast")),
                transforms.scale_by_component_rms(n.get("b2"), n.get("eps")),
                orthax.scale_by_shape(transforms.RMSMatch(0.2)),
            ),
        }
        matrices = optax.chain(*pieces[row.name], decay, step)
        rest = optax.adamw(
            n["adam_learning_rate"],
            n["adam_b1"],
            n["adam_b2"],
            n["adam_eps"],
            weight_decay=n["adam_weight_decay"],
            nesterov=row.name == "muon",
        )
    return optax.partition(
        {"matrices": matrices, "rest": rest},
        {path: "matrices" if path in MATRICES else "rest" for path in SHAPES},
    )


@each_optimiser
def test_an_optimiser_is_its_chain(row):
    params, *gradients = trees()
    extra = {"nesterov": True} if row.name in ("orthogonal_sgd", "muon") else {}
    ours, theirs = row.factory(**row.numbers, **extra), written_out(row)
    found = [
        run(jax.jit(tx.update), tx.init(params), params, gradients)[0]
        for tx in (ours, theirs)
    ]
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


def test_no_momentum_is_no_momentum():
    params, *gradients = trees()
    tx = orthax.orthogonal_sgd(0.1, momentum=None)
    state = tx.init(params)
    assert not jax.tree.leaves(state)
    updates, _ = run(jax.jit(tx.update), state, params, gradients)
    (wanted,) = expected(on_matrices(exact), gradients[-1:], params)
    wanted = {path: -0.1 * w for path, w in wanted.items()}
    assert_close(updates, wanted, 2e-4)


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_momentum_can_be_kept_in_another_dtype(name):
    (row,) = (row for row in OPTIMISERS if row.name == name)
    params, *gradients = trees()
    tx = row.factory(**row.numbers, nesterov=True, mu_dtype="bfloat16")
    state = tx.init(params)
    in_half = [x for x in jax.tree.leaves(state) if x.dtype == "bfloat16"]
    assert len(in_half) == len(SHAPES)
    updates, new = run(jax.jit(tx.update), state, params, gradients)
    assert types(new) == types(state) and types(updates) == types(params)
    oracle = row.oracle(**row.numbers, nesterov=True)
    wanted = expected(oracle, gradients, params)[-1]
    assert_close(updates, wanted, 3e-2)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_restored_in_another_dtype_is_cast(nesterov):
    params, gradients, *_ = trees()
    before = orthax.muon(0.1, nesterov=nesterov)
    _, restored = before.update(gradients, before.init(params), params)
    tx = orthax.muon(0.1, nesterov=nesterov, mu_dtype="bfloat16")
    _, state = tx.update(gradients, restored, params)
    assert types(state) == types(tx.init(params)) != types(restored)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "consistent_rms"),
    [(transforms.Width(), None), (transforms.RMSMatch(0.2), 0.2)],
    ids=["width", "rms_match"],
)
def test_muon_is_optax_muon_where_that_is_right(nesterov, scale, consistent_rms):
    rng = np.random.default_rng(5)
    shapes = {"tall": (7, 3), "wide": (3, 8), "square": (5, 5), "bias": (4,)}
    params, target, stiffness = (
        {
            path: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for path, shape in shapes.items()
        }
        for _ in range(3)
    )
    rates = {"learning_rate": 0.02, "adam_learning_rate": 0.05}
    decays = {"weight_decay": 0.3, "adam_weight_decay": 0.2}
    jordan = polar.NewtonSchulz(polar.JORDAN, gram=False)

    def train(tx):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda p, t, s: s * (p - t), params, target, stiffness)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

        start = params, tx.init(params)
        return jax.jit(lambda: jax.lax.scan(step, start, length=10)[1])()

    def ours(nesterov):
        rest = optax.adamw(0.05, weight_decay=0.2, nesterov=nesterov)
        how = {"nesterov": nesterov, "scale": scale, "method": jordan, "rest": rest}
        return train(orthax.muon(0.02, 0.9, weight_decay=0.3, **how))

    theirs = train(
        optax.contrib.muon(
            beta=0.9,
            nesterov=nesterov,
            consistent_rms=consistent_rms,
            **rates,
            **decays,
        )
    )
    # Measured: 2e-6, on CPU, after the amplification of rounding by JORDAN's slope.
    same = ours(nesterov)
    assert_close(same, theirs, 2e-5)
    other = ours(not nesterov)
    assert difference(other, theirs) > 1e-2


def signs_seen(seen):
    """Signs, a state that counts, and a record of what else an update is given."""

    def update(updates, state, params=None, **extra):
        shown = params and {path for path in params if hasattr(params[path], "shape")}
        seen.append((shown, set(extra)))
        return jax.tree.map(jnp.sign, updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)


def test_restore_norm_hands_state_and_unknown_arguments_to_what_it_wraps():
    params, grads, *_ = trees()
    seen = []
    tx = transforms.restore_norm(signs_seen(seen))
    updates, state = tx.update(grads, tx.init(params), params, value=1.0)
    assert seen == [(set(SHAPES), {"value"})]
    assert state == 1
    wanted = {path: np.sign(np.asarray(g)) for path, g in grads.items()}
    for path in MATRICES:
        size = np.linalg.norm(grads[path]) / np.linalg.norm(wanted[path])
        wanted[path] = wanted[path] * size
    assert_close(updates, wanted, 1e-5)


@pytest.mark.parametrize("with_params", [True, False])
def test_masked_hides_leaves_and_hands_the_rest_through(with_params):
    params, grads, *_ = trees()
    seen = []

    def is_matrix(tree):
        return {path: path in MATRICES for path in tree}

    tx = masked(signs_seen(seen), is_matrix)
    given = params if with_params else None
    updates, state = tx.update(grads, tx.init(params), given, value=1.0)
    assert seen == [(set(MATRICES) if with_params else None, {"value"})]
    assert state.inner_state == 1
    assert updates["dense/bias"] is grads["dense/bias"]
    for path in MATRICES:
        np.testing.assert_array_equal(updates[path], np.sign(grads[path]))


# --- Scale rules --------------------------------------------------------------------


SCALES = (
    transforms.Width(),
    transforms.Spectral(),
    transforms.MaxDim(),
    transforms.RMSMatch(0.25),
    transforms.ConvSpectral(),
)
PER_HEAD = components.ByName(
    attention="per_head", stacked=("experts",), unmatched="ignore"
)


def by_path(*args, **kwargs):
    return components.ByPath(
        [("bias", None), ("", components.Matricisation(*args, **kwargs))]
    )


@pytest.mark.parametrize(
    ("path", "shape", "rule", "numbers"),
    [
        # 4 x 64
        ("dense/kernel", (4, 64), components.ByName(), (4, 4, 8, 2, 4)),
        # 64 x 4
        ("tall/kernel", (64, 4), components.ByName(), (1, 0.25, 8, 2, 0.25)),
        # 16 x 64, four taps, four channels in
        ("conv/kernel", (2, 2, 4, 64), components.ByName(), (2, 2, 8, 2, 1)),
        # three heads, 16 x 4 and 4 x 16
        ("attention/query/kernel", (16, 3, 4), PER_HEAD, (1, 0.5, 4, 1, 0.5)),
        ("attention/out/kernel", (3, 4, 16), PER_HEAD, (2, 2, 4, 1, 2)),
        # five experts, 4 x 36
        ("experts/kernel", (5, 4, 36), PER_HEAD, (3, 3, 6, 1.5, 3)),
        # four groups of 16 x 16, four taps, four channels in
        (
            "grouped/kernel",
            (2, 2, 4, 64),
            by_path((0, 1, 2), (3,), groups=4, spatial=(0, 1)),
            (1, 1, 4, 1, 0.5),
        ),
        # four gates, 4 x 16
        ("gates/kernel", (4, 64), by_path((0,), (1,), blocks=4), (2, 2, 4, 1, 2)),
        # two outputs in one kernel, 4 x 16 and 4 x 4
        (
            "fused/kernel",
            (4, 20),
            by_path((0,), (1,), blocks=(16, 4)),
            [[two] * 16 + [one] * 4 for two, one in [(2, 1), (2, 1), (4, 2), (1, 0.5)]]
            + [[2] * 16 + [1] * 4],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scale_rules_by_hand(path, shape, rule, numbers):
    updates = {path: np.full(shape, 3.0, np.float32), "bias": jnp.ones(3)}
    for scale, number in zip(SCALES, numbers, strict=True):
        tx = orthax.scale_by_shape(scale, rule=rule)
        scaled, _ = tx.update(updates, tx.init(updates))
        wanted = np.broadcast_to(3.0 * np.asarray(number), shape)
        np.testing.assert_allclose(scaled[path], wanted, rtol=1e-6)
        assert scaled["bias"] is updates["bias"]


@dataclasses.dataclass(frozen=True)
class OfNumpy:
    """A user's own rule, whose factor is a numpy scalar."""

    def factor(self, fan_in, fan_out, taps):
        return np.sqrt(fan_in)


@pytest.mark.parametrize("scale", [OfNumpy(), transforms.RMSMatch(np.float64(1))])
def test_numpy_numbers_do_not_change_the_dtype(scale):
    updates = {"kernel": jnp.ones((9, 2), jnp.bfloat16)}
    scaled, _ = orthax.scale_by_shape(scale).update(updates, optax.EmptyState())
    np.testing.assert_array_equal(np.asarray(scaled["kernel"], np.float32), 3.0)
    assert scaled["kernel"].dtype == "bfloat16"


# --- What users bring ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signs:
    """A user's own method: the entries' signs."""

    def factor(self, x):
        return jnp.sign(x)

    def flops(self, m, n):
        return 0.0


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """A user's own rule."""

    def resolve(self, path, leaf):
        if path.startswith("conv"):
            return components.Matricisation((0, 1, 2), (3,))
        return None


@dataclasses.dataclass(frozen=True)
class Halves:
    """A user's own scale."""

    def factor(self, fan_in, fan_out, taps):
        return 0.5


def test_own_methods_rules_and_scales_also_when_injected():
    params, grads, *_ = trees()
    settings = {"rule": Convolutions(), "method": Signs(), "scale": Halves()}
    tx = optax.inject_hyperparams(orthax.muon)(1.0, rest=optax.sgd(0.0), **settings)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    wanted = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    wanted["conv/kernel"] = -0.5 * np.sign(grads["conv/kernel"])
    chex.assert_trees_all_close(updates, wanted, atol=1e-6)


@each(OPTIMISER_CASES)
def test_orbax_round_trip(case, tmp_path):
    params, *gradients, last = trees()
    tx = case.make()
    update = jax.jit(tx.update)
    _, state = run(update, tx.init(params), params, gradients)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        # From the shapes alone, in which a new process would start.
        like = jax.eval_shape(case.make().init, params)
        restored = manager.restore(0, args=ocp.args.StandardRestore(like))
    assert types(restored) == types(state)
    went_on, _ = update(last, state, params)
    resumed, _ = update(last, restored, params)
    chex.assert_trees_all_equal(resumed, went_on)
    fresh, _ = update(last, tx.init(params), params)
    assert difference(fresh, went_on) > 1e-2


# --- Bad input ----------------------------------------------------------------------


RULED = {
    "orthogonalise": orthax.orthogonalise,
    "normalise": orthax.normalise,
    "normalise_components": orthax.normalise_components,
    "scale_by_shape": orthax.scale_by_shape,
    "restore_norm": functools.partial(transforms.restore_norm, optax.identity()),
    "scale_by_component_rms": transforms.scale_by_component_rms,
    **{row.name: functools.partial(row.factory, 0.1) for row in OPTIMISERS},
}
WITH_METHOD = {
    name: RULED[name] for name in ("orthogonalise", *(row.name for row in OPTIMISERS))
}


class CallableMethod(Signs):
    """What `inject_hyperparams` would take for a schedule."""

    def __call__(self, x):
        return x


class CallableRule(Convolutions):
    """What `inject_hyperparams` would take for a schedule."""

    def __call__(self, x):
        return x


def factories(table):
    return pytest.mark.parametrize("make", table.values(), ids=table)


@factories(WITH_METHOD)
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (polar.SVD, r"`method` must be .*a class; write SVD\(\)"),
        ("svd", r"`method` must be a polar method such as polar.Auto\(\), got 'svd'"),
        (jnp.sign, r"`method` must be a polar method"),
        (None, r"`method` must be a polar method .* got None of type NoneType"),
        (CallableMethod(), "callable: optax.inject_hyperparams would take it for a"),
    ],
    ids=["class", "string", "function", "none", "callable"],
)
def test_bad_method(make, method, message):
    with pytest.raises(TypeError, match=message):
        make(method=method)


@factories(RULED)
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (components.ByName, r"`rule` must be .*a class; write ByName\(\)"),
        ([("kernel", None)], r"type list. For a list .* components.ByPath\(\[...\]\)"),
        (
            "kernel",
            r"`rule` must be a rule such as components.ByName\(\), got 'kernel'",
        ),
        (lambda path, leaf: None, r"`rule` must be a rule .* of type function"),
        (CallableRule(), "callable: optax.inject_hyperparams would take it for a"),
    ],
    ids=["class", "list", "string", "function", "callable"],
)
def test_bad_rule(make, rule, message):
    with pytest.raises(TypeError, match=message):
        make(rule=rule)


@factories(WITH_METHOD)
def test_bad_stacking(make):
    with pytest.raises(TypeError, match=r"`stacking` must be an execution.Stacking"):
        make(stacking=4)
    # That a good one arrives shows where it cannot be obeyed.
    params, grads, *_ = trees()
    tx = make(stacking=execution.Stacking(max_bytes=1))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"max_bytes=1\) is smaller than one [34] x"):
        jax.eval_shape(tx.update, grads, state, params)


@pytest.mark.parametrize("scale", [transforms.Width, "width", 0.2, math.sqrt])
@pytest.mark.parametrize("name", ["scale_by_shape", "muon", "normuon"])
def test_bad_scale(name, scale):
    with pytest.raises(TypeError, match=r"`scale` must be .* transforms.Width\(\)"):
        RULED[name](scale=scale)


def test_bad_restore_norm():
    with pytest.raises(TypeError, match="`inner` must be a gradient transformation"):
        transforms.restore_norm(polar.SVD())


@factories(RULED)
@pytest.mark.parametrize(
    ("leaf", "error", "messages"),
    [
        (
            {"embed": {"embedding": jnp.ones((5, 4))}},
            ValueError,
            ["cuts no leaf", "'embed/embedding'", "ByPath", "from_model", "masked"],
        ),
        (
            {"layers": [{"kernel": jnp.ones((2, 3, 4))}]},
            ValueError,
            [
                "'layers/0/kernel' of shape (2, 3, 4) is ambiguous",
                "from_function(model.apply, params, x)",
                "from_model(model)",
                "ByName(stacked=(...,))",
                "ByName(skip=(...,))",
                "ByName(overrides=[",
            ],
        ),
        (
            {"linear": {"weight": jnp.ones((3, 4))}},
            ValueError,
            ["'linear/weight' of shape (3, 4)", "Equinox", "from_model(model)"],
        ),
        (
            {"activation": jnp.tanh, "kernel": jnp.ones((3, 4))},
            TypeError,
            ["'activation'", "not an array", "nnx.state", "eqx.filter", "'params'"],
        ),
    ],
    ids=["nothing", "ambiguous", "weight", "no_array"],
)
def test_bad_leaves(make, leaf, error, messages):
    tx = make()
    good = {"kernel": jnp.ones((3, 4))}
    with pytest.raises(error) as at_init:
        tx.init(leaf)
    with pytest.raises(error) as at_update:
        jax.eval_shape(lambda: tx.update(leaf, tx.init(good), good))
    for message in messages:
        assert message in str(at_init.value)
        if error is ValueError:
            assert message in str(at_update.value)


@pytest.mark.parametrize("make", [orthax.muon, orthax.normuon])
def test_a_dtype_that_inject_hyperparams_called_is_refused(make):
    tx = optax.inject_hyperparams(make)(0.1, mu_dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="static_args"):
        tx.init({"kernel": jnp.ones((3, 4))})


@pytest.mark.parametrize("make", [orthax.orthogonal_sgd, orthax.orthogonal_adam])
def test_without_decay_no_parameters_are_needed(make):
    grads = {"kernel": jnp.eye(3, 4), "bias": jnp.ones(4)}
    tx = make(0.1)
    without, _ = tx.update(grads, tx.init(grads))
    decayed, _ = make(0.1, weight_decay=0.0).update(
        grads, make(0.1, weight_decay=0.0).init(grads), grads
    )
    chex.assert_trees_all_close(without, decayed, rtol=1e-6)
    assert float(jnp.abs(without["kernel"]).sum()) > 0.2
