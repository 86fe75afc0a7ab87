"""OIALR around any optimiser: dense steps, the conversion, the checks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from orthax import components
from orthax.internal.components import check_rule
from orthax.low_rank._eligible import Order, check_order
from orthax.low_rank._factorise import factorise
from orthax.low_rank._moments import check_moments, convert_opt_state
from orthax.low_rank._refactor import refactor
from orthax.low_rank._restore import abstract_state
from orthax.low_rank._schedule import OIALR
from orthax.low_rank._state import LowRankState, TrainingState


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Training with OIALR around any optimiser and any loss.

    The loop is yours, and so is its step count: call `check` before a step, or before
    an epoch of steps, and `update` inside `jit` or `jax.lax.scan`.

    Attributes:
      tx: the optimiser. It sees dense parameters before the conversion and Sigmas
        after it; give its own rules `low_rank.with_sigmas`.
      config: when weights are converted, and how their ranks fall.
      rule: which axes of a leaf form matrices.
      order: the layers from the input to the output, as in `factorise`.
      moments: how the optimiser's moments are converted, as in `convert_opt_state`;
        the paper's code has `"slice"`.
      kinds: fields of your own optimiser's state, as in `convert_opt_state`.

    Raises:
      TypeError: if an attribute has the wrong type.
      ValueError: if `config` needs an order, or `moments` or `kinds` are unknown.

    Limits:
      An update is a call of `update`: with `optax.MultiSteps` one of its mini-steps.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax import low_rank
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["kernel"] - x) ** 2)
      >>> config = low_rank.OIALR(delay=5, frequency=5, beta=0.3)
      >>> trainer = low_rank.Trainer(optax.adam(0.01), config)
      >>> @jax.jit
      ... def step(state, x):
      ...     value, grads = low_rank.value_and_grad(loss)(state.weights, x)
      ...     return trainer.update(state, grads), value
      >>> params = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.1, 0.1]))}
      >>> state = trainer.init(params)
      >>> for i in range(6):
      ...     state = trainer.check(state, i)  # converts the weight at the last step
      ...     state, value = step(state, jnp.ones((1, 4)))
      >>> low_rank.ranks(state), state.weights.trainable["kernel"].shape
      ({'kernel': 2}, (2, 2))
      >>> low_rank.materialise(state.weights)["kernel"].shape
      (4, 4)
    """

    tx: optax.GradientTransformation
    config: OIALR
    rule: components.RuleOrTree = dataclasses.field(default_factory=components.ByName)
    _: dataclasses.KW_ONLY
    order: Order = None
    moments: str = "rotate"
    kinds: Mapping[str, str] | None = None

    def __post_init__(self):
        if not isinstance(self.config, OIALR):
            raise TypeError(
                f"`config` must be a low_rank.OIALR(...), got {self.config!r}."
            )
        object.__setattr__(self, "rule", check_rule(self.rule))
        check_moments(self.moments, self.kinds)
        needs = ("keep_first", "keep_last", "layer_step")
        check_order(self.order, {name: getattr(self.config, name) for name in needs})

    def init(
        self, params: Any, ranks: Mapping[str, int] | None = None
    ) -> TrainingState:
        """Return the state before the first step.

        What the conversion will need is tried here, on shapes alone.

        Args:
          params: the dense parameters.
          ranks: by path, to start with weights that are factorised already.

        Raises:
          TypeError: as `factorise` and `convert_opt_state`.
          ValueError: as `factorise` and `convert_opt_state`; NaN is found later.
        """
        weights = self._weights(params, ranks)
        opt_state = self.tx.init(weights.trainable)
        if not weights.frozen:
            jax.eval_shape(self._converted, weights, opt_state)
        return TrainingState(weights, opt_state)

    def update(
        self, state: TrainingState, grads: Any, **extra_args: Any
    ) -> TrainingState:
        """Return the state after one update; works inside `jit` and `jax.lax.scan`.

        Args:
          state: before.
          grads: a tree like `state.weights.trainable`, from `low_rank.value_and_grad`.
          **extra_args: for the optimiser.
        """
        trainable, frozen = state.weights
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, state.opt_state, trainable, **extra_args)
        trainable = optax.apply_updates(trainable, updates)
        return TrainingState(LowRankState(trainable, frozen), opt_state)

    def check(
        self, state: TrainingState, step: int, *, every: int = 1
    ) -> TrainingState:
        """Return the state after the conversion or the check that is due, if any.

        On the host, not inside `jit`: shapes change. Where nothing is due, `state` is
        returned and nothing waits for the device.

        Args:
          state: after `step` steps. Save checkpoints before `check`, with `step`: the
            state does not hold it.
          step: steps before this call: updates, or epochs if `config` counts those.
          every: steps from one call to the next. What became due in between is done
            once.

        Raises:
          ValueError: if a weight holds NaN or infinity, with its path.
        """
        weights, opt_state = state
        # The conversion is done however late it is.
        every = every if weights.frozen else step + 1
        number = self.config.check_at(step, every)
        if number is None:
            return state
        if not weights.frozen:
            weights, opt_state = self._converted(weights, opt_state)
        new = refactor(weights, self.config, check=number)
        return TrainingState(new, self._carried(opt_state, weights, new))

    def target(self, params: Any, ranks: Mapping[str, int]) -> TrainingState:
        """Return the shapes of a state at given ranks, to restore a checkpoint into.

        Args:
          params: the dense parameters, or their `jax.ShapeDtypeStruct`s, with the
            shardings that are wanted.
          ranks: by path; empty before the conversion. `low_rank.ranks` reads them from
            a checkpoint's metadata, with Orbax
            `ocp.StandardCheckpointer().metadata(folder)`.

        Returns:
          A `TrainingState` of `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: if the ranks are those of other parameters.
        """
        return abstract_state(
            params, lambda params: self._weights(params, ranks), self.tx.init
        )

    def _weights(self, params: Any, ranks: Mapping[str, int] | None) -> LowRankState:
        """Return parameters as weights: dense, or factorised at some ranks."""
        return self._factorised(params, ranks) if ranks else LowRankState(params, {})

    def _factorised(
        self, params: Any, ranks: Mapping[str, int] | None = None
    ) -> LowRankState:
        config = self.config
        return factorise(
            params,
            self.rule,
            min_aspect=config.min_aspect,
            keep_first=config.keep_first,
            keep_last=config.keep_last,
            order=self.order,
            ranks=ranks,
        )

    def _converted(self, weights: LowRankState, opt_state: Any) -> tuple[Any, Any]:
        """Return factorised weights and the optimiser's state for them."""
        new = self._factorised(weights.trainable)
        return new, self._carried(opt_state, weights, new)

    def _carried(self, opt_state: Any, old: LowRankState, new: LowRankState) -> Any:
        return convert_opt_state(
            opt_state, old, new, self.moments, tx=self.tx, kinds=self.kinds
        )
