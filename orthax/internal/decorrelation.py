"""Names of `orthax.decorrelation` for `orthax.nn`."""

from orthax.decorrelation._rule import (
    DecorrelationRule as DecorrelationRule,
    averaged as averaged,
    count as count,
)
from orthax.decorrelation._update import (
    DecorrelationState as DecorrelationState,
    apply_decorrelation as apply_decorrelation,
    check_rule as check_rule,
    check_shares as check_shares,
    devices as devices,
    drawn as drawn,
    init_decorrelation as init_decorrelation,
    update_decorrelation as update_decorrelation,
)
