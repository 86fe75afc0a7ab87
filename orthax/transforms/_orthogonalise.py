"""Replace every gradient matrix by its orthogonal polar factor."""

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
    (rows, where P < N): $O = U V^T$ for $G = U \Sigma V^T$. Put it before any
    first-order optimiser, which is the paper, or behind a momentum, which is Muon.

    Args:
      method: how polar factors are computed.
      rule: how leaves are cut into matrices; leaves that it leaves alone pass through.
      stacking: how equal matrices are worked on together.

    Returns:
      A stateless transformation; `params` and extra arguments are not looked at. The
      update keeps the dtype of the gradient and has spectral norm one per matrix:
      the learning rate behind it is in units of spectral norm per step.

    Raises:
      TypeError: if `method`, `rule` or `stacking` is something else.
      ValueError: from `init` and `update`, if the rule cannot decide a leaf or cuts
        none.

    Limits:
      Not linear: average over devices and accumulated batches first
      (`optax.MultiSteps` around the chain does). Every factor in front of it is lost:
      behind `optax.sgd(0.1)` the learning rate would be one. Clipping before it changes
      nothing, clipping behind it clips to the square root of the rank. A zero gradient
      gives a
      zero update, and directions without gradient get none, except with
      `polar.SVD(null_space="complete")` or `polar.QDWH()`.

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
        advice = ""
        if isinstance(stacking, int):
            advice = f" Write execution.Stacking(max_bytes={stacking})."
        raise TypeError(
            f"`stacking` must be a execution.Stacking, got {stacking!r} of type "
            f"{type(stacking).__name__}.{advice}"
        )

    def update(updates: optax.Updates) -> optax.Updates:
        return execution.map_matrices(work, updates, rule, stacking=stacking)

    return stateless(update, rule)
