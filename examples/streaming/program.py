"""What the steps of large trainings compute: any model and loss, on any mesh.

What is learned is a `Task`: a model, its loss, its optimiser. It becomes one program
for one device or thousands, in one process or many: `jit` with shardings on a mesh of
two axes. A batch is divided among all devices. Along "data" parameters are copied;
along "fsdp" they are divided between their uses, with all that the optimiser keeps.
What is computed is the same on every mesh up to rounding: means over a batch, the
statistics of batch normalisation among them, are over the whole of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

AXES = ("data", "fsdp")

# ------------------------------------------------------------------- what is learned

Sums = dict[str, jax.Array]  # of a batch; "images" is how many they are sums over


class Task(NamedTuple):
    """A model, its loss and its optimiser.

    Attributes:
      model: makes the model from a key.
      loss: takes the model, in training mode, and a batch; returns the loss and sums.
      score: takes the model, in evaluation mode, and a batch; returns sums.
      optimiser: makes the optimiser, given the learning rate of a step.
      average: decay of the exponential moving average of the model that is evaluated,
        a step; None to evaluate the model itself.
      learned: which variables of the model the optimiser changes, as `nnx.split` takes
        it; the others change as the model changes them when it is called.
    """

    model: Callable[[jax.Array], nnx.Module]
    loss: Callable[[nnx.Module, Any], tuple[jax.Array, Sums]]
    score: Callable[[nnx.Module, Any], Sums]
    optimiser: Callable[[jax.Array], optax.GradientTransformation]
    average: float | None = None
    learned: Any = nnx.Param


class State(NamedTuple):
    """All that a step changes.

    Attributes:
      params: what is learned, float32.
      statistics: running mean and variance of batch normalisation, and all else.
      optimiser: what it keeps.
      average: of parameters and statistics, or None.
    """

    params: nnx.State
    statistics: nnx.State
    optimiser: optax.OptState
    average: tuple[nnx.State, nnx.State] | None


# ------------------------------------------------------------- the mesh, the programs


def make_mesh(shape: tuple[int, int] | None = None) -> jax.sharding.Mesh:
    """Return a mesh of all devices of all processes, by default along "data".

    Raises:
      ValueError: if the shape has another number of devices.
    """
    found = jax.device_count()
    shape = shape or (found, 1)
    if math.prod(shape) != found:
        raise ValueError(
            f"`mesh` is {shape}; expected two numbers whose product is {found}, the "
            "number of devices"
        )
    # The default differs between versions of jax.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def at_rest(shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return how something of a shape lies between its uses.

    Its longest axis that divides evenly is divided; vectors, a thousandth of a network,
    and what has no such axis are copied.
    """
    shards = mesh.shape["fsdp"]
    even = [i for i, n in enumerate(shape) if n % shards == 0]
    if shards == 1 or len(shape) < 2 or not even:
        return NamedSharding(mesh, P())
    axis = max(even, key=shape.__getitem__)
    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))


class Program(NamedTuple):
    """What is compiled, and what it works on.

    Attributes:
      state: shapes and shardings of the state.
      initialise: makes the first state from a key.
      step: takes a state, a batch, the learning rate and the number of the step;
        returns the next state and the sums of `Task.loss`.
      score: takes a state and a batch; returns the sums of `Task.score`.
    """

    state: State
    initialise: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, Sums]]
    score: Callable[[State, Any], Sums]


def make_program(task: Task, mesh: jax.sharding.Mesh) -> Program:
    """Return the programs of a task on a mesh."""
    graphdef, *_ = nnx.split(nnx.eval_shape(lambda: task.model(jax.random.key(0))))
    copied = NamedSharding(mesh, P())

    def initialise(key: jax.Array) -> State:
        _, params, statistics = nnx.split(task.model(key), task.learned, ...)
        # The rate has no part in the optimiser's first state.
        optimiser = task.optimiser(jnp.float32(1.0)).init(params)
        average = None if task.average is None else (params, statistics)
        return State(params, statistics, optimiser, average)

    def merged(params: nnx.State, statistics: nnx.State) -> nnx.Module:
        # What FSDP gathers for this and for the gradient, and keeps no longer.
        whole = jax.lax.with_sharding_constraint((params, statistics), copied)
        return nnx.merge(graphdef, *whole, copy=True)

    def step(
        state: State, batch: Any, rate: jax.Array, number: jax.Array
    ) -> tuple[State, Sums]:
        def objective(params: nnx.State) -> tuple[jax.Array, tuple]:
            model = merged(params, state.statistics)
            loss, sums = task.loss(model, batch)
            return loss, (nnx.split(model, task.learned, ...)[2], sums)

        grads, (statistics, sums) = jax.grad(objective, has_aux=True)(state.params)
        # Gradients lie like their parameters: summed where they are needed.
        grads = jax.lax.with_sharding_constraint(grads, lie.params)
        updates, optimiser = task.optimiser(rate).update(
            grads, state.optimiser, state.params
        )
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # The first weights are random: the average forgets them sooner.
            decay = jnp.minimum(task.average, (1.0 + number) / (10.0 + number))
            average = optax.incremental_update(
                (params, statistics), average, 1.0 - decay
            )
        return State(params, statistics, optimiser, average), sums

    def score(state: State, batch: Any) -> Sums:
        averaged = state.average is not None
        model = merged(*(state.average if averaged else state[:2]))
        model.eval()
        return task.score(model, batch)

    shapes = jax.eval_shape(initialise, jax.random.key(0))
    lie = jax.tree.map(lambda x: at_rest(x.shape, mesh), shapes)

    def placed(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return Program(
        jax.tree.map(placed, shapes, lie),
        jax.jit(initialise, out_shardings=lie),
        jax.jit(step, donate_argnums=0, out_shardings=(lie, copied)),
        jax.jit(score, out_shardings=copied),
    )


def place(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> Any:
    """Return a batch on all devices, given the part of this process."""
    where = NamedSharding(mesh, P(AXES))
    return {
        name: jax.make_array_from_process_local_data(where, part)
        for name, part in batch.items()
    }
