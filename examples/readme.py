"""Write the README's table from the committed results: `python -m examples.readme`."""

from pathlib import Path

from benchmarks.tables import put
from examples.training.report import EPOCHS_SHOWN, Arm, Results, gather, spread

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DIGITS = ROOT / "examples" / "results" / "digits.csv"


def table(path: Path) -> str:
    """Return the final runs of a results file as a Markdown table, under a caption."""
    rows = [row for row in Results(path).rows() if row["chosen"] != "grid"]
    arms = gather(rows)
    first = rows[0]
    seeds, epochs = arms[0].curves.shape
    shown = [epoch for epoch in EPOCHS_SHOWN if epoch <= epochs]
    rate = {"fixed": "the paper's", "tuned": "its own, tuned on validation"}

    def cells(arm: Arm) -> list[str]:
        curve = [spread(100 * arm.curves[:, epoch - 1], 1) for epoch in shown]
        chosen = f"{arm.learning_rate:g}, {rate[arm.chosen]}"
        return [f"`{arm.optimiser}`", chosen, *curve, spread(100 * arm.tests, 1)]

    header = ["optimiser", "learning rate", *(f"epoch {x}" for x in shown), "test"]
    body = [header, [":--"] * 2 + ["--:"] * (len(header) - 2), *map(cells, arms)]
    lines = ["| " + " | ".join(line) + " |" for line in body]
    caption = (
        f"Accuracy in per cent, on validation images by epoch and on test images after "
        f"{epochs} epochs: mean of {seeds} seeds and one standard error. BasicCNN on "
        f"scikit-learn's 8x8 digits, batch {first['batch_size']}, momentum "
        f"{first['momentum']}, weight decay {first['weight_decay']}; "
        f"{first['device']}, jax {first['jax']}, flax {first['flax']}, optax "
        f"{first['optax']}."
    )
    return caption + "\n\n" + "\n".join(lines)


def filled(readme: str) -> str:
    """Return the README with the tables as the committed results have them."""
    return put(table(DIGITS), "digits", into=readme)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
