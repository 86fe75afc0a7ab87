"""The settings of the decorrelation experiments, and the data that they ask for."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.data import Dataset, Split, load_cifar10, load_digits
from examples.experiments.decorrelation.rules import NAMES, WITHOUT_RATE, Name
from examples.experiments.decorrelation.training import LEARNING, Learning, Recipe
from examples.models.decorrelation import MODELS, Model
from examples.training.optimisers import WITHOUT_METHOD, Optimiser
from examples.training.study import Study
from examples.training.supervised import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Study):
    """What both data sets can be told."""

    learning: tuple[Learning, ...] = LEARNING
    """Backpropagation, feedback alignment, node perturbation."""
    rules: tuple[Name, ...] = NAMES
    """What is done to the inputs of all layers."""
    optimiser: Optimiser = "sgd"
    """What makes the step."""
    b2: float = 0.9999
    """Of the Adam family; the paper's."""
    grid: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    rates: tuple[float, ...] = (0.01, 0.1)
    """Decorrelation rates to choose from, the same for every rule that has one."""
    floors: tuple[float, ...] = (0.2, 0.5)
    """Floors of the polar rule to choose from; it has no rate."""
    tuning_seeds: int = 3
    """Runs of an arm at every pair of rates."""
    seeds: int = 21
    at_once: int = 21
    """Runs trained side by side; one compilation serves equal numbers."""
    epochs: int = 15
    validation_images: int = 0
    """Images to choose by, the first ones; 0 for all."""
    schedule: Schedule = "constant"
    update_every: int = 1
    """Steps between two batches that R and the running mean learn from."""
    noise: float = 1e-3
    """Standard deviation of node perturbation, in units of a layer's output."""
    checkpoints: Path = Path("runs/decorrelation")

    def __post_init__(self):
        super().__post_init__()
        self.expect_among(LEARNING, "learning")
        self.expect_among(NAMES, "rules")
        for name in ("learning", "rules"):
            self.expect(getattr(self, name), name, "at least one")
        self.expect_at_least(1, "at_once", "update_every")
        self.expect_increasing("rates", "floors")
        self.expect(self.floors[-1] <= 1, "floors", "at most 1")
        self.expect_at_least(0, "validation_images")
        self.expect_share("b2")
        self.expect_positive("noise")

    def recipes(
        self, learning: Learning, rule: Name, optimiser: Optimiser, **others: Any
    ) -> list[Recipe]:
        """Return the recipes of an arm, one for every decorrelation rate."""
        names = ("batch_size", "momentum", "b2", "train_images", "validation_images")
        given = {x: getattr(self, x) for x in (*names, "update_every", "noise")}
        method = "" if optimiser in WITHOUT_METHOD else "auto"
        given |= {"method": method, "layers": "all", "weight_decay": 0.0, **others}
        given |= {"learning": learning, "rule": rule, "optimiser": optimiser}
        rates = (0.0,) if rule in WITHOUT_RATE else self.rates
        rates = self.floors if rule == "polar" else rates
        return [Recipe(rate=rate, **given) for rate in rates]

    def arms(self) -> Iterator[list[Recipe]]:
        """Yield the recipes of every arm that is compared."""
        raise NotImplementedError

    def load(self) -> dict[float, Dataset]:
        """Return the data by the condition of the matrix that mixes the pixels."""
        raise NotImplementedError

    def some(self, data: Dataset) -> Dataset:
        """Return as many images to train on and to choose by as are asked for."""
        return super().some(data, "train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Settings):
    """An MLP on scikit-learn's 8x8 digits, as they are and ill-conditioned."""

    conditions: tuple[float, ...] = (1.0, 30.0)
    """Condition numbers of the matrix that mixes the pixels; 1 for none."""
    together: tuple[Name, ...] = ("nothing", "mean", "scaled", "polar")
    """What is also tried with `orthogonalise()` in front of SGD's momentum."""
    widths: tuple[int, ...] = (64, 64)
    """Features of the hidden layers."""

    def __post_init__(self):
        super().__post_init__()
        holds = self.conditions and all(1 <= x < math.inf for x in self.conditions)
        self.expect(holds, "conditions", "numbers of at least 1")

    def arms(self) -> Iterator[list[Recipe]]:
        """Yield the recipes of every arm that is compared."""
        options = {"data": "digits", "model": "mlp", "side": 8, "sample": 1.0}
        options["widths"] = self.widths
        for learning, rule in itertools.product(self.learning, self.rules):
            yield self.recipes(learning, rule, self.optimiser, **options)
        if "bp" in self.learning:
            for rule in self.together:
                yield self.recipes("bp", rule, "orthogonal_sgd", **options)

    def load(self) -> dict[float, Dataset]:
        """Return scikit-learn's digits, and what becomes of them."""
        data = self.some(load_digits())
        return {x: jax.device_put(mixed(data, x)) for x in self.conditions}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10(Settings):
    """An MLP and a convolutional network on CIFAR-10; small, for a CPU."""

    models: tuple[Model, ...] = MODELS
    """Dense layers, or convolutions."""
    rules: tuple[Name, ...] = ("nothing", "mean", "scaled", "polar")
    mlp: tuple[int, ...] = (128, 128, 128)
    """Features of the hidden layers of the MLP; four times 1000 in the paper."""
    mlp_side: int = 8
    """Pixels along a side of what the MLP is given, averaged; 32 in the paper."""
    conv: tuple[int, int, int] = (8, 16, 128)
    """Channels of two pairs of convolutions, features behind; 32, 64, 1000 there."""
    conv_side: int = 16
    """Pixels along a side of what the convolutions are given; 32 in the paper."""
    sample: float = 0.1
    """Share of the patches that the R of a convolution learns from; the paper's."""
    optimiser: Optimiser = "adam"
    grid: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    rates: tuple[float, ...] = (1e-4, 1e-3)
    tuning_seeds: int = 1
    seeds: int = 3
    at_once: int = 1
    epochs: int = 6
    batch_size: int = 128
    train_images: int = 5000
    validation_images: int = 1000
    data_dir: Path | None = None
    """Folder of the prepared data; default: the environment variable ORTHAX_DATA."""

    def __post_init__(self):
        super().__post_init__()
        holds = self.models and set(self.models) <= set(MODELS)
        self.expect(holds, "models", f"names among {', '.join(MODELS)}")
        for name in ("mlp_side", "conv_side"):
            side = getattr(self, name)
            least = 4 if name == "conv_side" else 1
            holds = side >= least and 32 % side == 0
            self.expect(holds, name, f"a divisor of 32, at least {least}")
        self.expect(0 < self.sample <= 1, "sample", "above 0 and at most 1")

    def arms(self) -> Iterator[list[Recipe]]:
        """Yield the recipes of every arm that is compared."""
        for model, learning, rule in itertools.product(
            self.models, self.learning, self.rules
        ):
            options = {"data": "cifar10", "model": model}
            options["widths"] = getattr(self, model)
            options["side"] = getattr(self, f"{model}_side")
            options["sample"] = self.sample if model == "conv" else 1.0
            yield self.recipes(learning, rule, self.optimiser, **options)

    def load(self) -> dict[float, Dataset]:
        """Return CIFAR-10."""
        return {1.0: jax.device_put(self.some(load_cifar10(self.data_dir)))}


def mixed(data: Dataset, condition: float) -> Dataset:
    """Return images whose pixels are mixed by a matrix of that condition number.

    The matrix is the same at every call, its singular values are in geometric
    progression, and the mean square of the images to train on stays what it was.
    """
    if condition == 1:
        return data
    shape = data.train.images.shape[1:]
    rng = np.random.default_rng(0)
    left, right = (
        np.linalg.qr(rng.normal(size=2 * (math.prod(shape),)))[0] for _ in range(2)
    )
    matrix = left * np.geomspace(1, 1 / condition, len(left)) @ right
    rows = data.train.images.reshape(-1, len(matrix))
    matrix *= np.sqrt(np.mean(rows**2) / np.mean((rows @ matrix) ** 2))

    def of(split: Split) -> Split:
        images = split.images.reshape(-1, len(matrix)) @ matrix
        return split._replace(images=np.float32(images.reshape(-1, *shape)))

    return Dataset(*map(of, data))
