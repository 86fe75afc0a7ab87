"""The rules that make one update of the gradients of several tasks, by name."""

from typing import Literal

from orthax import transforms

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
STATEFUL = ("gradvac",)  # not with `transforms.combined_value_and_grad`


def make_rule(name: Rule, tasks: int) -> transforms.TaskRule:
    """Return the rule of a name.

    Args:
      name: which; OSGD is a reconstruction, the first task first unless reversed, and
        PCGrad and GradVac meet tasks in the given order, the papers in a random one.
      tasks: how many there are.
    """
    match name:
        case "sum":
            return transforms.Sum()
        case "osgd":
            return transforms.OSGD()
        case "osgd_reversed":
            return transforms.OSGD(order=range(tasks)[::-1])
        case "osgd_per_task":
            return transforms.OSGD(normalise="per_task")
        case "osgd_conflict_only":
            return transforms.OSGD(conflict_only=True)
        case "pcgrad":
            return transforms.PCGrad()
        case "gradvac":
            return transforms.GradVac(target=None, tasks=tasks)
        case "cagrad":
            return transforms.CAGrad()
        case "symmetric":
            return transforms.Symmetric()
    raise ValueError(f"`name` is {name!r}; expected one of {', '.join(RULES)}")
