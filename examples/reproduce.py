"""Run the paper's CIFAR-10 study: `python -m examples.reproduce table1 --minutes 9`.

arXiv 2202.07052, Sections 2.3 and 3. The studies are in `examples/paper/studies.py`;
tables 6, 7 and 8 are the losses of 5, 2 and 4, and figures 1 to 5, 10 and 12 to 14 the
curves of the same runs. Every finished run is a row of `examples/results/cifar10.csv`,
and is not run again: any part can be run anywhere, for as long as there is time.
Whatever is run, `examples/results/README.md` and its figures are written from all rows
that are there, beside the paper's numbers; `python -m examples.reproduce report` does
only that.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from examples.data import Dataset, load_cifar10
from examples.paper import comparison, probes
from examples.paper.studies import STUDIES, Study
from examples.training import program
from examples.training.report import RESULTS, Results
from examples.training.runs import Limits
from examples.training.supervised import Run, train_runs

Name = Literal[(*STUDIES, *probes.PROBES, "report")]


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Run a study of the paper, or more of the same kind, and write what came of it."""

    study: Annotated[Name, tyro.conf.Positional]
    """Which study; `report` runs nothing."""
    models: tuple[str, ...] = ()
    """Networks to leave it at; default: all that the study has."""
    seeds: int = 5
    """Runs of every cell."""
    search_seeds: int = 1
    """Runs of every candidate where the best is searched on the validation images."""
    epochs: int | None = None
    """Passes over the training images; default: as in the paper."""
    minutes: float = math.inf
    """Stop after the epoch that passes so many; started again, it goes on there."""
    seeds_at_once: int = 1
    """Seeds trained side by side: fast on a GPU where memory allows, slow on a CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations; rows of another dtype are other rows."""
    norm_groups: int = 1
    """Parts of a batch with their own batch statistics; the paper trained on 4 GPUs."""
    data_dir: Path | None = None
    """Folder of the prepared data; default: the environment variable ORTHAX_DATA."""
    results: Path = RESULTS
    """Folder of cifar10.csv, README.md and the figures."""
    checkpoints: Path = Path("runs/reproduce")
    """Folder of what is not finished."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""

    def __post_init__(self):
        for name in ("seeds", "search_seeds", "seeds_at_once", "norm_groups"):
            if getattr(self, name) < 1:
                found = getattr(self, name)
                raise ValueError(f"`{name}` is {found}; expected at least 1")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"`epochs` is {self.epochs}; expected at least 1")
        if not self.minutes > 0:
            raise ValueError(f"`minutes` is {self.minutes}; expected a positive number")
        if self.study in STUDIES:
            known = STUDIES[self.study]().models()
            if not set(self.models) <= set(known):
                names = ", ".join(known)
                raise ValueError(
                    f"`models` is {self.models}; expected names among {names}"
                )

    def limits(self) -> Limits:
        """Return when to stop, where to leave what is not finished."""
        deadline = time.monotonic() + 60 * self.minutes
        every = self.checkpoint_seconds
        return Limits(self.checkpoints, every, deadline, self.seeds_at_once)

    def of(self, run: Run) -> Run:
        """Return a run with the settings that hold for all."""
        changes = {"dtype": self.dtype, "norm_groups": self.norm_groups}
        recipe = dataclasses.replace(run.recipe, **changes)
        return dataclasses.replace(run, recipe=recipe)


def with_seeds(run: Run, count: int) -> list[Run]:
    """Return a run with as many seeds, its own and those that follow."""
    return [dataclasses.replace(run, seed=run.seed + i) for i in range(count)]


def finish(
    config: Reproduce, study: Study, results: Results, data: Dataset, limits: Limits
) -> bool:
    """Train what is missing of a study; return whether there was time for all."""

    def trained(runs: Sequence[Run], count: int, test: bool) -> list | None:
        runs = [x for run in runs for x in with_seeds(config.of(run), count)]
        rows = train_runs(runs, results, data, test=test, limits=limits)
        return rows if len(rows) == len(runs) else None

    if trained([cell.run for cell in study.cells], config.seeds, test=True) is None:
        return False
    for candidates in study.arms.values():
        if trained(candidates, config.search_seeds, test=False) is None:
            return False
        found = [config.of(run) for run in candidates]
        best = comparison.best(found, results, config.search_seeds)
        if best and trained([best], config.seeds, test=True) is None:
            return False
    return True


def measure(config: Reproduce, data: Dataset, limits: Limits) -> bool:
    """Train and measure what is missing of a probe; return if there was time."""
    runs = [
        dataclasses.replace(x, epochs=config.epochs or x.epochs)
        for run in probes.PROBES[config.study].runs
        for x in with_seeds(config.of(run), config.seeds)
    ]
    path = config.results / "probes.csv"
    return probes.finish(config.study, runs, data, path, limits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the command line says."""
    config = tyro.cli(Reproduce, prog="python -m examples.reproduce", args=arguments)
    limits = config.limits()
    results = Results(config.results / "cifar10.csv")
    done = True
    try:
        if config.study != "report":
            data = jax.device_put(load_cifar10(config.data_dir))
        if config.study in STUDIES:
            study = STUDIES[config.study]().restricted(config.models, config.epochs)
            done = finish(config, study, results, data, limits)
            print(comparison.text(study, results.rows(), config.study))
        elif config.study in probes.PROBES:
            done = measure(config, data, limits)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    comparison.write(config.results, results.rows())
    if not done:
        print(f"out of time; started again, it goes on: {results.path}")


if __name__ == "__main__":
    program.run(main)
