"""What the paper measured on CIFAR-10, and more of the same kind, as plain data.

Tuddenham, Prügel-Bennett, Hare: "Orthogonalising gradients to speed up neural network
optimisation", 2022. https://arxiv.org/abs/2202.07052.
"""

import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.training.optimisers import WITHOUT_METHOD, Method, Optimiser
from examples.training.runs import FIRST_TUNING_SEED
from examples.training.supervised import Recipe, Run

NUMBERS = Path(__file__).parent / "paper.csv"


class Published(NamedTuple):
    """What the paper says of a cell: means of five runs, and one standard error.

    Attributes:
      accuracy: on the test images, per cent; not a number where it diverged.
      accuracy_error: its standard error.
      loss: on the test images.
      loss_error: its standard error.
    """

    accuracy: float
    accuracy_error: float
    loss: float
    loss_error: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: a run, whatever its seed, and what the paper says of it."""

    run: Run
    published: Published | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """What is run, and what is compared.

    Attributes:
      title: what it is.
      cells: runs with their settings given.
      arms: for each name the runs among which the best on the validation images is
        searched; that one is then run with other seeds, and tested.
    """

    title: str
    cells: tuple[Cell, ...] = ()
    arms: dict[str, tuple[Run, ...]] = dataclasses.field(default_factory=dict)

    def restricted(self, models: Sequence[str], epochs: int | None) -> "Study":
        """Return the part on some networks (all if none is named), for other epochs."""

        def wanted(run: Run) -> bool:
            return not models or run.recipe.model in models

        def shortened(run: Run) -> Run:
            return dataclasses.replace(run, epochs=epochs or run.epochs)

        cells = (c for c in self.cells if wanted(c.run))
        arms = {
            name: tuple(shortened(run) for run in runs if wanted(run))
            for name, runs in self.arms.items()
        }
        return Study(
            self.title,
            tuple(Cell(shortened(c.run), c.published) for c in cells),
            {name: runs for name, runs in arms.items() if runs},
        )

    def models(self) -> list[str]:
        """Return the networks of this study."""
        runs = [cell.run for cell in self.cells]
        runs += itertools.chain.from_iterable(self.arms.values())
        return [*dict.fromkeys(run.recipe.model for run in runs)]


def run_of(
    model: str,
    optimiser: Optimiser,
    *,
    method: Method = "svd",
    learning_rate: float = 1e-2,
    epochs: int = 100,
    schedule: str = "constant",
    chosen: str = "fixed",
    seed: int = 0,
    **others,
) -> Run:
    """Return a run of Section 2.3.1, with changes: the paper's method is the SVD."""
    taken = "" if optimiser in WITHOUT_METHOD else method
    recipe = {
        "layers": "all",
        "batch_size": 1024,
        "momentum": 0.9,
        "b2": 0.99,
        "weight_decay": 5e-4,
        "augment": True,
        "classes": None,
    } | others
    made = Recipe("cifar10", model, optimiser, taken, **recipe)
    return Run(made, epochs, learning_rate, schedule, chosen, seed)


# ---------------------------------------------------------------- the paper's tables

# Table 3: the recipe of He et al., 2016, Section 4.2.
_TUNED_FOR_SGD = {
    "batch_size": 128,
    "weight_decay": 1e-4,
    "schedule": "steps",
    "epochs": 200,
}


def _published(table: int) -> tuple[Cell, ...]:
    """Return the cells of a table of the paper."""
    changes = _TUNED_FOR_SGD if table == 3 else {}
    with NUMBERS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == str(table)]
    return tuple(
        Cell(
            run_of(
                row["model"],
                row["optimiser"],
                layers=row["layers"],
                learning_rate=float(row["learning_rate"]),
                momentum=float(row["momentum"]),
                **changes,
            ),
            Published(*(float(row[name]) for name in Published._fields)),
        )
        for row in rows
    )


def _cells(runs: Iterable[Run]) -> tuple[Cell, ...]:
    return tuple(map(Cell, runs))


# ------------------------------------------------------------------------- and more

_SMALL = ("basic_cnn", "resnet20")
_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def _search(model: str, optimiser: Optimiser, **settings: Sequence) -> tuple[Run, ...]:
    """Return the runs of a grid, every setting with every other."""
    return tuple(
        run_of(
            model,
            optimiser,
            chosen="grid",
            seed=FIRST_TUNING_SEED,
            **dict(zip(settings, values, strict=True)),
        )
        for values in itertools.product(*settings.values())
    )


def _recipes() -> dict[str, tuple[Run, ...]]:
    """Return the search of Table 3: as many candidates for SGD as for the other."""
    common = {
        "schedule": ("steps", "cosine"),
        "batch_size": (128,),
        "epochs": (200,),
        "weight_decay": (1e-4, 5e-4),
    }
    sgd = _search("resnet20", "sgd", learning_rate=(0.03, 0.1, 0.3), **common)
    others = [
        _search(
            "resnet20",
            optimiser,
            learning_rate=(0.003, 0.01, 0.03),
            method=("svd_zero",),
            layers=("convolutions",),
            **common,
        )
        for optimiser in ("orthogonal_sgd", "sgd_orthogonal")
    ]
    return {"sgd": sgd, "orthogonal_sgd": others[0], "sgd_orthogonal": others[1]}


STUDIES: dict[str, Callable[[], Study]] = {
    "table1": lambda: Study("Table 1, figures 1 to 5 and 12", _published(1)),
    "table2": lambda: Study("Tables 2 and 7, figures 13 and 14", _published(2)),
    "table3": lambda: Study("Table 3", _published(3)),
    "table4": lambda: Study("Tables 4 and 8", _published(4)),
    "table5": lambda: Study("Tables 5 and 6, figure 10", _published(5)),
    "figure11": lambda: Study(
        "Figure 11: small batches",
        _cells(
            run_of("resnet18", optimiser, batch_size=size)
            for size in (4, 16)
            for optimiser in ("sgd", "orthogonal_sgd")
        ),
    ),
    "null_space": lambda: Study(
        "Directions without gradient: filled, as in the paper, or left at zero; and QR "
        "(Section 3.4)",
        _cells(
            run_of(model, "orthogonal_sgd", method=method)
            for model in _SMALL
            for method in ("svd", "svd_zero", "qr")
        ),
    ),
    "methods": lambda: Study(
        "Faster polar factors than the SVD",
        _cells(
            run_of(model, "orthogonal_sgd", method=method)
            for model in _SMALL
            for method in ("svd", "auto", "fast", "newton_schulz", "jordan")
        ),
    ),
    "order": lambda: Study(
        "The polar factor before the momentum, as in the paper, or behind it, as Muon",
        arms={
            f"{model}, {optimiser}": _search(model, optimiser, learning_rate=_RATES)
            for model in _SMALL
            for optimiser in ("orthogonal_sgd", "sgd_orthogonal")
        },
    ),
    "budget": lambda: Study(
        "The same epochs for all, each at its best learning rate of one grid",
        arms={
            f"{model}, {optimiser}": _search(
                model, optimiser, learning_rate=_RATES, method=("auto",)
            )
            for model in _SMALL
            for optimiser in ("sgd", "orthogonal_sgd", "adamw", "muon", "normuon")
        },
    ),
    "batch_size": lambda: Study(
        "From which batch on it pays, and whether zeros for directions without "
        "gradient or a momentum before the polar factor repair small ones",
        _cells(
            run_of("basic_cnn", optimiser, method=method, batch_size=size, epochs=20)
            for size in (4, 16, 64, 256, 1024)
            for optimiser, method in (
                ("sgd", "svd"),
                ("orthogonal_sgd", "svd"),
                ("orthogonal_sgd", "svd_zero"),
                ("sgd_orthogonal", "svd_zero"),
            )
        ),
    ),
    "recipe": lambda: Study(
        "Table 3 again, with as large a search for every optimiser", arms=_recipes()
    ),
}
