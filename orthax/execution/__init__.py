"""Who works on which matrices, where and together with which others."""

from orthax.execution._costs import Factors as Factors, Machine as Machine, Work as Work
from orthax.execution._explain import explain as explain
from orthax.execution._explanation import (
    Explanation as Explanation,
    Row as Row,
    Share as Share,
    Stack as Stack,
)
from orthax.execution._map import map_matrices as map_matrices
from orthax.execution._mesh import (
    along_axes as along_axes,
    by_compiler as by_compiler,
    mesh_of as mesh_of,
)
from orthax.execution._stacking import Stacking as Stacking
