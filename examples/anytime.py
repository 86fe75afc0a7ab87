"""Train anytime networks: `python -m examples.anytime digits`, or `cifar10`.

The settings, the choice of the learning rate and the program. The rest is in
`examples/experiments/anytime/`: the trainer, the rules by name, and what becomes of
finished runs (report); the networks are in `examples/models/anytime.py`. How the paper
(Wan, Hoffmann, Lu, Maire, 2020, https://arxiv.org/abs/2008.06635) combines the
gradients of the exits and nests the stages is a reconstruction: its algorithm could not
be read.

Every network is trained with every rule of `orthax.transforms`, each at its own
learning rate, the best of one grid by the validation images; and beside them, for every
stage, a network of that stage alone that only its last exit trains. A finished run is a
row of `examples/results/anytime.csv` and is not run again. The test images are looked
at once, after the last epoch of a run whose learning rate was already settled.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from examples.data import Dataset, load_cifar10, load_digits
from examples.experiments.anytime.report import INDEPENDENT, Rows, merit, write
from examples.experiments.anytime.task_rules import RULES, STATEFUL, Rule
from examples.experiments.anytime.training import TRAINER, Recipe, Run
from examples.models.anytime import MODELS, Model
from examples.training import program
from examples.training.optimisers import WITHOUT_METHOD, Optimiser
from examples.training.runs import Limits, seeds_of
from examples.training.side_by_side import train_runs
from examples.training.study import Study
from examples.training.supervised import check_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Study):
    """What both data sets can be told."""

    models: tuple[Model, ...] = MODELS
    """How the networks grow."""
    rules: tuple[Rule, ...] = RULES
    """How the gradients of the exits become one."""
    independent: bool = True
    """Whether to train a network of its own for every stage as well."""
    stages: int = 3
    """Exits of every network."""
    width: int = 8
    """Features of stage 0; the last stage has `2**(stages - 1)` times as many."""
    depth: int = 1
    """Layers (CIFAR-10: residual blocks of every group) of stage 0 behind the first."""
    optimiser: Optimiser = "sgd"
    """What makes the step of the combined gradient."""
    grid: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    tuning_seeds: int = 4
    seeds: int = 20
    at_once: int = 20
    """Runs trained side by side; one compilation serves equal numbers."""
    momentum: float = 0.9
    """Momentum; with it no rule keeps its promise about a step exactly."""
    weight_decay: float = 5e-4
    """On every parameter."""
    two_passes: bool = False
    """Whether to save the memory of one gradient for each exit; no cosines then."""
    checkpoints: Path = Path("runs/anytime")

    def __post_init__(self):
        super().__post_init__()
        self.expect_among(MODELS, "models")
        self.expect_among(RULES, "rules")
        self.expect(len(self.models) > 0, "models", "at least one")
        self.expect_at_least(2, "stages")
        self.expect_at_least(1, "width", "depth", "at_once")
        self.expect_at_least(0, "weight_decay")
        if self.two_passes:
            stateless = not set(self.rules) & set(STATEFUL)
            expected = f"none of {', '.join(STATEFUL)} with `two_passes`"
            self.expect(stateless, "rules", f"{expected}: it keeps a state")

    def recipe(self, model: Model, rule: str, last: int, **others) -> Recipe:
        """Return the recipe of a network up to a stage, counted from one."""
        names = ("optimiser", "batch_size", "momentum", "weight_decay", "stages")
        names += ("width", "depth", "train_images", "two_passes")
        given = {x: getattr(self, x) for x in names}
        method = "" if self.optimiser in WITHOUT_METHOD else "auto"
        given |= {"method": method, "layers": "all", "b2": 0.99}
        return Recipe(model=model, rule=rule, exit=last, **given, **others)

    def arms(self) -> list[Recipe]:
        """Return the recipes that are compared, network by network."""
        arms = []
        for model in self.models:
            arms += [self.recipe(model, rule, self.stages) for rule in self.rules]
            if self.independent:
                last = range(1, self.stages + 1)
                arms += [self.recipe(model, INDEPENDENT, k) for k in last]
        return arms

    def load(self) -> Dataset:
        """Return the data."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Settings):
    """Anytime MLPs on scikit-learn's 8x8 digits, in ten minutes on two cores."""

    def recipe(self, *args, **others) -> Recipe:
        """Return the recipe of a network up to a stage."""
        return super().recipe(*args, data="digits", **others)

    def load(self) -> Dataset:
        """Return scikit-learn's digits."""
        return load_digits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10(Settings):
    """Anytime residual networks on CIFAR-10; for a GPU."""

    grid: tuple[float, ...] = (0.01, 0.03, 0.1)
    tuning_seeds: int = 1
    seeds: int = 3
    at_once: int = 1
    epochs: int = 30
    batch_size: int = 128
    augment: bool = True
    """Whether to train on random crops, framed by 4 black pixels, and mirror images."""
    data_dir: Path | None = None
    """Folder of the prepared data; default: the environment variable ORTHAX_DATA."""

    def recipe(self, *args, **others) -> Recipe:
        """Return the recipe of a network up to a stage."""
        return super().recipe(*args, data="cifar10", augment=self.augment, **others)

    def load(self) -> Dataset:
        """Return CIFAR-10."""
        return load_cifar10(self.data_dir)


# ------------------------------------------------------ the choice of the learning rate


def plan(
    config: Settings, recipe: Recipe, chosen: str, rates: Sequence[float]
) -> list[Run]:
    """Return the runs of an arm at some rates, for every seed."""
    seeds = seeds_of(chosen, config.seeds, config.tuning_seeds)
    return [
        Run(recipe, config.epochs, rate, config.schedule, chosen, seed)
        for rate in rates
        for seed in seeds
    ]


def tune(
    config: Settings, recipe: Recipe, results: Rows, data: Dataset, limits: Limits
) -> float | None:
    """Return the best rate of an arm; the test images are not looked at.

    Best is the highest accuracy on the validation images after the last epoch, mean of
    exits and seeds; the lower loss decides between equals. None after the deadline;
    not a number if a run diverged at every rate.
    """
    runs = plan(config, recipe, "grid", config.grid)
    rows = train_runs(TRAINER, runs, results, data, test=False, limits=limits)
    if rows is None:
        return None
    merits = {
        rate: merit([row for row in rows if float(row["learning_rate"]) == rate])
        for rate in config.grid
    }
    best = max(config.grid, key=merits.__getitem__)
    return math.nan if math.isinf(merits[best][0]) else best


# --------------------------------------------------------------------- the program


def finish(config: Settings, results: Rows, data: Dataset, limits: Limits) -> bool:
    """Tune and train what is missing of every arm; return if there was time for all."""
    arms = config.arms()
    for number, recipe in enumerate(arms, 1):
        print(f"{number}/{len(arms)}: {recipe.model}, {recipe.rule}")
        best = tune(config, recipe, results, data, limits)
        if best is None:
            return False
        if math.isnan(best):
            print("no rate of the grid is usable: all diverged; try smaller ones")
            continue
        runs = plan(config, recipe, "tuned", (best,))
        if train_runs(TRAINER, runs, results, data, test=True, limits=limits) is None:
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the command line says, and write tables and figures of all rows."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"digits": Digits, "cifar10": Cifar10},
        prog="python -m examples.anytime",
        args=arguments,
    )
    deadline = time.monotonic() + 60 * config.minutes
    every, at_once = config.checkpoint_seconds, config.at_once
    limits = Limits(config.checkpoints, every, deadline, at_once)
    try:
        data = config.some(config.load())
        check_batches(config.recipe("width", "sum", 1), len(data.train.labels))
        results = Rows(config.results / "anytime.csv")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    done = finish(config, results, jax.device_put(data), limits)
    print(f"written: {write(config.results, results.rows())}")
    if not done:
        print(f"out of time; started again, it goes on: {results.path}")


if __name__ == "__main__":
    program.run(main)
