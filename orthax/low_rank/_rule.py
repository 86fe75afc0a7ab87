"""The rule for trees in which Sigmas are in place of some weights."""

import dataclasses
from typing import Any

from orthax import components
from orthax.internal.components import Decision, check_rule

_SIGMA = components.Matricisation((-2,), (-1,))


def with_sigmas(
    params: Any, rule: components.RuleOrTree = components.ByName()
) -> components.Rule:
    r"""Return a rule for transformations of weights that are, or will be, factorised.

    `orthogonalise(rule=low_rank.with_sigmas(params, rule))` takes the polar factor of
    dense gradients before the conversion and of $U^T G V$, the gradient of Sigma, after
    it: the orthogonal step inside the frozen subspace, of r x r matrices.

    Args:
      params: the dense parameters, or their `jax.ShapeDtypeStruct`s.
      rule: which axes of dense leaves form matrices: the rule given to `factorise`.

    Returns:
      A rule for trees like `params` and trees like `LowRankState.trainable` alike: a
      leaf with the shape that it has in `params` is left to `rule`, one with another
      shape is a Sigma.

    Raises:
      TypeError: if `rule` is not a rule or a leaf is not an array.
      ValueError: if the rule cannot decide a leaf or finds no matrices; from the
        returned rule, for a leaf that is neither a dense weight nor a Sigma, or may be
        both.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> from orthax import low_rank
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 4, 8))}}
      >>> rule = low_rank.with_sigmas(params)
      >>> tx = orthax.orthogonalise(rule=rule)
      >>> grads = {"conv": {"kernel": 5 * jnp.eye(8)}}  # of a Sigma
      >>> updates, _ = tx.update(grads, tx.init(params))
      >>> updates["conv"]["kernel"].diagonal().round(3).tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    rule = check_rule(rule)
    leaves = components.resolve(params, rule)
    shapes = tuple((leaf.path, tuple(leaf.value.shape)) for leaf in leaves if leaf.cut)
    return WithSigmas(rule, shapes)


@dataclasses.dataclass(frozen=True)
class WithSigmas:
    """The rule that `with_sigmas` returns.

    Attributes:
      rule: which axes of dense leaves form matrices.
      shapes: path and shape of every dense leaf in which `rule` finds matrices.
    """

    rule: components.Rule
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(repr=False)

    def resolve(self, path: str, leaf: Any) -> components.Matricisation | None:
        """Return which axes of the leaf at `path` form matrices."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return which axes of the leaf at `path` form matrices, with the reason."""
        shape = tuple(leaf.shape)
        dense = dict(self.shapes).get(path)
        if dense is not None and shape != dense:
            if len(shape) > 3 or shape[-1] != shape[-2]:
                raise ValueError(
                    f"Leaf '{path}' of shape {shape} is not a Sigma, and the dense "
                    f"weight has shape {dense}: build the rule with "
                    "low_rank.with_sigmas from the parameters that are trained."
                )
            return Decision(_SIGMA.on(len(shape)), "Sigma")
        if hasattr(self.rule, "decide"):
            decision = self.rule.decide(path, leaf)
        else:
            cut = self.rule.resolve(path, leaf)
            decision = Decision(cut, type(self.rule).__name__)
        if dense is not None and decision.cut is not None:
            _check_unambiguous(decision.cut.on(len(shape)), path, shape)
        return decision


def _check_unambiguous(
    cut: components.Matricisation, path: str, shape: tuple[int, ...]
) -> None:
    """Raise if a Sigma would have the shape of the dense weight, but other axes."""
    (b, m, n), *others = cut.matrices(shape)
    side = min(m, n)
    full = (side, side) if b == 1 else (b, side, side)
    # In either order: the polar factor of the transpose is the transpose.
    last = {len(shape) - 2, len(shape) - 1}
    if not others and shape == full and {*cut.rows, *cut.columns} != last:
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be dense or a Sigma of full rank, "
            "whose matrices have other axes: exclude it in the rule that is given to "
            "low_rank.factorise and to low_rank.with_sigmas."
        )
