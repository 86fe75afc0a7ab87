r"""Low-rank training in bases that are frozen once they have settled: OIALR.

A weight becomes $U \Sigma V^T$. The optimiser sees $\Sigma$ and all parameters that are
not factorised, `LowRankState.trainable`; the model sees dense weights, `materialise`.
`Trainer` does this on a schedule; the other functions are its parts.

Shapes: `b` matrices in a leaf, `m` rows, `n` columns, `r` the rank.

Reference: Coquelin et al., "Harnessing Orthogonality to Train Low-Rank Neural
Networks", 2024, arXiv 2401.08505, and the authors' code, "the paper's code" below.
"""

from orthax._spelling import american as _american
from orthax.low_rank._factorise import (
    factorise as factorise,
    materialise as materialise,
    value_and_grad as value_and_grad,
)
from orthax.low_rank._moments import convert_opt_state as convert_opt_state
from orthax.low_rank._refactor import refactor as refactor
from orthax.low_rank._rule import with_sigmas as with_sigmas
from orthax.low_rank._schedule import OIALR as OIALR
from orthax.low_rank._state import (
    LowRankState as LowRankState,
    TrainingState as TrainingState,
    fractions as fractions,
    ranks as ranks,
)
from orthax.low_rank._trainer import Trainer as Trainer

__getattr__ = _american(__name__)
