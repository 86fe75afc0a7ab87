"""Several losses: how their gradients become one update."""

from orthax.tasks._combine import (
    CombineTasksState as CombineTasksState,
    combine_tasks as combine_tasks,
    task_weights as task_weights,
)
from orthax.tasks._conflict_rules import (
    CAGrad as CAGrad,
    GradVac as GradVac,
    PCGrad as PCGrad,
)
from orthax.tasks._gradients import (
    combined_value_and_grad as combined_value_and_grad,
    task_value_and_grad as task_value_and_grad,
)
from orthax.tasks._rules import (
    OSGD as OSGD,
    Sum as Sum,
    Symmetric as Symmetric,
    TaskRule as TaskRule,
)
