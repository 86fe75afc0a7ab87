"""Layers in Flax NNX: nested, for anytime networks, and with decorrelated input.

**Nested**: stage k never reads a later stage. Activations are a list with one array for
each stage, from stage 0, the smallest network, to the last. Layers take such a list and
give one, so that `nnx.Sequential` holds them (it would unpack tuples); what works on
each stage alone is a map: `jax.tree.map(nnx.relu, xs)`, and `jax.tree.map(jnp.add, xs,
ys)` for a residual.

`stages=n` runs the first n stages and costs no more than them. Layers behind the first
need no telling: without `stages` they run every stage whose inputs are there. Stage k
grows in width (`NestedLinear`, `NestedConv`, `NestedNorm`), in depth (`Branched`,
`Interlaced`), or in both (`Interlaced` with `widen=True`).

**Decorrelated**: z = R (x - mu), with R learnt by a rule of `orthax.decorrelation`, is
what the layer gets instead of x. `DecorrelatedLinear` and `DecorrelatedConv` are such
layers, `decorrelate` wraps those of a model, `fuse` folds R and mu away for inference.

The room is not imported by `import orthax`; it needs Flax.
"""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "orthax.nn is written in Flax NNX, which is not installed: "
        "pip install 'orthax-optim[flax]'"
    ) from error

from orthax.nn._decorrelate import decorrelate as decorrelate, fuse as fuse
from orthax.nn._decorrelated import (
    Decorrelated as Decorrelated,
    DecorrelatedConv as DecorrelatedConv,
    DecorrelatedLinear as DecorrelatedLinear,
    DecorrelationVariable as DecorrelationVariable,
)
from orthax.nn._depth import (
    Branched as Branched,
    Interlaced as Interlaced,
    Step as Step,
    interlacing as interlacing,
)
from orthax.nn._width import (
    NestedConv as NestedConv,
    NestedLinear as NestedLinear,
    NestedNorm as NestedNorm,
    doubling as doubling,
)
