"""Train a GPT on a text: `python -m examples.train_lm train --sample 500`.

`study` compares optimisers and cuts of attention, each at its own learning rate, by
step and by time, and writes `examples/results/language.md`; `speed` times their steps;
`page` writes the page of the rows that are there.
The rest is in `examples/experiments/language/`: settings, arms, trainer, and what
becomes of finished runs (report, page); the network is `examples/models/gpt.py`, the
text `examples/data/text.py`.

The first nine tenths of the text are trained on, by the next twentieth rates are
chosen, and the last one is looked at once, behind a run whose rates were already
settled. A finished run is a row of `language.csv` and is not run again; what is stopped
goes on from its last checkpoint.
"""

import itertools
import math
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import tyro
from tqdm import tqdm

from examples.data import Text
from examples.experiments.language import report, speed
from examples.experiments.language.arms import BASELINE, Arm
from examples.experiments.language.comparisons import Page, Speed, Study
from examples.experiments.language.figures import draw_single
from examples.experiments.language.page import write
from examples.experiments.language.report import Rows, merit
from examples.experiments.language.sampling import sample
from examples.experiments.language.settings import Rates, Train
from examples.experiments.language.training import TRAINER, Metrics, Run
from examples.training import program
from examples.training.runs import Limits, OutOfTime
from examples.training.side_by_side import programs, train_runs, train_together
from examples.training.supervised import State

_AGAIN = "out of time; started again, it goes on"

# ------------------------------------------------------------------------ the study


def tune(
    config: Study,
    arm: Arm,
    pairs: Sequence[Rates],
    results: Rows,
    text: Text,
    limits: Limits,
) -> Rates | None:
    """Return the best of some pairs of rates of an arm; the test part is not looked at.

    Best is the lowest validation loss behind the last step, mean of seeds. None after
    the deadline; not a number if a run diverged at every pair.
    """
    runs = config.plan(arm, text, report.GRID, pairs)
    rows = train_runs(TRAINER, runs, results, text, test=False, limits=limits)
    if rows is None:
        return None
    merits = {
        pair: merit([row for row in rows if report.rates_of(row) == pair])
        for pair in pairs
    }
    best = max(pairs, key=merits.__getitem__)
    return (math.nan, math.nan) if math.isinf(merits[best]) else best


def compare(
    config: Study,
    arm: Arm,
    pairs: Sequence[Rates],
    results: Rows,
    text: Text,
    limits: Limits,
    ratio: float,
) -> Rates | None:
    """Return the best rates of an arm, once it has run with them, by step and by time.

    For equal time it takes as many steps as fit into AdamW's time, of which one of its
    steps takes `ratio`. None after the deadline.
    """
    best = tune(config, arm, pairs, results, text, limits)
    if best is None or math.isnan(best[0]):
        return best
    epochs = config.steps // config.evaluate_every
    final = [(report.TUNED, epochs)]
    if arm.optimiser != BASELINE:
        fit = max(1, min(epochs, int(epochs / ratio)))
        final.append((report.EQUAL_TIME, fit))
    for chosen, epochs in final:
        runs = config.plan(arm, text, chosen, (best,), epochs=epochs)
        test = chosen == report.TUNED
        if train_runs(TRAINER, runs, results, text, test=test, limits=limits) is None:
            return None
    return best


def finish(config: Study, results: Rows, text: Text, limits: Limits) -> bool:
    """Tune and train what is missing of every arm; return if there was time for all.

    AdamW comes first, at every pair of rates: what is best there for all but the
    kernels is the rate of these in the other arms.
    """
    arms, rest = config.arms(), config.rest_grid
    recipes = [config.run(arm, text, (1.0, 1.0), 0).recipe for arm in arms]
    ratios = speed.ratios(recipes, config.rounds, config.results)
    for number, arm in enumerate(arms, 1):
        print(f"{number}/{len(arms)}: {arm.name}, {ratios[arm]:.2f} of AdamW's time")
        pairs = list(itertools.product(config.grid, rest))
        best = compare(config, arm, pairs, results, text, limits, ratios[arm])
        if best is None:
            return False
        if math.isnan(best[0]):
            print("no rate of the grid is usable: all diverged; try smaller ones")
            if arm.optimiser == BASELINE:
                return True  # the others need its rate
        elif arm.optimiser == BASELINE:
            rest = best[1:]
    return True


def study(config: Study) -> None:
    """Train what is missing, and write tables and figures of all rows."""
    text, results = config.load(), Rows(config.results / "language.csv")
    limits = limits_of(config, config.at_once)
    done = finish(config, results, text, limits)
    print(f"written: {write(config.results)}")
    if not done:
        print(f"{_AGAIN}: {results.path}")


# ---------------------------------------------------------------------- one training


def train(config: Train) -> None:
    """Train one network, write its row and its curves, and let it write."""
    text, results = config.load(), Rows(config.results / "language.csv")
    text.vocabulary.encode(config.prompt)  # before the training, if it is no use
    arm = config.arm(config.optimiser, config.attention)
    rates = (config.learning_rate, config.rest_rate)
    run = config.run(arm, text, rates, config.seed, chosen=report.SINGLE)
    with tqdm(total=run.epochs, unit=f"x{config.evaluate_every} steps") as progress:

        def told(epoch: int, metrics: Metrics) -> None:
            progress.update(epoch + 1 - progress.n)
            losses = metrics.train_loss[0], metrics.validation_loss[0]
            progress.set_postfix_str("loss {:.3f}, validation {:.3f}".format(*losses))

        def written(state: State, history: Metrics, seconds: float) -> None:
            publish(run, results, text, state, history, seconds)

        limits = limits_of(config, 1)
        state, _ = train_together(TRAINER, [run], text, limits, told, written)
    if config.sample:
        more = sample(
            jax.tree.map(lambda x: x[0], state),
            run.recipe,
            text.vocabulary,
            config.prompt,
            count=config.sample,
            temperature=config.temperature,
            key=jax.random.key(config.seed),
        )
        print(config.prompt + more)


def publish(
    run: Run,
    results: Rows,
    text: Text,
    state: State,
    history: Metrics,
    seconds: float,
) -> None:
    """Look at the test part, and write the row and the curves of one training."""
    _, evaluate = programs(TRAINER, run.recipe, 1)
    tested = [x[0] for x in map(np.asarray, evaluate(state, text.test))]
    own = Metrics(*(values[0] for values in history))
    row = TRAINER.make_row(run, own, seconds, tested)
    if results.find(run.key()) is None:
        results.append(row)
    arm = run.recipe.arm.name.replace(" ", "_")
    path = results.path.parent / f"{text.name}_{arm}_{run.seed}.png"
    draw_single(row, path)
    names = ("train_loss", "validation_loss", "test_loss", "tokens_per_s")
    print(", ".join(f"{x.replace('_', ' ')} {row[x]}" for x in names))
    print(f"written: {results.path}, {path}")


# ---------------------------------------------------------------------- the program


def limits_of(config: Study | Train, at_once: int) -> Limits:
    """Return when to stop, counted from now."""
    deadline = time.monotonic() + 60 * config.minutes
    return Limits(config.checkpoints, config.checkpoint_seconds, deadline, at_once)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the command line says."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "study": Study, "speed": Speed, "page": Page},
        prog="python -m examples.train_lm",
        args=arguments,
    )
    try:
        if isinstance(config, Train):
            train(config)
        elif isinstance(config, Study):
            study(config)
        else:
            if isinstance(config, Speed):
                speed.measure(config.recipes(), config.rounds, config.results)
            print(f"written: {write(config.results)}")
    except OutOfTime:
        print(_AGAIN)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    program.run(main)
