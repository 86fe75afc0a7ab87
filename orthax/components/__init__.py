"""Which axes of a leaf form a matrix."""

from orthax._spelling import american as _american
from orthax.components._by_name import ByName as ByName
from orthax.components._by_tree import ByTree as ByTree
from orthax.components._from_function import from_function as from_function
from orthax.components._from_model import from_model as from_model
from orthax.components._matricisation import Matricisation as Matricisation
from orthax.components._rule import (
    ByPath as ByPath,
    OnlyConvolutions as OnlyConvolutions,
    Rule as Rule,
    RuleOrTree as RuleOrTree,
)
from orthax.components._tree import Leaf as Leaf, resolve as resolve

__getattr__ = _american(__name__)
