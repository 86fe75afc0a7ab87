"""The page of the decorrelation experiments: every table, every figure."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.experiments.decorrelation import memory, speed
from examples.experiments.decorrelation.report import Rows, draw, groups, section
from examples.training.report import NOT_YET, Row

_HEAD = """\
# Decorrelation: layers whose inputs are kept uncorrelated

Written by `python -m examples.decorrelation` from `decorrelation.csv`, one row a run,
`decorrelation_speed.csv` and `decorrelation_memory.csv`; nothing is typed by hand. What
Ahmad 2024 (arXiv 2407.10780) reports is in figures that could not be read: no number
here can be compared with theirs. The rules are those of `orthax.nn`, some of them
reconstructions, as their docstrings say.

The input of every layer is left as it is (`nothing`), has its mean removed (`mean`), or
is decorrelated by a rule, each of which removes the mean as well: what a rule itself
does is its difference to `mean`, and what mean removal does is the difference between
`nothing` and `mean`. "Loss" is the training loss, mean of an epoch's steps; "validation
loss" that after the last epoch; "test" the accuracy then. Mean of n seeds and one
standard error. "Loss - mean" and "test - mean" are differences to mean removal, paired
by seed. Every arm runs at its own learning rate and decorrelation rate (of `polar`: its
floor), the best pair of one grid by the validation loss, mean of all epochs; * is an
end of the grid. Seeds of the grid are other ones than those of the tables.
"Correlation" is the mean |correlation| between the inputs of a layer's weights, of
validation images after the last epoch, layer by layer. Of eight rules that change
nothing, one lies beyond two standard errors in about every third column.

`blended` has kappa 0.01, `blended_normalised` 0.5; `factorised` keeps half of the
directions, chosen at random and for good. Node perturbation leaves out what one image's
noise does to another through the batch mean. A rate is settled by few seeds: one that
diverges in a later one is shown as it is."""

_TITLES = {"digits": "scikit-learn's 8x8 digits", "cifar10": "CIFAR-10"}
_FULL = "1000 1000 1000 1000"
_FULL_SIZE = f"""\
### Full size

The paper's networks, all images and 100 epochs, for a GPU - {NOT_YET}:

`python -m examples.decorrelation cifar10 --mlp {_FULL} --mlp-side 32 \
--conv 32 64 1000 --conv-side 32 --train-images 0 --validation-images 0 \
--batch-size 256 --epochs 100 \
--grid 1e-5 1e-4 1e-3 1e-2 --rates 1e-4 1e-3 1e-2 --update-every 10 --seeds 5`"""


def _section(rows: Sequence[Row], data: str, folder: Path) -> Iterator[str]:
    yield f"## {_TITLES[data]}"
    found = list(groups(rows, data))
    if not found:
        yield f"{NOT_YET}: `python -m examples.decorrelation {data}`"
    for number, group in enumerate(found):
        yield section(group)
        if any(row["chosen"] == "tuned" for row in group):
            suffix = f"_{number + 1}" * (number > 0)
            path = folder / f"decorrelation_{data}{suffix}.png"
            draw(group, path)
            yield f"![{path.stem}]({path.name})"
    if data == "cifar10" and all(row["widths"] != _FULL for row in rows):
        yield _FULL_SIZE


def write(folder: Path) -> Path:
    """Write the page and the figures of all rows in a folder, and return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder / "decorrelation.csv").rows()
    parts = [_HEAD]
    for data in _TITLES:
        parts += _section(rows, data, folder)
    parts.append(speed.text(speed.read(folder)))
    parts.append(memory.text(memory.read(folder)))
    page = folder / "decorrelation.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
