"""Programs that promote no ranks and no dtypes: JAX's two strict settings together.

What is computed under them is what is computed without, operation for operation. Inputs
are of the dtype that is tested, through and through, as strict users have them.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthax
from orthax import (
    components,
    decorrelation,
    diagnostics,
    low_rank,
    polar,
    tasks,
    transforms,
)

DTYPES = ["bfloat16", "float32", "float64"]
SHAPES = {
    "tall": (8, 3),
    "wide": (3, 8),
    "square": (4, 4),
    "stack": (2, 6, 3),
    "long": (2, 3, 40),
}
PARAMS = {
    "attention": {"query": {"kernel": (4, 2, 3)}},
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "deep": {"kernel": (5, 6)},
    "dense": {"kernel": (6, 4), "bias": (4,)},
    "embed": {"embedding": (7, 4)},
    "layers": {"kernel": (3, 4, 4)},
}
RULE = components.ByName(stacked=("layers",))


@contextlib.contextmanager
def strict():
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


def normal(shape, dtype, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, dtype)


def like(shapes, dtype, seed=0):
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    leaves = [normal(shape, dtype, seed + i) for i, shape in enumerate(leaves)]
    return structure.unflatten(leaves)


def same_strictly(f, *args):
    """Hold the program that is traced under the strict settings against that without.

    Promotion happens, or is refused, where a program is traced: none has to run.
    """
    expected = traced(f, *args)
    with strict():
        found = traced(f, *args)
    assert "let" in found and found == expected


def traced(f, *args):
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(f)(*args)))


def same_values_strictly(f, *args):
    """Hold what is computed where programs depend on values."""
    expected = f(*args)
    with strict():
        found = f(*args)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(
        x.dtype == y.dtype
        for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    )


@pytest.fixture(params=DTYPES)
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


def test_the_settings_are_strict():
    with strict(), pytest.raises(Exception, match="promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)
    with strict(), pytest.raises(Exception, match="promotion"):
        jnp.ones(2) + jnp.ones(2, "bfloat16")


# --- polar factors --------------------------------------------------------------------

METHODS = {
    "auto": polar.Auto(),
    "fast": polar.Auto("fast"),
    "halley": polar.DWH(),
    "halley, not polished": polar.DWH(polish=False),
    "newton-schulz": polar.NewtonSchulz(),
    "jordan": polar.NewtonSchulz(polar.JORDAN),
    "jordan in bfloat16": polar.NewtonSchulz(polar.JORDAN, dtype="bfloat16"),
    "tolerance": polar.NewtonSchulz(polar.polar_express(1e-3, 6), tolerance=1e-2),
    "restarts": polar.NewtonSchulz(polar.polar_express(1e-3, 6), restarts=[2, 4]),
    "gram": polar.GramEigh(),
    "qdwh": polar.QDWH(),
    "svd": polar.SVD(),
    "svd, complete": polar.SVD(null_space="complete"),
}


@pytest.mark.parametrize("name", METHODS)
def test_polar_factors(name, dtype):
    for shape in SHAPES.values():
        x = normal(shape, dtype)
        same_strictly(lambda x: orthax.polar_factor(x, METHODS[name]), x)


@pytest.mark.parametrize("name", ["auto", "halley", "newton-schulz", "svd"])
def test_derivatives_of_polar_factors(name, dtype):
    def loss(x, weights):
        return (orthax.polar_factor(x, METHODS[name]) * weights).sum()

    x, weights = normal((2, 4, 3), dtype), normal((2, 4, 3), dtype, 1)
    same_strictly(jax.grad(loss), x, weights)


# --- transformations and optimisers ---------------------------------------------------

TRANSFORMATIONS = {
    "orthogonalise": lambda: orthax.orthogonalise(rule=RULE),
    "normalise": lambda: orthax.normalise(rule=RULE),
    "normalise_components": lambda: orthax.normalise_components(rule=RULE),
    "scale_by_component_rms": lambda: transforms.scale_by_component_rms(rule=RULE),
    "scale_to_weights": lambda: transforms.scale_to_weights(rule=RULE),
    "on_sphere": lambda: transforms.on_sphere(rule=RULE),
    "add_cautious_decay": lambda: transforms.add_cautious_decay(0.1),
    "nesterov_ema": lambda: transforms.nesterov_ema(0.9),
    "nesterov_ema, bfloat16": lambda: transforms.nesterov_ema(0.9, mu_dtype="bfloat16"),
    **{
        f"restore_norm, {type(norm).__name__}": lambda norm=norm: (
            transforms.restore_norm(orthax.orthogonalise(rule=RULE), norm, rule=RULE)
        )
        for norm in (transforms.OriginalNorm(), transforms.NuclearNorm())
    },
    **{
        f"scale_by_shape, {scale.__name__}": lambda scale=scale: orthax.scale_by_shape(
            scale(), rule=RULE
        )
        for scale in (
            transforms.Width,
            transforms.MaxDim,
            transforms.RMSMatch,
            transforms.Spectral,
            transforms.ConvSpectral,
        )
    },
    "orthogonal_sgd": lambda: orthax.orthogonal_sgd(
        0.1, 0.9, nesterov=True, weight_decay=0.01, rule=RULE
    ),
    "orthogonal_adam": lambda: orthax.orthogonal_adam(
        0.1, weight_decay=0.01, rule=RULE
    ),
    "orthogonal_lars": lambda: orthax.orthogonal_lars(0.1, rule=RULE),
    "muon": lambda: orthax.muon(0.1, weight_decay=0.01, rule=RULE),
    "muon, exact, no nesterov": lambda: orthax.muon(
        0.1,
        nesterov=False,
        scale=transforms.RMSMatch(),
        method=polar.Auto(),
        rule=RULE,
    ),
    "muon, bfloat16 momentum": lambda: orthax.muon(0.1, mu_dtype="bfloat16", rule=RULE),
    "muon, schedule": lambda: orthax.muon(
        optax.cosine_decay_schedule(0.1, 10), rule=RULE
    ),
    "normuon": lambda: orthax.normuon(0.1, weight_decay=0.01, rule=RULE),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name, dtype):
    params = like(PARAMS, dtype, 10)
    gradients = [like(PARAMS, dtype, seed) for seed in (20, 30)]

    def two_steps(params, gradients):
        tx = TRANSFORMATIONS[name]()
        state = tx.init(params)
        for grads in gradients:
            updates, state = tx.update(grads, state, params)
        return updates

    same_strictly(two_steps, params, gradients)


TASK_RULES = {
    "OSGD": tasks.OSGD(),
    "Sum": tasks.Sum(),
    "Symmetric": tasks.Symmetric(),
    "PCGrad": tasks.PCGrad(),
    "GradVac": tasks.GradVac(),
    "CAGrad": tasks.CAGrad(),
}


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("name", TASK_RULES)
def test_tasks(name, scope, dtype):
    stacked = like({"kernel": (3, 4, 5), "bias": (3, 5)}, dtype)

    def combine(stacked):
        tx = orthax.combine_tasks(TASK_RULES[name], scope=scope)
        return tx.update(stacked, tx.init(stacked))[0]

    same_strictly(combine, stacked)


def test_gradients_of_tasks(dtype):
    def losses(x):
        return jnp.stack([(x**2).sum(), -x.sum(), (x * x[0]).sum()])

    x = normal((5,), dtype)
    same_strictly(tasks.task_value_and_grad(losses), x)
    same_strictly(tasks.combined_value_and_grad(losses), x)


# --- the rest -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("bfloat16", "float64")),
    ],
    indirect=True,
)
def test_low_rank(dtype):
    params = {"kernel": normal((6, 5), dtype), "bias": normal((5,), dtype, 1)}
    x = normal((4, 6), dtype, 2)

    def loss(params, x):
        return (jnp.square(x @ params["kernel"]) * params["bias"][None]).sum()

    def trained(params, x):
        config = low_rank.OIALR(delay=1, frequency=1, beta=0.3)
        trainer = low_rank.Trainer(optax.sgd(0.01, momentum=0.9), config)
        state, gradient = trainer.init(params), low_rank.value_and_grad(loss)
        for step in range(3):
            state = trainer.check(state, step)
            state = trainer.update(state, gradient(state.weights, x)[1])
        return low_rank.materialise(state.weights)

    same_values_strictly(trained, params, x)

    def factorised(params):
        return low_rank.materialise(low_rank.factorise(params, ranks=2))

    same_values_strictly(factorised, params)


def test_diagnostics(dtype):
    tree, other = like(PARAMS, dtype), like(PARAMS, dtype, 1)
    activations = normal((6, 5), dtype)

    def all_of_them(tree, other):
        return [
            diagnostics.orthogonality_error(tree, RULE),
            diagnostics.polar_residual(tree, other, RULE),
            diagnostics.rank_estimate(tree, RULE),
            diagnostics.singular_values(tree, RULE),
            diagnostics.basis_stability(tree, other, RULE),
            diagnostics.update_cosine(tree, other),
            diagnostics.dead_parameters(tree),
            diagnostics.representation_cosines(activations, per_sample=False),
        ]

    same_strictly(all_of_them, tree, other)


DECORRELATION = {
    "Blended": decorrelation.Blended(0.1),
    "Local": decorrelation.Local(0.1),
    "OffDiagonal": decorrelation.OffDiagonal(0.1),
    "Scaled": decorrelation.Scaled(0.1),
    "Whitening": decorrelation.Whitening(0.1),
    "Factorised": decorrelation.Factorised(0.1),
    "Lateral": decorrelation.Lateral(0.1),
    "Polar": decorrelation.Polar(),
}


@pytest.mark.parametrize("name", DECORRELATION)
def test_decorrelation(name, dtype):
    rule, x = DECORRELATION[name], normal((12, 5), dtype)

    def decorrelated(x):
        # The state is in float32 at least.
        work = "float64" if dtype == "float64" else "float32"
        state = decorrelation.init_decorrelation(5, rule, work)
        for _ in range(2):
            state = decorrelation.update_decorrelation(state, x, rule)
        return decorrelation.apply_decorrelation(state, x, rule)

    same_strictly(decorrelated, x)
