"""The rules that make one update of the gradients of several tasks, by name."""

from typing import Literal

from orthax import tasks

Rule = Literal[
    "sum",
    "osgd",
    "osgd_reversed",
    "osgd_per_task",
    "osgd_conflict_only",
    "pcgrad",
    "gradvac",
    "cagrad",
    "symmetric",
]
RULES: tuple[Rule, ...] = Rule.__args__
STATEFUL = ("gradvac",)  # not with `tasks.combined_value_and_grad`


def make_rule(name: Rule, count: int) -> tasks.TaskRule:
    """Return the rule of a name.

    Args:
      name: which; OSGD is a reconstruction, the first task first unless reversed, and
        PCGrad and GradVac meet tasks in the given order, the papers in a random one.
      count: how many tasks there are.
    """
    match name:
        case "sum":
            return tasks.Sum()
        case "osgd":
            return tasks.OSGD()
        case "osgd_reversed":
            return tasks.OSGD(order=range(count)[::-1])
        case "osgd_per_task":
            return tasks.OSGD(normalise="per_task")
        case "osgd_conflict_only":
            return tasks.OSGD(conflict_only=True)
        case "pcgrad":
            return tasks.PCGrad()
        case "gradvac":
            return tasks.GradVac(target=None, tasks=count)
        case "cagrad":
            return tasks.CAGrad()
        case "symmetric":
            return tasks.Symmetric()
    raise ValueError(f"`name` is {name!r}; expected one of {', '.join(RULES)}")
