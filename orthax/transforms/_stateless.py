"""Transformations of the update alone, checked against the tree at `init`."""

from collections.abc import Callable
from typing import Any

import optax

from orthax import components


def stateless(
    f: Callable[[optax.Updates], optax.Updates], rule: components.Rule
) -> optax.GradientTransformationExtraArgs:
    """Return the stateless transformation that applies `f` to the updates.

    Unlike `optax.stateless`, `init` checks the parameters, so that a leaf that the rule
    cannot decide is reported before the first step.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        components.resolve(params, rule)
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        return f(updates), state

    return optax.GradientTransformationExtraArgs(init, update)
