"""Whole models: layers wrapped for training, and folded for inference."""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from orthax.internal.decorrelation import DecorrelationRule
from orthax.nn._decorrelated import Decorrelated
from orthax.nn._folding import folded
from orthax.nn._replacing import replaced
from orthax.nn._samples import samples_of

Model = TypeVar("Model")


def decorrelate(
    model: Model,
    rule: DecorrelationRule,
    *,
    select: Callable[[str, nnx.Module], bool] | None = None,
    copy: bool = True,
    momentum: float = 0.1,
    sample: float = 1.0,
    axis_name: Any | None = None,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Return a model with `Decorrelated` around its linear layers and convolutions.

    Every `nnx.Linear` and `nnx.Conv` is wrapped, wherever it is held: attributes,
    `nnx.Sequential`, lists, tuples, dicts. One held in several places is wrapped once.
    Kernels keep their names, one level deeper: `dense/kernel` becomes
    `dense/layer/kernel`. Make the optimiser from the new model.

    Args:
      model: an `nnx.Module`, or a container of some.
      rule: how every R learns.
      select: `select(path, layer)` says which layers are wrapped, from their path,
        joined by "/", and the layer; default all.
      copy: whether `model` stays as it is. If not, its modules are changed in place.
      momentum: as in `Decorrelated`.
      sample: as in `Decorrelated`. For convolutions, 0.1 or less: otherwise every patch
        of the batch is held in memory.
      axis_name: as in `Decorrelated`.
      rngs: random numbers for `sample` below 1.

    Returns:
      The model.

    Raises:
      TypeError: if `rule` is not a rule.
      ValueError: if no layer is selected, or, with its path, if a selected one is a
        convolution with groups or dilated inputs, a subclass of `nnx.Conv` with a
        `__call__` of its own, or stacked by `nnx.vmap`.

    Limits:
      Layers that are no `nnx.Linear` or `nnx.Conv`, such as the projections of
      `nnx.MultiHeadAttention`, stay. Layers that run under `nnx.scan` (recurrent cells)
      can be wrapped only if the scan carries their statistics: leave them out.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax import decorrelation, nn
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 3, rngs=rngs)
      ... )
      >>> model = nn.decorrelate(model, decorrelation.Polar())
      >>> [type(model.layers[i]).__name__ for i in (0, 2)]
      ['Decorrelated', 'Decorrelated']
      >>> model(jnp.ones((5, 8))).shape
      (5, 3)
    """
    wrapped = []

    def change(path: str, module: nnx.Module) -> nnx.Module | None:
        if isinstance(module, Decorrelated):
            return module
        known = isinstance(module, nnx.Linear | nnx.Conv)
        if not known or not (select is None or select(path, module)):
            return None
        wrapped.append(path)
        try:
            samples_of(module)
        except ValueError as error:
            raise ValueError(
                f"Layer '{path}': {error} Leave it out with select=lambda path, layer: "
                f"path != {path!r}."
            ) from None
        return Decorrelated(
            module,
            rule,
            momentum=momentum,
            sample=sample,
            axis_name=axis_name,
            rngs=rngs,
        )

    new = replaced(nnx.clone(model) if copy else model, change)
    if not wrapped:
        raise ValueError(
            f"No nnx.Linear or nnx.Conv of the {type(model).__name__} was selected: "
            "nothing would be decorrelated."
        )
    return new


def fuse(model: Model) -> Model:
    """Return a copy of a model with R and the mean folded into plain layers.

    For inference: what it gives is what `model` gives in evaluation, without the cost
    of R. Kernels become R^T W, biases b - mu R^T W, made where there were none.

    Args:
      model: an `nnx.Module`, or a container of some, with `Decorrelated` layers.

    Returns:
      The copy; its layers are those that were wrapped, at their old paths.

    Raises:
      ValueError: if `model` holds no `Decorrelated`, or, with its path, one whose layer
        has a `__call__` of its own: what that makes of a kernel is not known.

    Limits:
      Exact but for rounding, of the size of that of the unfused layer times the
      condition number of R.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax import decorrelation, nn
      >>> rule = decorrelation.Scaled(1e-3)
      >>> layer = nn.DecorrelatedLinear(8, 3, rule, rngs=nnx.Rngs(0))
      >>> type(nn.fuse(layer)).__name__
      'Linear'
    """
    found = []

    def change(path: str, module: nnx.Module) -> nnx.Module | None:
        if not isinstance(module, Decorrelated):
            return None
        found.append(path)
        layer = module.layer
        plain = nnx.Conv if isinstance(layer, nnx.Conv) else nnx.Linear
        if type(layer).__call__ is not plain.__call__:
            raise ValueError(
                f"Layer '{path}' is a {type(layer).__name__} with a `__call__` of its "
                f"own: only the kernel of an nnx.{plain.__name__} is known to be "
                "multiplied with the input and nothing else."
            )
        state = module.state()
        return folded(layer, module.rule, state, state.mean)

    new = replaced(nnx.clone(model), change)
    if not found:
        raise ValueError(
            f"The {type(model).__name__} holds no Decorrelated layer: nothing to fuse."
        )
    return new
