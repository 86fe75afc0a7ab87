"""Nesting in depth: exits along a trunk, and interlaced stages."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from orthax.nn._stages import Activations, count, select

Layer = Callable[[jax.Array], jax.Array]


class Step(NamedTuple):
    """One layer of an interlaced network: its position and its inputs.

    Attributes:
      stage: the stage that owns the layer, and whose activation it replaces.
      number: the number of layers of this stage before it.
      reads: the stages whose latest activations it reads, the last one `stage` itself
        once it has an activation.
    """

    stage: int
    number: int
    reads: tuple[int, ...]


def interlacing(
    layers: int, stages: int, *, inputs: int = 1, widen: bool = False
) -> tuple[Step, ...]:
    """Return the layers of an interlaced network in the order in which they run.

    Stage 0 has `layers` layers. Each further stage inserts one after each layer of the
    earlier stages, which doubles the number of layers; it reads their latest
    activations and its own, and they never read it.

    Args:
      layers: the number of layers of stage 0.
      stages: the number of stages.
      inputs: the number of stages that have an activation at the start; the others
        start with their first layer.
      widen: whether a stage also has layers of its own beside those of earlier stages
        (growth in width), and not only between them. Layers side by side do not read
        one another.

    Returns:
      The layers. Those of the first n stages are `interlacing(layers, n)`.

    Raises:
      TypeError: if a number is not an integer.
      ValueError: if a number is not positive, or `inputs` more than `stages`.

    Limits:
      Earlier stages do not read later ones, so no path runs through all layers: with k
      stages, `layers * 2**(k - 1)` of them, the longest path has
      `layers * 2**(k - 2) + 1` for k > 1. With `widen` it has `layers * 2**(k - 1)`:
      then stage k is as deep as a network of that many layers.

    Example:
      >>> from orthax.nn import interlacing
      >>> for step in interlacing(2, 2):
      ...     print(step)
      Step(stage=0, number=0, reads=(0,))
      Step(stage=1, number=0, reads=(0,))
      Step(stage=0, number=1, reads=(0,))
      Step(stage=1, number=1, reads=(0, 1))

    References:
      Wan, Hoffmann, Lu, Maire 2020, arXiv 2008.06635, Figure 3. A reconstruction from
      its caption, which says that interlacing is recursive and that every stage doubles
      the depth: what reads what is ours, and so is `widen`.
    """
    layers, stages = count("layers", layers), count("stages", stages)
    inputs = count("inputs", inputs)
    if inputs > stages:
        raise ValueError(f"`inputs` is {inputs}, more than the {stages} `stages`.")
    steps, numbers, started = [], [0] * stages, set(range(inputs))
    for position in range(layers << (stages - 1)):
        # Later stages first: at one position nobody reads what is new there.
        for stage in reversed(range(stages)):
            stride = 1 << (stages - 1 - stage)
            beside = stage > 0 and position % (2 * stride) == 0
            if position % stride or (beside and not widen):
                continue
            reads = tuple(sorted(s for s in started if s <= stage))
            steps.append(Step(stage, numbers[stage], reads))
            numbers[stage] += 1
            started.add(stage)
    return tuple(steps)


class Branched(nnx.Module):
    """A trunk with exits: stage k is its first k + 1 blocks, followed by an exit.

    Calling it with one array returns a list, the output of every exit. With `stages=n`
    (static under `jit`) only the first n blocks and exits run.

    Args:
      trunk: the blocks, callables from an array to an array, one for each stage.
      exits: the heads after the blocks, one for each stage.

    Raises:
      TypeError: if a block or an exit cannot be called, or `stages` is not an integer.
      ValueError: if there are no blocks, not as many exits as blocks, or `stages` is
        not between 1 and their number.

    Limits:
      As `NestedLinear`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax.nn import Branched
      >>> rngs = nnx.Rngs(0)
      >>> model = Branched(
      ...     trunk=[
      ...         nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), nnx.relu)
      ...         for _ in range(3)
      ...     ],
      ...     exits=[nnx.Linear(16, 10, rngs=rngs) for _ in range(3)],
      ... )
      >>> [logits.shape for logits in model(jnp.ones((5, 16)), stages=2)]
      [(5, 10), (5, 10)]

    References:
      Wan, Hoffmann, Lu, Maire 2020, arXiv 2008.06635, Figure 2 (by its caption).
    """

    def __init__(self, trunk: Sequence[Layer], exits: Sequence[Layer]):
        if not trunk or len(trunk) != len(exits):
            raise ValueError(
                "`trunk` and `exits` must have an entry for each stage, got "
                f"{len(trunk)} and {len(exits)}."
            )
        for name, parts in (("trunk", trunk), ("exits", exits)):
            for k, part in enumerate(parts):
                _check_callable(f"{name}[{k}]", part)
        self.trunk, self.exits = nnx.data(list(trunk)), nnx.data(list(exits))

    def __call__(self, x: jax.Array, *, stages: int | None = None) -> list[jax.Array]:
        _, stages = select(x, 1, len(self.trunk), stages)
        outputs = []
        for block, head in zip(self.trunk[:stages], self.exits, strict=False):
            x = block(x)
            outputs.append(head(x))
        return outputs


def add(xs: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of activations of one shape, the earliest stage first."""
    shapes = [x.shape for x in xs]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"An interlaced layer adds what it reads, but `xs` has shapes {shapes}: "
            "give all stages the same features, or a `combine` that joins them, such "
            "as functools.partial(jnp.concatenate, axis=-1)."
        )
    return functools.reduce(operator.add, xs)


class Interlaced(nnx.Module):
    """Layers whose stages lie between one another, as `interlacing` says.

    Stage 0 is a network of `layers` layers, and each further stage doubles their
    number. Calling it with `xs`, the activations of the first stages or one array for
    stage 0, returns a list, the last activation of each stage. With `stages=n` (static
    under `jit`) the first n stages run, otherwise all that have inputs. The layers
    are `stages/k/number`.

    Args:
      make: makes the layer of a `Step`, `make(step)`, any callable from an array to an
        array. With `combine` that concatenates, a layer reads
        `sum(widths[s] for s in step.reads)` features.
      layers: how many layers stage 0 has.
      stages: the number of stages.
      inputs: the number of stages in `xs`: 1, or `stages` after another layer of this
        package.
      widen: whether stages grow in width too, with layers of their own beside those of
        earlier stages.
      combine: makes what a layer reads from the list of the activations of
        `step.reads`; by default their sum.

    Raises:
      TypeError: if `make`, what it makes, or `combine` cannot be called, or a number is
        not an integer.
      ValueError: if a number is not positive, `inputs` is more than `stages`, `xs` has
        not the activations that `stages` needs, or the sum is over different shapes.

    Limits:
      As `NestedLinear`, and of depth as `interlacing`. Layers are made stage by stage:
      the first stages' initial values do not depend on how many there are. Sums of
      activations that were sums themselves grow with depth: have a norm in each layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax.nn import Interlaced
      >>> rngs = nnx.Rngs(0)
      >>> def block(step):
      ...     norm = nnx.LayerNorm(16, rngs=rngs)
      ...     return nnx.Sequential(norm, nnx.Linear(16, 16, rngs=rngs), nnx.relu)
      >>> net = Interlaced(block, layers=2, stages=3)
      >>> [len(layers) for layers in net.stages]
      [2, 2, 4]
      >>> [y.shape for y in net(jnp.ones((5, 16)), stages=2)]
      [(5, 16), (5, 16)]

    References:
      Wan, Hoffmann, Lu, Maire 2020, arXiv 2008.06635, Figure 3: a reconstruction from
      its caption.
    """

    def __init__(
        self,
        make: Callable[[Step], Layer],
        layers: int,
        stages: int,
        *,
        inputs: int = 1,
        widen: bool = False,
        combine: Callable[[Sequence[jax.Array]], jax.Array] = add,
    ):
        _check_callable("make", make)
        _check_callable("combine", combine)
        self.plan = interlacing(layers, stages, inputs=inputs, widen=widen)
        self.inputs = inputs
        self.combine = combine
        made: list[list[Layer]] = [[] for _ in range(stages)]
        for step in sorted(self.plan):
            made[step.stage].append(make(step))
            _check_callable(f"make({step})", made[step.stage][-1])
        self.stages = nnx.data(made)

    def __call__(
        self, xs: Activations, *, stages: int | None = None
    ) -> list[jax.Array]:
        xs, stages = select(xs, self.inputs, len(self.stages), stages)
        latest = dict(enumerate(xs))
        for step in self.plan:
            if step.stage < stages:
                layer = self.stages[step.stage][step.number]
                x = self.combine([latest[stage] for stage in step.reads])
                latest[step.stage] = layer(x)
        return [latest[stage] for stage in range(stages)]


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(
            f"`{name}` must be callable, got {value!r} of type {type(value).__name__}."
        )
