"""Code as users write it, for a type checker: `pyright`.

What is right has no complaint, and what is wrong has one: a comment that ignores
nothing is itself an error.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import orthax
from orthax import (
    components,
    diagnostics,
    execution,
    low_rank,
    nn,
    polar,
    tasks,
    transforms,
)

params: optax.Params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}

# What is written every day.
tx: optax.GradientTransformation = optax.chain(
    orthax.orthogonalise(), optax.sgd(0.1, momentum=0.9)
)
state = tx.init(params)
updates, state = tx.update(params, state, params)
params = optax.apply_updates(params, updates)
rate: optax.Schedule = optax.cosine_decay_schedule(0.1, 1000)
optimisers: list[optax.GradientTransformationExtraArgs] = [
    orthax.orthogonal_sgd(0.1, 0.9, nesterov=True),
    orthax.orthogonal_adam(rate, weight_decay=1e-4),
    orthax.orthogonal_lars(0.2, rate),
    orthax.muon(rate, scale=transforms.RMSMatch(), mu_dtype=jnp.bfloat16),
    orthax.normuon(1e-3, method=polar.Auto("fast")),
    orthax.muon(
        rate, rule={"embed": None, "mlp": components.Matricisation((0,), (1,))}
    ),
    orthax.orthogonalize(polar.SVD(null_space="complete")),
    transforms.restore_norm(orthax.orthogonalise(), transforms.NuclearNorm()),
    orthax.combine_tasks(tasks.OSGD((1, 0)), scope="leaf"),
    orthax.combine_tasks(tasks.PCGrad(key=jax.random.key(0))),
    orthax.normalise(),
    orthax.normalise_components(rule=components.ByName(skip=("head",))),
]

# Factors.
factor: jax.Array = orthax.polar_factor(jnp.ones((2, 4, 3)), polar.DWH(polish=False))
methods: list[polar.PolarMethod] = [
    polar.Auto(),
    polar.QDWH(max_iterations=8),
    polar.GramEigh(rank_tol=1e-3),
    polar.NewtonSchulz(polar.JORDAN, dtype="bfloat16"),
    polar.NewtonSchulz(polar.polar_express(1e-3, 6), restarts=[2, 4]),
    polar.NewtonSchulz([[1.5, -0.5]] * 8, tolerance=1e-4, precision="high"),
]

# Rules.
cut = components.Matricisation((0, 1, 2), (-1,), groups=2)
rules: list[components.Rule] = [
    components.ByName(stacked=["layers", ("experts", 1)], attention="heads"),
    components.ByPath([("bias|embed", None), ("kernel", cut)]),
    components.OnlyConvolutions(components.ByName()),
    components.from_model(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), overrides=[("x", None)]),
]
found = orthax.explain(params, rules[0], method=methods[0], platform="gpu")
paths: list[str] = [row.path for row in found.rows if row.rows is not None]
mesh = jax.make_mesh((1,), ("data",))
stacking = execution.Stacking(2**28, ("data",))
orthax.explain(params, shardings=jax.NamedSharding(mesh, jax.P("data")))


@dataclasses.dataclass(frozen=True)
class Own:
    """A rule and a method of one's own."""

    def resolve(self, path: str, leaf: jax.Array) -> components.Matricisation | None:
        return cut if path.endswith("kernel") else None

    def factor(self, x: jax.Array) -> jax.Array:
        return x

    def flops(self, m: int, n: int) -> float:
        return 0.0


orthax.orthogonalise(Own(), rule=Own(), stacking=stacking)

# The other rooms are there.
rooms = [diagnostics, low_rank, nn]

# What is wrong is found before anything runs.
orthax.orthogonalise(0.01)  # pyright: ignore[reportArgumentType]
orthax.orthogonalise("svd")  # pyright: ignore[reportArgumentType]
orthax.orthogonalise(polar.SVD)  # pyright: ignore[reportArgumentType]
orthax.orthogonalise(components.ByName())  # pyright: ignore[reportArgumentType]
orthax.orthogonalise(rule=polar.SVD())  # pyright: ignore[reportArgumentType]
orthax.orthogonalise(rule=lambda path, leaf: None)  # pyright: ignore[reportArgumentType]
orthax.orthogonal_sgd()  # pyright: ignore[reportCallIssue]
orthax.orthogonal_sgd("0.1")  # pyright: ignore[reportArgumentType]
orthax.orthogonal_sgd(0.1, polar.SVD())  # pyright: ignore[reportArgumentType]
orthax.muon(0.1, ns_steps=5)  # pyright: ignore[reportCallIssue]
orthax.muon(0.1, scale=0.2)  # pyright: ignore[reportArgumentType]
orthax.polar_factor(params)  # pyright: ignore[reportArgumentType]
polar.NewtonSchulz(5)  # pyright: ignore[reportArgumentType]
polar.NewtonSchulz("jordan")  # pyright: ignore[reportArgumentType]
components.ByPath({"kernel": None})  # pyright: ignore[reportArgumentType]
execution.Stacking("1 GB")  # pyright: ignore[reportArgumentType]
orthax.combine_tasks(tasks.OSGD)  # pyright: ignore[reportArgumentType]
