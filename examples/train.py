"""Compare optimisers on real data: `python -m examples.train digits`, or `cifar10`.

The settings of both, the choice of the learning rate and the program. The trainer is
`examples/training/supervised.py`, beside it are the optimisers and what becomes of
finished runs: the results file, the table, the figure (`report.py`). The data sets are
in `examples/data/`, the networks in `examples/models/`. The subcommand `imagenet`, one
network on as many devices as there are, is in `examples/streaming/imagenet.py`.

Every run is one row of `results.csv`, written as soon as the run is finished. Started
again, the program does what is missing. Accuracies along the way are those of the
validation images; the test images are looked at once, after the last epoch of a run
whose learning rate was already settled.
"""

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import tyro

from examples.data import Dataset, load_cifar10, load_digits
from examples.models import CLASSIFIERS
from examples.streaming import imagenet
from examples.training import program
from examples.training.checked import Checked
from examples.training.optimisers import WITHOUT_METHOD, Layers, Method, Optimiser
from examples.training.report import (
    Arm,
    Results,
    describe_device,
    gather,
    make_table,
    plot,
    plot_rates,
    spread,
)
from examples.training.runs import Limits, seeds_of
from examples.training.supervised import (
    Recipe,
    Run,
    Schedule,
    check_batches,
    train_runs,
)

# Fewer seeds of a small network are told apart by rounding alone.
_ENOUGH_SEEDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Checked):
    """What all comparisons can be told."""

    optimisers: tuple[Optimiser, ...] = ("sgd", "orthogonal_sgd")
    """Which optimisers to compare."""
    method: Method = "auto"
    """Polar factor: auto is the library's default, svd the exact U V^T of the paper."""
    layers: Layers = "all"
    """The layers whose gradients are orthogonalised."""
    learning_rate: float = 1e-2
    """The one rate at which every optimiser runs."""
    schedule: Schedule = "constant"
    """Of the rate: steps is a tenth from half of the epochs, another from 75 %."""
    tune: bool = True
    """Whether every optimiser also runs at its own best rate of the grid."""
    grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    """The rates to choose from, the same for every optimiser."""
    seeds: int = 3
    """Final runs of an optimiser at a rate, each with its own weights and batches."""
    tuning_seeds: int = 3
    """Runs of an optimiser at a rate of the grid."""
    seeds_at_once: int = 1
    """Seeds trained side by side: fast on a GPU where memory allows, slow on a CPU."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 256
    """Images in a step; those beyond the last whole batch make a smaller one."""
    momentum: float = 0.9
    """Momentum of the SGD and Muon families, b1 of the Adam family."""
    b2: float = 0.99
    """Of the Adam family; the paper's."""
    weight_decay: float = 5e-4
    """On every parameter: L2 added to the gradient; decoupled in Muon and AdamW."""
    minutes: float = math.inf
    """Stop after the epoch that passes so many; started again, it goes on there."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints, from which a run that was killed goes on."""
    output: Path = Path("runs")
    """Folder of results.csv, curves.png and the checkpoints."""
    fresh: bool = False
    """Whether to delete the finished runs in the folder and start over."""

    def __post_init__(self):
        methods = get_args(Method)
        self.expect_among(get_args(Optimiser), "optimisers")
        self.expect(self.optimisers, "optimisers", "one name or more")
        self.expect(self.method in methods, "method", f"one of {', '.join(methods)}")
        counts = ("seeds", "tuning_seeds", "seeds_at_once", "epochs", "batch_size")
        self.expect_at_least(1, *counts)
        self.expect_positive("learning_rate")
        self.expect_increasing("grid")
        self.expect_share("momentum", "b2")
        self.expect_at_least(0, "weight_decay")
        for name in ("minutes", "checkpoint_seconds"):
            self.expect(getattr(self, name) > 0, name, "a positive number")
        self.expect(not self.output.is_file(), "output", "a folder, found a file")

    def recipe(self, optimiser: Optimiser, **others) -> Recipe:
        """Return the recipe of an optimiser."""
        method = "" if optimiser in WITHOUT_METHOD else self.method
        return Recipe(
            optimiser=optimiser,
            method=method,
            layers=self.layers if method else "all",
            batch_size=self.batch_size,
            momentum=self.momentum,
            b2=self.b2,
            weight_decay=self.weight_decay,
            **others,
        )

    def load(self) -> Dataset:
        """Return the data."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Comparison):
    """Compare optimisers on scikit-learn's 8x8 digits, in about a minute on two cores.

    BasicCNN with the settings of arXiv 2202.07052, but for its 100 epochs and batches
    of 1024. Every optimiser runs at the paper's one learning rate, and at its own, the
    best of one grid by the validation images.
    """

    split: int = 0
    """Which division into training, validation and test images."""
    output: Path = Path("runs/digits")

    def __post_init__(self):
        super().__post_init__()
        self.expect_at_least(0, "split")

    def recipe(self, optimiser: Optimiser) -> Recipe:
        """Return the recipe of an optimiser."""
        data = f"digits, split {self.split}" if self.split else "digits"
        return super().recipe(optimiser, data=data, model="basic_cnn")

    def load(self) -> Dataset:
        """Return scikit-learn's digits."""
        return load_digits(self.split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10(Comparison):
    """Compare optimisers on CIFAR-10, with the settings of arXiv 2202.07052.

    100 epochs of batches of 1024 at one learning rate for all. `examples/reproduce.py`
    runs the paper's tables; this is for your own.
    """

    model: str = "basic_cnn"
    """The network: one of `examples.models.CLASSIFIERS`."""
    tune: bool = False
    epochs: int = 100
    batch_size: int = 1024
    augment: bool = True
    """Whether to train on random crops, framed by 4 black pixels, and mirror images."""
    classes: int | None = None
    """Width of the head; by default the network's own, 1000 for those of ImageNet."""
    cifar_stem: bool = False
    """Whether the networks of ImageNet begin with a 3x3 convolution, for 32x32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations."""
    norm_groups: int = 1
    """Parts of a batch with their own batch statistics; the paper trained on 4 GPUs."""
    data_dir: Path | None = None
    """Folder of the prepared data; default: the environment variable ORTHAX_DATA."""
    output: Path = Path("runs/cifar10")

    def __post_init__(self):
        super().__post_init__()
        known = f"one of {', '.join(CLASSIFIERS)}"
        self.expect(self.model in CLASSIFIERS, "model", known)
        self.expect(self.norm_groups >= 1, "norm_groups", "at least 1")
        self.expect(
            self.classes is None or self.classes >= 10, "classes", "at least 10"
        )

    def recipe(self, optimiser: Optimiser) -> Recipe:
        """Return the recipe of an optimiser."""
        names = ("model", "augment", "classes", "cifar_stem", "dtype", "norm_groups")
        given = {name: getattr(self, name) for name in names}
        return super().recipe(optimiser, data="cifar10", **given)

    def load(self) -> Dataset:
        """Return CIFAR-10."""
        return load_cifar10(self.data_dir)


# ------------------------------------------------------ the choice of the learning rate


def plan(
    config: Comparison, chosen: str, rates: dict[str, Sequence[float]]
) -> list[Run]:
    """Return the runs of every optimiser in `rates` at its rates, for every seed."""
    seeds = seeds_of(chosen, config.seeds, config.tuning_seeds)
    return [
        Run(config.recipe(name), config.epochs, rate, config.schedule, chosen, seed)
        for name in rates
        for rate in rates[name]
        for seed in seeds
    ]


def tune(
    runs: Sequence[Run], results: Results, data: Dataset, limits: Limits = Limits()
) -> dict[str, float] | None:
    """Return the best rate of every optimiser, from runs over a grid; print them all.

    Best is the highest mean accuracy on the validation images after the last epoch;
    the lower validation loss decides between equals. An optimiser that diverged at
    every rate has none. The test images are not looked at. None after the deadline.
    """
    rows = train_runs(runs, results, data, test=False, limits=limits)
    if len(rows) < len(runs):
        return None
    arms = gather(rows)
    best = {}
    print("\nvalidation accuracy after the last epoch, by learning rate (* is best)")
    for name in dict.fromkeys(arm.optimiser for arm in arms):
        tried = [arm for arm in arms if arm.optimiser == name]
        winner = max(tried, key=Arm.merit)
        for arm in tried:
            mark = "*" if arm is winner else ""
            print(f"  {name:16}{arm.learning_rate:8g}  {spread(arm.last)} {mark}")
        if math.isinf(winner.merit()[0]):
            print(f"  note: no rate of the grid is usable for {name}; try smaller ones")
            continue
        best[name] = winner.learning_rate
        if len(tried) > 1 and winner in (tried[0], tried[-1]):
            end = "lowest" if winner is tried[0] else "highest"
            print(f"  note: {name} is best at the {end} rate of the grid; widen it")
    return best


# --------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"digits": Digits, "cifar10": Cifar10, "imagenet": imagenet.Imagenet},
        prog="python -m examples.train",
        args=arguments,
    )
    if isinstance(config, imagenet.Imagenet):
        imagenet.run_or_exit(config)
    else:
        compare(config)


def compare(config: Comparison) -> None:
    """Compare optimisers as a config says; write the results and a figure."""
    limits = Limits(
        config.output / "checkpoints",
        config.checkpoint_seconds,
        time.monotonic() + 60 * config.minutes,
        config.seeds_at_once,
    )
    try:
        data = config.load()
        check_batches(config.recipe("sgd"), len(data.train.labels))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    data = jax.device_put(data)
    results = Results(config.output / "results.csv", config.fresh)
    if config.fresh:
        shutil.rmtree(limits.folder, ignore_errors=True)
    names = config.optimisers
    runs = plan(config, "fixed", dict.fromkeys(names, (config.learning_rate,)))
    best, grid = {}, []
    if config.tune:
        grid = plan(config, "grid", dict.fromkeys(names, config.grid))
        best = tune(grid, results, data, limits)
    if best is not None:
        runs += plan(config, "tuned", {name: (rate,) for name, rate in best.items()})
        rows = train_runs(runs, results, data, limits=limits)
    if best is None or len(rows) < len(runs):
        print(f"out of time; started again, it goes on: {results.path}")
        return
    searched = gather(results.find(run.key()) for run in grid)
    present(config, gather(rows), searched, results.path)


def present(
    config: Comparison, arms: Sequence[Arm], searched: Sequence[Arm], path: Path
) -> None:
    """Print the table of the final runs; draw their curves, and the search."""
    seeds = "1 seed"
    if config.seeds > 1:
        seeds = f"mean of {config.seeds} seeds and one standard error"
    print(
        "\nvalidation accuracy by epoch, test accuracy after the last; "
        f"{seeds}; {describe_device()}\n\n{make_table(arms)}\n"
    )
    recipe = config.recipe("sgd")
    title = f"{recipe.data}: {recipe.model}, batch {config.batch_size}; {seeds}"
    figure = config.output / "curves.png"
    plot(arms, title, figure)
    print(f"{path}: one row a run\n{figure}: accuracy by epoch")
    if searched:
        figure = config.output / "rates.png"
        plot_rates(searched, title, figure)
        print(f"{figure}: accuracy by learning rate")
    if config.tune and min(config.seeds, config.tuning_seeds) < _ENOUGH_SEEDS:
        print(
            f"\nA demonstration: {config.tuning_seeds} seeds a rate choose between "
            "neighbouring rates by chance, and on another processor perhaps another "
            "one. With --seeds 20 --tuning-seeds 20 the difference decides."
        )


if __name__ == "__main__":
    program.run(main)
