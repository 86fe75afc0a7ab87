"""The settings of low-rank networks, for the program in `examples/low_rank.py`."""

import dataclasses
from pathlib import Path
from typing import Literal

from examples.data import Dataset, load_cifar10, load_digits
from examples.experiments.low_rank.training import Model, Recipe
from examples.training.optimisers import Optimiser
from examples.training.study import Study

NO_CUT = 1e-6  # a threshold below every singular value
Part = Literal["truncated", "fixed", "joint", "orthogonal"]
PARTS: tuple[Part, ...] = Part.__args__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Study):
    """Settings of both data sets."""

    models: tuple[Model, ...]
    """Networks to train."""
    parts: tuple[Part, ...] = PARTS
    """Arms beside full rank and OIALR: controls, joint search, orthogonal step."""
    betas: tuple[float, ...] = (NO_CUT, 0.1, 0.3, 0.5)
    """Thresholds of OIALR, fractions of the largest singular value."""
    delay: int = 6
    """Epochs before weights are converted."""
    delays: tuple[int, ...] = (3, 6, 12)
    """Candidates where delay, threshold and learning rate are tuned together."""
    frequency: int = 3
    """Epochs between two checks, and two measurements of the stability of bases."""
    layer_step: float = 0.0
    """Fraction of the layers that a check adds, from the output; 0 for all at once."""
    rank_multiple: int = 8
    """Ranks are rounded up to multiples, for fewer compilations; the paper has 1."""
    moments: Literal["rotate", "slice", "zero"] = "rotate"
    """How the optimiser's moments are converted; the authors' code slices them."""
    optimiser: Optimiser = "adam"
    """For all arms without the orthogonal step, which has `orthogonal_sgd`."""
    grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    orthogonal_grid: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """For the arms with the orthogonal step."""
    orthogonal_beta: float = 0.3
    """Threshold of OIALR with the orthogonal step."""
    tuning_seeds: int = 2
    seeds: int = 10
    weight_decay: float = 0.0
    """On every parameter that trains."""
    checkpoints: Path = Path("runs/low_rank")
    """Folder of unfinished runs, and of networks to be truncated."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_at_least(1, "frequency", "rank_multiple")
        self.expect_at_least(0, "delay", "weight_decay")
        self.expect(len(self.models) > 0, "models", "at least one")
        self.expect(self.delay < self.epochs, "delay", f"below {self.epochs} epochs")
        later = [x for x in self.delays if not 0 <= x < self.epochs]
        expected = f"at least one, from 0 to {self.epochs - 1}"
        holds = "joint" not in self.parts or (self.delays and not later)
        self.expect(bool(holds), "delays", expected)
        self.expect_increasing("orthogonal_grid")
        for name, betas in (
            ("betas", self.betas),
            ("orthogonal_beta", (self.orthogonal_beta,)),
        ):
            holds = betas and all(0 < x < 1 for x in betas)
            holds = holds and len(set(betas)) == len(betas)
            self.expect(holds, name, f"in (0, 1), each once; {NO_CUT} cuts nothing")
        self.expect(0 <= self.layer_step <= 1, "layer_step", "in [0, 1]")

    def sizes(self, model: Model) -> dict[str, int]:
        """Return width, depth and heads of a network."""
        raise NotImplementedError

    def recipe(self, model: Model, optimiser: str = "", **others) -> Recipe:
        """Return the recipe of a network, with another optimiser if one is named."""
        names = ("batch_size", "momentum", "weight_decay", "train_images", "frequency")
        names += ("layer_step", "rank_multiple", "moments")
        given = {x: getattr(self, x) for x in names} | self.sizes(model) | others
        given |= {"optimiser": optimiser or self.optimiser, "layers": "all"}
        method = "auto" if optimiser else ""
        return Recipe(model=model, method=method, b2=0.999, **given)

    def load(self) -> Dataset:
        """Return the data."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Settings):
    """An MLP on scikit-learn's 8x8 digits, in a quarter of an hour on one core."""

    models: tuple[Literal["mlp"], ...] = ("mlp",)
    width: int = 256
    """Features of every hidden layer."""
    depth: int = 2
    """Hidden layers."""

    def sizes(self, model: Model) -> dict[str, int]:
        """Return width and depth."""
        return {"width": self.width, "depth": self.depth, "heads": 0}

    def recipe(self, *args, **others) -> Recipe:
        """Return the recipe of a network."""
        return super().recipe(*args, data="digits", **others)

    def load(self) -> Dataset:
        """Return scikit-learn's digits."""
        return load_digits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10(Settings):
    """A small vision transformer and ResNet-20 on CIFAR-10; for a GPU."""

    models: tuple[Literal["vit", "resnet"], ...] = ("vit", "resnet")
    optimiser: Optimiser = "adamw"
    grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    betas: tuple[float, ...] = (0.15, 0.3)
    tuning_seeds: int = 1
    seeds: int = 3
    batch_size: int = 128
    weight_decay: float = 0.01
    vit_width: int = 768
    """Features of a token."""
    vit_depth: int = 6
    """Encoder blocks."""
    vit_heads: int = 6
    """Attention heads; they divide `vit_width`."""
    resnet_width: int = 16
    """Channels of the first of three stages; each has twice those of the last."""
    resnet_depth: int = 3
    """Blocks in every stage."""
    augment: bool = True
    """Whether to train on random crops, framed by 4 black pixels, and mirror images."""
    data_dir: Path | None = None
    """Folder of the prepared data; default: the environment variable ORTHAX_DATA."""

    def __post_init__(self):
        super().__post_init__()
        divides = self.vit_heads >= 1 and self.vit_width % self.vit_heads == 0
        self.expect(divides, "vit_heads", f"a divisor of {self.vit_width}, the width")

    def sizes(self, model: Model) -> dict[str, int]:
        """Return width, depth and heads of a network."""
        heads = self.vit_heads if model == "vit" else 0
        width, depth = (getattr(self, f"{model}_{x}") for x in ("width", "depth"))
        return {"width": width, "depth": depth, "heads": heads}

    def recipe(self, *args, **others) -> Recipe:
        """Return the recipe of a network."""
        return super().recipe(*args, data="cifar10", augment=self.augment, **others)

    def load(self) -> Dataset:
        """Return CIFAR-10."""
        return load_cifar10(self.data_dir)
