"""Which axes of a leaf form a matrix, and work on all matrices of a tree at once."""

from orthax.components._axes import along_axes as along_axes
from orthax.components._by_name import ByName as ByName
from orthax.components._costs import Machine as Machine, Split as Split
from orthax.components._division import Division as Division
from orthax.components._from_function import (
    FromFunction as FromFunction,
    from_function as from_function,
)
from orthax.components._from_model import (
    FromModel as FromModel,
    from_model as from_model,
)
from orthax.components._map import (
    map_matrices as map_matrices,
    map_stacks as map_stacks,
)
from orthax.components._matricisation import Matricisation as Matricisation
from orthax.components._rule import (
    ByPath as ByPath,
    Decision as Decision,
    OnlyConvolutions as OnlyConvolutions,
    Rule as Rule,
    check_rule as check_rule,
)
from orthax.components._sharded import (
    by_compiler as by_compiler,
    mesh_of as mesh_of,
)
from orthax.components._stacking import Group as Group, Stacking as Stacking
from orthax.components._tree import (
    Leaf as Leaf,
    decide_all as decide_all,
    in_one_message as in_one_message,
    resolve as resolve,
)
