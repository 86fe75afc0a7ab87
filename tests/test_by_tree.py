"""Rules that are data: trees of cuts, prefixes of them, Optax's dimension numbers."""

import copy
import dataclasses
import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import orthax
from orthax import components, diagnostics, low_rank, polar, transforms
from orthax.components import ByTree, Matricisation as Cut
from orthax.internal.components import check_rule

DENSE = Cut((0,), (1,))
CONV = Cut((0, 1, 2), (3,))
PARAMS = {
    "embed": jnp.ones((9, 4)),
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "mlp": [{"w": jnp.ones((4, 8)), "b": jnp.ones(8)}, {"w": jnp.ones((8, 4))}],
}
# Full, and as prefix: vectors need no entry.
FULL = {
    "embed": None,
    "conv": {"kernel": CONV, "bias": None},
    "mlp": [{"w": DENSE, "b": None}, {"w": DENSE}],
}
PREFIX = {"embed": None, "conv": {"kernel": CONV}, "mlp": DENSE}
CUTS = {
    "embed": None,
    "conv/kernel": CONV,
    "conv/bias": None,
    "mlp/0/w": DENSE,
    "mlp/0/b": None,
    "mlp/1/w": DENSE,
}


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params
    )


def cuts(params, rule):
    return {leaf.path: leaf.cut for leaf in components.resolve(params, rule)}


# --- what a tree says -----------------------------------------------------------------


@pytest.mark.parametrize("tree", [FULL, PREFIX], ids=["full", "prefix"])
def test_a_tree_and_its_prefix(tree):
    assert cuts(PARAMS, tree) == cuts(PARAMS, ByTree(tree)) == CUTS


def test_the_nearest_entry_above_decides():
    # Haiku's names: one module's path begins as another's.
    params = {name: {"w": jnp.ones((4, 3))} for name in ("net", "net/~/out")}
    assert cuts(params, {"net": DENSE, "net/~/out": None}) == {
        "net/w": DENSE,
        "net/~/out/w": None,
    }
    params = {"net": jnp.ones((4, 3)), "net2": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="'net2'"):
        components.resolve(params, {"net": DENSE})


def test_dimension_numbers():
    numbers = optax.contrib.MuonDimensionNumbers
    tree = {
        "embed": None,
        "conv": {"kernel": numbers((0, 1, 2), 3), "bias": None},
        "mlp": numbers(-2, -1),
    }
    assert cuts(PARAMS, tree) == CUTS
    mixed = {**tree, "mlp": DENSE}
    assert cuts(PARAMS, mixed) == CUTS


@pytest.mark.parametrize("make", ["nnx", "equinox", "named tuple"], ids=str)
def test_trees_made_from_the_parameters(make):
    def cut(leaf):
        return DENSE if len(leaf.shape) == 2 else None

    if make == "nnx":
        model = layers.nnx_model(lambda rngs: nnx.Linear(6, 5, rngs=rngs))
        params = nnx.state(model, nnx.Param)
    elif make == "equinox":
        params = layers.eqx_params(
            layers.eqx_model(lambda k: eqx.nn.MLP(6, 5, 8, 1, key=k))
        )
    else:
        params = layers.Two(jnp.ones((4, 3)), (jnp.ones(3), jnp.ones((3, 2))))
    tree = jax.tree.map(cut, params)
    found = components.resolve(params, tree)
    assert any(leaf.cut for leaf in found)
    for leaf in found:
        assert leaf.cut == cut(leaf.value)


def test_a_tree_is_a_hashable_value():
    rule, other = ByTree(PREFIX), ByTree({**PREFIX, "mlp": None})
    assert rule == check_rule(copy.deepcopy(PREFIX)) != other
    assert hash(rule) == hash(ByTree(PREFIX))
    assert not callable(rule)
    for again in (
        dataclasses.replace(rule),
        pickle.loads(pickle.dumps(rule)),
        eval(repr(rule), {"ByTree": ByTree, "Matricisation": Cut}),
    ):
        assert again == rule and cuts(PARAMS, again) == CUTS


def test_a_tree_that_changes_afterwards_changes_nothing():
    tree = copy.deepcopy(FULL)
    tx = orthax.scale_by_shape(rule=tree)
    before = tx.update(PARAMS, tx.init(PARAMS))[0]
    tree["conv"]["kernel"] = tree["mlp"][0]["w"] = None
    after = tx.update(PARAMS, tx.init(PARAMS))[0]
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_reasons():
    rows = {row.path: row for row in orthax.explain(PARAMS, PREFIX).rows}
    assert "'mlp'" in rows["mlp/1/w"].reason
    assert rows["mlp/1/w"].matrices == ((1, 8, 4),) and not rows["embed"].matrices


# --- wherever a rule is taken ---------------------------------------------------------

SGD = functools.partial(optax.sgd, 0.1)
TRANSFORMS = {
    "orthogonalise": lambda rule: orthax.orthogonalise(rule=rule),
    "normalise": lambda rule: orthax.normalise(rule=rule),
    "normalise_components": lambda rule: orthax.normalise_components(rule=rule),
    "scale_by_shape": lambda rule: orthax.scale_by_shape(rule=rule),
    "scale_to_weights": lambda rule: transforms.scale_to_weights(rule=rule),
    "on_sphere": lambda rule: transforms.on_sphere(rule=rule),
    "scale_by_component_rms": lambda rule: transforms.scale_by_component_rms(rule=rule),
    "restore_norm": lambda rule: transforms.restore_norm(
        orthax.orthogonalise(rule=rule), rule=rule
    ),
    "orthogonal_sgd": lambda rule: orthax.orthogonal_sgd(0.1, rule=rule),
    "orthogonal_adam": lambda rule: orthax.orthogonal_adam(0.1, rule=rule),
    "orthogonal_lars": lambda rule: orthax.orthogonal_lars(0.1, rule=rule),
    "muon": lambda rule: orthax.muon(0.1, rule=rule),
    "normuon": lambda rule: orthax.normuon(0.1, rule=rule),
}
BY_PATH = components.ByPath([("embed", None), ("conv/kernel", CONV), ("mlp", DENSE)])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_take_trees(name):
    grads = random_like(PARAMS)

    def updates(rule):
        tx = TRANSFORMS[name](rule)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    jax.tree.map(np.testing.assert_array_equal, updates(PREFIX), updates(BY_PATH))
    with pytest.raises(ValueError, match="no entry for leaf 'embed'"):
        TRANSFORMS[name]({"conv": CONV, "mlp": DENSE}).init(PARAMS)
    with pytest.raises(TypeError, match="ByPath"):
        TRANSFORMS[name]([("embed", None), ("mlp", DENSE)]).init(PARAMS)


def test_low_rank_and_diagnostics_take_trees():
    params = random_like(PARAMS)
    for f in (diagnostics.orthogonality_error, diagnostics.singular_values):
        assert f(params, PREFIX).keys() == f(params, BY_PATH).keys()
    states = [low_rank.factorise(params, rule) for rule in (PREFIX, BY_PATH)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    config = low_rank.OIALR(delay=1, frequency=1)
    trainers = [low_rank.Trainer(SGD(), config, r) for r in (PREFIX, BY_PATH)]
    assert trainers[0].rule == ByTree(PREFIX)
    rule = low_rank.with_sigmas(params, PREFIX)
    assert hash(rule) and rule.resolve("mlp/0/w", params["mlp"][0]["w"]) == DENSE


def test_only_convolutions_of_a_tree():
    conv = dataclasses.replace(CONV, spatial=(0, 1))
    rule = components.OnlyConvolutions({**PREFIX, "conv": {"kernel": conv}})
    assert {path for path, cut in cuts(PARAMS, rule).items() if cut} == {"conv/kernel"}
    assert hash(rule)


@pytest.mark.parametrize("rule", [PREFIX, ByTree(PREFIX)], ids=["tree", "rule"])
def test_injected_hyperparameters(rule):
    grads = random_like(PARAMS)
    tx = optax.inject_hyperparams(orthax.muon)(0.1, rule=rule)
    updates, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    assert "rule" not in state.hyperparams
    plain = orthax.muon(0.1, rule=BY_PATH)
    expected, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), updates, expected
    )


def test_a_static_argument_of_jit():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def step(grads, rule):
        traces.append(None)
        tx = orthax.orthogonalise(rule=rule)
        return tx.update(grads, tx.init(grads))[0]

    for _ in range(2):
        step(PARAMS, ByTree(copy.deepcopy(PREFIX)))
    assert len(traces) == 1


def test_masked_and_absent_leaves_are_no_mistake():
    mask = {"embed": False, "conv": True, "mlp": False}
    tx = optax.masked(orthax.orthogonalise(rule=FULL), mask)
    tx.update(PARAMS, tx.init(PARAMS))
    absent = {**PARAMS, "embed": None}
    assert cuts(absent, PREFIX)["conv/kernel"] == CONV
    assert cuts({}, PREFIX) == {}


# --- what Optax computes --------------------------------------------------------------


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_the_update_of_optax_muon_with_its_own_tree(consistent_rms):
    """Kernels of four axes, three with a batch axis, and a table left to AdamW."""
    numbers = optax.contrib.MuonDimensionNumbers
    params = {
        "embed": jnp.ones((9, 4)),
        "conv": jnp.ones((3, 3, 2, 5)),
        "stack": jnp.ones((3, 6, 4)),
        "out": jnp.ones((2, 3, 4)),
        "bias": jnp.ones(4),
    }
    dims = {
        "embed": None,
        "conv": numbers((0, 1, 2), 3),
        "stack": numbers(1, 2),
        "out": numbers((0, 1), (2,)),
        "bias": None,
    }
    grads, params = random_like(params), random_like(params, 1)
    rate, adam_rate = 0.1, 0.01
    scale = transforms.RMSMatch(0.2) if consistent_rms else transforms.Width()
    ours = orthax.muon(
        rate,
        momentum=0.9,
        nesterov=False,
        method=polar.NewtonSchulz(polar.JORDAN),
        scale=scale,
        rule=dims,
        rest=optax.adamw(adam_rate, eps_root=0.0, weight_decay=0.0),
    )
    theirs = optax.contrib.muon(
        rate,
        adam_learning_rate=adam_rate,
        beta=0.9,
        nesterov=False,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=dims,
    )
    found, expected = (
        tx.update(grads, tx.init(params), params)[0] for tx in (ours, theirs)
    )
    # As in the contract: rounding, amplified by the slope of JORDAN's polynomial.
    for name in params:
        difference = np.linalg.norm(found[name] - expected[name])
        assert difference <= 2e-5 * np.linalg.norm(expected[name]), name
    # The axes matter: a wrong cut is far off.
    wrong = orthax.muon(rate, rule={**dims, "stack": Cut((0, 1), (2,))})
    other = wrong.update(grads, wrong.init(params), params)[0]["stack"]
    assert np.linalg.norm(other - expected["stack"]) > 0.1 * np.linalg.norm(other)


# --- mistakes -------------------------------------------------------------------------


def test_leaves_without_entry_are_all_named():
    tree = {"embed": None, "mlp": [{"w": DENSE}]}
    with pytest.raises(ValueError) as error:
        orthax.orthogonalise(rule=tree).init(PARAMS)
    for text in (
        "'conv/kernel' of shape (3, 3, 2, 4)",
        "'mlp/1/w'",
        "or None to leave",
    ):
        assert text in str(error.value)
    assert "bias" not in str(error.value)


def test_entries_without_leaf_are_named_with_what_is_near():
    tree = {**PREFIX, "mpl": None, "conv": {"kernel": CONV, "biass": None}}
    with pytest.raises(ValueError) as error:
        orthax.orthogonalise(rule=tree).init(PARAMS)
    assert "'mpl'" in str(error.value)
    assert "'conv/biass'" in str(error.value) and "'conv/bias'" in str(error.value)
    unused = ByTree(tree).unused(list(CUTS))
    assert unused == ("entry 'conv/biass'", "entry 'mpl'")


def test_a_cut_that_does_not_fit_names_the_leaf():
    with pytest.raises(ValueError, match=r"'conv/bias|'conv/kernel' of shape .*lacks"):
        components.resolve(PARAMS, {**PREFIX, "conv": Cut((0,), (4,))})


@pytest.mark.parametrize(
    ("rule", "error", "texts"),
    [
        (PARAMS, TypeError, ("got {", "'conv/bias' is of type Array", "or None")),
        ({"a": (0, 1)}, TypeError, ("'a/0' is of type int", "Matricisation")),
        (
            [("w", DENSE)],
            TypeError,
            ("'0/0' is of type str", "components.ByPath([...])"),
        ),
        ({"a/b": DENSE, "a": {"b": None}}, ValueError, ("two entries", "'a/b'")),
        (
            {"a": optax.contrib.MuonDimensionNumbers(0, 0)},
            ValueError,
            ("Entry 'a'", "may occur once"),
        ),
        (lambda params: PREFIX, TypeError, ("of type function", "first")),
        (
            optax.contrib.MuonDimensionNumbers(),
            TypeError,
            ('components.ByPath([("", Matricisation((0,), (1,)))])',),
        ),
        (
            eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)),
            TypeError,
            ("components.from_model(model)",),
        ),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TypeError, ("is of type",)),
    ],
)
def test_what_is_no_tree_of_cuts(rule, error, texts):
    with pytest.raises(error) as caught:
        orthax.muon(0.1, rule=rule)
    for text in texts:
        assert text in str(caught.value)
