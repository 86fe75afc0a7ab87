r"""Low-rank training whose bases are frozen when they have settled: OIALR.

A weight becomes $U \Sigma V^T$; an optimiser sees $\Sigma$ and everything that is not
factorised, `LowRankState.trainable`, and the model sees dense weights, `materialise`.
`Training` does all of it on a schedule; the other functions are its parts.

Shapes: `b` matrices in a leaf, `m` rows, `n` columns, `r` the rank.
"""

from orthax.low_rank._apply import apply as apply
from orthax.low_rank._factorise import (
    factorise as factorise,
    materialise as materialise,
)
from orthax.low_rank._fractions import (
    stored_fraction as stored_fraction,
    trainable_fraction as trainable_fraction,
)
from orthax.low_rank._masking import (
    mask_updates as mask_updates,
    refactor_masked as refactor_masked,
)
from orthax.low_rank._moments import convert_opt_state as convert_opt_state
from orthax.low_rank._refactor import refactor as refactor
from orthax.low_rank._restoring import (
    check_saved as check_saved,
    saved_ranks as saved_ranks,
)
from orthax.low_rank._schedule import OIALR as OIALR
from orthax.low_rank._sigma_rule import (
    WithSigmas as WithSigmas,
    with_sigmas as with_sigmas,
)
from orthax.low_rank._state import (
    Bases as Bases,
    LowRankState as LowRankState,
    Sigmas as Sigmas,
    TrainingState as TrainingState,
    ranks as ranks,
)
from orthax.low_rank._training import Training as Training
