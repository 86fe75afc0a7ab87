"""Replace every gradient matrix by its orthogonal polar factor."""

from __future__ import annotations

import optax

from orthax import components, execution, polar
from orthax.internal.components import check_rule
from orthax.internal.execution import Factors
from orthax.transforms._stateless import stateless


def orthogonalise(
    method: polar.PolarMethod = polar.Auto(),
    *,
    rule: components.RuleOrTree = components.ByName(),
    stacking: execution.Stacking = execution.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    r"""Replace every gradient matrix by its orthogonal polar factor.

    For a layer of N components with P parameters each, the gradient
    $G \in \mathbb{R}^{P \times N}$ becomes the nearest matrix with orthonormal columns
    (rows, where P < N): $O = U V^T$ for $G = U \Sigma V^T$. Put it before a first-order
    optimiser, as in the paper, or after a momentum, as in Muon.

    Args:
      method: how polar factors are computed.
      rule: how leaves form matrices; other leaves pass through unchanged.
      stacking: how matrices are batched and divided among devices.

    Returns:
      A stateless transformation that ignores `params` and extra arguments. The update
      has the dtype of the gradient, and spectral norm one in every matrix, so that the
      learning rate is the spectral norm of a step.

    Raises:
      TypeError: if `method`, `rule` or `stacking` is something else.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none.

    Limits:
      Not linear: average over devices and accumulated batches first (as
      `optax.MultiSteps` around the chain does). Any scaling applied before it has no
      effect: after `optax.sgd(0.1)`, the effective learning rate would be one. Clipping
      the norm before it does nothing; after it, that norm is the square root of the
      rank. A zero gradient gives a zero update, and so does every direction without
      gradient, except with `polar.SVD(null_space="complete")` or `polar.QDWH()`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import orthax
      >>> tx = optax.chain(orthax.orthogonalise(), optax.sgd(0.1, momentum=0.9))
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> grads = {"dense": {"kernel": jnp.eye(3, 2) * 7, "bias": jnp.ones(2)}}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> (updates["dense"]["kernel"].round(4) + 0.0).tolist()
      [[-0.1, 0.0], [0.0, -0.1], [0.0, 0.0]]

    References:
      Tuddenham, Pruegel-Bennett, Hare: "Orthogonalising gradients to speed up neural
      network optimisation", 2022, arXiv 2202.07052, equations (3) to (7).
    """
    work = Factors(method)
    rule = check_rule(rule)
    if not isinstance(stacking, execution.Stacking):
        raise TypeError(f"`stacking` must be an execution.Stacking, got {stacking!r}.")

    def update(updates: optax.Updates) -> optax.Updates:
        return execution.map_matrices(work, updates, rule, stacking=stacking)

    return stateless(update, rule)
