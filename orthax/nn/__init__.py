"""Layers in Flax NNX: nested, for anytime networks, and with decorrelated input.

**Nested**: stage k never reads a later stage. Activations are a list with one array for
each stage, from stage 0, the smallest network, to the last. Layers map such a list to
another, so they can be used in `nnx.Sequential` (which would unpack tuples). Functions
of each stage alone are mapped: `jax.tree.map(nnx.relu, xs)`, or
`jax.tree.map(jnp.add, xs, ys)` for a residual.

`stages=n` runs the first n stages, at the cost of these. Only the first layer needs it;
each later layer runs every stage for which it receives an input. Stage k grows in width
(`NestedLinear`, `NestedConv`, `NestedNorm`), in depth (`Branched`, `Interlaced`), or in
both (`Interlaced` with `widen=True`).

**Decorrelated**: the layer receives z = R (x - mu) instead of x, where R is learnt by a
rule of `orthax.decorrelation`. `DecorrelatedLinear` and `DecorrelatedConv` are such
layers, `decorrelate` wraps those of a model, `fuse` folds R and mu into the weights for
inference.

This package needs Flax, and is imported when `orthax.nn` is first used.
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
