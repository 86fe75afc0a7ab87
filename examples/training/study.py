"""What every study is told that tunes a learning rate for each of its arms."""

import dataclasses
import math
from pathlib import Path

from examples.data import Dataset, Split
from examples.training.checked import Checked
from examples.training.report import RESULTS
from examples.training.supervised import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Checked):
    """What studies are told that tune a learning rate for every arm.

    Runs of a rate of the grid have other seeds than those of the tables.
    """

    grid: tuple[float, ...]
    """Learning rates to choose from, the same for every arm."""
    tuning_seeds: int = 1
    """Runs of an arm at a rate of the grid."""
    seeds: int = 3
    """Runs of an arm at its own rate."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a step; those beyond the last whole batch wait for another epoch."""
    train_images: int = 0
    """Images to train on, the first ones; 0 for all."""
    schedule: Schedule = "cosine"
    """Of the learning rate."""
    momentum: float = 0.9
    """Of the SGD family; b1 of the Adam family."""
    minutes: float = math.inf
    """Stop after the epoch that passes so many; started again, it goes on there."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    results: Path = RESULTS
    """Folder of the rows, the page and the figures."""
    checkpoints: Path
    """Folder of what is not finished."""

    def __post_init__(self):
        self.expect_increasing("grid")
        counts = ("tuning_seeds", "seeds", "epochs", "batch_size")
        self.expect_at_least(1, *counts)
        self.expect_at_least(0, "train_images")
        self.expect_share("momentum")
        for name in ("minutes", "checkpoint_seconds"):
            self.expect(getattr(self, name) > 0, name, "a positive number")

    def some(self, data: Dataset, *parts: str) -> Dataset:
        """Return data with the first images of some parts, as many as are asked for.

        Raises:
          ValueError: if there are fewer.
        """
        cut = {}
        for name in parts or ("train",):
            split, count = getattr(data, name), getattr(self, f"{name}_images")
            there = len(split.labels)
            expected = f"at most {there}: there are no more"
            self.expect(count <= there, f"{name}_images", expected)
            cut[name] = Split(*(x[: count or there] for x in split))
        return data._replace(**cut)
