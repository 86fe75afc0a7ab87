"""Gradients of several tasks: rules, the transformation, the two passes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import orthax
from orthax import tasks
from orthax.tasks import (
    OSGD,
    CAGrad,
    GradVac,
    PCGrad,
    Sum,
    Symmetric,
    combine_tasks,
    combined_value_and_grad,
    task_value_and_grad,
    task_weights,
)

RULES = {
    "sum": Sum(),
    "osgd": OSGD(),
    "osgd_order": OSGD(order=(2, 0, 3, 1)),
    "osgd_per_task": OSGD(normalise="per_task"),
    "osgd_total": OSGD(normalise="total"),
    "osgd_conflict": OSGD(conflict_only=True),
    "pcgrad": PCGrad(),
    "pcgrad_order": PCGrad(order=(3, 1, 0, 2)),
    "gradvac": GradVac(target=0.3),
    "gradvac_negative": GradVac(target=-0.4),
    "cagrad": CAGrad(),
    "cagrad_far": CAGrad(c=0.9, steps=100),
    "symmetric": Symmetric(),
}


def jacobian(tasks=4, size=30, seed=0, sizes=None):
    """Return gradients of several tasks, partly in conflict, in float64."""
    random = np.random.default_rng(seed)
    common = random.normal(size=size)
    rows = random.normal(size=(tasks, size)) + random.normal(size=(tasks, 1)) * common
    return rows * (np.exp(random.normal(size=(tasks, 1))) if sizes is None else sizes)


def combined(rule, rows, **how):
    """Return the update of one leaf, by the transformation."""
    tx = combine_tasks(rule, **how)
    rows = jnp.asarray(rows, jnp.float32)
    return np.asarray(tx.update([rows], tx.init([rows[0]]))[0][0], np.float64)


def far(found, expected):
    """Return the distance of vectors relative to the length of the expected one."""
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


# ------------------------------------------------ direct implementations, on gradients


def gram_schmidt(rows, order=None, normalise=None, conflict_only=False):
    q = []
    for i in order or range(len(rows)):
        rest = rows[i].copy()
        for other in q:
            part = rest @ other / (other @ other)
            rest -= (min(part, 0) if conflict_only else part) * other
        q.append(rest)
    order = order or range(len(rows))
    if normalise == "per_task":
        lengths = [np.linalg.norm(rows[i]) for i in order]
        q = [n * r / np.linalg.norm(r) for n, r in zip(lengths, q, strict=True)]
    d = sum(q)
    if normalise == "total":
        d *= np.linalg.norm(rows.sum(0)) / np.linalg.norm(d)
    return d


def surgery(rows, turn, order=None):
    """Change a copy of each gradient by each other one, and sum."""
    total = 0
    for i, g in enumerate(rows):
        g = g.copy()
        for j in order or range(len(rows)):
            if j != i:
                g = turn(g, rows[j])
        total = total + g
    return total


def projected(g, other):
    return g - min(g @ other, 0) / (other @ other) * other


def vaccinated(target):
    def turn(g, other):
        a, b = np.linalg.norm(g), np.linalg.norm(other)
        cosine = g @ other / (a * b)
        if cosine >= target:
            return g
        sines = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
        return g + a * (target * sines[0] - cosine * sines[1]) / (b * sines[1]) * other

    return turn


def conflict_averse(rows, c):
    mean = rows.mean(0)
    radius = c * np.linalg.norm(mean)

    def value(w):
        return w @ rows @ mean + radius * np.linalg.norm(w @ rows)

    tasks = len(rows)
    found = [
        scipy.optimize.minimize(
            value,
            start,
            bounds=[(0, 1)] * tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        for start in [np.full(tasks, 1 / tasks), *(np.eye(tasks) * 0.9 + 0.1 / tasks)]
    ]
    g = min(found, key=lambda f: f.fun).x @ rows
    return mean + radius / np.linalg.norm(g) * g


def loewdin(rows):
    u, _, vh = np.linalg.svd(rows, full_matrices=False)
    return np.linalg.norm(rows, axis=1) @ (u @ vh)


DIRECT = {
    "sum": lambda rows: rows.sum(0),
    "osgd": gram_schmidt,
    "osgd_order": lambda rows: gram_schmidt(rows, order=(2, 0, 3, 1)),
    "osgd_per_task": lambda rows: gram_schmidt(rows, normalise="per_task"),
    "osgd_total": lambda rows: gram_schmidt(rows, normalise="total"),
    "osgd_conflict": lambda rows: gram_schmidt(rows, conflict_only=True),
    "pcgrad": lambda rows: surgery(rows, projected),
    "pcgrad_order": lambda rows: surgery(rows, projected, order=(3, 1, 0, 2)),
    "gradvac": lambda rows: surgery(rows, vaccinated(0.3)),
    "gradvac_negative": lambda rows: surgery(rows, vaccinated(-0.4)),
    "cagrad": lambda rows: conflict_averse(rows, 0.5),
    "cagrad_far": lambda rows: conflict_averse(rows, 0.9),
    "symmetric": loewdin,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RULES)
def test_equals_a_direct_implementation(name, seed):
    rows = jacobian(seed=seed)
    limit = 3e-3 if "cagrad" in name else 2e-5
    assert far(combined(RULES[name], rows), DIRECT[name](rows)) < limit
    if name not in ("sum", "gradvac_negative"):
        assert far(combined(RULES[name], rows), rows.sum(0)) > 1e-2


@pytest.mark.parametrize("name", RULES)
def test_the_same_in_every_orthonormal_basis(name):
    rows = jacobian(seed=5)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0]
    found = combined(RULES[name], rows @ turn)
    limit = 5e-3 if "cagrad" in name else 5e-5
    assert far(found, combined(RULES[name], rows) @ turn) < limit


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_with_the_gradients(name, scale):
    rows = jacobian()
    limit = 5e-3 if "cagrad" in name else 2e-5
    assert far(combined(RULES[name], rows * scale) / scale, DIRECT[name](rows)) < limit


@pytest.mark.parametrize("first", range(4))
def test_nothing_disturbs_the_first_task(first):
    rows = jacobian(seed=7)
    order = (first, *(i for i in range(4) if i != first))
    for normalise in (None, "per_task"):
        d = combined(OSGD(order=order, normalise=normalise), rows)
        assert d @ rows[first] == pytest.approx(rows[first] @ rows[first], rel=1e-5)
    assert abs(rows.sum(0) @ rows[first] / (rows[first] @ rows[first]) - 1) > 0.05


def test_no_task_of_a_conflict_averse_direction_falls_less_than_for_the_mean():
    rows = jacobian(seed=3)
    worst = (rows @ combined(CAGrad(0.5), rows)).min()
    assert worst > (rows @ rows.mean(0)).min() + 1e-3
    assert far(combined(CAGrad(0.0), rows), rows.mean(0)) < 1e-5


def test_a_target_of_zero_is_projection():
    rows = jacobian(seed=9)
    found = combined(GradVac(target=0.0), rows)
    assert far(found, combined(PCGrad(), rows)) < 1e-5


# ----------------------------------------------------------------- what degenerates


@pytest.mark.parametrize("name", RULES)
def test_a_task_without_gradient_changes_nothing(name):
    rows = jacobian()
    rows[2] = 0
    found = combined(RULES[name], rows)
    assert np.isfinite(found).all()
    if "cagrad" not in name and "order" not in name:
        assert far(found, DIRECT[name](rows[[0, 1, 3]])) < 2e-5


@pytest.mark.parametrize("name", RULES)
def test_no_gradients_at_all_give_zero(name):
    assert (combined(RULES[name], np.zeros((4, 30))) == 0).all()


@pytest.mark.parametrize("name", RULES)
def test_equal_and_parallel_tasks(name):
    g = jacobian(tasks=1)
    found = combined(RULES[name], np.concatenate([g, g, 2 * g, g]))
    assert np.isfinite(found).all()
    # Along the one direction that there is.
    assert far(found / np.linalg.norm(found), g[0] / np.linalg.norm(g)) < 1e-3


def test_a_repeated_task_adds_nothing_to_ordered_ones():
    rows = jacobian(tasks=2)
    again = np.stack([rows[0], rows[1], rows[0], 3 * rows[1] - rows[0]])
    assert far(combined(OSGD(), again), gram_schmidt(rows)) < 1e-4


def test_the_remainder_that_counts_as_rounding():
    """Its norm is sqrt(16 tasks eps) of the gradient's: 2e-3 for two, as documented."""
    threshold = (32 * np.finfo(np.float32).eps) ** 0.5
    for factor in (0.7, 1.4):
        sine = factor * threshold
        rows = np.array([[1.0, 0], [(1 - sine**2) ** 0.5, sine]])
        found = combined(OSGD(normalise="per_task"), rows)
        assert np.allclose(found, [1, 0] if factor < 1 else [1, 1], atol=0.2)


@pytest.mark.parametrize("name", ["osgd", "pcgrad", "gradvac", "symmetric"])
def test_opposite_tasks_are_finite(name):
    g = jacobian(tasks=1)
    assert np.isfinite(combined(RULES[name], np.concatenate([g, -g, g, -2 * g]))).all()


@pytest.mark.parametrize("name", RULES)
def test_one_task_alone_keeps_its_gradient(name):
    if "order" in name:
        return
    g = jacobian(tasks=1)
    expected = g[0] * (1 + RULES[name].c if "cagrad" in name else 1)
    assert far(combined(RULES[name], g), expected) < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_nan_is_not_repaired(name):
    rows = jacobian()
    rows[1, 4] = np.nan
    assert np.isnan(combined(RULES[name], rows)).all()


# ------------------------------------------------------------ states and random orders


def test_random_orders_are_new_ones_and_reproducible():
    rows = jacobian(tasks=4, size=3, seed=2)
    rows = jnp.asarray(rows - rows.mean(0), jnp.float32)
    tx = combine_tasks(PCGrad(key=3))

    def steps(n):
        state, found = tx.init(rows[0]), []
        for _ in range(n):
            out, state = jax.jit(tx.update)(rows, state)
            found.append(tuple(np.asarray(out).round(4).tolist()))
        return found

    assert len(set(steps(6))) > 1
    assert steps(3) == steps(6)[:3]
    typed = combine_tasks(PCGrad(key=jax.random.key(3)))
    first = typed.update(rows, typed.init(rows[0]))[0]
    assert np.allclose(first, steps(1)[0], atol=1e-3)


def test_running_mean_of_cosines():
    rows = jacobian(tasks=2, seed=4)
    cosine = rows[0] @ rows[1] / np.prod(np.linalg.norm(rows, axis=1))
    tx = combine_tasks(GradVac(target=None, tasks=2, b=0.25))
    rows = jnp.asarray(rows, jnp.float32)
    state = tx.init(rows[0])
    mean = 0.0
    for _ in range(3):
        expected = surgery(np.asarray(rows, np.float64), vaccinated(mean))
        out, state = tx.update(rows, state)
        assert far(np.asarray(out), expected) < 1e-5
        mean = 0.75 * mean + 0.25 * cosine
        means = np.asarray(state.rule[0])
        assert means[0, 1] == pytest.approx(mean, rel=1e-5)
        assert means[0, 0] == means[1, 1] == 0


# ---------------------------------------------------------------- the transformation


def tree(seed=0, tasks=3):
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    shapes = {"a": {"kernel": (5, 4), "bias": (4,)}, "b": (2, 3, 2)}
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), (tasks, *shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(updates, tasks=None):
    leaves = jax.tree.leaves(updates)
    lead = () if tasks is None else (tasks,)
    return np.concatenate([np.asarray(x).reshape(*lead, -1) for x in leaves], -1)


def test_global_and_leaf_scope():
    updates = tree()
    params = jax.tree.map(lambda x: x[0], updates)
    for scope in ("global", "leaf"):
        tx = combine_tasks(OSGD(), scope=scope)
        out, _ = jax.jit(tx.update)(updates, tx.init(params), params)
        assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, params)
        if scope == "global":
            expected = gram_schmidt(flat(updates, 3).astype(np.float64))
            assert far(flat(out), expected) < 2e-5
            continue
        for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(out), strict=True):
            rows = np.asarray(x, np.float64).reshape(3, -1)
            assert far(np.asarray(y).ravel(), gram_schmidt(rows)) < 2e-5


@pytest.mark.parametrize("name", ["symmetric", "cagrad", "pcgrad", "gradvac"])
def test_leaf_scope_for_every_kind_of_rule(name):
    updates = tree(tasks=4)
    tx = combine_tasks(RULES[name], scope="leaf")
    state = tx.init(jax.tree.map(lambda x: x[0], updates))
    out, _ = jax.jit(tx.update)(updates, state)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(out), strict=True):
        alone = combined(RULES[name], np.asarray(x).reshape(4, -1))
        limit = 5e-3 if name == "cagrad" else 2e-5
        assert far(np.asarray(y).ravel(), alone) < limit


def test_leaf_scope_with_a_state():
    updates = tree(tasks=2)
    params = jax.tree.map(lambda x: x[0], updates)
    for rule in (GradVac(target=None, tasks=2, key=0), PCGrad(key=0)):
        tx = combine_tasks(rule, scope="leaf")
        state = tx.init(params)
        _, after = jax.jit(tx.update)(updates, state, params)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "complex64"])
def test_dtypes_are_kept(dtype, x64):
    rows = jnp.asarray(jacobian(), dtype)
    if dtype == "complex64":
        rows = rows + 1j * jnp.asarray(jacobian(seed=8), dtype)
    tx = combine_tasks(OSGD())
    out = tx.update([rows], tx.init([rows[0]]))[0][0]
    assert out.dtype == rows.dtype
    parts = [np.asarray(f(rows), np.float64) for f in (jnp.real, jnp.imag)]
    found = [np.asarray(f(out), np.float64) for f in (jnp.real, jnp.imag)]
    limit = {"bfloat16": 1e-2, "float64": 1e-12}.get(dtype, 2e-5)
    expected = gram_schmidt(np.concatenate(parts, axis=1))
    assert far(np.concatenate(found), expected) < limit


def test_other_leaves_lose_their_axis_alone():
    updates = {"w": jnp.asarray(jacobian(), jnp.float32), "i": jnp.ones((4, 2), int)}
    out, _ = combine_tasks().update(updates, combine_tasks().init({"w": 0.0, "i": 0}))
    assert out["i"].tolist() == [1, 1]


def test_in_a_chain_before_orthogonalise():
    updates = tree()
    del updates["b"]
    params = jax.tree.map(lambda x: x[0], updates)
    tx = optax.chain(combine_tasks(), orthax.orthogonalise(), optax.sgd(1.0))
    out, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    values = np.linalg.svd(np.asarray(out["a"]["kernel"]), compute_uv=False)
    assert np.allclose(values, 1, atol=1e-4)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("rule", [OSGD(), PCGrad()], ids=["osgd", "pcgrad"])
def test_sharded_equals_unsharded(kind, rule):
    """And the Gram matrix is summed over the devices once for the whole tree.

    The compiler does it once for each way in which leaves lie.
    """
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    names = {"a": ("x", "y"), "b": (None, "x"), "c": (None, None)}
    updates = {
        k: jnp.asarray(jacobian(3, 8 * 16, seed=i), jnp.float32).reshape(3, 8, 16)
        for i, k in enumerate(names)
    }
    tx = combine_tasks(rule)
    expected = tx.update(updates, tx.init(updates))[0]
    xs = {
        k: jax.device_put(
            x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *names[k]))
        )
        for k, x in updates.items()
    }
    program = jax.jit(lambda xs: tx.update(xs, tx.init(xs))[0]).lower(xs).compile()
    for name, x in program(xs).items():
        spec = jax.sharding.PartitionSpec(*names[name])
        assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)
        assert far(np.asarray(x), np.asarray(expected[name])) < 1e-5
    text = program.as_text()
    assert " all-gather(" not in text
    assert " all-to-all(" not in text
    assert text.count(" all-reduce(") == (1 if kind == "Explicit" else 2)


# ---------------------------------------------------------------------- both passes


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (6, 16)) / 3,
        "heads": jax.random.normal(keys[1], (3, 16)) / 3,
    }
    return params, jax.random.normal(keys[2], (20, 6))


def exits(params, x):
    hidden = jnp.tanh(x @ params["up"])
    scores = hidden @ params["heads"].T
    return jnp.mean((scores - jnp.sin(x[:, :3] * 3)) ** 2, axis=0)


def test_gradients_of_all_tasks():
    params, x = network()
    losses, grads = jax.jit(task_value_and_grad(exits))(params, x)
    assert np.allclose(losses, exits(params, x))
    for i in range(3):
        alone = jax.grad(lambda p, i=i: exits(p, x)[i])(params)
        of_task = jax.tree.map(lambda g, i=i: g[i], grads)
        assert far(flat(of_task), flat(alone)) < 1e-5


@pytest.mark.parametrize("name", [n for n in RULES if "order" not in n])
def test_two_passes_give_what_one_gives(name):
    params, x = network()
    _, grads = task_value_and_grad(exits)(params, x)
    tx = combine_tasks(RULES[name])
    expected, _ = tx.update(grads, tx.init(params), params)
    losses, found = jax.jit(combined_value_and_grad(exits, RULES[name]))(params, x)
    assert np.allclose(losses, exits(params, x))
    assert far(flat(found), flat(expected)) < (5e-3 if "cagrad" in name else 5e-5)


def test_auxiliary_results():
    params, x = network()

    def with_aux(params, x):
        return exits(params, x), {"seen": len(x)}

    for make in (task_value_and_grad, combined_value_and_grad):
        (losses, aux), _ = make(with_aux, has_aux=True)(params, x)
        assert losses.shape == (3,)
        assert aux["seen"] == 20


def test_two_passes_need_the_memory_of_one_gradient():
    """Temporary memory with eight tasks: of all gradients, and of one."""
    size, tasks = 256, 8

    def losses(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2, axis=0).reshape(tasks, -1).sum(1)

    def temporary(f):
        args = jnp.ones((size, size)), jnp.ones((4, size))
        memory = jax.jit(f).lower(*args).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * size * size)

    tx = combine_tasks()

    def one_pass(w, x):
        _, grads = task_value_and_grad(losses)(w, x)
        return tx.update(grads, tx.init(w))[0]

    assert temporary(one_pass) > tasks - 1
    assert temporary(lambda *a: combined_value_and_grad(losses)(*a)[1]) < 4


def test_the_first_loss_never_rises_where_the_sum_lets_it():
    """Two quadratics in conflict, the second thirty times as strong."""
    random = np.random.default_rng(0)
    bases = [random.normal(size=(6, 6)) for _ in range(2)]
    forms = [b @ b.T / 6 + 0.1 * np.eye(6) for b in bases]
    ends = random.normal(size=(2, 6)) * 2

    def losses(x):
        parts = [
            (x - e) @ jnp.asarray(f) @ (x - e) for e, f in zip(ends, forms, strict=True)
        ]
        return jnp.stack([parts[0], 30 * parts[1]]) / 2

    def run(rule):
        x, seen = jnp.zeros(6), []
        step = jax.jit(combined_value_and_grad(losses, rule))
        for _ in range(300):
            values, grads = step(x)
            seen.append(values)
            x = x - 0.002 * grads
        return np.asarray(seen)

    ordered, summed = run(OSGD()), run(Sum())
    assert (np.diff(ordered[:, 0]) <= 1e-5).all()
    assert (np.diff(summed[:, 0]) > 1e-3).any()
    assert ordered[-1, 0] < summed[-1, 0]
    # The price, which the second task pays.
    assert ordered[-1, 1] > summed[-1, 1]


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: OSGD(order=(0, 0)), ValueError, "permutation"),
        (lambda: OSGD(order=(1, 2)), ValueError, "permutation"),
        (lambda: OSGD(normalise="all"), ValueError, "per_task"),
        (lambda: PCGrad(order=(1, 0), key=1), ValueError, "`order` or `key`"),
        (lambda: GradVac(target=1.0), ValueError, r"\[-1, 1\)"),
        (lambda: GradVac(b=0.0), ValueError, r"\(0, 1\]"),
        (lambda: GradVac(target=None), ValueError, "give `tasks`"),
        (lambda: CAGrad(c=1.0), ValueError, r"\[0, 1\)"),
        (lambda: CAGrad(steps=0), ValueError, "at least 1"),
        (lambda: task_weights(np.eye(3), OSGD((1, 0))), ValueError, "2 tasks.*are 3"),
        (lambda: task_weights(np.ones((2, 3))), ValueError, r"\(2, 3\)"),
        (lambda: task_weights(np.ones((0, 0))), ValueError, "at least one task"),
        (lambda: task_weights(np.eye(2), OSGD), TypeError, "a task rule"),
        (
            lambda: task_weights(np.eye(2), GradVac(target=None, tasks=3)),
            ValueError,
            "given 2 tasks",
        ),
        (lambda: combine_tasks("osgd"), TypeError, "a task rule"),
        (lambda: combine_tasks(scope="layer"), ValueError, "global"),
        (lambda: combined_value_and_grad(exits, PCGrad(key=1)), ValueError, "state"),
        (lambda: task_value_and_grad(jnp.sum)(jnp.ones(2)), ValueError, "jnp.stack"),
        (
            lambda: combined_value_and_grad(jnp.sum)(jnp.ones(2)),
            ValueError,
            "jnp.stack",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("updates", "params", "message"),
    [
        ({}, None, "no tasks"),
        ({"a": jnp.ones((0, 3))}, None, "no tasks"),
        ({"a": jnp.ones(())}, None, r"\['a'\] has no axes"),
        (
            {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))},
            None,
            r"2 in leaf \['a'\], 3 in leaf \['b'\]",
        ),
        (
            {"a": jnp.ones((2, 3))},
            {"a": jnp.ones((2, 3))},
            r"\['a'\] has shape \(2, 3\)",
        ),
    ],
)
def test_bad_updates(updates, params, message):
    with pytest.raises(ValueError, match=message):
        combine_tasks().update(updates, ((),), params)


def test_rules_are_no_schedules():
    """`optax.inject_hyperparams` takes whatever is callable for one."""
    for rule in RULES.values():
        assert not callable(rule)
        assert isinstance(rule, tasks.TaskRule)
