"""Compare optimisers on real data: `python -m examples.train digits`.

To be read from top to bottom: what is compared, the model and its state, the optimiser,
the step, one run, many runs and the choice of the learning rate, the program. The data
sets are in `examples/data.py`, the networks in `examples/models/`, and what becomes of
finished runs - the results file, the table, the figure - in `examples/report.py`.

Every run is one row of `results.csv`, written as soon as the run is finished. Started
again, the program does what is missing. Accuracies along the way are those of the
validation images; the test images are looked at once, after the last epoch of a run
whose learning rate was already settled.
"""

import dataclasses
import functools
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import flax
import jax
import optax
import tyro
from flax import nnx
from tqdm import tqdm

import orthax
from examples.data import Split, load_digits
from examples.models.basic_cnn import BasicCNN
from examples.report import (
    COLUMNS,
    EPOCHS_SHOWN,
    KEY,
    Arm,
    Results,
    Row,
    describe_device,
    gather,
    make_table,
    plot,
    spread,
)

# ---------------------------------------------------------------- what is compared

Optimiser = Literal[
    "sgd",
    "n_sgd",
    "cn_sgd",
    "orthogonal_sgd",
    "adam",
    "orthogonal_adam",
    "muon",
    "normuon",
]
Method = Literal["auto", "svd"]

METHODS = {
    "auto": orthax.polar.Auto(),  # the library's default
    "svd": orthax.polar.SVD(null_space="complete"),  # the paper's U V^T
}
WITHOUT_METHOD = ("sgd", "n_sgd", "cn_sgd", "adam")
FIRST_TUNING_SEED = 1_000_000  # no final run shares its seed with a run of the grid


@dataclasses.dataclass(frozen=True)
class Digits:
    """Compare optimisers on scikit-learn's 8x8 digits, in about a minute on two cores.

    BasicCNN with the settings of arXiv 2202.07052, but for its 100 epochs and batches
    of 1024. Every optimiser runs at the paper's one learning rate, and at its own, the
    best of one grid by the validation images.
    """

    optimisers: tuple[Optimiser, ...] = ("sgd", "orthogonal_sgd")
    """Which optimisers to compare."""
    method: Method = "auto"
    """Polar factor: the library's default, or the exact U V^T of the paper."""
    learning_rate: float = 1e-2
    """The one rate at which every optimiser runs."""
    tune: bool = True
    """Whether every optimiser also runs at its own best rate of the grid."""
    grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    """The rates to choose from, the same for every optimiser."""
    seeds: int = 3
    """Final runs of an optimiser at a rate, each with its own weights and batches."""
    tuning_seeds: int = 3
    """Runs of an optimiser at a rate of the grid."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 256
    """Images in a step; images beyond the last whole batch sit out an epoch."""
    momentum: float = 0.9
    """Momentum of the SGD and Muon families, b1 of the Adam family."""
    weight_decay: float = 5e-4
    """On every parameter: L2 added to the gradient; decoupled in the Muon family."""
    output: Path = Path("runs/digits")
    """Folder of results.csv and curves.png."""
    fresh: bool = False
    """Whether to delete the finished runs in the folder and start over."""

    def __post_init__(self):
        def expect(holds: bool, name: str, expected: str) -> None:
            if not holds:
                found = getattr(self, name)
                raise ValueError(f"`{name}` is {found!r}; expected {expected}")

        names, methods = get_args(Optimiser), tuple(METHODS)
        chosen = set(self.optimisers)
        expect(chosen <= set(names), "optimisers", f"names among {', '.join(names)}")
        expect(
            len(chosen) == len(self.optimisers) > 0,
            "optimisers",
            "one name or more, each once",
        )
        expect(self.method in methods, "method", f"one of {', '.join(methods)}")
        for name in ("seeds", "tuning_seeds", "epochs", "batch_size"):
            expect(getattr(self, name) >= 1, name, "at least 1")
        expect(0 < self.learning_rate < math.inf, "learning_rate", "a positive number")
        expect(
            len(self.grid) > 0 and all(0 < rate < math.inf for rate in self.grid),
            "grid",
            "one positive number or more",
        )
        expect(
            list(self.grid) == sorted(set(self.grid)),
            "grid",
            "rates in increasing order, each once",
        )
        expect(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        expect(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0")
        expect(not self.output.is_file(), "output", "a folder, found a file")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the runs of one optimiser share; one compiled epoch serves them all."""

    optimiser: Optimiser
    method: Method | Literal[""]  # empty where no polar factor is taken
    momentum: float
    weight_decay: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: a row of the results file, and what tells it from the others."""

    config: str
    recipe: Recipe
    epochs: int
    learning_rate: float
    chosen: Literal["fixed", "grid", "tuned"]  # how the learning rate was
    seed: int

    def key(self) -> dict[str, str]:
        """Return the columns that identify this run, as the results file has them."""
        values = dataclasses.asdict(self)
        values |= values.pop("recipe")
        return {name: str(values[name]) for name in KEY}


# ------------------------------------------------------------- the model, its state


class State(NamedTuple):
    """All that a step changes, and the structure (no arrays) of the model."""

    graphdef: nnx.GraphDef
    params: nnx.State
    statistics: nnx.State  # the running mean and variance of batch normalisation
    optimiser: optax.OptState


@functools.partial(jax.jit, static_argnames=("shape", "recipe"))
def initialise(key: jax.Array, *, shape: tuple[int, int, int], recipe: Recipe) -> State:
    """Return the state before the first step, for images of `shape`."""
    model = BasicCNN(shape, 10, strides=(1, 2, 2), rngs=nnx.Rngs(key))
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    # The rate has no part in the optimiser's first state.
    optimiser = make_optimiser(recipe, learning_rate=1.0).init(params)
    return State(graphdef, params, statistics, optimiser)


@jax.jit
def evaluate(state: State, split: Split) -> tuple[jax.Array, jax.Array]:
    """Return mean loss and accuracy, between 0 and 1, with the running statistics."""
    model = nnx.merge(state.graphdef, state.params, state.statistics, copy=True)
    model.eval()
    logits = model(split.images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
    return loss.mean(), (logits.argmax(-1) == split.labels).mean()


# ------------------------------------------------------------------- the optimiser


def make_optimiser(
    recipe: Recipe, learning_rate: float | jax.Array
) -> optax.GradientTransformation:
    """Return the optimiser called `recipe.optimiser`.

    SGD as PyTorch has it: L2 on every parameter, then momentum, then the rate. The
    normalised and the orthogonal ones change the gradient before all that.
    """
    momentum, decay = recipe.momentum, recipe.weight_decay
    sgd = optax.chain(
        optax.add_decayed_weights(decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )
    method = METHODS.get(recipe.method)
    match recipe.optimiser:
        case "sgd":
            return sgd
        case "n_sgd":
            return optax.chain(orthax.normalise(), sgd)
        case "cn_sgd":
            return optax.chain(orthax.normalise_components(), sgd)
        case "orthogonal_sgd":
            return orthax.orthogonal_sgd(
                learning_rate, momentum, weight_decay=decay, method=method
            )
        case "adam":
            return optax.chain(
                optax.add_decayed_weights(decay), optax.adam(learning_rate, momentum)
            )
        case "orthogonal_adam":
            return orthax.orthogonal_adam(
                learning_rate, momentum, weight_decay=decay, method=method
            )
        case "muon":
            return orthax.muon(
                learning_rate, momentum, weight_decay=decay, method=method
            )
        case "normuon":
            return orthax.normuon(
                learning_rate, momentum, weight_decay=decay, method=method
            )


# ------------------------------------------------------------------------ the step


class Metrics(NamedTuple):
    """What an epoch leaves behind: numbers, accuracy between 0 and 1."""

    train_loss: jax.Array  # mean over the steps of the epoch
    validation_loss: jax.Array
    validation_accuracy: jax.Array


def train_step(
    state: State, batch: Split, learning_rate: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Return the state after one step on a batch, and the loss before it."""

    def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(state.graphdef, params, state.statistics, copy=True)
        logits = model(batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        _, _, statistics = nnx.split(model, nnx.Param, ...)
        return losses.mean(), statistics

    (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    tx = make_optimiser(recipe, learning_rate)
    updates, optimiser = tx.update(grads, state.optimiser, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.graphdef, params, statistics, optimiser), value


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_epoch(
    state: State,
    key: jax.Array,
    learning_rate: float | jax.Array,
    train: Split,
    validation: Split,
    *,
    recipe: Recipe,
) -> tuple[State, Metrics]:
    """Return the state after one pass over shuffled training images, and metrics.

    The learning rate is traced: one compilation serves every rate and seed.
    """
    steps = len(train.labels) // recipe.batch_size
    order = jax.random.permutation(key, len(train.labels))
    order = order[: steps * recipe.batch_size].reshape(steps, recipe.batch_size)

    def step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
        batch = Split(train.images[rows], train.labels[rows])
        return train_step(state, batch, learning_rate, recipe)

    # XLA's convolutions are slow inside a loop on a CPU: written out, four steps of
    # 256 digits took a sixteenth of the time on two cores (jax 0.10.2). Many steps
    # would take long to compile.
    unroll = steps if jax.default_backend() == "cpu" and steps <= 8 else 1
    state, losses = jax.lax.scan(step, state, order, unroll=unroll)
    return state, Metrics(losses.mean(), *evaluate(state, validation))


# ----------------------------------------------------------------------- one run


class Outcome(NamedTuple):
    """What one run gives; not a number from the epoch in which it diverged."""

    train_loss: float
    validation_loss: float
    curve: list[float]  # validation accuracy after every epoch
    seconds: float


def train_run(run: Run, train: Split, validation: Split) -> tuple[State, Outcome]:
    """Train one network; a run whose loss is not finite stops there."""
    key = jax.random.key(run.seed)
    shape, recipe = train.images.shape[1:], run.recipe
    state = initialise(jax.random.fold_in(key, 0), shape=shape, recipe=recipe)
    curve = [math.nan] * run.epochs
    start = time.perf_counter()
    # One run after the other: three seeds at once, by vmap, took 1.7 times as long a
    # run on two cores (jax 0.10.2).
    for epoch in range(run.epochs):
        state, metrics = train_epoch(
            state,
            jax.random.fold_in(key, epoch + 1),
            run.learning_rate,
            train,
            validation,
            recipe=recipe,
        )
        train_loss, validation_loss, accuracy = map(float, metrics)
        if not math.isfinite(train_loss + validation_loss):
            train_loss = validation_loss = math.nan
            break
        curve[epoch] = accuracy
    seconds = time.perf_counter() - start
    return state, Outcome(train_loss, validation_loss, curve, seconds)


# ---------------------------------------------------------------------- many runs


def make_row(run: Run, outcome: Outcome, test_accuracy: float | None) -> Row:
    """Return the row of a finished run; what was not reached or done is empty."""
    if test_accuracy is not None and math.isnan(outcome.curve[-1]):
        test_accuracy = math.nan  # diverged: no network to speak of
    shown = {
        f"accuracy_{epoch}": f"{outcome.curve[epoch - 1]:.4f}"
        for epoch in EPOCHS_SHOWN
        if epoch <= run.epochs
    }
    values = {
        **run.key(),
        **shown,
        "test_accuracy": "" if test_accuracy is None else f"{test_accuracy:.4f}",
        "train_loss": f"{outcome.train_loss:.6g}",
        "validation_loss": f"{outcome.validation_loss:.6g}",
        "seconds": f"{outcome.seconds:.2f}",
        "device": describe_device(),
        "python": platform.python_version(),
        **{x.__name__: x.__version__ for x in (jax, flax, optax, orthax)},
        "curve": " ".join(f"{accuracy:.4f}" for accuracy in outcome.curve),
    }
    return {name: values.get(name, "") for name in COLUMNS}


def train_runs(
    runs: Sequence[Run],
    results: Results,
    train: Split,
    validation: Split,
    test: Split | None = None,
) -> list[Row]:
    """Train what the results file does not hold; return the rows of all `runs`.

    Without test images the rows say nothing about the test.
    """
    missing = [run for run in runs if results.find(run.key()) is None]
    if len(missing) < len(runs):
        print(
            f"{len(runs) - len(missing)} of {len(runs)} runs skipped: finished in "
            f"{results.path} (--fresh starts over)"
        )
    compiled = set()
    progress = tqdm(missing, unit="run", disable=not missing)
    for run in progress:
        name = f"{run.recipe.optimiser} at {run.learning_rate:g}, seed {run.seed}"
        progress.set_description(f"{run.chosen}: {name}")
        if run.recipe not in compiled:
            # One epoch thrown away, so that `seconds` is training alone.
            train_run(dataclasses.replace(run, epochs=1), train, validation)
            compiled.add(run.recipe)
        state, outcome = train_run(run, train, validation)
        tested = None if test is None else float(evaluate(state, test)[1])
        results.append(make_row(run, outcome, tested))
        progress.set_postfix_str(f"accuracy {outcome.curve[-1]:.3f}")
    return [results.find(run.key()) for run in runs]


def tune(
    runs: Sequence[Run], results: Results, train: Split, validation: Split
) -> dict[str, float]:
    """Return the best rate of every optimiser, from runs over a grid; print them all.

    Best is the highest mean accuracy on the validation images after the last epoch;
    the lower validation loss decides between equals. An optimiser that diverged at
    every rate has none. The test images are not here.
    """
    arms = gather(train_runs(runs, results, train, validation))
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


def plan(config: Digits, chosen: str, rates: dict[str, Sequence[float]]) -> list[Run]:
    """Return the runs of every optimiser in `rates` at its rates, for every seed."""
    first, seeds = 0, config.seeds
    if chosen == "grid":
        first, seeds = FIRST_TUNING_SEED, config.tuning_seeds
    return [
        Run(
            config="digits",
            recipe=Recipe(
                name,
                "" if name in WITHOUT_METHOD else config.method,
                config.momentum,
                config.weight_decay,
                config.batch_size,
            ),
            epochs=config.epochs,
            learning_rate=rate,
            chosen=chosen,
            seed=seed,
        )
        for name in rates
        for rate in rates[name]
        for seed in range(first, first + seeds)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare optimisers as the command line says; write the results and a figure."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"digits": Digits}, prog="python -m examples.train", args=arguments
    )
    train, validation, test = jax.device_put(load_digits())
    if config.batch_size > len(train.labels):
        sys.exit(
            f"`batch_size` is {config.batch_size}; expected at most the "
            f"{len(train.labels)} training images"
        )
    try:
        results = Results(config.output / "results.csv", config.fresh)
    except ValueError as error:
        sys.exit(str(error))
    names = config.optimisers
    runs = plan(config, "fixed", dict.fromkeys(names, (config.learning_rate,)))
    if config.tune:
        grid = plan(config, "grid", dict.fromkeys(names, config.grid))
        best = tune(grid, results, train, validation)
        runs += plan(config, "tuned", {name: (rate,) for name, rate in best.items()})
    arms = gather(train_runs(runs, results, train, validation, test))

    seeds = "1 seed"
    if config.seeds > 1:
        seeds = f"mean of {config.seeds} seeds and one standard error"
    print(
        "\nvalidation accuracy by epoch, test accuracy after the last; "
        f"{seeds}; {describe_device()}\n\n{make_table(arms)}\n"
    )
    figure = config.output / "curves.png"
    plot(arms, f"digits: BasicCNN, batch {config.batch_size}; {seeds}", figure)
    print(f"{results.path}: one row a run\n{figure}: accuracy by epoch")


if __name__ == "__main__":
    main()
