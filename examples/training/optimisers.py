"""The optimisers that the trainers compare, by name, and their polar methods."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import orthax
from orthax import components, execution, polar

Optimiser = Literal[
    "sgd",
    "n_sgd",
    "cn_sgd",
    "orthogonal_sgd",
    "sgd_orthogonal",
    "adam",
    "orthogonal_adam",
    "adamw",
    "muon",
    "normuon",
]
Method = Literal["auto", "fast", "svd", "svd_zero", "newton_schulz", "jordan", "qr"]
Layers = Literal["all", "convolutions"]
WITHOUT_METHOD = ("sgd", "n_sgd", "cn_sgd", "adam", "adamw")


@dataclasses.dataclass(frozen=True)
class QR:
    """The orthonormal factor of a QR decomposition, in place of the polar factor.

    The paper passes it over as less stable (Section 3.4). Columns (rows, where the
    matrix is wide) are orthonormalised in turn, so that the first keeps its direction
    and the last is what the others leave of it; every column keeps its sense.
    """

    def factor(self, x: jax.Array) -> jax.Array:
        """Return Q of every matrix of a stack, `(b, m, n)`."""
        if x.shape[-2] < x.shape[-1]:
            return self.factor(x.mT).mT
        # One after another: batched decompositions may hang on a CPU.
        q, r = jax.lax.map(lambda a: tuple(jnp.linalg.qr(a)), x)
        signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
        return q * jnp.where(signs == 0, 1, signs)[:, None, :]

    def flops(self, m: int, n: int) -> float:
        """Return the operations for one m x n matrix, with Q formed."""
        short, long = min(m, n), max(m, n)
        return 4.0 * short**2 * (long - short / 3)


METHODS: dict[str, polar.PolarMethod] = {
    "auto": polar.Auto(),  # the library's default
    "fast": polar.Auto("fast"),
    "svd": polar.SVD(null_space="complete"),  # the paper's U V^T
    "svd_zero": polar.SVD(),
    "newton_schulz": polar.NewtonSchulz(),
    "jordan": polar.NewtonSchulz(polar.JORDAN),  # Muon's five steps
    "qr": QR(),
}
RULES: dict[str, components.Rule] = {
    "all": components.ByName(),
    "convolutions": components.OnlyConvolutions(components.ByName()),
}


def make_optimiser(
    name: Optimiser,
    learning_rate: float | jax.Array,
    *,
    momentum: float,
    weight_decay: float,
    b2: float = 0.999,
    method: Method | Literal[""] = "auto",
    layers: Layers = "all",
    stacking: execution.Stacking = execution.Stacking(),
) -> optax.GradientTransformation:
    """Return the optimiser of a name.

    SGD and Adam as PyTorch has them: L2 on every parameter, then the optimiser. The
    normalised and the orthogonal ones change the gradient before all that;
    `sgd_orthogonal` takes the polar factor behind the momentum. AdamW and Muon decay
    the weights apart.

    Args:
      name: which.
      learning_rate: the rate, perhaps traced.
      momentum: of the SGD and Muon families, b1 of the Adam family.
      weight_decay: on every parameter.
      b2: of the Adam family.
      method: how polar factors are taken, where they are.
      layers: of which layers.
      stacking: how equal matrices are worked on together.
    """
    decay = optax.add_decayed_weights(weight_decay)
    sgd = optax.sgd(learning_rate, momentum)
    adam = optax.adam(learning_rate, momentum, b2)
    taken = METHODS.get(method, polar.Auto())
    how = {"method": taken, "rule": RULES[layers], "stacking": stacking}
    options = {"weight_decay": weight_decay, **how}
    match name:
        case "sgd":
            return optax.chain(decay, sgd)
        case "n_sgd":
            return optax.chain(orthax.normalise(), decay, sgd)
        case "cn_sgd":
            return optax.chain(orthax.normalise_components(), decay, sgd)
        case "orthogonal_sgd":
            return orthax.orthogonal_sgd(learning_rate, momentum, **options)
        case "sgd_orthogonal":
            factors = orthax.orthogonalise(**how)
            rate = optax.scale_by_learning_rate(learning_rate)
            return optax.chain(optax.trace(momentum), factors, decay, rate)
        case "adam":
            return optax.chain(decay, adam)
        case "orthogonal_adam":
            return orthax.orthogonal_adam(learning_rate, momentum, b2, **options)
        case "adamw":
            return optax.adamw(learning_rate, momentum, b2, weight_decay=weight_decay)
        case "muon":
            return orthax.muon(learning_rate, momentum, **options)
        case "normuon":
            return orthax.normuon(learning_rate, momentum, **options)
    raise ValueError(f"`name` is {name!r}; expected one of {', '.join(NAMES)}")


NAMES = Optimiser.__args__
