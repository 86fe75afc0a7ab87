"""The optimisers that are compared on a language model, and the cuts of attention.

An optimiser moves the kernels of the blocks. All else - the table of tokens, which is
the head too, that of positions, norms and biases - is AdamW's in every arm, at a rate
that all share: what differs between two arms is what happens to the kernels.
"""

import dataclasses
from typing import Any, Literal

import jax
import optax

import orthax
from examples.training.optimisers import METHODS, Method
from orthax import components, transforms

Optimiser = Literal["adamw", "muon", "normuon", "orthogonal_sgd", "orthogonal_adam"]
OPTIMISERS: tuple[Optimiser, ...] = Optimiser.__args__
Attention = Literal["whole", "per_head", "heads"]
ATTENTION: tuple[Attention, ...] = Attention.__args__
BASELINE = "adamw"  # takes no polar factors, so that no cut is told

# Whatever the cut, an update of full rank has the root mean square of AdamW's: arms
# differ in where they go and not, by the shapes of their matrices, in how far.
_SCALE = transforms.RMSMatch(0.2)
_EPS = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """An optimiser of the kernels.

    Attributes:
      optimiser: which.
      attention: how attention is cut; empty for AdamW.
      method: how polar factors are taken; empty for AdamW.
      momentum: of the Muon and SGD families.
      b1: of the Adam family, and of AdamW for all else.
      b2: likewise; of NorMuon its own default.
      weight_decay: of the kernels, decoupled, times the rate.
      scanned: whether the parameters of all blocks are stacked.
    """

    optimiser: Optimiser
    attention: Attention | Literal[""]
    method: Method | Literal[""]
    momentum: float
    b1: float
    b2: float
    weight_decay: float
    scanned: bool

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.optimiser} {self.attention}".strip()

    def rule(self) -> components.ByName:
        """Return how leaves are cut into matrices."""
        stacked = ("blocks",) if self.scanned else ()
        return components.ByName(attention=self.attention or "whole", stacked=stacked)


def _kernels(arm: Arm, rate: float | jax.Array) -> optax.GradientTransformation:
    """Return what moves the kernels."""
    decay = arm.weight_decay
    adamw = optax.adamw(rate, arm.b1, arm.b2, _EPS, weight_decay=decay)
    if arm.optimiser == "adamw":
        return adamw
    options = {"rule": arm.rule(), "method": METHODS[arm.method]}
    decayed = options | {"weight_decay": decay, "scale": _SCALE}
    match arm.optimiser:
        case "muon":
            return orthax.muon(rate, arm.momentum, **decayed)
        case "normuon":
            return orthax.normuon(rate, arm.momentum, **decayed)
        case "orthogonal_adam":
            return optax.chain(orthax.orthogonalise(**options), adamw)
        case "orthogonal_sgd":
            # The mean of what SGD's momentum sums up: its rate is Muon's.
            return optax.chain(
                orthax.orthogonalise(**options),
                orthax.scale_by_shape(_SCALE, rule=arm.rule()),
                optax.ema(arm.momentum, debias=False),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            )
    raise ValueError(
        f"`optimiser` is {arm.optimiser!r}; expected one of {', '.join(OPTIMISERS)}"
    )


def make_optimiser(
    arm: Arm, rate: float | jax.Array, rest_rate: float | jax.Array
) -> optax.GradientTransformation:
    """Return the optimiser of an arm.

    Args:
      arm: which.
      rate: of the kernels of the blocks, perhaps traced; of every arm in AdamW's units.
      rest_rate: of AdamW for all else.
    """
    rule = arm.rule()

    def labels(params: Any) -> Any:
        leaves = components.resolve(params, rule)
        names = ["rest" if leaf.cut is None else "kernels" for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    rest = optax.adamw(rest_rate, arm.b1, arm.b2, _EPS, weight_decay=0.0)
    return optax.partition({"kernels": _kernels(arm, rate), "rest": rest}, labels)
