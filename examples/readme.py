"""Write the README from the committed results: `python -m examples.readme`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import peers, summary, tables
from examples.training.report import (
    EPOCHS_SHOWN,
    Arm,
    Results,
    Row,
    gather,
    plot,
    plot_rates,
    spread,
)

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DIGITS = ROOT / "examples" / "results" / "digits.csv"
STEP = ROOT / "benchmarks" / "results" / "step.csv"

TREES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vit_ti16": "ViT-Ti/16",
    "gpt2_small": "GPT-2 small",
}
METHODS = {
    summary.OURS: f"`{summary.OURS}`",
    peers.OPTAX: "`optax.contrib.muon`",
    peers.OPTAX_ROWS: "`optax.contrib.muon`, `ns_coeffs` a table of five rows",
    "torch.optim.Muon": "`torch.optim.Muon`",
    "jnp.linalg.svd per leaf": "`jnp.linalg.svd`, leaf by leaf",
}


def beside_the_peers(path: Path) -> str:
    """Return milliseconds and error of one update on a CPU as a table, captioned."""
    rows = {
        (row["method"], row["tree"]): row
        for row in tables.read(path)
        if (row["platform"], row["gradients"]) == ("cpu", "gaussian")
    }

    def cell(method: str, tree: str) -> str:
        row = rows[method, tree]
        return f"{float(row['median_ms']):,.0f} ({float(row['worst_error']):.0e})"

    body = [
        [name, *(cell(method, tree) for tree in TREES)]
        for method, name in METHODS.items()
    ]
    first = rows[summary.OURS, next(iter(TREES))]
    caption = (
        "Milliseconds of one update of all matrices of a network, and in brackets the "
        "largest relative Frobenius error of a polar factor that is not square, to "
        "float64; standard normal gradients, float32, medians; "
        f"{first['device']}, {first['cpus']} cores, jax {first['jax']}, optax "
        f"{first['optax']}."
    )
    header = ["one update", *TREES.values()]
    return f"{caption}\n\n{tables.markdown(header, body)}"


def digits(path: Path) -> str:
    """Return the final runs of a results file as a Markdown table, under a caption."""
    rows = [row for row in Results(path).rows() if row["chosen"] != "grid"]
    first = rows[0]
    arms = gather(row for row in rows if row["data"] == first["data"])
    seeds, epochs = arms[0].curves.shape
    shown = [epoch for epoch in EPOCHS_SHOWN if epoch <= epochs]
    rate = {"fixed": "the paper's", "tuned": "its own, tuned on validation"}

    def cells(arm: Arm) -> list[str]:
        curve = [spread(100 * arm.curves[:, epoch - 1], 1) for epoch in shown]
        chosen = f"{arm.learning_rate:g}, {rate[arm.chosen]}"
        return [f"`{arm.optimiser}`", chosen, *curve, spread(100 * arm.tests, 1)]

    header = ["optimiser", "learning rate", *(f"epoch {x}" for x in shown), "test"]
    lines = [header, [":--"] * 2 + ["--:"] * (len(header) - 2), *map(cells, arms)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    caption = (
        f"Accuracy in per cent, on validation images by epoch and on test images after "
        f"{epochs} epochs: mean of {seeds} seeds and one standard error. BasicCNN on "
        f"scikit-learn's 8x8 digits, batch {first['batch_size']}, momentum "
        f"{first['momentum']}, weight decay {first['weight_decay']}; "
        f"{first['device']}, jax {first['jax']}, flax {first['flax']}, optax "
        f"{first['optax']}."
    )
    return f"{caption}\n\n{body}\n\n{_differences(rows)}"


def _differences(rows: Sequence[Row]) -> str:
    """Return what the arms differ by on the test images: over seeds, and splits."""
    splits = list(dict.fromkeys(row["data"] for row in rows))

    def tests(data: str, chosen: str) -> tuple[np.ndarray, np.ndarray]:
        part = [row for row in rows if (row["data"], row["chosen"]) == (data, chosen)]
        sgd, ours = gather(part)
        return 100 * sgd.tests, 100 * ours.tests

    def paired(sgd: np.ndarray, ours: np.ndarray) -> str:
        return spread(ours - sgd, 2)

    fixed, tuned = (paired(*tests(splits[0], x)) for x in ("fixed", "tuned"))
    means = np.array([[x.mean() for x in tests(data, "tuned")] for data in splits]).T
    return (
        "Orthogonalised less plain, in per cent of the test images, paired by seed: "
        f"{fixed} at one rate for both, {tuned} at a rate of its own for each. Over "
        f"{len(splits)} divisions of the images into training, validation and test, "
        "each tuned again (mean and standard error over divisions): "
        f"{spread(means[0], 2)} and {spread(means[1], 2)}, difference {paired(*means)}."
    )


def pictures(path: Path) -> dict[str, Path]:
    """Return the figures of a results file by what they show."""
    by_rate = path.with_name(f"{path.stem}_rates.png")
    return {
        "accuracy by epoch": path.with_suffix(".png"),
        "accuracy by learning rate": by_rate,
    }


def draw(path: Path) -> None:
    """Draw the figures of the first split of a results file."""
    rows = Results(path).rows()
    rows = [row for row in rows if row["data"] == rows[0]["data"]]
    final = gather(row for row in rows if row["chosen"] != "grid")
    search = gather(row for row in rows if row["chosen"] == "grid")
    title = f"scikit-learn's digits: BasicCNN, {len(final[0].curves)} seeds"
    by_epoch, by_rate = pictures(path).values()
    plot(final, title, by_epoch)
    plot_rates(search, title, by_rate)


def filled(readme: str) -> str:
    """Return the README with the tables as the committed results have them."""
    readme = tables.put(digits(DIGITS), "digits", into=readme)
    return tables.put(beside_the_peers(STEP), "peers", into=readme)


if __name__ == "__main__":
    draw(DIGITS)
    README.write_text(filled(README.read_text()))
