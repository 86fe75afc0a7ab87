"""Train a language model on many devices: `python -m examples.sharded --layout fsdp`.

Data parallel, fully sharded (FSDP), tensor parallel, and the last two together, on a
mesh of eight devices that a CPU pretends to be. A layout is one function from a leaf to
its `PartitionSpec`, here `_spec`; the optimiser is that of one device, and divides its
work as the parameters are sharded.

With `--axis-types explicit` the types of arrays say how that is. The model, which knows
of no mesh, runs under `jax.sharding.auto_axes`; the optimiser needs none of that. With
`--axis-types auto` a program cannot see it: the optimiser is told the specs.

The same program runs on several hosts, here two of four devices each, in two shells:

    python -m examples.sharded --coordinator localhost:1234 --processes 2 --process 0
    python -m examples.sharded --coordinator localhost:1234 --processes 2 --process 1
"""

import collections
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from tqdm import tqdm

import orthax
from examples.data import load_digits
from examples.models.gpt import GPT, GPTConfig
from examples.training.checked import Checked
from examples.training.checkpoints import checkpoints
from examples.training.optimisers import (
    METHODS,
    WITHOUT_METHOD,
    Method,
    Optimiser,
    make_optimiser,
)
from orthax.execution import Stacking

Layout = Literal["data", "fsdp", "tensor", "fsdp_tensor"]
AxisTypes = Literal["explicit", "auto"]
AXES = ("data", "model")

# Settings of where and how long, with which a checkpoint may be continued.
_SAME_NUMBERS = (
    "layout",
    "axis_types",
    "mesh",
    "devices",
    "steps",
    "checkpoints",
    "checkpoint_steps",
    "coordinator",
    "processes",
    "process",
)

# -------------------------------------------------------------------- what can be told


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Train a transformer to predict real digits, pixel by pixel, or a text of yours.

    Whatever the layout, the mesh and the number of processes, the numbers are the same
    up to rounding.
    """

    layout: Layout = "fsdp"
    """How parameters lie: copies on all devices, sharded, by heads and features."""
    axis_types: AxisTypes = "explicit"
    """Of the mesh: shardings are part of types, or up to the compiler."""
    mesh: tuple[int, int] = (2, 4)
    """Devices along "data" and along "model"."""
    devices: int | None = 8
    """That CPUs pretend to be, over all processes; None: the machine's own devices."""
    optimiser: Optimiser = "muon"
    """Which optimiser."""
    method: Method = "auto"
    """Polar factor, where the optimiser takes one."""
    learning_rate: float = 0.01
    """The rate, constant."""
    momentum: float = 0.9
    """Momentum of the SGD and Muon families, b1 of the Adam family."""
    weight_decay: float = 0.0
    """On every parameter."""
    steps: int = 200
    """Steps in all, with those before a checkpoint."""
    batch_size: int = 32
    """Sequences in a step, on all devices together."""
    text: Path | None = None
    """A file whose bytes are the tokens; without, scikit-learn's 8x8 digits."""
    context: int = 64
    """Tokens of a sequence; a digit has 64."""
    depth: int = 2
    """Blocks of the transformer."""
    heads: int = 4
    """Attention heads of a block."""
    width: int = 64
    """Features of a token."""
    seed: int = 0
    """Of the weights and of the batches."""
    checkpoints: Path | None = None
    """Folder, shared by all hosts, from which a training goes on in any layout."""
    checkpoint_steps: int = 100
    """Steps between two checkpoints; there is also one at the end."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes; every process is told the same."""
    processes: int = 1
    """How many processes train together, with equally many devices each."""
    process: int = 0
    """Which of them this is."""

    def __post_init__(self):
        for name, kind in (("layout", Layout), ("axis_types", AxisTypes)):
            known = get_args(kind)
            self.expect(
                getattr(self, name) in known, name, f"one of {', '.join(known)}"
            )
        for name in ("steps", "batch_size", "context", "depth", "heads", "width"):
            self.expect(getattr(self, name) >= 1, name, "at least 1")
        self.expect(self.checkpoint_steps >= 1, "checkpoint_steps", "at least 1")
        self.expect(min(self.mesh) >= 1, "mesh", "two positive numbers")
        self.expect(self.processes >= 1, "processes", "at least 1")
        self.expect(0 <= self.process < self.processes, "process", "below `processes`")
        self.expect(
            (self.coordinator is None) == (self.processes == 1),
            "coordinator",
            "HOST:PORT where there are several processes, else none",
        )
        if self.devices is not None:
            self.expect(
                self.devices >= 1 and self.devices % self.processes == 0,
                "devices",
                "equally many in every process",
            )
        self.expect(self.width % self.heads == 0, "width", "a multiple of `heads`")
        shards, model = self.mesh
        if "tensor" in self.layout:
            self.expect(
                self.heads % model == 0, "heads", f"a multiple of the mesh's {model}"
            )
        else:
            shards *= model
        self.expect(
            self.batch_size % shards == 0,
            "batch_size",
            f"a multiple of {shards}, the devices that share a batch",
        )

    def identity(self) -> dict[str, Any]:
        """Return the settings upon which numbers depend; a checkpoint is of these."""
        values = dataclasses.asdict(self) | {"text": str(self.text)}
        return {name: x for name, x in values.items() if name not in _SAME_NUMBERS}

    @property
    def batch_spec(self) -> P:
        """How a batch lies: tensor parallel devices share their sequences."""
        return P("data") if "tensor" in self.layout else P(("data", "model"))


def start(config: Config) -> None:
    """Make the devices, and join the other processes; before JAX computes anything."""
    if config.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.devices // config.processes)
    if config.coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """Return the mesh.

    Raises:
      ValueError: unless it takes all devices.
    """
    needed, found = math.prod(config.mesh), jax.device_count()
    config.expect(needed == found, "mesh", f"one of all {found} devices, not {needed}")
    kinds = {"explicit": jax.sharding.AxisType.Explicit}
    kind = kinds.get(config.axis_types, jax.sharding.AxisType.Auto)
    return jax.make_mesh(config.mesh, AXES, axis_types=(kind, kind))


# ------------------------------------------------------------------------- the layouts

# Megatron's tensor parallelism: the axis of heads, and that of the features in between.
_DIVIDED = {
    "query/kernel": 1,
    "key/kernel": 1,
    "value/kernel": 1,
    "query/bias": 0,
    "key/bias": 0,
    "value/bias": 0,
    "attention/out/kernel": 0,
    "up/kernel": 1,
    "up/bias": 0,
    "down/kernel": 0,
}


def _spec(path: str, shape: tuple[int, ...], config: Config, at_rest: bool) -> P:
    """Return how a parameter is sharded.

    Args:
      path: of the parameter, joined by "/".
      shape: of the parameter.
      config: the layout and the mesh.
      at_rest: between its uses, where FSDP shards the longest axis that divides
        evenly; a parameter that has none is copied.
    """
    data, model = config.mesh
    spec: list[Any] = [None] * len(shape)
    if "tensor" in config.layout:
        axis = next((i for end, i in _DIVIDED.items() if end in path), None)
        if axis is not None:
            spec[axis] = "model"
    if at_rest and "fsdp" in config.layout:
        alone = config.layout == "fsdp"
        names, size = (("data", "model"), data * model) if alone else ("data", data)
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % size == 0]
        if free:
            spec[max(free, key=shape.__getitem__)] = names
    return P(*spec)


def specs(params: Any, config: Config, *, at_rest: bool = True) -> Any:
    """Return the `PartitionSpec` of every parameter, at rest or in use."""

    def spec(path: Any, x: jax.ShapeDtypeStruct) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _spec(name, x.shape, config, at_rest)

    return jax.tree.map_with_path(spec, params)


def optimiser_specs(
    optimiser: optax.GradientTransformation, params: Any, config: Config
) -> Any:
    """Return the `PartitionSpec` of everything that an optimiser keeps.

    Whatever the axes of the mesh are: were they explicit, types would say it.
    """
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.sharding.AbstractMesh(config.mesh, AXES, axis_types=explicit)
    typed = with_shardings(params, specs(params, config), mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        kept = jax.eval_shape(optimiser.init, typed)
    return jax.tree.map(lambda x: x.sharding.spec if x.sharding else P(), kept)


def with_shardings(shapes: Any, specs: Any, mesh: Any) -> Any:
    """Return a tree of `jax.ShapeDtypeStruct`s with shardings on a mesh."""

    def lying(x: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(lying, shapes, specs)


# ---------------------------------------------------------------------------- the data


def load_sequences(config: Config) -> np.ndarray:
    """Return sequences of tokens, shape `(n, context)`, integers.

    Raises:
      FileNotFoundError: if there is no such text.
      ValueError: if the context is longer than a digit or the text.
    """
    if config.text is None:
        images = load_digits().train.images
        tokens = (16 * images).round().astype(np.uint8).reshape(len(images), -1)
        config.expect(config.context <= 64, "context", "at most the 64 pixels of one")
        return tokens[:, : config.context]
    text = np.frombuffer(config.text.read_bytes(), np.uint8)
    config.expect(config.context <= len(text), "context", "no more than the text has")
    return np.lib.stride_tricks.sliding_window_view(text, config.context)


def draw(sequences: np.ndarray, config: Config, step: int) -> np.ndarray:
    """Return the batch of a step, `(batch_size, context)`: the same everywhere."""
    random = np.random.default_rng((config.seed, step))
    return sequences[random.integers(len(sequences), size=config.batch_size)]


# ---------------------------------------------------------- the model, its state, steps


class State(NamedTuple):
    """All that a step changes."""

    params: nnx.State
    optimiser: optax.OptState


class Program(NamedTuple):
    """What is to be compiled, and what it works on.

    Attributes:
      state: shapes and shardings of the state.
      initialise: makes the first state from a key, each part on the device it is for.
      step: takes a state and tokens `(n, length)`; returns the next one and the loss.
    """

    state: State
    initialise: Callable[[jax.Array], State]
    step: Callable[[State, jax.Array], tuple[State, jax.Array]]


def make_program(config: Config, mesh: jax.sharding.Mesh) -> Program:
    """Return the program of a layout, to be called inside `jax.set_mesh(mesh)`."""
    vocabulary = 17 if config.text is None else 256
    sizes = GPTConfig(
        vocabulary, config.context, config.depth, config.heads, config.width
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GPT(sizes, rngs=nnx.Rngs(0))))
    auto = config.axis_types == "auto"
    optimiser = make_optimiser(
        config.optimiser,
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        method=config.method,
        stacking=Stacking(shardings=specs(params, config) if auto else None),
    )

    def initialise(key: jax.Array) -> State:
        params = nnx.split(GPT(sizes, rngs=nnx.Rngs(key)))[1]
        return State(params, optimiser.init(params))

    shapes = jax.eval_shape(initialise, jax.random.key(0))
    at_rest = State(
        specs(shapes.params, config), optimiser_specs(optimiser, shapes.params, config)
    )
    in_use = specs(shapes.params, config, at_rest=False)

    def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        # What FSDP gathers for this and the gradient, and keeps no longer.
        params = jax.lax.with_sharding_constraint(params, in_use)
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        logits = nnx.merge(graphdef, params)(before)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return losses.mean()

    if config.axis_types == "explicit":
        # The model says nothing of shardings; types would want it to.
        loss = jax.sharding.auto_axes(loss, out_sharding=P())
        initialise = jax.sharding.auto_axes(initialise, out_sharding=at_rest)

    def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state.params, tokens)
        # Gradients are sharded like their parameters: summed where they are needed.
        grads = jax.lax.with_sharding_constraint(grads, at_rest.params)
        updates, after = optimiser.update(grads, state.optimiser, state.params)
        return State(optax.apply_updates(state.params, updates), after), value

    placed = with_shardings(shapes, at_rest, mesh)
    return Program(
        placed,
        jax.jit(initialise, out_shardings=at_rest),
        jax.jit(step, donate_argnums=0, out_shardings=(at_rest, P())),
    )


_COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def count_collectives(program: str) -> dict[str, int]:
    """Return how often a compiled program calls for each collective, loops once."""
    return dict(sorted(collections.Counter(_COLLECTIVES.findall(program)).items()))


# -------------------------------------------------------------------------- the program


class Run(NamedTuple):
    """What came of a training.

    Attributes:
      state: after the last step.
      losses: one for each step of this run, before that step.
      collectives: how many of each a step calls for.
    """

    state: State
    losses: list[float]
    collectives: dict[str, int]


def train(config: Config) -> Run:
    """Train, after `start`; the first process prints.

    Raises:
      FileNotFoundError: if there is no such text.
      ValueError: if the mesh does not take all devices, or the context is too long.
    """
    mesh, sequences = make_mesh(config), load_sequences(config)
    where = NamedSharding(mesh, config.batch_spec)
    tell = print if jax.process_index() == 0 else lambda *_: None

    def batch(step: int) -> jax.Array:
        # Every process has the whole batch, and places what its devices need of it.
        tokens = draw(sequences, config, step)
        return jax.make_array_from_process_local_data(where, tokens, tokens.shape)

    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        tell(describe(config, program.state.params))
        step = program.step.lower(program.state, batch(0)).compile()
    # Orbax joins the processes by a mesh of its own, hence outside of this one.
    with checkpoints(config.identity(), config.checkpoints, keep=True) as kept:
        first, state = kept.restored(program.state)
        if first == 0:
            with jax.set_mesh(mesh):
                state = program.initialise(jax.random.key(config.seed))
        losses = []
        progress = tqdm(
            range(first, config.steps),
            initial=first,
            total=config.steps,
            disable=jax.process_index() > 0,
            mininterval=1,
            unit="step",
        )
        for i in progress:
            state, loss = step(state, batch(i))
            losses.append(float(loss))
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if (i + 1) % config.checkpoint_steps == 0 or i + 1 == config.steps:
                kept.save(i + 1, state)
    run = Run(state, losses, count_collectives(step.as_text()))
    counts = ", ".join(f"{n} {name}" for name, n in run.collectives.items())
    tell(f"collectives of the compiled step: {counts or 'none'}")
    if losses:
        tell(f"loss of step {config.steps}: {losses[-1]:.6f}")
    else:
        tell(f"nothing to do: the checkpoint is of step {first}")
    return run


def describe(config: Config, params: Any) -> str:
    """Return what the optimiser will do to every leaf, and on which devices."""
    if config.optimiser in WITHOUT_METHOD:
        return f"{config.optimiser} takes no polar factors: nothing to divide"
    shardings = jax.tree.map(lambda x: x.sharding, params)
    stacking = Stacking(shardings=shardings)
    return str(orthax.explain(params, method=METHODS[config.method], stacking=stacking))


def main(arguments: Sequence[str] | None = None) -> Run:
    """Train as the command line says."""
    try:
        config = tyro.cli(Config, prog="python -m examples.sharded", args=arguments)
        start(config)
        return train(config)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
