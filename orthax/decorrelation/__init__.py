"""Decorrelated inputs: z = R (x - mu), with R learnt by a rule; arrays, no layers.

`init_decorrelation` makes a state, `update_decorrelation` lets it learn from samples,
`apply_decorrelation` gives z. `orthax.nn` has layers in Flax NNX that do so.
"""

from orthax._spelling import american as _american
from orthax.decorrelation._dense_rules import (
    Blended as Blended,
    Local as Local,
    OffDiagonal as OffDiagonal,
    Scaled as Scaled,
    Whitening as Whitening,
)
from orthax.decorrelation._implicit_rules import (
    Factorised as Factorised,
    Lateral as Lateral,
)
from orthax.decorrelation._polar_rule import Polar as Polar, PolarState as PolarState
from orthax.decorrelation._rule import DecorrelationRule as DecorrelationRule
from orthax.decorrelation._update import (
    DecorrelationState as DecorrelationState,
    apply_decorrelation as apply_decorrelation,
    init_decorrelation as init_decorrelation,
    update_decorrelation as update_decorrelation,
)

__getattr__ = _american(__name__)
