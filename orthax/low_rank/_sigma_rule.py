"""The rule that cuts Sigmas as matrices, and everything else as another rule does."""

import dataclasses
from typing import Any

from orthax import components

_SIGMA = components.Matricisation((-2,), (-1,))
_STACKS = "/stacks/"


@dataclasses.dataclass(frozen=True)
class WithSigmas:
    """The rule that `with_sigmas` makes.

    A leaf of the shape that it has in the dense parameters is cut as `rule` says; one
    of another shape is a Sigma, each of whose matrices is cut as it is.

    Attributes:
      rule: how dense leaves are cut.
      shapes: path and shape of every leaf of the dense parameters that the rule cuts.

    Raises:
      TypeError: if `rule` is no rule.
      ValueError: from `resolve`, for a leaf that is neither, or that might be both.
    """

    rule: components.Rule
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(repr=False)

    def __post_init__(self):
        object.__setattr__(self, "rule", components.check_rule(self.rule))

    def resolve(self, path: str, leaf: Any) -> components.Matricisation | None:
        """Return the cut of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> components.Decision:
        """Return the cut of the leaf at `path`, with the reason."""
        shapes, shape = dict(self.shapes), tuple(leaf.shape)
        owner = path if path in shapes else path.rpartition(_STACKS)[0]
        if owner in shapes and shape != shapes[owner]:
            if len(shape) > 3 or shape[-1] != shape[-2]:
                raise ValueError(
                    f"Leaf '{path}' of shape {shape} is no Sigma, and the dense weight "
                    f"has shape {shapes[owner]}: build the rule with "
                    "low_rank.with_sigmas from the parameters that are trained."
                )
            return components.Decision(_SIGMA.on(len(shape)), "Sigma")
        if hasattr(self.rule, "decide"):
            found = self.rule.decide(path, leaf)
        else:
            cut = self.rule.resolve(path, leaf)
            found = components.Decision(cut, type(self.rule).__name__)
        if owner in shapes and found.cut is not None:
            _check_not_both(found.cut.on(len(shape)), path, shape)
        return found


def _check_not_both(
    cut: components.Matricisation, path: str, shape: tuple[int, ...]
) -> None:
    """Raise if a Sigma has the shape of the dense weight and is cut otherwise."""
    stacks = cut.matrices(shape)
    b, m, n = stacks[0]
    side = min(m, n)
    full = (side, side) if b == 1 else (b, side, side)
    # One way round or the other: a polar factor does not mind.
    last = {len(shape) - 2, len(shape) - 1}
    if len(stacks) == 1 and shape == full and {*cut.rows, *cut.columns} != last:
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be dense or a Sigma of full rank, "
            "which would be cut along other axes: leave it out by the rule that is "
            "given to low_rank.factorise and to low_rank.with_sigmas."
        )


def with_sigmas(
    params: Any, rule: components.RuleOrTree = components.ByName()
) -> WithSigmas:
    r"""Return a rule for transformations of weights that are, or will be, factorised.

    `orthogonalise(rule=low_rank.with_sigmas(params, rule))` takes the polar factor of
    dense gradients before the conversion and of $U^T G V$, the gradient of Sigma,
    behind it: the orthogonal step inside the frozen subspace, of r x r matrices.

    Args:
      params: the dense parameters, or their `jax.ShapeDtypeStruct`s.
      rule: how dense leaves are cut: the rule that `factorise` is given.

    Returns:
      A rule for trees like `params` and trees like `LowRankState.trainable` alike.

    Raises:
      TypeError: if `rule` is no rule or a leaf is no array.
      ValueError: if the rule cannot decide a leaf or cuts none; from the rule, for a
        leaf that might be dense or a Sigma cut along other axes.

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

    References:
      Tuddenham et al. 2022, arXiv 2202.07052; Coquelin et al. 2024, arXiv 2401.08505.
    """
    rule = components.check_rule(rule)
    leaves = components.resolve(params, rule)
    shapes = tuple((leaf.path, tuple(leaf.value.shape)) for leaf in leaves if leaf.cut)
    return WithSigmas(rule, shapes)
