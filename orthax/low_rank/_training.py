"""OIALR as a driver: ordinary steps, the conversion, the checks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from orthax import components
from orthax.low_rank._factorise import factorise, materialise
from orthax.low_rank._layers import Order, check_order
from orthax.low_rank._masking import mask_updates, refactor_masked
from orthax.low_rank._moments import check_moments, convert_opt_state
from orthax.low_rank._refactor import refactor
from orthax.low_rank._restoring import abstract, check_saved, saved_ranks
from orthax.low_rank._schedule import OIALR
from orthax.low_rank._state import LowRankState, TrainingState, wrapped


@dataclasses.dataclass(frozen=True)
class Training:
    """Training with OIALR around any optimiser and any loss.

    Attributes:
      tx: the optimiser. It sees dense parameters before the conversion and Sigmas
        behind it; give its own rules `low_rank.with_sigmas`.
      config: when weights are converted, and how their ranks fall.
      rule: how leaves are cut into matrices.
      order: the layers from the input to the output, as in `factorise`.
      moments: what becomes of the optimiser's moments, as in `convert_opt_state`; the
        paper's code has `"slice"`.
      kinds: fields of your own optimiser's state, as in `convert_opt_state`.
      masked: whether checks keep the shapes (`refactor_masked`): no recompilation
        after the conversion, and no saving.
      steps: length of the run, if it is known, to see that `delay` is not beyond it.

    Raises:
      TypeError: if an attribute is something else.
      ValueError: if `config.delay` is not below `steps`, `config` needs an order, or
        `moments` or `kinds` are unknown.

    Limits:
      Steps are calls of `update`: with `optax.MultiSteps` they are its small steps.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from orthax import low_rank
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["kernel"] - x) ** 2)
      >>> config = low_rank.OIALR(delay=5, frequency=5, beta=0.3)
      >>> training = low_rank.Training(optax.adam(0.01), config)
      >>> params = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.1, 0.1]))}
      >>> state = training.init(params)
      >>> step = training.step(loss)
      >>> for _ in range(6):  # the weight is converted before the sixth step
      ...     state, value = step(state, jnp.ones((1, 4)))
      >>> state.trainable["kernel"].shape, low_rank.ranks(state.weights)
      ((2, 2), {'kernel': 2})
      >>> training.params(state)["kernel"].shape
      (4, 4)

    References:
      Coquelin et al. 2024, arXiv 2401.08505, and the authors' code.
    """

    tx: optax.GradientTransformation
    config: OIALR
    rule: components.RuleOrTree = dataclasses.field(default_factory=components.ByName)
    _: dataclasses.KW_ONLY
    order: Order = None
    moments: str = "rotate"
    kinds: Mapping[str, str] | None = None
    masked: bool = False
    steps: int | None = None

    def __post_init__(self):
        if not isinstance(self.config, OIALR):
            raise TypeError(
                f"`config` must be a low_rank.OIALR(...), got {self.config!r}."
            )
        if not hasattr(self.tx, "init") or not hasattr(self.tx, "update"):
            raise TypeError(
                f"`tx` must be an optax.GradientTransformation, got {self.tx!r}."
            )
        object.__setattr__(self, "rule", components.check_rule(self.rule))
        check_moments(self.moments, self.kinds)
        needs = ("keep_first", "keep_last", "layer_step")
        check_order(self.order, {name: getattr(self.config, name) for name in needs})
        if self.steps is not None and self.config.delay >= self.steps:
            raise ValueError(
                f"delay={self.config.delay} is beyond a run of {self.steps} steps: "
                "nothing would ever be factorised. Give a smaller delay."
            )

    def init(self, params: Any) -> TrainingState:
        """Return the state before the first step.

        Everything that the conversion will meet is tried here, on shapes alone.

        Args:
          params: the dense parameters.

        Raises:
          TypeError: as `factorise` and `convert_opt_state`.
          ValueError: as `factorise` and `convert_opt_state`, values apart.
        """
        weights, opt_state = wrapped(params), self.tx.init(params)
        jax.eval_shape(self._converted, weights, opt_state)
        zero, first = np.asarray(0, np.int32), np.asarray(self.config.delay, np.int32)
        return TrainingState(zero, zero, first, weights, opt_state)

    def params(self, state: TrainingState, trainable: Any = None) -> Any:
        """Return the dense parameters, before and after the conversion.

        Args:
          state: from `init`, `update` or `check`.
          trainable: what to take in place of `state.trainable`, for `jax.grad`.
        """
        return materialise(state.weights, trainable)

    def update(
        self, state: TrainingState, grads: Any, **extra_args: Any
    ) -> TrainingState:
        """Return the state after one update; works inside `jit` and `jax.lax.scan`.

        Args:
          state: before.
          grads: a tree like `state.trainable`: the gradient of a loss of
            `params(state, trainable)` with respect to `trainable`.
          **extra_args: for the optimiser.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.trainable, **extra_args
        )
        if self.masked:
            updates = mask_updates(updates, state.weights)
        trainable = optax.apply_updates(state.trainable, updates)
        weights = LowRankState(trainable, state.weights.frozen)
        return state._replace(step=state.step + 1, weights=weights, opt_state=opt_state)

    def check(self, state: TrainingState) -> TrainingState:
        """Return the state after what is due: the conversion, a check, or nothing.

        On the host, and not inside `jit`: shapes change. It waits for `state.step`, so
        that a loop over steps that the device is to run ahead of asks less often; what
        was due in between is done once.

        Raises:
          ValueError: if a weight holds NaN or infinity, with its path; `state` is
            unchanged.
        """
        step, checks = int(state.step), int(state.checks)
        if step < int(state.next_check):
            return state
        if not state.weights.frozen:
            weights, opt_state = self._converted(state.weights, state.opt_state)
            state = state._replace(weights=weights, opt_state=opt_state)
        weights, opt_state = self._checked(state.weights, state.opt_state, checks)
        every = self.config.frequency
        due = int(state.next_check)
        due += every * ((step - due) // every + 1)
        return TrainingState(
            step=np.asarray(step, np.int32),
            checks=np.asarray(checks + 1, np.int32),
            next_check=np.asarray(due, np.int32),
            weights=weights,
            opt_state=opt_state,
        )

    def step(
        self, loss: Callable[..., Any], *, has_aux: bool = False, donate: bool = False
    ) -> Callable[..., tuple[TrainingState, Any]]:
        """Return one step of training, compiled, with the check before it.

        Args:
          loss: of the dense parameters and whatever else it is called with.
          has_aux: whether `loss` gives a pair, the loss and anything else.
          donate: whether the weights and the state that go in are given up for those
            that come out. Not those given to `init`: hand over copies.

        Returns:
          From a `TrainingState` and the other arguments of `loss` to the next state
          and what `loss` gave.
        """

        def dense_loss(trainable: Any, frozen: Any, *args: Any) -> Any:
            # NNX lets its variables be written only where they were made: rebuilt here,
            # those among the arguments (statistics of a batch) can be.
            args = jax.tree.map(lambda x: x, args)
            return loss(materialise(LowRankState(trainable, frozen)), *args)

        gradient = jax.value_and_grad(dense_loss, has_aux=has_aux)

        # Step and checks stay on the host, so that no step waits for the one before.
        @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
        def advanced(trainable: Any, opt_state: Any, frozen: Any, *args: Any) -> Any:
            value, grads = gradient(trainable, frozen, *args)
            weights = LowRankState(trainable, frozen)
            new = self.update(TrainingState(0, 0, 0, weights, opt_state), grads)
            return new.trainable, new.opt_state, value

        def one_step(state: TrainingState, *args: Any) -> tuple[TrainingState, Any]:
            state = self.check(state)
            frozen = state.weights.frozen
            trainable, opt_state, value = advanced(
                state.trainable, state.opt_state, frozen, *args
            )
            return (
                state._replace(
                    step=np.asarray(int(state.step) + 1, np.int32),
                    weights=LowRankState(trainable, frozen),
                    opt_state=opt_state,
                ),
                value,
            )

        return one_step

    def target(self, params: Any, saved: Any) -> TrainingState:
        """Return the state that a checkpoint holds, without values, to restore into.

        Args:
          params: the dense parameters, or their `jax.ShapeDtypeStruct`s, with the
            shardings that are wanted.
          saved: the tree of the checkpoint, as `saved_ranks` takes it: with Orbax
            `ocp.StandardCheckpointer().metadata(folder)`.

        Returns:
          A `TrainingState` of `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: if the checkpoint is of other parameters, or of other leaves of
            them.
        """
        ranks = saved_ranks(saved)

        def weights(params: Any) -> LowRankState:
            return self._factorised(params, ranks) if ranks else wrapped(params)

        found, opt_state, shaped = abstract(params, weights, self.tx.init)
        check_saved(found, saved)
        count = shaped(np.asarray(0, np.int32))
        return TrainingState(count, count, count, found, opt_state)

    def _factorised(self, params: Any, ranks: Any = None) -> LowRankState:
        """Return the weights as they are after the conversion."""
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

    def _checked(
        self, weights: LowRankState, opt_state: Any, checks: int
    ) -> tuple[LowRankState, Any]:
        """Return weights after a check and the optimiser's state for them."""
        how = refactor_masked if self.masked else refactor
        new = how(weights, self.config, check=checks)
        return new, self._carried(opt_state, weights, new)

    def _carried(self, opt_state: Any, old: LowRankState, new: LowRankState) -> Any:
        return convert_opt_state(
            opt_state, old, new, self.moments, tx=self.tx, kinds=self.kinds
        )
