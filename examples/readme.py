"""Write the README's tables from the committed results: `python -m examples.readme`."""

from pathlib import Path

from benchmarks import peers, summary, tables
from examples.training.report import EPOCHS_SHOWN, Arm, Results, gather, spread

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
    return f"{caption}\n\n{body}"


def filled(readme: str) -> str:
    """Return the README with the tables as the committed results have them."""
    readme = tables.put(digits(DIGITS), "digits", into=readme)
    return tables.put(beside_the_peers(STEP), "peers", into=readme)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
