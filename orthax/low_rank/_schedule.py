"""OIALR's numbers: when the basis is frozen, and how fast the rank may fall."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Field, type, lowest and highest value, and whether these two belong to the range.
_RANGES = (
    ("delay", int, 0, math.inf, True, False),
    ("frequency", int, 1, math.inf, True, False),
    ("beta", float, 0, 1, False, False),
    ("max_drop", float, 0, 1, False, True),
    ("min_rank_fraction", float, 0, 1, True, True),
    ("min_aspect", float, 0, 1, True, False),
    ("layer_step", float, 0, 1, True, True),
    ("rank_multiple", int, 1, math.inf, True, False),
)


@dataclasses.dataclass(frozen=True)
class OIALR:
    r"""When weights are factorised, and how their ranks fall: plain numbers.

    After `delay` steps every weight that is eligible becomes $U \Sigma V^T$, of which
    $\Sigma$ trains. Then, and after every `frequency` further steps, $\Sigma$ is
    diagonalised and singular values below `beta` times the largest are cut.

    Attributes:
      delay: steps of ordinary training, at least 0.
      frequency: steps between two checks, at least 1.
      beta: threshold, as a fraction of the largest singular value, in (0, 1).
      max_drop: largest fraction of the rank that one check cuts, in (0, 1]; the paper
        never drops more than half.
      min_rank_fraction: lowest rank, as a fraction of the short side of the matrix, in
        [0, 1]; never below rank 1.
      min_aspect: matrices whose short side is not above this fraction of the long side
        stay as they are, in [0, 1).
      keep_first: whether the first layer stays as it is. Needs an order of layers.
      keep_last: whether the last layer stays as it is. Needs an order; the paper's
        code has True.
      layer_step: the first check works on this fraction of the layers, those nearest
        to the output, every further one on as many more; in [0, 1]. At least one
        layer; 0 is all of them, always. Needs an order; the paper's code has 0.1.
      rank_multiple: ranks are rounded up to multiples of this, so that programs are
        compiled for few ranks.

    Raises:
      ValueError: if a number is outside its range.
      TypeError: if a field is of another type.

    Example:
      >>> from orthax import low_rank
      >>> low_rank.OIALR(delay=2500, frequency=500).beta  # mini-ViT on CIFAR-10
      0.15

    References:
      Coquelin et al.: "Harnessing Orthogonality to Train Low-Rank Neural Networks",
      2024, arXiv 2401.08505, and the authors' code.
    """

    delay: int
    frequency: int
    _: dataclasses.KW_ONLY
    beta: float = 0.15
    max_drop: float = 0.5
    min_rank_fraction: float = 0.01
    min_aspect: float = 0.1
    keep_first: bool = False
    keep_last: bool = False
    layer_step: float = 0.0
    rank_multiple: int = 1

    def __post_init__(self):
        for name, kind, low, high, with_low, with_high in _RANGES:
            value = getattr(self, name)
            allowed = int if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, allowed):
                wanted = "an integer" if kind is int else "a Python number"
                raise TypeError(f"`{name}` must be {wanted}, got {value!r}.")
            above = value >= low if with_low else value > low
            below = value <= high if with_high else value < high
            if not (above and below):
                ends = f"{'(['[with_low]}{low}, {high}{')]'[with_high]}"
                raise ValueError(f"`{name}` must be in {ends}, got {value}.")
        for name in ("keep_first", "keep_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`{name}` must be a bool, got {getattr(self, name)!r}."
                )

    def ranks(self, s: jax.Array | np.ndarray, rank: Any, side: int) -> Any:
        """Return the rank at which the matrices of a stack are to be cut.

        Args:
          s: singular values of each, descending, `(b, k)`, of numpy on the host.
          rank: the rank that they have, an integer or a traced one.
          side: short side of the weight's matrices.

        Returns:
          One rank for all of them, the largest that any of them needs, int32.
        """
        xp = np if isinstance(s, np.ndarray) else jnp
        # The singular values are sorted: those that are kept come first.
        above = xp.max(xp.sum(s >= self.beta * s[:, :1], axis=1), initial=0)
        lowest = xp.asarray(self._lowest(s.shape[1], side))[rank]
        wanted = xp.maximum(above, lowest)
        rounded = -(-wanted // self.rank_multiple) * self.rank_multiple
        return xp.minimum(rounded, rank).astype(np.int32)

    def _lowest(self, most: int, side: int) -> np.ndarray:
        """Return the rank that one check must leave, for every rank up to `most`.

        A table, because a traced product would be rounded otherwise than Python's.
        """
        left = [rank - math.floor(self.max_drop * rank) for rank in range(most + 1)]
        return np.maximum(left, max(1, int(self.min_rank_fraction * side)))

    def layers_at(self, check: Any, layers: int) -> Any:
        """Return how many layers, from the output, a check works on.

        Args:
          check: how many checks there have been, an integer or a traced one.
          layers: how many layers there are.
        """
        if not self.layer_step:
            return layers
        return (check + 1) * max(1, int((layers - 1) * self.layer_step))
