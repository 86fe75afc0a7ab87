"""Names of `orthax.execution` for other packages."""

from orthax.execution._costs import Factors as Factors
from orthax.execution._mesh import (
    along_axes as along_axes,
    by_compiler as by_compiler,
    mesh_of as mesh_of,
)
