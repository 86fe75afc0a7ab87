"""Programs compiled for chips that are not there: `python tests/accelerators.py CHIP`.

A process of its own: the compilers need variables that are set before JAX is imported,
and may abort. Prints one JSON object for each program.
"""

import collections
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import orthax
from benchmarks import aot, costs
from orthax import decorrelation, low_rank, polar, transforms
from orthax.components import ByName
from orthax.execution import Stacking

P = jax.sharding.PartitionSpec
METHODS = {
    "Auto": polar.Auto(),
    "Auto fast": polar.Auto("fast"),
    "DWH": polar.DWH(),
    "GramEigh": polar.GramEigh(),
    "NewtonSchulz": polar.NewtonSchulz(),
    "NewtonSchulz direct": polar.NewtonSchulz(gram=False),
    "NewtonSchulz tolerance": polar.NewtonSchulz(tolerance=1e-3),
    "NewtonSchulz float16": polar.NewtonSchulz(polar.JORDAN, dtype="float16"),
    "QDWH": polar.QDWH(),
    "SVD": polar.SVD(),
}
TRANSFORMS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "orthogonalise": orthax.orthogonalise,
    "normalise": orthax.normalise,
    "normalise_components": orthax.normalise_components,
    "scale_to_weights": transforms.scale_to_weights,
    "on_sphere": transforms.on_sphere,
    "add_cautious_decay": lambda rule: transforms.add_cautious_decay(0.1),
    "nesterov_ema": lambda rule: transforms.nesterov_ema(0.9),
    "restore_norm": lambda rule: transforms.restore_norm(
        orthax.orthogonalise(rule=rule), rule=rule
    ),
    "scale_by_component_rms": transforms.scale_by_component_rms,
    "scale_by_shape": functools.partial(orthax.scale_by_shape, transforms.Width()),
}
OPTIMISERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "orthogonal_sgd": functools.partial(orthax.orthogonal_sgd, momentum=0.9),
    "orthogonal_adam": orthax.orthogonal_adam,
    "orthogonal_lars": functools.partial(
        orthax.orthogonal_lars, bias_learning_rate=0.1
    ),
    "muon": orthax.muon,
    "normuon": orthax.normuon,
}
# Large and small ones, tall and wide ones, one alone, scanned layers, a convolution.
SHAPES = {
    "a": (256, 512),
    "b": (512, 256),
    "c": (256, 512),
    "layers": (8, 128, 256),
    "conv": (3, 3, 16, 64),
    "small": (16, 64),
}
PARAMS = {name: {"kernel": shape} for name, shape in SHAPES.items()}
PARAMS["a"]["bias"] = (64,)
RULE = ByName(stacked=("layers",))
# Over how many chips, how the axes of the mesh are, and whether shardings are given.
WAYS = {
    "explicit": (jax.sharding.AxisType.Explicit, False),
    "given": (jax.sharding.AxisType.Auto, True),
    "automatic": (jax.sharding.AxisType.Auto, False),
}
SPECS = {
    "a": P("x"),
    "b": P(None, "x"),
    "c": P("x"),
    "layers": P(None, "x"),
    "conv": P(None, None, None, "x"),
    "small": P(),
}


class Program(NamedTuple):
    """What is compiled: a function, and the shapes of its arguments."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]


def shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        tree,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def placed(
    x: jax.ShapeDtypeStruct, sharding: jax.NamedSharding
) -> jax.ShapeDtypeStruct:
    """Return a shape with a sharding, without it where that divides nothing."""
    spec = zip(x.shape, [*sharding.spec] + [None] * len(x.shape), strict=False)
    spec = P(*(None if n == 1 else names for n, names in spec))
    sharding = jax.NamedSharding(sharding.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def updating(tx: optax.GradientTransformation) -> Callable[..., Any]:
    return lambda grads, state, params: tx.update(grads, state, params)


def whole() -> Iterator[Program]:
    """Yield the programs for one chip."""
    for name, method in METHODS.items():
        few = name in ("QDWH", "SVD")
        x = jax.ShapeDtypeStruct((2, 16, 24) if few else (2, 136, 264), jnp.float32)
        yield Program(
            f"method {name}", functools.partial(polar.polar_factor, method=method), (x,)
        )
    x = jax.ShapeDtypeStruct((2, 16, 24), jnp.float32)
    yield Program(
        "first derivative",
        lambda x, dx: jax.jvp(polar.polar_factor, (x,), (dx,)),
        (x, x),
    )
    params = shapes(PARAMS)
    made = {name: make(rule=RULE) for name, make in TRANSFORMS.items()}
    made |= {name: make(0.1, rule=RULE) for name, make in OPTIMISERS.items()}
    for name, tx in made.items():
        state = jax.eval_shape(tx.init, params)
        yield Program(f"transform {name}", updating(tx), (params, state, params))
    state = jax.eval_shape(low_rank.factorise, {"a": params["a"], "c": params["c"]})
    yield Program(
        "low rank",
        jax.grad(
            lambda t, s: sum(
                jnp.sum(jnp.sin(x))
                for x in jax.tree.leaves(low_rank.materialise(s._replace(trainable=t)))
            )
        ),
        (state.trainable, state),
    )
    for rule in (decorrelation.Local(1e-3), decorrelation.Polar(1e-3)):
        state = jax.eval_shape(
            functools.partial(decorrelation.init_decorrelation, 128, rule)
        )
        x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
        yield Program(
            f"decorrelation {type(rule).__name__}",
            lambda state, x, rule=rule: decorrelation.update_decorrelation(
                state, x, rule
            ),
            (state, x),
        )


def sharded(mesh: jax.sharding.Mesh, given: bool) -> Iterator[tuple[Program, Any]]:
    """Yield the programs for several chips, and what `explain` says of each."""
    params = shapes(PARAMS)
    specs = {name: SPECS[name] for name in params}
    shardings = {
        name: jax.tree.map(
            lambda x, name=name: jax.NamedSharding(
                mesh, specs[name] if len(x.shape) > 1 else P()
            ),
            leaf,
        )
        for name, leaf in params.items()
    }
    params = jax.tree.map(placed, params, shardings)
    stacking = Stacking(shardings=shardings) if given else Stacking()
    explained = functools.partial(orthax.explain, params, RULE, stacking=stacking)
    tx = orthax.orthogonalise(rule=RULE, stacking=stacking)
    call = lambda grads: tx.update(grads, tx.init(grads))[0]  # noqa: E731
    yield Program("orthogonalise", call, (params,)), (explained, shardings)
    for name, make in OPTIMISERS.items():
        tx = make(0.1, rule=RULE, stacking=stacking)
        state = jax.eval_shape(tx.init, params)
        beside = aot.beside(state, shardings, jax.NamedSharding(mesh, P()))
        state = jax.tree.map(placed, state, beside)
        yield (
            Program(
                name,
                lambda g, s, p, tx=tx: tx.update(g, s, p)[0],
                (params, state, params),
            ),
            (None, shardings),
        )


def on_one(chip: str) -> Iterator[dict[str, Any]]:
    """Yield what became of every program for one chip."""
    devices = np.array(aot.MACHINES[chip].devices()[:1])
    mesh = jax.sharding.Mesh(devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, P())
    for name, call, arguments in whole():
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
        )
        yield {"name": name, **outcome(call, arguments, mesh, None)}


def on_many(chip: str, way: str) -> Iterator[dict[str, Any]]:
    """Yield what became of every program for several chips."""
    kind, given = WAYS[way]
    devices = np.array(aot.MACHINES[chip].devices())
    mesh = jax.sharding.Mesh(devices, ("x",), axis_types=(kind,))
    platform = aot.MACHINES[chip].platform
    for (name, call, arguments), (explained, shardings) in sharded(mesh, given):
        row = outcome(call, arguments, mesh, shardings)
        if explained is not None:
            said = collections.Counter(
                collective
                for share in explained(platform=platform).shares
                for collective in share.collectives
            )
            row["explained"] = dict(said)
        yield {"name": name, **row}


def outcome(
    call: Callable[..., Any], arguments: Any, mesh: jax.sharding.Mesh, shardings: Any
) -> dict[str, Any]:
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(call).lower(*arguments).compile()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    row: dict[str, Any] = {
        "error": None,
        "called": dict(costs.read(compiled.as_text()).collectives),
    }
    if shardings is not None:
        # The updates, in the order of the parameters.
        pairs = zip(
            jax.tree.leaves(shardings),
            jax.tree.leaves(compiled.output_shardings),
            jax.tree.leaves(arguments[0]),
            strict=True,
        )
        row["alike"] = all(b.is_equivalent_to(a, x.ndim) for a, b, x in pairs)
    return row


def main(chip: str, way: str | None = None) -> None:
    """Print every outcome as soon as it is known."""
    for row in on_many(chip, way) if way else on_one(chip):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
