"""Train low-rank networks: `python -m examples.low_rank digits`, or `cifar10`.

The arms, the choice of the learning rate and the program. The settings are in
`examples/experiments/low_rank/settings.py`; what a run is, and its steps, in
`examples/experiments/low_rank/training.py`, the loops over epochs and runs in
`examples/experiments/low_rank/runs.py`, tables and figures of finished runs in
`examples/experiments/low_rank/report.py` and `examples/experiments/low_rank/page.py`.

Every network is trained at full rank and with OIALR (Coquelin et al. 2024,
https://arxiv.org/abs/2401.08505) at several thresholds, each at its own learning rate,
the best of one grid on the validation images. Controls have the ranks that OIALR ends
with: the trained network truncated at its end, and one of that rank from the start.
Then come OIALR with delay, threshold and learning rate tuned together, and with the
orthogonal step. A finished run is a row of `examples/results/low_rank.csv` and is not
run again. The test images are used once, after the last epoch of a run whose settings
are final.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tyro

from examples.data import Dataset
from examples.experiments.low_rank.page import write
from examples.experiments.low_rank.report import Rows
from examples.experiments.low_rank.runs import train_runs
from examples.experiments.low_rank.settings import NO_CUT, Cifar10, Digits, Settings
from examples.experiments.low_rank.training import Arm, Model, Recipe, Run, layers_of
from examples.training import program
from examples.training.report import Results, Row, gather
from examples.training.runs import Limits, OutOfTime, seeds_of
from examples.training.supervised import check_batches

# ------------------------------------------------------------------ one arm at a time


@dataclasses.dataclass(frozen=True)
class Study:
    """The arms of one network; each method trains what is missing of one.

    Raises:
      OutOfTime: after the deadline.
    """

    config: Settings
    results: Results
    data: Dataset
    limits: Limits

    def rows(self, runs: Sequence[Run], test: bool) -> list[Row]:
        """Return the rows of runs, trained if they are missing."""
        rows = train_runs(runs, self.results, self.data, test=test, limits=self.limits)
        if not all(rows):
            raise OutOfTime
        return rows

    def runs(self, recipe: Recipe, arm: Arm, rate: float, chosen: str) -> list[Run]:
        """Return the runs of an arm at a rate, for every seed."""
        config = self.config
        shared = recipe, config.epochs, rate, config.schedule, chosen
        seeds = seeds_of(chosen, config.seeds, config.tuning_seeds)
        return [Run(*shared, seed, arm) for seed in seeds]

    def tuned(
        self, recipe: Recipe, arms: Sequence[Arm], chosen: str = "tuned"
    ) -> list[Row]:
        """Return the rows of the best of some arms at its best rate.

        Empty if all diverged. Best is the highest accuracy on the validation images
        after the last epoch, mean of seeds; ties go to the lower loss. The test images
        are not used before that.
        """
        orthogonal = recipe.optimiser == "orthogonal_sgd"
        grid = self.config.orthogonal_grid if orthogonal else self.config.grid
        plans = [(arm, rate) for arm in arms for rate in grid]
        tried = {plan: self.runs(recipe, *plan, "grid") for plan in plans}
        rows = self.rows([run for runs in tried.values() for run in runs], test=False)
        by_key = {tuple(self._key(row)): row for row in rows}
        merits = {}
        for plan, runs in tried.items():
            results = [by_key[tuple(self._key(run.key()))] for run in runs]
            merits[plan] = gather(results)[0].merit()
        best = max(plans, key=merits.__getitem__)
        if math.isinf(merits[best][0]):
            print("no rate of the grid is usable: all diverged; try smaller ones")
            return []
        return self.rows(self.runs(recipe, *best, chosen), test=True)

    def _key(self, row: Row) -> Iterator[str]:
        return (row[name] for name in self.results.key)

    def truncated(self, recipe: Recipe, full: Sequence[Row], of: Sequence[Row]) -> None:
        """Truncate trained networks to the last ranks of OIALR, seed by seed."""
        runs = []
        for row, low in zip(full, of, strict=True):
            if "diverged" not in (row["status"], low["status"]):
                arm = _like("truncated", low, _ranks([low]))
                rate, seed = float(row["learning_rate"]), int(row["seed"])
                shared = recipe, self.config.epochs, rate, self.config.schedule
                runs.append(Run(*shared, "tuned", seed, arm))
        self.rows(runs, test=True)

    def all_of(self, model: Model) -> None:
        """Train what is missing of all arms of a network."""
        config = self.config
        recipe, parts = config.recipe(model), config.parts
        full, low = self.tuned(recipe, [Arm()]), {}
        for beta in config.betas:
            low[beta] = self.tuned(recipe, [Arm("oialr", beta, config.delay)])
        for rows in low.values():
            if not full or not rows:
                continue
            ranks = _ranks(rows)
            if ranks != tuple(layers_of(recipe).values()):
                if "truncated" in parts:
                    self.truncated(recipe, full, rows)
                if "fixed" in parts:
                    self.tuned(recipe, [_like("fixed", rows[0], ranks)])
        if "joint" in parts:
            betas = [x for x in config.betas if x > NO_CUT]
            arms = [Arm("oialr", x, delay) for delay in config.delays for x in betas]
            self.tuned(recipe, arms, "joint")
        if "orthogonal" in parts:
            recipe = config.recipe(model, "orthogonal_sgd")
            self.tuned(recipe, [Arm()])
            arm = Arm("oialr", config.orthogonal_beta, config.delay)
            self.tuned(recipe, [arm])


def _ranks(rows: Sequence[Row]) -> tuple[int, ...]:
    """Return the median ranks at the end of some runs, layer by layer."""
    ranks = [row["ranks_at_end"].split() for row in rows if row["ranks_at_end"]]
    return tuple(int(x) for x in np.median(np.array(ranks, float), axis=0))


def _like(kind: str, row: Row, ranks: tuple[int, ...]) -> Arm:
    return Arm(kind, float(row["beta"]), int(row["delay"]), ranks)


# --------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and write tables and figures of all rows."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"digits": Digits, "cifar10": Cifar10},
        prog="python -m examples.low_rank",
        args=arguments,
    )
    deadline = time.monotonic() + 60 * config.minutes
    limits = Limits(config.checkpoints, config.checkpoint_seconds, deadline)
    try:
        data = config.some(config.load())
        check_batches(config.recipe(config.models[0]), len(data.train.labels))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    results = Rows(config.results / "low_rank.csv")
    study, done = Study(config, results, jax.device_put(data), limits), True
    try:
        for model in config.models:
            study.all_of(model)
    except OutOfTime:
        done = False
    print(f"written: {write(config.results, results.rows())}")
    if not done:
        print(f"out of time; start again to resume: {results.path}")


if __name__ == "__main__":
    program.run(main)
