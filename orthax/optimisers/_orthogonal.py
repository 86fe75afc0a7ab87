"""Orthogonalised gradients before SGD, Adam and LARS."""

from __future__ import annotations

from typing import Any

import jax
import optax

from orthax import components, execution, polar, transforms
from orthax.internal.transforms import check_hyperparameters, promoting, without_keys


def orthogonal_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    *,
    nesterov: bool = False,
    weight_decay: float | None = None,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.RuleOrTree = components.ByName(),
    stacking: execution.Stacking = execution.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    r"""Return Orthogonal-SGDM: orthogonalised gradients, then SGD with momentum.

    $v \leftarrow \gamma v + O + \lambda \theta$, $\theta \leftarrow \theta - \eta v$,
    with O the polar factor of the gradient: `orthogonalise`, then torch's SGD.

    Args:
      learning_rate: $\eta$, in spectral norm per step for matrices; a number or a
        schedule. The paper uses 1e-2.
      momentum: $\gamma$, dimensionless; None for none.
      nesterov: whether to use Nesterov momentum.
      weight_decay: $\lambda$, coupled L2 decay of all parameters, added between
        orthogonalisation and momentum, dimensionless; None for none. The paper uses
        5e-4. (`muon` decays decoupled.)
      method: how polar factors are computed; the paper's exact U V^T is
        `polar.SVD(null_space="complete")`.
      rule: how leaves form matrices; others get plain SGD.
      stacking: how matrices are batched and divided among devices.

    Returns:
      The chain.

    Raises:
      TypeError, ValueError: as `orthogonalise`.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {"kernel": jnp.eye(2)}
      >>> tx = orthax.orthogonal_sgd(0.1)
      >>> updates, _ = tx.update({"kernel": jnp.eye(2) * 9}, tx.init(params), params)
      >>> updates["kernel"].round(4).diagonal().tolist()
      [-0.1, -0.1]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, equations (6) and (7).
    """
    check_hyperparameters(
        ("momentum", "weight_decay"),
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return without_keys(
        optax.chain(
            transforms.orthogonalise(method, rule=rule, stacking=stacking),
            _decayed(weight_decay),
            optax.identity()
            if momentum is None
            else optax.trace(decay=momentum, nesterov=nesterov),
            promoting(optax.scale_by_learning_rate(learning_rate)),
        )
    )


def orthogonal_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float | None = None,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.RuleOrTree = components.ByName(),
    stacking: execution.Stacking = execution.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    """Return Orthogonal-Adam: orthogonalised gradients, then Adam.

    Args:
      learning_rate: of Adam; a number or a schedule.
      b1: decay of the first moment, dimensionless.
      b2: decay of the second moment, dimensionless; the paper uses 0.99.
      eps: added to the root of the second moment, dimensionless.
      weight_decay: coupled L2 decay of all parameters, added between orthogonalisation
        and moments, as in torch's Adam, dimensionless; None for none.
      method: how polar factors are computed.
      rule: how leaves form matrices; others get plain Adam.
      stacking: how matrices are batched and divided among devices.

    Returns:
      The chain.

    Raises:
      TypeError, ValueError: as `orthogonalise`.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {"kernel": jnp.eye(2)}
      >>> tx = orthax.orthogonal_adam(0.1)
      >>> updates, _ = tx.update({"kernel": jnp.eye(2) * 9}, tx.init(params), params)
      >>> updates["kernel"].round(4).diagonal().tolist()
      [-0.1, -0.1]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 2.3.2 and Table 2.
    """
    check_hyperparameters(
        ("weight_decay",),
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    return without_keys(
        optax.chain(
            transforms.orthogonalise(method, rule=rule, stacking=stacking),
            _decayed(weight_decay),
            promoting(optax.scale_by_adam(b1, b2, eps)),
            promoting(optax.scale_by_learning_rate(learning_rate)),
        )
    )


def orthogonal_lars(
    learning_rate: optax.ScalarOrSchedule,
    bias_learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    trust_coefficient: float = 1e-3,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.RuleOrTree = components.ByName(),
    stacking: execution.Stacking = execution.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    """Return Orthogonal-LARS: orthogonalised gradients, then LARS.

    LARS as in Barlow Twins' code: the learning rate is outside the momentum (inside in
    `optax.lars`, which differs under a schedule), and weight decay and trust ratio
    apply to parameters of rank 2 or more only.

    Args:
      learning_rate: of parameters of rank 2 or more; a number or a schedule.
      bias_learning_rate: of all others; default the same.
      momentum: dimensionless.
      weight_decay: L2 decay of parameters of rank 2 or more, dimensionless.
      trust_coefficient: factor of the ratio of parameter norm to update norm,
        dimensionless.
      method: how polar factors are computed.
      rule: how leaves form matrices. For Barlow Twins the paper uses convolutions only:
        `components.OnlyConvolutions(components.ByName())`.
      stacking: how matrices are batched and divided among devices.

    Returns:
      The chain.

    Raises:
      TypeError, ValueError: as `orthogonalise`.

    Limits:
      The trust ratio is one where the norm of the parameter or of the update is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {"kernel": jnp.eye(2)}
      >>> tx = orthax.orthogonal_lars(0.5, weight_decay=0.0)
      >>> updates, _ = tx.update({"kernel": jnp.eye(2) * 9}, tx.init(params), params)
      >>> (updates["kernel"] * 1e3).round(4).diagonal().tolist()
      [-0.5, -0.5]

    References:
      Tuddenham et al. 2022, arXiv 2202.07052, Section 2.3.5; You, Gitman, Ginsburg:
      "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888; Zbontar
      et al.: "Barlow Twins", 2021, arXiv 2103.03230.
    """
    check_hyperparameters(
        ("bias_learning_rate",),
        learning_rate=learning_rate,
        bias_learning_rate=bias_learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
    )
    if bias_learning_rate is None:
        bias_learning_rate = learning_rate
    ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return without_keys(
        optax.chain(
            transforms.orthogonalise(method, rule=rule, stacking=stacking),
            optax.add_decayed_weights(weight_decay, mask=_rank_two),
            optax.masked(ratio, _rank_two),
            optax.trace(decay=momentum),
            optax.masked(
                promoting(optax.scale_by_learning_rate(learning_rate)), _rank_two
            ),
            optax.masked(
                promoting(optax.scale_by_learning_rate(bias_learning_rate)),
                _rank_below_two,
            ),
        )
    )


def _decayed(weight_decay: float | None) -> optax.GradientTransformation:
    # Without decay `update` needs no parameters, as in optax.sgd.
    if weight_decay is None:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)


def _rank_two(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def _rank_below_two(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim <= 1, tree)
