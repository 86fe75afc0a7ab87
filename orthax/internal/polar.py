"""Names of `orthax.polar` for other rooms."""

from orthax.polar._checks import check_method as check_method
from orthax.polar._polar_factor import split_polar_factors as split_polar_factors
