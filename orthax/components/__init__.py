"""Which axes of a leaf form a matrix."""

from orthax._spelling import american as _american
from orthax.components._by_name import ByName as ByName
from orthax.components._by_tree import ByTree as ByTree
from orthax.components._from_function import (
    FromFunction as FromFunction,
    from_function as from_function,
)
from orthax.components._from_model import (
    FromModel as FromModel,
    from_model as from_model,
)
from orthax.components._matricisation import (
    Decision as Decision,
    Matricisation as Matricisation,
)
from orthax.components._paths import path_string as path_string
from orthax.components._rule import (
    ByPath as ByPath,
    OnlyConvolutions as OnlyConvolutions,
    Rule as Rule,
    RuleOrTree as RuleOrTree,
    check_rule as check_rule,
)
from orthax.components._tree import (
    Leaf as Leaf,
    decide_all as decide_all,
    in_one_message as in_one_message,
    resolve as resolve,
)

__getattr__ = _american(__name__)
