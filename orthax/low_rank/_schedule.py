"""OIALR's numbers: when weights are factorised, and how fast ranks may fall."""

import dataclasses
import math

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

    After `delay` steps every eligible weight becomes $U \Sigma V^T$, of which $\Sigma$
    trains. Then, and after every `frequency` further steps, comes a check: $\Sigma$ is
    diagonalised and singular values below `beta` times the largest are truncated.

    Attributes:
      delay: steps of dense training, at least 0. The unit of a step is that of
        `Trainer.check`: updates, or epochs.
      frequency: steps between two checks, at least 1.
      beta: threshold, as a fraction of the largest singular value, in (0, 1).
      max_drop: largest fraction of the rank that one check drops, in (0, 1]; the paper
        never drops more than half.
      min_rank_fraction: lowest rank, as a fraction of the short side of the matrix, in
        [0, 1]; never below rank 1.
      min_aspect: matrices whose short side is at most this fraction of the long side
        stay dense, in [0, 1).
      keep_first: whether the first layer stays dense. Needs an order of layers.
      keep_last: whether the last layer stays dense. Needs an order; the paper's code
        has True.
      layer_step: the first check works on this fraction of the layers, those nearest
        to the output, every further one on as many more; in [0, 1]. At least one
        layer; 0 for all layers at every check. Needs an order; the paper's code has
        0.1.
      rank_multiple: ranks are rounded up to multiples of this, so that programs are
        compiled for few ranks.

    Raises:
      ValueError: if a number is outside its range.
      TypeError: if a field has another type.

    Example:
      >>> from orthax import low_rank
      >>> low_rank.OIALR(delay=2500, frequency=500).beta  # mini-ViT on CIFAR-10
      0.15

    References:
      Coquelin et al. 2024, arXiv 2401.08505.
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

    def check_at(self, step: int, every: int = 1) -> int | None:
        """Return the number of the check that is due at a step, None without one.

        Args:
          step: how many steps there have been.
          every: steps since checks were last asked for; those missed since then are
            done once.
        """
        number, previous = (
            (at - self.delay) // self.frequency for at in (step, step - every)
        )
        return number if number > max(previous, -1) else None

    def rank(self, s: np.ndarray, side: int) -> int:
        """Return the rank to which the matrices of a leaf are truncated.

        Args:
          s: singular values of each, descending, `(b, r)`.
          side: short side of the weight's matrices.

        Returns:
          One rank for all of them, the largest that any of them needs.
        """
        r = s.shape[1]
        above = int(np.max(np.sum(s >= self.beta * s[:, :1], axis=1), initial=0))
        lowest = max(1, int(self.min_rank_fraction * side))
        lowest = max(lowest, r - math.floor(self.max_drop * r))
        wanted = max(above, lowest)
        return min(r, -(-wanted // self.rank_multiple) * self.rank_multiple)

    def layers_at(self, check: int, layers: int) -> int:
        """Return how many layers, from the output, a check works on.

        Args:
          check: how many checks came before.
          layers: how many layers there are.
        """
        if not self.layer_step:
            return layers
        return (check + 1) * max(1, int((layers - 1) * self.layer_step))
