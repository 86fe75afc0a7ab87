"""Moments in other coordinates, the trainer, checkpoints, frameworks, devices."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from test_low_rank import close, random, trees_close, with_spectrum

import orthax
from orthax import components, low_rank, polar
from orthax.components import Matricisation

QUIET = low_rank.OIALR(delay=0, frequency=1, beta=1e-6)
WHOLE = components.ByPath([("", Matricisation((0,), (1,)))])
TRUNCATING = low_rank.OIALR(delay=0, frequency=1, beta=0.3, max_drop=0.5)
PARAMS = {
    "a": {"kernel": with_spectrum([5, 4, 3, 0.5, 0.4, 0.3], 8), "bias": random((6,))},
    "b": {"kernel": with_spectrum([5, 4, 0.3, 0.2], 6, seed=1)},
}


# --- Optimisers' states -------------------------------------------------------------

OPTIMISERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "lion": optax.lion(0.1),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.amsgrad(0.1), optax.ema(0.9)
    ),
    "masked": optax.masked(
        optax.adam(0.1),
        lambda tree: jax.tree.map_with_path(lambda path, _: path[0].key == "a", tree),
    ),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "partition": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        lambda tree: {name: name for name in tree},
    ),
    "muon": orthax.muon(0.1),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
}
FIRST = ("trace", "mu", "ema")
SECOND = ("nu", "nu_max")


def fields(opt_state, owner):
    """The leaves that mirror a weight, by the name of their field and their path."""
    found = {}
    for path, x in jax.tree.flatten_with_path(opt_state)[0]:
        names = [
            str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", ""))))
            for k in path
        ]
        if names[-2:] == [owner, "kernel"]:
            (field,) = [n for n in names if n in (*FIRST, *SECOND, "acc_grads", "z")]
            found["/".join(names)] = field, np.asarray(x, np.float64)
    return found


def like(seed, x):
    return random(x.shape, seed)


def trained(tx, weights, steps, seed=0):
    """An optimiser's state that has seen gradients."""
    opt_state = tx.init(weights)
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(functools.partial(like, seed + i), weights)
        _, opt_state = update(grads, opt_state, weights)
    return opt_state


def expected(field, x, a, b, moments, was_dense):
    r = a.shape[1]
    rotates = field in ("acc_grads", "z") or (field in FIRST and moments == "rotate")
    if rotates:
        return a.T @ x @ b
    if field in SECOND and moments == "rotate":
        return (a**2).T @ x @ b**2
    if was_dense or (field in FIRST and moments == "zero"):
        return np.zeros((r, r))
    return x[:r, :r]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_states_of_optimisers_are_carried_over(name):
    tx = OPTIMISERS[name]
    dense = low_rank.LowRankState(PARAMS, {})
    full = low_rank.factorise(PARAMS)
    moved = jax.tree.map(lambda x: x + 0.3 * random(x.shape, 9), full.trainable)
    full = full._replace(trainable=moved)
    cut = low_rank.refactor(full, TRUNCATING)
    assert low_rank.ranks(cut) == {"a/kernel": 3, "b/kernel": 2}
    for old, new in ((dense, full), (full, cut)):
        opt_state = trained(tx, old.trainable, 3)
        fresh = jax.eval_shape(tx.init, new.trainable)
        for moments in ("zero", "slice", "rotate"):
            found = low_rank.convert_opt_state(opt_state, old, new, moments)
            # What the optimiser would have made of the new weights, in form.
            assert jax.tree.structure(found) == jax.tree.structure(fresh)
            assert [x.shape for x in jax.tree.leaves(found)] == [
                x.shape for x in jax.tree.leaves(fresh)
            ]
            for owner in "ab":
                a, b = in_new_basis(old, new, f"{owner}/kernel")
                before, after = fields(opt_state, owner), fields(found, owner)
                assert list(before) == list(after)
                assert before or (name == "masked" and owner == "b")
                for path, (field, x) in before.items():
                    assert np.any(x)
                    want = expected(field, x, a, b, moments, not old.frozen)
                    close(after[path][1], want, 1e-5)
        untouched = jax.tree.leaves(opt_state)
        for x, y in zip(untouched, jax.tree.leaves(found), strict=True):
            if x.ndim < 2:  # counts, hyper-parameters and biases
                np.testing.assert_array_equal(x, y)


def in_new_basis(old, new, path):
    """The matrices A and B of `convert_opt_state`, from the bases."""
    u, vt = new.frozen[path].u, new.frozen[path].vt
    a, b = np.asarray(u[0], np.float64), np.asarray(vt[0], np.float64).T
    if old.frozen:
        u, vt = old.frozen[path].u, old.frozen[path].vt
        a = np.asarray(u[0], np.float64).T @ a
        b = np.asarray(vt[0], np.float64) @ b
    return a, b


def test_fused_blocks_are_carried_over():
    rule = components.ByPath([("", Matricisation((0,), (1,), blocks=2))])
    params = {"qkv": random((6, 10))}
    state = low_rank.factorise(params, rule)
    opt_state = trained(optax.adam(0.1), params, 2)
    first = low_rank.convert_opt_state(opt_state, params, state)
    bases, mu = state.frozen["qkv"], np.asarray(opt_state[0].mu["qkv"], np.float64)
    for i, part in enumerate((mu[:, :5], mu[:, 5:])):
        u, vt = (np.asarray(x[i], np.float64) for x in (bases.u, bases.vt))
        close(first[0].mu["qkv"][i], u.T @ part @ vt.T, 1e-5)
    moved = jax.tree.map(lambda x: x + 0.1 * random(x.shape), state.trainable)
    old = state._replace(trainable=moved)
    new = low_rank.refactor(old, TRUNCATING)
    r = low_rank.ranks(new)["qkv"]
    assert r < 5
    sliced = low_rank.convert_opt_state(first, old, new, "slice")
    close(sliced[0].mu["qkv"], first[0].mu["qkv"][:, :r, :r], 0)
    rotated = low_rank.convert_opt_state(first, old, new)
    for i in range(2):
        before, after = (x.frozen["qkv"] for x in (old, new))
        factors = before.u, before.vt, after.u, after.vt
        u, vt, new_u, new_vt = (np.asarray(x[i], np.float64) for x in factors)
        x = np.asarray(first[0].mu["qkv"][i], np.float64)
        close(rotated[0].mu["qkv"][i], new_u.T @ u @ x @ vt @ new_vt.T, 1e-5)


def test_a_leaf_of_a_longer_path_is_not_taken_for_another():
    params = {"kernel": random((6, 6)), "a": {"kernel": random((6, 6), 1)}}
    state = low_rank.factorise(params, ranks={"kernel": 6})
    opt_state = trained(optax.sgd(0.1, momentum=0.9), params, 1)
    found = low_rank.convert_opt_state(opt_state, params, state)
    trees_close(found[0].trace["a"], opt_state[0].trace["a"], 0)
    assert np.any(found[0].trace["kernel"] != opt_state[0].trace["kernel"])


def test_parameters_that_are_one_array():
    x = random((6, 5))
    tx = optax.inject_hyperparams(optax.adam)(0.1)
    opt_state = trained(tx, x, 1)
    state = low_rank.factorise(x, WHOLE, ranks=2)
    found = low_rank.convert_opt_state(opt_state, x, state)
    u, vt = state.frozen[""].u[0], state.frozen[""].vt[0]
    expected = u.T @ opt_state.inner_state[0].mu @ vt.T
    close(found.inner_state[0].mu, expected, 1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(state.trainable))


def test_a_state_that_does_not_mirror_its_weights_starts_afresh():
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    state = low_rank.factorise(PARAMS)
    opt_state = trained(tx, PARAMS, 2)
    with pytest.raises(ValueError, match=r"v_row/a/kernel.*give `tx`"):
        low_rank.convert_opt_state(opt_state, PARAMS, state)
    found = low_rank.convert_opt_state(opt_state, PARAMS, state, tx=tx)
    fresh = tx.init(state.trainable)
    trees_close(found[0].v_col["a"], fresh[0].v_col["a"])
    assert int(found[0].count) == 2


def test_fields_of_unknown_names_need_their_kind():
    state = low_rank.factorise(PARAMS)
    opt_state = {"speed": jax.tree.map(lambda x: random(x.shape), PARAMS)}
    found = low_rank.convert_opt_state(opt_state, PARAMS, state)
    assert not np.any(found["speed"]["a"]["kernel"])
    kinds = {"speed": "first"}
    found = low_rank.convert_opt_state(opt_state, PARAMS, state, kinds=kinds)
    a, b = in_new_basis(low_rank.LowRankState(PARAMS, {}), state, "a/kernel")
    speed = opt_state["speed"]["a"]["kernel"]
    close(found["speed"]["a"]["kernel"], a.T @ speed @ b, 1e-5)
    with pytest.raises(ValueError, match="'speed' holds 'third'"):
        low_rank.convert_opt_state(opt_state, PARAMS, state, kinds={"speed": "third"})
    with pytest.raises(ValueError, match="`moments` must be one of"):
        low_rank.convert_opt_state(opt_state, PARAMS, state, "turn")
    with pytest.raises(ValueError, match="the state before, then"):
        low_rank.convert_opt_state(opt_state, state, low_rank.LowRankState(PARAMS, {}))


# --- The trainer --------------------------------------------------------------------

X = random((16, 6), 3)
TARGET = random((6, 6), 4)
SQUARE = {"kernel": random((6, 6), 5), "bias": jnp.zeros(6)}


def loss(params, x):
    return jnp.mean((x @ (params["kernel"] - TARGET) + params["bias"]) ** 2)


def one_step(trainer, loss, *, donate=False, **options):
    """A compiled step: the state and the arguments of the loss, to the next state."""

    @functools.partial(jax.jit, donate_argnums=(0,) if donate else ())
    def step(state, *args):
        value_and_grad = low_rank.value_and_grad(loss, **options)
        value, grads = value_and_grad(state.weights, *args)
        return trainer.update(state, grads), value

    return step


def run(trainer, params, steps):
    state, step, values = trainer.init(params), one_step(trainer, loss), []
    for i in range(steps):
        state, value = step(trainer.check(state, i), X)
        values.append(value)
    return state, values


def plainly(tx, params, steps):
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params, X), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params


def test_a_square_weight_at_full_rank_trains_as_if_nothing_had_happened():
    # Its bases are orthogonal matrices, and momentum is the same in every basis.
    tx = optax.sgd(0.2, momentum=0.9)
    config = low_rank.OIALR(delay=3, frequency=4, beta=1e-6)
    state, _ = run(low_rank.Trainer(tx, config), SQUARE, 14)
    assert low_rank.ranks(state) == {"kernel": 6}
    expected = plainly(tx, SQUARE, 14)
    trees_close(low_rank.materialise(state.weights), expected, 2e-5)
    lost, _ = run(low_rank.Trainer(tx, config, moments="zero"), SQUARE, 14)
    dense = low_rank.materialise(lost.weights)
    assert np.max(np.abs(dense["kernel"] - expected["kernel"])) > 1e-3


def test_the_schedule():
    config = low_rank.OIALR(delay=2, frequency=3, beta=0.9, max_drop=0.4)
    trainer = low_rank.Trainer(optax.sgd(1e-6), config)
    state, step, seen = trainer.init(SQUARE), one_step(trainer, loss), []
    for i in range(9):
        state, _ = step(trainer.check(state, i), X)
        seen.append(low_rank.ranks(state).get("kernel"))
    # Before the third step the first check drops two of six, then one of four.
    assert seen == [None, None, 4, 4, 4, 3, 3, 3, 2]


@pytest.mark.parametrize(
    ("every", "expected"),
    # Steps at which checks are asked for, and the numbers of those that are due.
    [
        (1, {2: 0, 5: 1, 8: 2, 11: 3}),
        (2, {2: 0, 6: 1, 8: 2, 12: 3}),
        (3, {3: 0, 6: 1, 9: 2, 12: 3}),
        (6, {6: 1, 12: 3}),  # those that were missed are done once
        (13, {}),
    ],
)
def test_checks_that_are_due(every, expected):
    config = low_rank.OIALR(delay=2, frequency=3)
    due = {step: config.check_at(step, every) for step in range(0, 13, every)}
    assert {step: n for step, n in due.items() if n is not None} == expected


def test_every_check_adds_layers():
    params = dict.fromkeys("abcd", SQUARE["kernel"])
    config = low_rank.OIALR(
        delay=2, frequency=1, beta=0.99, max_drop=0.2, layer_step=0.4
    )
    trainer = low_rank.Trainer(optax.sgd(0.1), config, WHOLE, order=tuple("abcd"))
    state, seen = trainer.init(params), []
    for step in range(5):
        state = trainer.check(state, step)
        seen.append("".join(map(str, low_rank.ranks(state).values())))
    # One layer more at every check, from the output.
    assert seen == ["", "", "6665", "6654", "6544"]


def test_a_late_conversion_is_done_at_once():
    trainer = low_rank.Trainer(optax.sgd(0.1), low_rank.OIALR(2, 5, beta=0.9))
    state = trainer.init(SQUARE)
    assert trainer.check(state, 1) is state
    late = trainer.check(state, 4)  # of which nobody has said how often it is called
    assert low_rank.ranks(late) == {"kernel": 3}
    assert trainer.check(late, 5) is late
    assert low_rank.ranks(trainer.check(late, 7)) == {"kernel": 2}


def test_update_and_check_where_steps_are_scanned():
    config = low_rank.OIALR(delay=4, frequency=4, beta=0.3)
    trainer = low_rank.Trainer(optax.adam(0.02), config)
    traces, seen = [], set()

    @jax.jit
    def epoch(state):
        def one(state, _):
            traces.append(None)
            _, grads = low_rank.value_and_grad(loss)(state.weights, X)
            return trainer.update(state, grads), None

        return jax.lax.scan(one, state, None, length=4)[0]

    # The same in updates, and in epochs.
    epochs = low_rank.Trainer(optax.adam(0.02), low_rank.OIALR(1, 1, beta=0.3))
    state = in_epochs = trainer.init(SQUARE)
    for i in range(3):
        state = epoch(trainer.check(state, 4 * i, every=4))
        seen.add(low_rank.ranks(state).get("kernel"))
        in_epochs = epoch(epochs.check(in_epochs, i))
    stepped, _ = run(trainer, SQUARE, 12)
    dense = low_rank.materialise(state.weights)
    trees_close(dense, low_rank.materialise(stepped.weights), 1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(stepped)
    trees_close(in_epochs, state, 0)
    assert len(traces) == len(seen) >= 2  # once for each rank


def test_nan_is_refused_and_nothing_is_lost():
    trainer = low_rank.Trainer(optax.sgd(0.1), low_rank.OIALR(delay=1, frequency=2))
    params = {"dense": {"kernel": SQUARE["kernel"].at[1, 2].set(jnp.nan)}}
    state = trainer.init(params)
    assert trainer.check(state, 0) is state
    with pytest.raises(ValueError, match="dense/kernel"):
        trainer.check(state, 1)
    assert np.isnan(state.weights.trainable["dense"]["kernel"][1, 2])


def test_donated_steps_and_auxiliary_values():
    trainer = low_rank.Trainer(
        optax.adam(0.05), low_rank.OIALR(delay=2, frequency=2, beta=0.3)
    )
    plain, values = run(trainer, SQUARE, 6)
    state = trainer.init(jax.tree.map(jnp.copy, SQUARE))
    both = lambda p, x: (loss(p, x), x[0, 0])  # noqa: E731
    step = one_step(trainer, both, has_aux=True, donate=True)
    for i in range(6):
        before = trainer.check(state, i)
        state, (value, aux) = step(before, X)
        close(value, values[i])
        assert aux == X[0, 0]
    assert before.weights.trainable["kernel"].is_deleted()
    trees_close(*(low_rank.materialise(x.weights) for x in (state, plain)))


ADVICE = {
    "order": (
        {"config": low_rank.OIALR(delay=2, frequency=5, layer_step=0.1)},
        r"layer_step=0.1 needs the order of the layers",
    ),
    "keep": (
        {"config": low_rank.OIALR(delay=2, frequency=5, keep_last=True)},
        r"keep_last=True needs the order of the layers",
    ),
    "moments": ({"moments": "turn"}, r"`moments` must be one of"),
    "pattern": ({"order": ("[",)}, r"'\[' of `order` is not a regular expression"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_settings_that_do_not_go_together(case):
    options, message = ADVICE[case]
    options = {"config": low_rank.OIALR(delay=2, frequency=5), **options}
    with pytest.raises(ValueError, match=message):
        low_rank.Trainer(optax.sgd(0.1), **options)


INIT = {
    "nothing cut": ({"rule": components.ByPath([("", None)])}, {}, "cuts no leaf"),
    "nothing left": (
        {"order": ("kernel",)},
        {"keep_last": True},
        r"No leaf is left.*'kernel' \(6, 6\).*keep_last=True",
    ),
    "no leaf": ({"order": ("kernel", "head")}, {}, "'head' of `order` has no leaf"),
    "no order": ({"order": ("bias",)}, {}, "No pattern of `order` matches leaf 'ker"),
}


@pytest.mark.parametrize("case", INIT)
def test_what_the_conversion_would_meet_is_met_at_the_start(case):
    options, numbers, message = INIT[case]
    config = low_rank.OIALR(delay=2, frequency=5, **numbers)
    trainer = low_rank.Trainer(optax.sgd(0.1), config, **options)
    with pytest.raises(ValueError, match=message):
        trainer.init(SQUARE)


def test_a_pattern_that_takes_too_much_is_found():
    params = {f"blocks/{i}": {"kernel": SQUARE["kernel"]} for i in (1, 10)}
    with pytest.raises(ValueError, match=r"belongs to an earlier pattern.*blocks/1/"):
        low_rank.factorise(params, order=("blocks/1", "blocks/10"))


NUMBERS = [
    ({"beta": 0.0}, ValueError, r"`beta` must be in \(0, 1\), got 0.0"),
    ({"beta": 1}, ValueError, r"`beta` must be in \(0, 1\), got 1"),
    ({"beta": float("nan")}, ValueError, "`beta`"),
    ({"delay": -1}, ValueError, r"`delay` must be in \[0, inf\)"),
    ({"delay": 2.0}, TypeError, "`delay` must be an integer"),
    ({"frequency": 0}, ValueError, "`frequency`"),
    ({"max_drop": 0}, ValueError, r"`max_drop` must be in \(0, 1\]"),
    ({"min_rank_fraction": 1.1}, ValueError, "`min_rank_fraction`"),
    ({"min_aspect": 1}, ValueError, r"`min_aspect` must be in \[0, 1\)"),
    ({"layer_step": -0.1}, ValueError, "`layer_step`"),
    ({"rank_multiple": 0}, ValueError, "`rank_multiple`"),
    ({"rank_multiple": True}, TypeError, "`rank_multiple`"),
]


@pytest.mark.parametrize(("fields", "error", "message"), NUMBERS)
def test_numbers_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        low_rank.OIALR(**{"delay": 1, "frequency": 1, **fields})


# --- Checkpoints --------------------------------------------------------------------


def test_saved_and_restored_in_every_phase(tmp_path):
    config = low_rank.OIALR(delay=2, frequency=2, beta=0.9)
    make = functools.partial(low_rank.Trainer, optax.adam(0.05), config)
    trainer, again = make(), make()
    step, step_again = one_step(trainer, loss), one_step(again, loss)
    state, seen, saved = trainer.init(SQUARE), set(), {}
    with ocp.StandardCheckpointer() as checkpoints:
        # Before, just before and after the conversion, and after a further check.
        for i in range(6):
            ranks = low_rank.ranks(state)
            seen.add(ranks.get("kernel"))
            if i in (1, 2, 3, 5):
                folder = tmp_path / str(i)
                checkpoints.save(folder, state)
                checkpoints.wait_until_finished()
                saved[i] = checkpoints.metadata(folder)
                assert low_rank.ranks(saved[i]) == ranks
                target = again.target(SQUARE, low_rank.ranks(saved[i]))
                restored = checkpoints.restore(folder, target)
                assert jax.tree.structure(restored) == jax.tree.structure(state)
                trees_close(restored, state, 0)
                on, value = step_again(again.check(restored, i), X)
                also, expected = step(trainer.check(state, i), X)
                trees_close(on, also, 0)
                assert value == expected
            state, _ = step(trainer.check(state, i), X)
        assert seen == {None, 3, 2}
    with pytest.raises(ValueError, match=r"names 'kernel', in which the rule finds no"):
        again.target({"other": SQUARE["kernel"]}, {"kernel": 3})
    with pytest.raises(ValueError, match=r"gives 7 for 'kernel'.*another model"):
        again.target(SQUARE, {"kernel": 7})
    with pytest.raises(TypeError, match="an entry 'weights'"):
        low_rank.ranks({"params": 1})
    mixed = low_rank.LowRankState(
        {"kernel": jnp.eye(5), "bias": 0}, state.weights.frozen
    )
    with pytest.raises(ValueError, match=r"Sigma of 'kernel' has shape.*same state"):
        low_rank.materialise(mixed)


def test_weights_that_are_factorised_from_the_start():
    trainer = low_rank.Trainer(optax.adam(0.05), low_rank.OIALR(delay=9, frequency=1))
    state = trainer.init(SQUARE, {"kernel": 2})
    u, s, vt = np.linalg.svd(np.asarray(SQUARE["kernel"], np.float64))
    dense = low_rank.materialise(state.weights)
    close(dense["kernel"], u[:, :2] * s[:2] @ vt[:2], 1e-5)
    assert state.opt_state[0].mu["kernel"].shape == (2, 2)
    target = trainer.target(jax.eval_shape(lambda: SQUARE), low_rank.ranks(state))
    assert jax.tree.structure(target) == jax.tree.structure(state)
    for x, like in zip(*map(jax.tree.leaves, (state, target)), strict=True):
        assert isinstance(like, jax.ShapeDtypeStruct)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)


# --- Frameworks ---------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.norm(self.conv(x)))
        return self.dense(x.mean((1, 2)))


IMAGES, LABELS = random((8, 4, 4, 2)), random((8, 6), 1)


def test_nnx_model_in_the_trainer():
    model = Net(nnx.Rngs(0))
    rule = components.from_model(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    trainer = low_rank.Trainer(
        optax.adam(0.01), low_rank.OIALR(delay=2, frequency=2, beta=0.4), rule
    )

    def loss(params, rest, x, y):
        model = nnx.merge(graph, params, rest)
        value = jnp.mean((model(x) - y) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    step, values = one_step(trainer, loss, has_aux=True), []
    state = trainer.init(params)
    for i in range(8):
        state, (value, rest) = step(trainer.check(state, i), rest, IMAGES, LABELS)
        values.append(float(value))
    assert values[-1] < values[0]
    assert set(low_rank.ranks(state)) == {"conv/kernel", "dense/kernel"}
    dense = low_rank.materialise(state.weights)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    nnx.update(model, dense)
    shapes = [x.shape for x in jax.tree.leaves(params)]
    assert [x.shape for x in jax.tree.leaves(nnx.state(model, nnx.Param))] == shapes
    assert low_rank.fractions(state.weights)["trainable"] < 1


def test_nnx_optimizer():
    # The Sigmas live in a model of the same form, which is never called itself.
    model = Net(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = low_rank.factorise(params, ranks=4)
    inner = nnx.merge(graph, state.trainable, rest)
    optimizer = nnx.Optimizer(inner, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(inner, optimizer, frozen):
        def loss(inner):
            graph, trainable, rest = nnx.split(inner, nnx.Param, ...)
            weights = low_rank.LowRankState(trainable, frozen)
            model = nnx.merge(graph, low_rank.materialise(weights), rest)
            return jnp.mean((model(IMAGES) - LABELS) ** 2)

        value, grads = nnx.value_and_grad(loss)(inner)
        optimizer.update(inner, grads)
        return value

    values = [float(step(inner, optimizer, state.frozen)) for _ in range(4)]
    assert values[-1] < values[0]
    old = state._replace(trainable=nnx.state(inner, nnx.Param))
    new = low_rank.refactor(old, low_rank.OIALR(delay=0, frequency=1, beta=0.9))
    assert low_rank.ranks(new)["dense/kernel"] < 4
    opt_state = low_rank.convert_opt_state(optimizer.opt_state, old, new)
    nnx.update(inner, new.trainable)
    optimizer = nnx.Optimizer(inner, optax.adam(0.01), wrt=nnx.Param)
    optimizer.opt_state = opt_state
    assert (
        optimizer.opt_state[0].mu["dense"]["kernel"].shape
        == new.trainable["dense"]["kernel"].shape
    )
    assert float(step(inner, optimizer, new.frozen)) < values[0]


def test_equinox_model():
    model = eqx.nn.MLP(6, 6, 6, 1, key=jax.random.key(0))
    rule = components.from_model(model)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    trainer = low_rank.Trainer(
        optax.adam(0.01), low_rank.OIALR(delay=1, frequency=2, beta=0.4), rule
    )

    def loss(params, x):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    state, step = trainer.init(params), one_step(trainer, loss)
    for i in range(3):
        state, _ = step(trainer.check(state, i), X)
    assert set(low_rank.ranks(state)) == {f"layers/{i}/weight" for i in range(2)}
    dense = low_rank.materialise(state.weights)
    assert eqx.combine(dense, static)(X[0]).shape == (6,)


# --- The orthogonal step inside the frozen subspace ---------------------------------


def test_orthogonalise_sigma():
    rule = components.ByName(stacked=("layers",), attention="per_head")
    params = {
        "conv": {"kernel": random((1, 2, 3, 6))},
        "query": {"kernel": random((6, 3, 5))},
        "layers": {"kernel": random((2, 6, 6))},
        "head": {"kernel": random((30, 2))},
        "bias": random((5,)),
    }
    grads = jax.tree.map(lambda x: random(x.shape, 11), params)
    tx = orthax.orthogonalise(polar.SVD(), rule=low_rank.with_sigmas(params, rule))
    dense, _ = tx.update(grads, tx.init(params))
    plain = orthax.orthogonalise(polar.SVD(), rule=rule)
    trees_close(dense, plain.update(grads, plain.init(params))[0])
    state = low_rank.factorise(params, rule, ranks=3)
    assert "head/kernel" not in state.frozen

    def loss(trainable):
        dense = low_rank.materialise(state, trainable)
        return sum(
            jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), dense, grads))
        )

    inside = jax.grad(loss)(state.trainable)
    updates, _ = tx.update(inside, tx.init(state.trainable))
    found = low_rank.materialise(state, updates)
    leaves = {leaf.path: leaf for leaf in components.resolve(grads, rule)}
    steps = {leaf.path: leaf for leaf in components.resolve(found, rule)}
    for path, bases in state.frozen.items():
        (gs,), (found,) = (
            tree[path].cut.fold(tree[path].value) for tree in (leaves, steps)
        )
        for *factors, step in zip(bases.u, bases.vt, gs, found, strict=True):
            u, vt, g = (np.asarray(x, np.float64) for x in factors)
            a, _, b = np.linalg.svd(u.T @ g @ vt.T)
            close(step, u @ a @ b @ vt, 1e-4)
    trees_close(updates["head"], dense["head"])
    trees_close(updates["bias"], grads["bias"])


def test_a_leaf_that_may_be_either_is_refused():
    rule = components.ByPath([("", Matricisation((0,), (2,)))])
    cube = {"kernel": random((3, 3, 3))}
    tx = orthax.orthogonalise(rule=low_rank.with_sigmas(cube, rule))
    with pytest.raises(ValueError, match="may be dense or a Sigma"):
        tx.init(cube)
    with pytest.raises(ValueError, match="is not a Sigma"):
        tx.init({"kernel": random((3, 4, 5))})


# --- Devices ------------------------------------------------------------------------


P = jax.sharding.PartitionSpec
SPECS = {
    "dense": P("data", "model"),
    "conv": P(None, None, "model"),
    "experts": P("data"),
    "bias": P(),
}
ON_DEVICES = {
    "dense": random((8, 6)),
    "conv": random((2, 3, 6)),
    "experts": random((4, 6, 6)),
    "bias": random((8,)),
}
GOAL = jax.tree.map(lambda x: random(x.shape, 8), ON_DEVICES)


def distance(params, goal):
    parts = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, goal)
    return sum(jax.tree.leaves(parts))


def trained_on_devices(params, goal):
    rule = components.ByPath(
        [
            ("conv", Matricisation((0, 1), (2,), spatial=(0,))),
            ("", Matricisation((-2,), (-1,))),
        ]
    )
    config = low_rank.OIALR(delay=0, frequency=1, beta=0.4)
    trainer = low_rank.Trainer(optax.adam(0.05), config, rule)
    state, step = trainer.init(params), one_step(trainer, distance)
    for i in range(2):
        state, value = step(trainer.check(state, i), goal)
    return trainer, state, value


@functools.cache
def trained_on_one():
    return trained_on_devices(ON_DEVICES, GOAL)


@pytest.mark.parametrize(
    "kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]
)
def test_sharded_weights(kind):
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    put = {name: jax.NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    trainer, state, value = trained_on_devices(
        jax.device_put(ON_DEVICES, put), jax.device_put(GOAL, put)
    )
    _, expected, plain = trained_on_one()
    close(value, plain, 1e-4)
    assert low_rank.ranks(state) == low_rank.ranks(expected)
    dense = jax.jit(low_rank.materialise)(state.weights)
    trees_close(jax.device_get(dense), low_rank.materialise(expected.weights), 1e-4)
    bases = state.weights.frozen
    assert bases["dense"].u.sharding.spec[1] in ("data", ("data",))
    assert bases["experts"].u.sharding.spec[0] in ("data", ("data",))
    for name in put if kind == jax.sharding.AxisType.Explicit else ():
        assert dense[name].sharding.is_equivalent_to(put[name], dense[name].ndim)
    # What is restored is sharded like what was trained.
    target = trainer.target(jax.device_put(ON_DEVICES, put), low_rank.ranks(state))
    for x, like in zip(*map(jax.tree.leaves, (state, target)), strict=True):
        assert x.shape == like.shape
    for x, like in zip(
        *map(jax.tree.leaves, (bases, target.weights.frozen)), strict=True
    ):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    adam = target.opt_state[0]
    assert adam.mu["experts"].sharding.spec[0] in ("data", ("data",))
    assert adam.count.sharding == jax.NamedSharding(mesh, P())
    assert jax.tree.structure(target) == jax.tree.structure(state)
