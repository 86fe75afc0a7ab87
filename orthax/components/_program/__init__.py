"""What a program does with its parameters: a walk through its jaxpr, on shapes alone.

The rest of the room sees `uses_of` and the plain data that it gives.
"""

from orthax.components._program._primitives import uses_of as uses_of
from orthax.components._program._uses import (
    Found as Found,
    Part as Part,
    Use as Use,
)
from orthax.components._program._views import Piece as Piece
