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

from examples.data import Dataset, Split, load_cifar10, load_digits
from examples.experiments.anytime.report import INDEPENDENT, Rows, merit, write
from examples.experiments.anytime.task_rules import RULES, STATEFUL, Rule
from examples.experiments.anytime.training import TRAINER, Recipe, Run
from examples.models.anytime import MODELS, Model
from examples.training.optimisers import WITHOUT_METHOD, Optimiser
from examples.training.report import RESULTS
from examples.training.runs import Limits, seeds_of
from examples.training.side_by_side import train_runs
from examples.training.supervised import Schedule, check_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
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
    """Learning rates to choose from, the same for every arm."""
    tuning_seeds: int = 4
    """Runs of an arm at a rate of the grid."""
    seeds: int = 20
    """Runs of an arm at its own rate."""
    at_once: int = 20
    """Runs trained side by side; one compilation serves equal numbers."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a step; those beyond the last whole batch wait for another epoch."""
    train_images: int = 0
    """Images to train on, the first ones; 0 for all."""
    schedule: Schedule = "cosine"
    """Of the learning rate."""
    momentum: float = 0.9
    """Momentum; with it no rule keeps its promise about a step exactly."""
    weight_decay: float = 5e-4
    """On every parameter."""
    two_passes: bool = False
    """Whether to save the memory of one gradient for each exit; no cosines then."""
    minutes: float = math.inf
    """Stop after the epoch that passes so many; started again, it goes on there."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    results: Path = RESULTS
    """Folder of anytime.csv, anytime.md and the figures."""
    checkpoints: Path = Path("runs/anytime")
    """Folder of what is not finished."""

    def __post_init__(self):
        for name, known in (("models", MODELS), ("rules", RULES)):
            chosen = getattr(self, name)
            holds = set(chosen) <= set(known) and len(set(chosen)) == len(chosen)
            self.expect(holds, name, f"names among {', '.join(known)}, each once")
        self.expect(len(self.models) > 0, "models", "at least one")
        self.expect(self.stages >= 2, "stages", "at least 2")
        counts = ("width", "depth", "tuning_seeds", "seeds", "at_once", "epochs")
        for name in (*counts, "batch_size"):
            self.expect(getattr(self, name) >= 1, name, "at least 1")
        holds = self.grid and all(0 < rate < math.inf for rate in self.grid)
        holds = holds and list(self.grid) == sorted(set(self.grid))
        self.expect(holds, "grid", "positive rates in increasing order, each once")
        self.expect(self.train_images >= 0, "train_images", "at least 0")
        self.expect(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        self.expect(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0")
        for name in ("minutes", "checkpoint_seconds"):
            self.expect(getattr(self, name) > 0, name, "a positive number")
        if self.two_passes:
            stateless = not set(self.rules) & set(STATEFUL)
            expected = f"none of {', '.join(STATEFUL)} with `two_passes`"
            self.expect(stateless, "rules", f"{expected}: it keeps a state")

    def expect(self, holds: bool, name: str, expected: str) -> None:
        """Raise ValueError about a setting unless something holds."""
        if not holds:
            found = getattr(self, name)
            raise ValueError(f"`{name}` is {found!r}; expected {expected}")

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

    def load_some(self) -> Dataset:
        """Return the data, with as many images to train on as are asked for."""
        data = self.load()
        there = len(data.train.labels)
        holds = self.train_images <= there
        self.expect(holds, "train_images", f"at most {there}: there are no more")
        some = self.train_images or there
        return data._replace(train=Split(*(x[:some] for x in data.train)))


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
        data = config.load_some()
        check_batches(config.recipe("width", "sum", 1), len(data.train.labels))
        results = Rows(config.results / "anytime.csv")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    done = finish(config, results, jax.device_put(data), limits)
    print(f"written: {write(config.results, results.rows())}")
    if not done:
        print(f"out of time; started again, it goes on: {results.path}")


if __name__ == "__main__":
    main()
