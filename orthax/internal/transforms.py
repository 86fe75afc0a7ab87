"""Names of `orthax.transforms` for other rooms."""

from orthax.transforms._hyperparameters import (
    check_dtype as check_dtype,
    check_hyperparameters as check_hyperparameters,
)
from orthax.transforms._masked import (
    masked as masked,
    without_keys as without_keys,
)
from orthax.transforms._promotion import promoting as promoting
