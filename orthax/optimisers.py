"""Named chains of the transformations of orthax and optax, and nothing new."""

from typing import Any

import jax
import optax

from orthax import components, polar, transforms


def orthogonal_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    *,
    nesterov: bool = False,
    weight_decay: float | None = None,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.Rule = components.ByName(),
    stacking: components.Stacking = components.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    r"""Return Orthogonal-SGDM: orthogonalised gradients, then SGD with momentum.

    $v \leftarrow \gamma v + O + \lambda \theta$, $\theta \leftarrow \theta - \eta v$,
    with O the polar factor of the gradient; torch's SGD behind `orthogonalise`.

    Args:
      learning_rate: $\eta$, in spectral norm per step for matrices; a number or a
        schedule. The paper uses 1e-2.
      momentum: $\gamma$, dimensionless; None for none.
      nesterov: whether the momentum looks ahead.
      weight_decay: $\lambda$, L2 decay of all parameters, added behind the
        orthogonalisation and before the momentum, dimensionless; None for none. The
        paper uses 5e-4.
      method: how polar factors are computed; the paper's exact U V^T is
        `polar.SVD(null_space="complete")`.
      rule: how leaves are cut into matrices; others get plain SGD.
      stacking: how equal matrices are worked on together.

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
    transforms.check_hyperparameters(
        ("momentum", "weight_decay"),
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return optax.chain(
        transforms.orthogonalise(method, rule=rule, stacking=stacking),
        _decayed(weight_decay),
        optax.identity()
        if momentum is None
        else optax.trace(decay=momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def orthogonal_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float | None = None,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.Rule = components.ByName(),
    stacking: components.Stacking = components.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    """Return Orthogonal-Adam: orthogonalised gradients, then Adam.

    Args:
      learning_rate: of Adam; a number or a schedule.
      b1: decay of the first moment, dimensionless.
      b2: decay of the second moment, dimensionless; the paper uses 0.99.
      eps: added to the root of the second moment, dimensionless.
      weight_decay: L2 decay of all parameters, added behind the orthogonalisation and
        before the moments, as torch's Adam does (not decoupled), dimensionless; None
        for none.
      method: how polar factors are computed.
      rule: how leaves are cut into matrices; others get plain Adam.
      stacking: how equal matrices are worked on together.

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
    transforms.check_hyperparameters(
        ("weight_decay",),
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    return optax.chain(
        transforms.orthogonalise(method, rule=rule, stacking=stacking),
        _decayed(weight_decay),
        optax.scale_by_adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def orthogonal_lars(
    learning_rate: optax.ScalarOrSchedule,
    bias_learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    trust_coefficient: float = 1e-3,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.Rule = components.ByName(),
    stacking: components.Stacking = components.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    """Return Orthogonal-LARS: orthogonalised gradients, then LARS.

    LARS as in Barlow Twins' code: the learning rate stands outside the momentum, not
    inside as in `optax.lars`, which differs under a schedule; weight decay and trust
    ratio act on parameters of rank 2 or more, the others have a rate of their own.

    Args:
      learning_rate: of parameters of rank 2 or more; a number or a schedule.
      bias_learning_rate: of all others; default the same.
      momentum: dimensionless.
      weight_decay: L2 decay of parameters of rank 2 or more, dimensionless.
      trust_coefficient: factor of the ratio of parameter norm to update norm,
        dimensionless.
      method: how polar factors are computed.
      rule: how leaves are cut into matrices. The paper cuts convolutions alone in
        Barlow Twins: `components.OnlyConvolutions(components.ByName())`.
      stacking: how equal matrices are worked on together.

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
    transforms.check_hyperparameters(
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
    return optax.chain(
        transforms.orthogonalise(method, rule=rule, stacking=stacking),
        optax.add_decayed_weights(weight_decay, mask=_rank_two),
        optax.masked(ratio, _rank_two),
        optax.trace(decay=momentum),
        optax.masked(optax.scale_by_learning_rate(learning_rate), _rank_two),
        optax.masked(optax.scale_by_learning_rate(bias_learning_rate), _rank_below_two),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    scale: transforms.ShapeRule = transforms.Width(),
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_eps: float = 1e-8,
    adam_weight_decay: float = 0.0,
    momentum_dtype: Any | None = None,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.Rule = components.ByName(),
    stacking: components.Stacking = components.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    """Return Muon: momentum, then orthogonalisation, for matrices; AdamW for the rest.

    As `optax.contrib.muon`, with the axes of every leaf from `rule` instead of
    "two axes", and a polar factor instead of five inexact steps. With
    `method=polar.NewtonSchulz(polar.JORDAN)` and two-dimensional leaves it computes
    the same.

    Args:
      learning_rate: of the matrices, in spectral norm per step, times `scale`; a number
        or a schedule. With `scale=RMSMatch(0.2)`, that of AdamW.
      momentum: decay of the running mean of the gradient, dimensionless.
      nesterov: whether the momentum looks ahead.
      weight_decay: decoupled decay of the matrices, times the learning rate.
      scale: factor of each matrix by its shape.
      adam_learning_rate: of everything that is not cut; default `learning_rate`.
      adam_b1: decay of AdamW's first moment, dimensionless.
      adam_b2: decay of AdamW's second moment, dimensionless.
      adam_eps: added to the root of AdamW's second moment, dimensionless.
      adam_weight_decay: decoupled decay of what is not cut, times its learning rate.
      momentum_dtype: dtype of the running mean, by name or as a `jnp.dtype`; default
        that of the parameters.
      method: how polar factors are computed.
      rule: how leaves are cut; `ByName(attention="per_head")` cuts attention by head.
      stacking: how equal matrices are worked on together.

    Returns:
      The chain.

    Raises:
      TypeError, ValueError: as `orthogonalise` and `scale_by_shape`.

    Limits:
      Output heads are matrices and are cut; Muon's authors leave them to AdamW:
      `rule=ByName(skip=("head",))`, with the name that yours has.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
      >>> tx = orthax.muon(0.1, adam_learning_rate=1e-3)
      >>> grads = {"kernel": jnp.eye(2) * 9, "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"].round(4).diagonal().tolist()
      [-0.1, -0.1]

    References:
      Jordan: "Muon: An optimizer for hidden layers in neural networks", 2024,
      https://kellerjordan.github.io/posts/muon; Liu et al.: "Muon is Scalable for LLM
      Training", 2025, arXiv 2502.16982 (weight decay, `RMSMatch`).
    """
    transforms.check_hyperparameters(
        ("adam_learning_rate",),
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=adam_eps,
        adam_weight_decay=adam_weight_decay,
    )
    matrices = optax.chain(
        _averaged(momentum, nesterov, momentum_dtype),
        transforms.orthogonalise(method, rule=rule, stacking=stacking),
        transforms.scale_by_shape(scale, rule=rule),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    rest = optax.adamw(
        rate,
        adam_b1,
        adam_b2,
        adam_eps,
        mu_dtype=momentum_dtype,
        weight_decay=adam_weight_decay,
        nesterov=nesterov,
    )
    return _matrices_and_rest(matrices, rest, rule)


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    scale: transforms.ShapeRule = transforms.RMSMatch(),
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_eps: float = 1e-8,
    adam_weight_decay: float = 0.0,
    momentum_dtype: Any | None = None,
    method: polar.PolarMethod = polar.Auto(),
    rule: components.Rule = components.ByName(),
    stacking: components.Stacking = components.Stacking(),
) -> optax.GradientTransformationExtraArgs:
    """Return NorMuon: Muon with components of equal root mean square.

    Args:
      learning_rate: of the matrices, times `scale`; a number or a schedule. With the
        default scale, that of AdamW.
      momentum: decay of the running mean of the gradient, dimensionless.
      b2: decay of the running mean square of each component, dimensionless.
      eps: added to its root, dimensionless.
      nesterov: whether the momentum looks ahead.
      weight_decay: decoupled decay of the matrices, times the learning rate.
      scale: factor of each matrix by its shape.
      adam_learning_rate: of everything that is not cut; default `learning_rate`.
      adam_b1: decay of AdamW's first moment, dimensionless.
      adam_b2: decay of AdamW's second moment, dimensionless.
      adam_eps: added to the root of AdamW's second moment, dimensionless.
      adam_weight_decay: decoupled decay of what is not cut, times its learning rate.
      momentum_dtype: dtype of the running mean, by name or as a `jnp.dtype`; default
        that of the parameters.
      method: how polar factors are computed.
      rule: how leaves are cut into matrices.
      stacking: how equal matrices are worked on together.

    Returns:
      The chain.

    Raises:
      TypeError, ValueError: as `muon`.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {"kernel": jnp.eye(2)}
      >>> tx = orthax.normuon(0.1)
      >>> updates, _ = tx.update({"kernel": jnp.eye(2) * 9}, tx.init(params), params)
      >>> updates["kernel"].round(4).diagonal().tolist()
      [-0.0283, -0.0283]

    References:
      Li et al.: "NorMuon: Making Muon more efficient and scalable", 2025, arXiv
      2510.05491, Algorithm 1.
    """
    transforms.check_hyperparameters(
        ("adam_learning_rate",),
        learning_rate=learning_rate,
        momentum=momentum,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=adam_eps,
        adam_weight_decay=adam_weight_decay,
    )
    matrices = optax.chain(
        _averaged(momentum, nesterov, momentum_dtype),
        transforms.orthogonalise(method, rule=rule, stacking=stacking),
        transforms.scale_by_component_rms(b2, eps, rule=rule),
        transforms.scale_by_shape(scale, rule=rule),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    rest = optax.adamw(
        rate,
        adam_b1,
        adam_b2,
        adam_eps,
        mu_dtype=momentum_dtype,
        weight_decay=adam_weight_decay,
    )
    return _matrices_and_rest(matrices, rest, rule)


def _decayed(weight_decay: float | None) -> optax.GradientTransformation:
    # Without decay `update` needs no parameters, as in optax.sgd.
    if weight_decay is None:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)


def _averaged(
    momentum: float, nesterov: bool, dtype: Any | None
) -> optax.GradientTransformation:
    transforms.check_dtype(dtype)
    if nesterov:
        return transforms.nesterov_ema(momentum, accumulator_dtype=dtype)
    return optax.ema(momentum, accumulator_dtype=dtype)


def _matrices_and_rest(
    matrices: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    rule: components.Rule,
) -> optax.GradientTransformationExtraArgs:
    """Return `matrices` on the leaves that are cut, and `rest` on the others.

    By masks given as functions: labels for `optax.partition` would be a tree like the
    parameters, and where that is a callable (Equinox) optax takes it for a function.
    """

    def mask(want_cut: bool, tree: Any) -> Any:
        leaves = components.resolve(tree, rule)
        values = [(leaf.cut is not None) == want_cut for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(tree), values)

    return optax.chain(
        transforms.masked(matrices, lambda tree: mask(True, tree)),
        transforms.masked(rest, lambda tree: mask(False, tree)),
    )


def _rank_two(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def _rank_below_two(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim <= 1, tree)
