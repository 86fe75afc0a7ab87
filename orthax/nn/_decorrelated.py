"""NNX layers whose input is kept decorrelated."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from orthax._linalg import working_dtype
from orthax.internal.decorrelation import (
    DecorrelationRule,
    DecorrelationState,
    averaged,
    check_rule,
    check_shares,
    devices,
    drawn,
    init_decorrelation,
    update_decorrelation,
)
from orthax.nn._samples import samples_of


class DecorrelationVariable(nnx.Variable):
    """Statistics of a decorrelated layer: never a parameter.

    It is not an `nnx.Param`: optimisers over `nnx.Param`, weight decay and
    `orthogonalise()` do not see it. Save or log `nnx.state(model,
    DecorrelationVariable)`.
    """


class Decorrelated(nnx.Module):
    """A layer whose input is decorrelated first, by z = R (x - mu).

    In training, the batch mean is removed, the layer runs on z with the R of earlier
    batches, and then R learns from the batch. In evaluation (`model.eval()`) the
    running mean is removed and nothing is learnt. `DecorrelatedLinear` and
    `DecorrelatedConv` create the layer too; `decorrelate` wraps those of a model.

    Attributes:
      layer: the layer, with its parameters.
      statistics: a `DecorrelationState` of `DecorrelationVariable`s.
      use_running_average: whether in evaluation; set by `model.train()` and `.eval()`.
      updating: whether R learns in training; set by
        `model.set_attributes(updating=False)`.

    Args:
      layer: an `nnx.Linear` or an `nnx.Conv`.
      rule: how R learns.
      momentum: weight of a batch in the running mean, as in `update_decorrelation`.
      sample: share of the samples that R learns from, drawn at random below 1.
      axis_name: mapped axis over which the batch is split, in `shard_map` or `pmap`.
      rngs: random numbers for `sample` below 1, of the stream "decorrelation" (or the
        default one).

    Raises:
      TypeError: if `layer` is another, or `rule` is not a rule.
      ValueError: if a share is not above 0 and at most 1, `rngs` is missing, or the
        convolution is of an unsupported kind.

    Limits:
      A batch of one sample has no statistics: the running ones are used, as in
      evaluation, and nothing is learnt. Before the first batch the mean is zero and R
      is I: the layer is unchanged. A batch with NaN gives NaN, but leaves the
      statistics unchanged (`statistics.skipped` counts such batches).

      Every call in training updates R: with gradient accumulation, set
      `updating=False` for all micro-batches but one. Under `nnx.remat` it is updated
      once.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from orthax import decorrelation, nn
      >>> rngs = nnx.Rngs(0)
      >>> layer = nn.Decorrelated(nnx.Linear(8, 3, rngs=rngs), decorrelation.Polar())
      >>> x = jax.random.normal(jax.random.key(0), (64, 8))
      >>> layer(x).shape, layer.statistics.updates[...].item()
      ((64, 3), 1)

    References:
      Ahmad 2024, arXiv 2407.10780 (a decorrelation before every linear map, which
      learns inside the forward pass).
    """

    def __init__(
        self,
        layer: nnx.Linear | nnx.Conv,
        rule: DecorrelationRule,
        *,
        momentum: float = 0.1,
        sample: float = 1.0,
        axis_name: Any | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        check_rule(rule)
        check_shares(momentum, sample)
        features = samples_of(layer).features
        if sample < 1 and rngs is None:
            raise ValueError(
                f"`sample` is {sample}: samples are drawn at random, which needs "
                '`rngs`, such as nnx.Rngs(decorrelation=0); "sample=1.0" needs none.'
            )
        self.layer = layer
        self.rule, self.momentum, self.sample = rule, momentum, sample
        self.axis_name = axis_name
        self.use_running_average = False
        self.updating = True
        self.rngs = nnx.data(rngs["decorrelation"].fork() if sample < 1 else None)
        dtype = working_dtype(layer.param_dtype)
        state = init_decorrelation(features, rule, dtype)
        self.statistics = nnx.data(jax.tree.map(DecorrelationVariable, state))

    def __call__(
        self,
        x: jax.typing.ArrayLike,
        *,
        use_running_average: bool | None = None,
        updating: bool | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        x = jnp.asarray(x)
        evaluating = _first(use_running_average, self.use_running_average)
        samples, state = samples_of(self.layer), self.state()
        samples.check(x)
        number = samples.count(x.shape)
        if evaluating or number * devices(self.axis_name) < 2:
            mean = jax.lax.stop_gradient(state.mean)
            return samples.run(self.layer, self.rule, state, x, mean, **kwargs)
        mean = averaged(samples.mean(x.astype(state.mean.dtype)), self.axis_name)
        y = samples.run(self.layer, self.rule, state, x, mean, **kwargs)
        if _first(updating, self.updating):
            key = None if self.rngs is None else self.rngs()
            index = drawn(number, self.sample, key, self.axis_name)
            self._learn(samples.take(x, index), mean)
        return y

    def state(self) -> DecorrelationState:
        """Return the statistics as arrays, for `layer.rule.matrix(state.transform)`."""
        return jax.tree.map(
            lambda variable: variable[...],
            self.statistics,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    def _variables(self) -> list[DecorrelationVariable]:
        return jax.tree.leaves(
            self.statistics, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )

    def _learn(self, x: jax.Array, mean: jax.Array) -> None:
        new = update_decorrelation(
            self.state(),
            x,
            self.rule,
            axis_name=self.axis_name,
            momentum=self.momentum,
            mean=mean,
        )
        for variable, value in zip(
            self._variables(), jax.tree.leaves(new), strict=True
        ):
            variable[...] = value


class DecorrelatedLinear(Decorrelated):
    """An `nnx.Linear` whose input is decorrelated: `layer(R (x - mu))`.

    Args:
      in_features: features d of the input.
      out_features: features of the output.
      rule: how R learns.
      rngs: random numbers for the layer, and for `sample` below 1.
      momentum: as in `Decorrelated`.
      sample: as in `Decorrelated`.
      axis_name: as in `Decorrelated`.
      **kwargs: arguments of `nnx.Linear`.

    Raises:
      TypeError: as `Decorrelated`.
      ValueError: as `Decorrelated`.

    Limits:
      As `Decorrelated`. Of the rules, R is d x d, or twice that for `Polar`, unless
      `Factorised`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax import decorrelation, nn
      >>> rule = decorrelation.Scaled(1e-3)
      >>> layer = nn.DecorrelatedLinear(8, 3, rule, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 8))).shape, layer.layer.kernel.shape
      ((5, 3), (8, 3))

    References:
      As `Decorrelated`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rule: DecorrelationRule,
        *,
        rngs: nnx.Rngs,
        momentum: float = 0.1,
        sample: float = 1.0,
        axis_name: Any | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            nnx.Linear(in_features, out_features, rngs=rngs, **kwargs),
            rule,
            momentum=momentum,
            sample=sample,
            axis_name=axis_name,
            rngs=rngs,
        )


class DecorrelatedConv(Decorrelated):
    """An `nnx.Conv` whose input patches are decorrelated.

    The samples are the patches that the kernel meets, of
    `d = prod(kernel_size) * in_features` features each, padding included. R and the
    mean are folded into the kernel and the bias: the forward pass is one ordinary
    convolution, and patches are gathered for the statistics alone.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: the taps along each spatial axis.
      rule: how R learns.
      rngs: random numbers for the layer, and for `sample` below 1.
      momentum: as in `Decorrelated`.
      sample: share of the patches of the batch that R learns from, drawn uniformly.
      axis_name: as in `Decorrelated`.
      **kwargs: arguments of `nnx.Conv`: `strides`, `padding`, `kernel_dilation`,
        `conv_general_dilated`, ...

    Raises:
      TypeError: as `Decorrelated`.
      ValueError: as `Decorrelated`; groups and dilated inputs are not supported.

    Limits:
      As `Decorrelated`. R of 512 channels and 3 x 3 taps is a 4608 x 4608 matrix, 85 MB
      in float32 (`Polar` keeps two), and folding it costs `d * d * out_features`
      operations a step: `Factorised` forms none of that size. Numbers in rounding are
      those of the raw input: a mean that is far larger than the deviations from it
      costs digits, as in any layer with a bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax import decorrelation, nn
      >>> conv = nn.DecorrelatedConv(
      ...     3, 8, (3, 3), decorrelation.Scaled(1e-3), strides=2, rngs=nnx.Rngs(0)
      ... )
      >>> conv(jnp.ones((4, 8, 8, 3))).shape, conv.statistics.mean.shape
      ((4, 4, 4, 8), (27,))

    References:
      Ahmad 2024, arXiv 2407.10780 (patches); Dalm et al. 2024, arXiv 2405.02385 (one
      convolution with the folded kernel, statistics of a part of the patches).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        rule: DecorrelationRule,
        *,
        rngs: nnx.Rngs,
        momentum: float = 0.1,
        sample: float = 0.1,
        axis_name: Any | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            nnx.Conv(in_features, out_features, kernel_size, rngs=rngs, **kwargs),
            rule,
            momentum=momentum,
            sample=sample,
            axis_name=axis_name,
            rngs=rngs,
        )


def _first(given: bool | None, attribute: bool) -> bool:
    return attribute if given is None else given
