"""What somebody meets who has never seen the code: the report, what prints, errors."""

import dataclasses
import functools
import inspect
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import orthax
from orthax import (
    __main__ as report,
    _self_check,
    components,
    execution,
    polar,
    tasks,
    transforms,
)
from orthax.components import ByName, ByPath, Matricisation
from orthax.polar import NewtonSchulz

PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
STACKED = {"block": {"kernel": jnp.ones((3, 4, 5))}}
WEIGHT = {"layers": [{"weight": jnp.ones((3, 4))} for _ in range(2)]}
TASKS = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}


def initialised(params, **how):
    return lambda: orthax.orthogonalise(**how).init(params)


def updated(make, **how):
    def call():
        tx = make(0.1, **how)
        return tx.update(PARAMS, tx.init(PARAMS))

    return call


def by_path(*pair):
    return lambda: orthax.orthogonalise(rule=ByPath([pair])).init(PARAMS)


# What is tried first: the call, and what its message must say, in this order.
MISTAKES = {
    "a learning rate for the method": (
        lambda: orthax.orthogonalise(0.01),
        TypeError,
        ("`method`", "got 0.01 of type float", "optax.chain(", "optax.sgd(0.1)"),
    ),
    "the name of a method": (
        lambda: orthax.orthogonalise("Newton-Schulz"),
        TypeError,
        ("got 'Newton-Schulz' of type str", "polar.NewtonSchulz()"),
    ),
    "a function for the method": (
        lambda: orthax.orthogonalise(jnp.linalg.svd),
        TypeError,
        ("polar method such as polar.Auto()", "of type PjitFunction"),
    ),
    "a rule for the method": (
        lambda: orthax.orthogonalise(ByName()),
        TypeError,
        ("of type ByName", "`rule=`"),
    ),
    "a function for the rule": (
        lambda: orthax.orthogonalise(rule=lambda path, leaf: None),
        TypeError,
        ("of type function", "`resolve(path, leaf)`"),
    ),
    "from_model, not called": (
        lambda: orthax.orthogonalise(rule=components.from_model),
        TypeError,
        ("Call it: components.from_model(...)",),
    ),
    "no rule": (
        lambda: orthax.orthogonalise(rule=None),
        TypeError,
        ("got None", "Leave it out", "ByName(skip=...)"),
    ),
    "axes for the rule": (
        lambda: orthax.orthogonalise(rule=Matricisation((0,), (1,))),
        TypeError,
        ('components.ByPath([("", Matricisation((0,), (1,)))])',),
    ),
    "a method for the rule": (
        lambda: orthax.explain(PARAMS, polar.SVD()),
        TypeError,
        ("of type SVD", "`method=`"),
    ),
    "a kernel of rank 3": (
        initialised(STACKED),
        ValueError,
        (
            "'block/kernel' of shape (3, 4, 5)",
            "Conv1d",
            "from_function(model.apply, params, x)",
            "from_model",
            "ByName(overrides=[",
        ),
    ),
    "Equinox": (
        initialised(WEIGHT),
        ValueError,
        ("'layers/0/weight'", "'layers/1/weight'", "from_model"),
    ),
    "a name that is in no path": (
        initialised(WEIGHT | PARAMS, rule=ByName(skip=("layers", "dens"))),
        ValueError,
        ("skip 'dens' of ByName is in no path", "near it: 'dense'", "orthax.explain"),
    ),
    "a pattern that is in no path": (
        initialised(PARAMS, rule=ByName(overrides=[("dense/kernal", None)])),
        ValueError,
        ("pattern 'dense/kernal' of ByName", "'dense/kernel'", 'unmatched="ignore"'),
    ),
    "a stacked axis too many": (
        initialised(PARAMS, rule=ByName(stacked=("dense",))),
        ValueError,
        ("'dense/kernel' of rank 2", "stacked=(('dense', 0),)", "smaller sub-tree"),
    ),
    "unmatched": (
        lambda: ByName(unmatched="warn"),
        ValueError,
        ('"raise" or "ignore"', "'warn'"),
    ),
    "no parameters": (updated(orthax.muon), ValueError, ("`params`", "`update`")),
    "a learning rate in quotes": (
        lambda: orthax.muon("3e-4"),
        TypeError,
        ("`learning_rate`", "got '3e-4'"),
    ),
    "an optimiser in an optimiser": (
        lambda: orthax.orthogonal_adam(optax.adam(1e-3)),
        TypeError,
        ("`learning_rate`", "optax.chain(orthax.orthogonalise(), "),
    ),
    "parameters, as torch wants them": (
        lambda: orthax.orthogonal_sgd(PARAMS, 0.1),
        TypeError,
        ("`learning_rate`", "of type dict"),
    ),
    "a method in the place of the momentum": (
        lambda: orthax.orthogonal_sgd(0.1, polar.SVD()),
        TypeError,
        ("`momentum`", "of type SVD", "method=..."),
    ),
    "a schedule for the momentum": (
        lambda: orthax.normuon(0.1, optax.constant_schedule(0.9)),
        TypeError,
        ("`momentum`", "optax.inject_hyperparams"),
    ),
    "no momentum": (
        lambda: orthax.muon(0.1, None),
        TypeError,
        ("`momentum`", "got None", "For none use 0.0."),
    ),
    "a factor for the scale": (
        lambda: orthax.muon(0.1, scale=0.2),
        TypeError,
        ("`scale`", "got 0.2", "optax.scale"),
    ),
    "a transformation not called": (
        lambda: transforms.restore_norm(orthax.orthogonalise),
        TypeError,
        ("`inner`", "orthax.orthogonalise()"),
    ),
    "a tree for a matrix": (
        lambda: orthax.polar_factor(PARAMS),
        TypeError,
        ("(*batch, m, n)", "of type dict", "orthax.orthogonalise()"),
    ),
    "integers": (
        lambda: orthax.polar_factor([[1, 2], [3, 4]]),
        TypeError,
        ("int32", "convert it first"),
    ),
    "a number of steps": (
        lambda: NewtonSchulz(5),
        TypeError,
        ("`coefficients`", "got 5", "polar.polar_express(steps=5)"),
    ),
    "the name of a table": (
        lambda: NewtonSchulz("jordan"),
        TypeError,
        ("'jordan'", "polar.JORDAN"),
    ),
    "axes that a leaf lacks": (
        by_path("kernel", Matricisation((0, 1, 2), (3,))),
        ValueError,
        ("'dense/kernel' of shape (3, 2)", "Matricisation((0, 1, 2), (3,))", "rank 2"),
    ),
    "axes without a name": (
        by_path("kernel", ((0,), (1,))),
        TypeError,
        ("Patterns must be pairs", "Matricisation((0,), (1,))"),
    ),
    "a dict of patterns": (
        lambda: ByPath({"kernel": None}),
        TypeError,
        ("{'kernel': None}", "[('kernel', None)]"),
    ),
    "a glob": (by_path("*kernel", None), ValueError, ("'*kernel'", "'.*'")),
    "a name for names": (
        lambda: ByName(skip="head"),
        TypeError,
        ("`skip`", "got 'head'", "skip=('head',)"),
    ),
    "a pair for pairs": (
        lambda: ByName(stacked=("layers", 0)),
        TypeError,
        ("`stacked`", "got ('layers', 0)", "stacked=(('layers', 0),)"),
    ),
    "no axes": (
        lambda: Matricisation(None, (1,)),
        TypeError,
        ("`rows`", "got None", "instead of a Matricisation"),
    ),
    "blocks of a broken number": (
        lambda: Matricisation((0,), (1,), blocks=2.5),
        TypeError,
        ("`blocks`", "integer", "got 2.5"),
    ),
    "a transformation explained": (
        lambda: orthax.explain(orthax.orthogonalise()),
        TypeError,
        ("gradient transformation", "explain(params, rule, method=...)"),
    ),
    "a model for its parameters": (
        lambda: orthax.explain(linen.Dense(3)),
        TypeError,
        ("The tree is Dense(", "variables['params']"),
    ),
    "an Equinox model unfiltered": (
        initialised(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))),
        TypeError,
        ("'activation'", "eqx.filter("),
    ),
    "gradients of one task": (
        lambda: orthax.combine_tasks().update(TASKS, ((),)),
        ValueError,
        ("2 in leaf ['a'], 3 in leaf ['b']", "first axis", "jnp.stack"),
    ),
    "a list of gradients": (
        lambda: orthax.combine_tasks().update([PARAMS, PARAMS], ((),), PARAMS),
        ValueError,
        ("4 leaves, the parameters 2", "jnp.stack(g), *gradients"),
    ),
    "gradients for their products": (
        lambda: orthax.task_weights([PARAMS, PARAMS]),
        TypeError,
        ("`gram`", "combine_tasks()"),
    ),
    "a task rule not called": (
        lambda: orthax.combine_tasks(tasks.OSGD),
        TypeError,
        ("Write OSGD().",),
    ),
    "the first task": (
        lambda: tasks.OSGD(0),
        TypeError,
        ("`order`", "got 0", "all of them"),
    ),
    "a seed in quotes": (
        lambda: orthax.combine_tasks(tasks.PCGrad(key="0")).init(PARAMS),
        TypeError,
        ("`key`", "a seed", "of type str"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_what_to_write(mistake):
    call, error, parts = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert not [part for part in parts if part not in message], message
    assert len(message) < 800, "nobody reads so much"


@pytest.mark.parametrize(
    "make", [orthax.orthogonal_sgd, orthax.orthogonal_adam, orthax.muon, orthax.normuon]
)
def test_numbers_of_every_kind_and_schedules_are_hyperparameters(make):
    """Nothing that worked is refused, traced values of inject_hyperparams included."""
    halved = optax.exponential_decay(0.1, 1, 0.5)
    for rate in (0.1, 1, np.float32(0.1), jnp.array(0.1), halved):
        make(rate, weight_decay=rate)
    tx = optax.inject_hyperparams(make)(halved, weight_decay=0.01)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert shapes.hyperparams["learning_rate"].shape == ()


def test_advice_is_given_once_however_many_leaves():
    alike = {f"block{i}": STACKED["block"] for i in range(12)}
    with pytest.raises(ValueError, match="'block0/kernel' and 11 like it of shape"):
        orthax.orthogonalise().init(alike)
    tree = {f"block{name}": STACKED["block"] for name in "abcdefghijkl"}
    with pytest.raises(ValueError) as caught:
        orthax.orthogonalise().init(tree)
    message = str(caught.value)
    assert message.count("components.from_function") == 1
    assert message.count("of shape (3, 4, 5)") == 10
    assert "... and 2 more kinds of leaves." in message


def public_dataclasses():
    for room in (components, execution, polar, tasks, transforms):
        for name, value in vars(room).items():
            if inspect.isclass(value) and dataclasses.is_dataclass(value):
                yield f"{room.__name__}.{name}", value


PRINTED = [
    *(NewtonSchulz(table) for table in (polar.JORDAN, polar.CANS, polar.DEEPSEEK_V4)),
    NewtonSchulz(polar.CLASSIC_CUBIC, gram=False),
    NewtonSchulz(((1.5, -0.5),) * 9, restarts=(2, 4)),
    NewtonSchulz(((1.5, -0.5), (1.4, -0.4)), precision="high"),
    NewtonSchulz(polar.polar_express(1e-2), tolerance=1e-5),
    polar.Auto("fast").on("gpu"),
    polar.SVD("complete"),
    Matricisation((0, 1, 2), (3,), groups=2, spatial=(0, 1)),
    Matricisation((0,), (1,), blocks=(2, 3), split="rows"),
    ByName(attention="heads", stacked=("layers", ("experts", 1)), skip=("head",)),
    ByPath([("bias", None), ("kernel", Matricisation((0,), (1,)))]),
    components.OnlyConvolutions(ByName()),
    execution.Stacking(2**20, ("data",)),
    tasks.OSGD((1, 0), "total"),
]


def evaluated(text):
    spaces = map(vars, (components, execution, polar, tasks, transforms))
    names = {name: value for space in spaces for name, value in space.items()}
    return eval(text, names)


def test_what_is_typed_prints_as_what_one_types():
    for value in PRINTED:
        assert evaluated(repr(value)) == value
    made = 0
    for name, kind in public_dataclasses():
        if not all(
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
            for field in dataclasses.fields(kind)
        ):
            continue
        assert evaluated(repr(kind())) == kind(), name
        made += 1
    assert made > 15
    assert repr(NewtonSchulz(polar.JORDAN)) == "NewtonSchulz(JORDAN)"
    assert len(repr(polar.Auto("fast").on("gpu"))) < 80


def ran(arguments, capsys):
    status = report.main(arguments)
    return status, capsys.readouterr().out


def test_the_report_says_what_there_is(capsys):
    status, text = ran(["--quick"], capsys)
    assert status == 0
    assert f"orthax {orthax.__version__}\njax {jax.__version__}\n" in text
    assert f"{jax.device_count()} x cpu (cpu)" in text
    assert f"polar.Auto() is {polar.DWH()}" in text
    assert evaluated(re.search(r'Auto\("fast"\) is (.*)', text)[1]) == polar.Auto(
        "fast"
    ).on("cpu")
    assert "Errors" not in text
    flops = polar.DWH().flops(576, 64) / 1e6
    assert re.search(rf"576 x 64 +{flops:.3g} ", text)


def test_the_report_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "orthax", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("orthax ")


def test_promises_are_kept_here(capsys):
    status, text = ran([], capsys)
    assert status == 0, text
    assert "All promises are kept." in text
    assert max(map(len, text.split("Errors", 1)[1].splitlines())) <= 100


@dataclasses.dataclass(frozen=True)
class Broken:
    """The exact factor with something wrong, done in float64 numpy."""

    how: str
    any_scale = True

    def factor(self, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(self._stack, shape, x)

    def flops(self, m, n):
        return 1.0

    def _stack(self, x):
        return np.stack([self._one(np.asarray(one, float)) for one in x]).astype("f4")

    def _one(self, x):
        if not np.isfinite(x).all():
            return np.zeros_like(x) if self.how == "NaN is lost" else x * np.nan
        largest = np.abs(x).max() or 1
        if self.how == "squares overflow" and largest > 1e30:
            return x * np.nan
        u, s, vh = np.linalg.svd(x / largest, full_matrices=False)
        values = (s > 1e-6 * s[0]).astype(float)
        if self.how == "too long":
            values *= 1.0002
        if self.how == "null space filled" and s[0]:
            values[:] = 1
        if self.how == "zero filled" and not s[0]:
            values[:1] = 1e-6
        if self.how == "coupled":
            u = u + 0.002 * np.roll(u, 1, axis=1)
        return (u * values) @ vh


# What rounding to bfloat16 may add hides smaller faults, and zero has no directions.
IN_FLOAT32 = {
    *("Gaussian", "max 1e-30", "max 1e37", "cond 1e4", "rank 32"),
    *("wide", "square", "one column"),
}
FAULTS = {
    "nothing": set(),
    "too long": IN_FLOAT32,
    "coupled": IN_FLOAT32,
    "squares overflow": {"max 1e37"},
    "null space filled": {"rank 32"},
    "zero filled": {"zero"},
    "NaN is lost": set(),
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_broken_polar_factor_is_found(how):
    found = _self_check.self_check(Broken(how))
    assert {check.name for check in found.checks if check.broken} == FAULTS[how]
    assert found.broken == (how != "nothing")
    assert found.nan_stays == (how != "NaN is lost")


def test_a_broken_polar_factor_is_reported(monkeypatch, capsys):
    check = _self_check.self_check
    broken = Broken("squares overflow")
    monkeypatch.setattr(_self_check, "self_check", lambda: check(broken))
    status, text = ran([], capsys)
    assert status == 1
    (line,) = (line for line in text.splitlines() if line.endswith("  BROKEN"))
    assert line.startswith("max 1e37")
    assert "nan/1e-04" in line
    assert "report all of the above" in text


@pytest.mark.parametrize(
    "make",
    [
        orthax.orthogonalise,
        functools.partial(orthax.orthogonal_sgd, 0.1),
        functools.partial(orthax.orthogonal_adam, 0.1),
        functools.partial(orthax.orthogonal_lars, 0.1),
        functools.partial(orthax.muon, 0.1),
        functools.partial(orthax.normuon, 0.1),
    ],
)
def test_keys_and_float8_pass_through_optimisers(make):
    plain = {"kernel": jnp.eye(4, 3), "bias": jnp.ones(3)}
    odd = {"key": jax.random.key(0), "small": jnp.ones((4, 3), jnp.float8_e4m3fn)}
    tx = make()
    params = plain | odd
    updates, _ = tx.update(params, tx.init(params), params)
    alone, _ = tx.update(plain, tx.init(plain), plain)
    assert updates["key"] is params["key"]
    assert updates["small"].dtype == params["small"].dtype
    for name in plain:
        assert jnp.allclose(updates[name], alone[name])
    assert "dtype key" in str(orthax.explain(params))


def test_overrides_that_match_nothing_raise():
    params = {"dense": {"kernel": jnp.ones((4, 3))}}
    rule = components.from_function(
        lambda p, x: x @ p["dense"]["kernel"],
        params,
        jnp.ones((2, 4)),
        overrides=[("dens/kernel", None)],
    )
    with pytest.raises(ValueError, match=r"dens/kernel.*near it: 'dense/kernel'"):
        orthax.orthogonalise(rule=rule).init(params)
