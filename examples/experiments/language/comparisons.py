"""The settings of what compares arms: of the study, of the clock, of the page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.data import Text
from examples.experiments.language.arms import (
    ATTENTION,
    BASELINE,
    OPTIMISERS,
    Arm,
    Attention,
    Optimiser,
)
from examples.experiments.language.settings import Rates, Settings, Training
from examples.experiments.language.training import Recipe, Run
from examples.training.report import RESULTS
from examples.training.runs import seeds_of

_POLAR: tuple[Optimiser, ...] = tuple(x for x in OPTIMISERS if x != BASELINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arms(Settings):
    """Settings that tell which arms are compared."""

    optimisers: tuple[Optimiser, ...] = _POLAR
    """Which optimisers move the kernels, beside AdamW, which always does."""
    cuts: tuple[Attention, ...] = ATTENTION
    """How attention is cut: whole, per head, or with heads as components."""
    cut: tuple[Optimiser, ...] = ("muon", "orthogonal_sgd")
    """Which of them are tried with every cut; the others with the first."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_among(_POLAR, "optimisers", "cut")
        self.expect_among(ATTENTION, "cuts")
        self.expect(self.cuts, "cuts", "one or more")

    def arms(self) -> list[Arm]:
        """Return the arms that are compared, AdamW first."""
        return [self.arm(BASELINE, self.cuts[0])] + [
            self.arm(optimiser, attention)
            for optimiser in self.optimisers
            for attention in (self.cuts if optimiser in self.cut else self.cuts[:1])
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Training, Arms):
    """Every arm at its own learning rate, by step and by time, and the page."""

    grid: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Learning rates of the kernels to choose from, the same for every arm."""
    rest_grid: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Those of all else, from which AdamW's runs choose for all arms."""
    tuning_seeds: int = 1
    """Runs of an arm at a rate of the grid."""
    seeds: int = 3
    """Runs of an arm at its own rate."""
    at_once: int = 1
    """Runs trained side by side."""
    rounds: int = 60
    """Steps of every arm that are timed, in turn, for equal time."""
    results: Path = RESULTS
    """Folder of language.csv, language.md and the figures."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_at_least(1, "tuning_seeds", "seeds", "at_once", "rounds")
        self.expect_increasing("grid", "rest_grid")

    def plan(
        self, arm: Arm, text: Text, chosen: str, rates: Sequence[Rates], **others: Any
    ) -> list[Run]:
        """Return the runs of an arm at some pairs of rates, for every seed."""
        seeds = seeds_of(chosen, self.seeds, self.tuning_seeds)
        options = {"chosen": chosen} | others
        return [
            self.run(arm, text, pair, seed, **options)
            for pair in rates
            for seed in seeds
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed(Arms):
    """Time of a step of every arm, beside AdamW's; no text is needed."""

    vocabulary: int = 256
    """Number of tokens."""
    rounds: int = 20
    """Timed steps of every arm, in turn; the median counts."""
    results: Path = RESULTS
    """Folder of language_speed.csv and language.md."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_at_least(1, "vocabulary", "rounds")

    def recipes(self) -> list[Recipe]:
        """Return the recipes of all arms."""
        about = {"text": "", "level": "byte", "steps": 1}
        return [self.recipe(arm, self.vocabulary, **about) for arm in self.arms()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """The page and the figures of the rows that are there."""

    results: Path = RESULTS
    """Folder of language.csv, language_speed.csv and language.md."""
