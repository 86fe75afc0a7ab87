"""Train decorrelated networks: `python -m examples.decorrelation digits` or `cifar10`.

The choice of the rates and the program; `memory` measures a large layer, `speed` a
step. The rest is in `examples/experiments/decorrelation/`: settings, trainer, the rules
by name, and what becomes of finished runs (report, page); the networks are in
`examples/models/decorrelation.py`.

Backpropagation, feedback alignment and node perturbation, each with nothing done to the
inputs of the layers, with mean removal alone, and with the rules of `orthax.nn` (Ahmad,
"Correlations Are Ruining Your Gradient Descent", 2024, arXiv 2407.10780). Every arm has
its own learning rate and decorrelation rate, the best of one grid by the validation
images. A finished run is a row of `examples/results/decorrelation.csv` and is not run
again. The test images are looked at once, after the last epoch of a run whose rates
were already settled.
"""

import math
import sys
import time
from collections.abc import Sequence

import tyro

from examples.data import Dataset
from examples.experiments.decorrelation import memory, speed
from examples.experiments.decorrelation.page import write
from examples.experiments.decorrelation.report import Rows, merit
from examples.experiments.decorrelation.settings import Cifar10, Digits, Settings
from examples.experiments.decorrelation.training import TRAINER, Recipe, Run
from examples.training import program
from examples.training.runs import Limits, seeds_of
from examples.training.side_by_side import train_runs
from examples.training.supervised import check_batches

# --------------------------------------------------------------- the choice of rates


def plan(
    config: Settings,
    recipe: Recipe,
    chosen: str,
    rates: Sequence[float],
    condition: float,
) -> list[Run]:
    """Return the runs of a recipe at some learning rates, for every seed."""
    seeds = seeds_of(chosen, config.seeds, config.tuning_seeds)
    return [
        Run(recipe, config.epochs, rate, config.schedule, chosen, seed, condition)
        for rate in rates
        for seed in seeds
    ]


def tune(
    config: Settings,
    recipes: Sequence[Recipe],
    results: Rows,
    data: Dataset,
    condition: float,
    limits: Limits,
) -> tuple[Recipe, float] | None:
    """Return the best recipe and learning rate of an arm, or None after the deadline.

    Best is the lowest validation loss, mean of all epochs and seeds: what learns fast
    and does not forget it. The rate is not a number if a run diverged at every pair.
    The test images are not looked at.
    """
    merits = {}
    for recipe in recipes:
        runs = plan(config, recipe, "grid", config.grid, condition)
        rows = train_runs(TRAINER, runs, results, data, test=False, limits=limits)
        if rows is None:
            return None
        for rate in config.grid:
            found = [row for row in rows if float(row["learning_rate"]) == rate]
            merits[recipe, rate] = merit(found)
    best = max(merits, key=merits.__getitem__)
    return (best[0], math.nan) if math.isinf(merits[best]) else best


# --------------------------------------------------------------------- the program


def finish(
    config: Settings, results: Rows, data: dict[float, Dataset], limits: Limits
) -> bool:
    """Tune and train what is missing of every arm; return if there was time for all."""
    arms = list(config.arms())
    for number, recipes in enumerate(arms, 1):
        for condition, images in data.items():
            print(f"{number}/{len(arms)}: {TRAINER.title(recipes[0])}, {condition:g}")
            best = tune(config, recipes, results, images, condition, limits)
            if best is None:
                return False
            recipe, rate = best
            if math.isnan(rate):
                print("no rate of the grid is usable: all diverged; try smaller ones")
                continue
            runs = plan(config, recipe, "tuned", (rate,), condition)
            done = train_runs(TRAINER, runs, results, images, test=True, limits=limits)
            if done is None:
                return False
    return True


def train(config: Settings) -> None:
    """Train what is missing, and write tables and figures of all rows."""
    deadline = time.monotonic() + 60 * config.minutes
    every, at_once = config.checkpoint_seconds, config.at_once
    limits = Limits(config.checkpoints, every, deadline, at_once)
    try:
        data = config.load()
        count = len(next(iter(data.values())).train.labels)
        check_batches(next(iter(config.arms()))[0], count)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    results = Rows(config.results / "decorrelation.csv")
    done = finish(config, results, data, limits)
    print(f"written: {write(config.results)}")
    if not done:
        print(f"out of time; started again, it goes on: {results.path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the command line says."""
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "digits": Digits,
            "cifar10": Cifar10,
            "memory": memory.Settings,
            "speed": speed.Settings,
        },
        prog="python -m examples.decorrelation",
        args=arguments,
    )
    if isinstance(config, Settings):
        train(config)
        return
    (memory if isinstance(config, memory.Settings) else speed).measure(config)
    print(f"written: {write(config.results)}")


if __name__ == "__main__":
    program.run(main)
