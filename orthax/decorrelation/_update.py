"""One decorrelating map and its statistics, as pure functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthax._linalg import replicated
from orthax.decorrelation._rule import DecorrelationRule, averaged, check_number, count


class DecorrelationState(NamedTuple):
    """What a decorrelating map z = R (x - mu) knows.

    Attributes:
      mean: running mean of the samples, shape (d,).
      transform: the state of the rule, a tree of arrays; `rule.matrix(transform)` is R.
      updates: how many batches were learnt from, int32.
      skipped: how many were not, because they were not finite or led to an R that was
        not, int32.
    """

    mean: jax.Array
    transform: Any
    updates: jax.Array
    skipped: jax.Array


def check_rule(rule: DecorrelationRule) -> None:
    """Raise unless `rule` is an instance of a decorrelation rule.

    Args:
      rule: anything.

    Raises:
      TypeError: if it is a class, lacks a method of a rule, or is callable.
    """
    what = "a decorrelation rule such as decorrelation.Polar()"
    found = f"`rule` must be {what}, got {rule!r}"
    if isinstance(rule, type):
        raise TypeError(f"{found}: a class; give an instance.")
    if not isinstance(rule, DecorrelationRule):
        raise TypeError(f"{found} of type {type(rule).__name__}.")
    if callable(rule):
        raise TypeError(
            f"{found}, which is callable: optax.inject_hyperparams would take it for a "
            "schedule. Make it a frozen dataclass with the methods of a rule."
        )


def check_shares(momentum: float, sample: float) -> None:
    """Raise unless both are numbers above zero and at most one."""
    check_number("momentum", momentum, 1)
    check_number("sample", sample, 1)


def init_decorrelation(
    features: int, rule: DecorrelationRule, dtype: jax.typing.DTypeLike = jnp.float32
) -> DecorrelationState:
    """Return the state before the first batch: mean zero and, for most rules, R = I.

    Args:
      features: the number of features d.
      rule: how R learns, such as `Scaled(1e-3)`.
      dtype: of the mean and of R, floating; statistics are computed in it.

    Returns:
      The state.

    Raises:
      TypeError: if `rule` is not a rule or `features` not an integer.
      ValueError: if `features` is not positive.

    Example:
      >>> from orthax import decorrelation
      >>> rule = decorrelation.Scaled(1e-3)
      >>> decorrelation.init_decorrelation(3, rule).transform.shape
      (3, 3)
    """
    check_rule(rule)
    features = count("features", features)
    zero = jnp.zeros((), jnp.int32)
    return DecorrelationState(
        jnp.zeros(features, dtype), rule.init(features, dtype), zero, zero
    )


def apply_decorrelation(
    state: DecorrelationState,
    x: jax.typing.ArrayLike,
    rule: DecorrelationRule,
    *,
    mean: jax.Array | None = None,
) -> jax.Array:
    """Return z = R (x - mu) for every sample.

    Args:
      state: from `init_decorrelation` or `update_decorrelation`.
      x: samples, shape (*batch, d).
      rule: the rule of the state.
      mean: mu, shape (d,); default the running mean.

    Returns:
      z, shape and dtype of `x`. Gradients flow to `x` and `mean`, never to R.

    Raises:
      TypeError: if `x` is not floating.
      ValueError: if `x` has other features than the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule = decorrelation.Scaled(1e-3)
      >>> state = decorrelation.init_decorrelation(2, rule)
      >>> x = jnp.array([[3.0, 4.0]])
      >>> decorrelation.apply_decorrelation(state, x, rule).tolist()
      [[3.0, 4.0]]
    """
    x = jnp.asarray(x)
    check_samples(state, x)
    transform = jax.lax.stop_gradient(state.transform)
    mean = jax.lax.stop_gradient(state.mean) if mean is None else mean
    rows = x.astype(state.mean.dtype).reshape(-1, x.shape[-1])
    z = rule.apply(transform, rows - mean[None])
    return z.reshape(x.shape).astype(x.dtype)


def update_decorrelation(
    state: DecorrelationState,
    x: jax.typing.ArrayLike,
    rule: DecorrelationRule,
    *,
    axis_name: Any | None = None,
    momentum: float = 0.1,
    sample: float = 1.0,
    key: jax.Array | None = None,
    mean: jax.Array | None = None,
) -> DecorrelationState:
    """Return the state after learning from one batch.

    A pure function; nothing is differentiated through. A batch with NaN or infinity, or
    one that leads to an R that is not finite, changes nothing but `skipped`.

    Args:
      state: from `init_decorrelation` or an earlier call.
      x: the batch, shape (*batch, d); all leading axes are samples.
      rule: the rule of the state.
      axis_name: inside `jax.shard_map` or `jax.pmap`, the mapped axis or axes over
        which the batch is split, as many samples on each device: statistics are those
        of the whole batch. Under `jit` with a sharded batch nothing is needed.
      momentum: weight of the new batch in the running mean, dimensionless, up to 1.
        The first batches count equally: batch t has weight `max(momentum, 1 / t)`.
      sample: which share of the samples, dimensionless, R learns from; below 1 they
        are drawn uniformly (with replacement), so that their covariance is an unbiased
        estimate of that of the batch. The mean is always that of all.
      key: random key for the draw, the same on every device; needed for `sample` < 1.
      mean: mean of the batch, shape (d,), where `x` is only a part of it; with
        `axis_name`, of the batch of all devices.

    Returns:
      The new state, of the same shapes and dtypes.

    Raises:
      TypeError: if `x` is not floating, or `rule` is not a rule.
      ValueError: if `x` has other features than the state, a share is not above 0 and
        at most 1, or `key` is missing.

    Limits:
      Fewer than two samples (on all devices together) have no statistics: the state
      comes back as it is. In float16 and bfloat16 the batch is converted first. Where
      mesh axes are explicit the batch is gathered on every device.

      A learning rate that is too large ends in an R that overflows: `skipped` then
      rises with every batch. Begin again, with a smaller one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from orthax import decorrelation
      >>> rule = decorrelation.Polar(momentum=1.0)
      >>> x = jax.random.normal(jax.random.key(0), (64, 3)) @ jnp.array(
      ...     [[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 0.1]]
      ... )
      >>> state = decorrelation.init_decorrelation(3, rule)
      >>> state = decorrelation.update_decorrelation(state, x, rule)
      >>> z = decorrelation.apply_decorrelation(state, x, rule)
      >>> (z.T @ z / 64).round(3).diagonal().tolist()
      [1.0, 1.0, 1.0]
    """
    check_rule(rule)
    check_shares(momentum, sample)
    x = jnp.asarray(x)
    check_samples(state, x)
    state, x = jax.lax.stop_gradient((state, x))
    x = replicated(x.astype(state.mean.dtype)).reshape(-1, x.shape[-1])
    if len(x) * devices(axis_name) < 2:
        return state
    if mean is None:
        mean = averaged(jnp.mean(x, axis=0), axis_name)
    if (index := drawn(len(x), sample, key, axis_name)) is not None:
        x = x[index]
    x = x - jax.lax.stop_gradient(mean)[None]
    weight = jnp.maximum(momentum, 1 / (state.updates + 1).astype(mean.dtype))
    learnt = (
        state.mean + weight * (mean - state.mean),
        rule.update(state.transform, x, axis_name=axis_name),
    )
    # The batch too: a rule that drops directions by size would drop NaN as well.
    finite = _finite((*learnt, mean, jnp.sum(jnp.abs(x))), axis_name)
    new = DecorrelationState(*learnt, state.updates + 1, state.skipped)
    kept = state._replace(skipped=state.skipped + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)


def devices(axis_name: Any | None) -> int:
    """Return how many devices share the batch."""
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def drawn(
    samples: int, sample: float, key: jax.Array | None, axis_name: Any | None
) -> jax.Array | None:
    """Return the indices of the samples to learn from, or None for all of them."""
    number = max(2, round(sample * samples))
    if sample == 1 or number >= samples:
        return None
    if key is None:
        raise ValueError(
            f"`sample` is {sample}: a share of the samples is drawn at random, which "
            "needs a `key` (in layers, `rngs`)."
        )
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    return jax.random.randint(key, (number,), 0, samples)


def _finite(tree: Any, axis_name: Any | None) -> jax.Array:
    """Return whether all entries are finite on all devices."""
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    share = averaged(jnp.all(finite).astype(jnp.float32), axis_name)
    return share == 1


def check_samples(state: DecorrelationState, x: jax.Array) -> None:
    """Raise unless the last axis of `x` has the features of the state."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating, got dtype {x.dtype}: convert it first.")
    features = state.mean.shape[-1]
    if not x.ndim or x.shape[-1] != features:
        raise ValueError(
            f"`x` must have shape (*batch, {features}), got shape {x.shape}: the state "
            f"is that of {features} features."
        )
