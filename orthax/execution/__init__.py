"""Which matrices are batched, and which device computes them."""

from orthax.execution._costs import Machine as Machine, Work as Work
from orthax.execution._explain import explain as explain
from orthax.execution._explanation import (
    Explanation as Explanation,
    Row as Row,
    Share as Share,
    Stack as Stack,
)
from orthax.execution._map import map_matrices as map_matrices
from orthax.execution._stacking import Stacking as Stacking
