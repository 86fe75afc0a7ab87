"""The settings of the language models, and of one training."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax

from examples.data import Text, load_text
from examples.data.text import Level
from examples.experiments.language.arms import (
    BASELINE,
    Arm,
    Attention,
    Optimiser,
)
from examples.experiments.language.training import Recipe, Run, windows
from examples.models.gpt import GPTConfig
from examples.training.checked import Checked
from examples.training.optimisers import Method

OWN = Path("runs/language")  # what is not committed
Rates = tuple[float, float]  # of the kernels, and of all else


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """What all three can be told. The sizes suit a CPU."""

    depth: int = 2
    """Blocks of the transformer."""
    heads: int = 4
    """Attention heads of a block; divides the width."""
    width: int = 64
    """Features of a token."""
    context: int = 64
    """Tokens that the model sees at once."""
    initial: float | None = None
    """Standard deviation of the first kernels; default 0.02 sqrt(768 / width)."""
    scan: bool = False
    """Whether the blocks are one scanned layer, compiled once."""
    batch_size: int = 16
    """Sequences in a step."""
    method: Method = "auto"
    """How polar factors are taken."""
    momentum: float = 0.95
    """Of the Muon and SGD families."""
    b1: float = 0.9
    """Of the Adam family, and of AdamW for all but the kernels."""
    b2: float = 0.99
    """Likewise."""
    weight_decay: float = 0.1
    """Of the kernels, decoupled, times the learning rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters are float32."""

    def __post_init__(self):
        self.expect_at_least(1, "depth", "heads", "width", "context", "batch_size")
        holds = self.width % self.heads == 0
        self.expect(holds, "heads", f"a divisor of the width, {self.width}")
        holds = self.initial is None or 0 < self.initial < math.inf
        self.expect(holds, "initial", "a positive number")
        self.expect_share("momentum", "b1", "b2")
        self.expect_at_least(0, "weight_decay")

    def arm(self, optimiser: Optimiser, attention: Attention) -> Arm:
        """Return an arm with the other settings."""
        names = ("momentum", "b1", "b2", "weight_decay")
        given = {name: getattr(self, name) for name in names}
        plain = optimiser == BASELINE
        return Arm(
            optimiser=optimiser,
            attention="" if plain else attention,
            method="" if plain else self.method,
            scanned=self.scan,
            **given,
        )

    def recipe(self, arm: Arm, vocabulary: int, **others: Any) -> Recipe:
        """Return the recipe of an arm."""
        names = ("context", "depth", "heads", "width")
        sizes = {name: getattr(self, name) for name in names}
        # GPT-2's at its width, and as large an output at any other.
        sizes["initial"] = self.initial or round(0.02 * (768 / self.width) ** 0.5, 4)
        return Recipe(
            model=GPTConfig(vocabulary, scanned=self.scan, **sizes),
            arm=arm,
            batch_size=self.batch_size,
            dtype=self.dtype,
            **others,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """What is told about trainings, one or many."""

    text: Path | None = None
    """A file; default: Tiny Shakespeare in the folder of ORTHAX_DATA."""
    level: Level = "char"
    """What a token is: a character of the text, or a byte."""
    steps: int = 500
    """Steps of a training."""
    evaluate_every: int = 25
    """Steps between two looks at the validation part; divides the steps."""
    validation_sequences: int = 256
    """Sequences of it that are looked at, evenly spread; 0 for all."""
    warmup: int = 25
    """Steps in which the rates rise to their height."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the rates behind that."""
    minutes: float = math.inf
    """Stop behind the look that passes so many; started again, it goes on there."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    checkpoints: Path = OWN
    """Folder of what is not finished."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_at_least(1, "steps", "evaluate_every")
        holds = self.steps % self.evaluate_every == 0
        self.expect(holds, "evaluate_every", f"a divisor of the {self.steps} steps")
        self.expect_at_least(0, "validation_sequences", "warmup")
        for name in ("minutes", "checkpoint_seconds"):
            self.expect(getattr(self, name) > 0, name, "a positive number")

    def load(self) -> Text:
        """Return the text; what is held out as sequences, on the device.

        Raises:
          FileNotFoundError, ValueError: as `load_text`; if a part is too short.
        """
        text = load_text(self.text, level=self.level)
        shortest = min(map(len, (text.train, text.validation, text.test)))
        holds = self.context < shortest
        self.expect(holds, "context", f"less than the {shortest} tokens of a part")
        most = self.validation_sequences
        return text._replace(
            train=jax.device_put(text.train),
            validation=jax.device_put(windows(text.validation, self.context, most)),
            test=jax.device_put(windows(text.test, self.context)),
        )

    def run(self, arm: Arm, text: Text, rates: Rates, seed: int, **others: Any) -> Run:
        """Return a run of an arm, given the rates of its kernels and of all else."""
        about = {"text": text.name, "level": self.level, "steps": self.evaluate_every}
        recipe = self.recipe(arm, text.vocabulary.size, **about)
        budget = self.steps // self.evaluate_every
        given = {"epochs": budget, "chosen": "grid"} | others
        return Run(
            recipe,
            budget=budget,
            learning_rate=rates[0],
            rest_rate=rates[1],
            schedule=self.schedule,
            seed=seed,
            warmup=self.warmup,
            **given,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Training):
    """One training, with text of its own at the end."""

    optimiser: Optimiser = "muon"
    """What moves the kernels of the blocks."""
    attention: Attention = "whole"
    """How attention is cut, but for AdamW."""
    learning_rate: float = 0.01
    """Of the kernels."""
    rest_rate: float = 0.01
    """Of AdamW for all else."""
    seed: int = 0
    """Of the weights and of the batches."""
    sample: int = 0
    """Tokens to write behind the training."""
    prompt: str = "\n"
    """What they go on from."""
    temperature: float = 0.8
    """By which their logits are divided."""
    results: Path = OWN
    """Folder of language.csv."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_positive("learning_rate", "rest_rate", "temperature")
        self.expect_at_least(0, "sample", "seed")
        self.expect(self.prompt, "prompt", "one character or more")
