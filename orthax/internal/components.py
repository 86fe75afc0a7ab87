"""Names of `orthax.components` for other packages."""

from orthax.components._from_function import FromFunction as FromFunction
from orthax.components._from_model import FromModel as FromModel
from orthax.components._matricisation import Decision as Decision
from orthax.components._paths import path_string as path_string
from orthax.components._rule import check_rule as check_rule
from orthax.components._tree import (
    decide_all as decide_all,
    in_one_message as in_one_message,
)
