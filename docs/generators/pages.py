"""Pages that are copies of files elsewhere in the repository, links and all.

Results, benchmarks, the changelog and notebooks are written where they are used;
`write_all` copies them below `docs/_generated`, which git does not know, so that
nothing is written twice and nothing can be out of date.
"""

import json
import os
import re
import shutil
from pathlib import Path

from docs.generators import learning_rates, pictures
from examples import readme
from examples.training.report import RESULTS

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
GENERATED = ROOT / "docs" / "_generated"
# What a copy is called where its file's name says too little.
NAMES = {RESULTS / "README.md": "cifar10"}
# Notebooks in the order in which they are best read; others come after them.
ORDER = ("one_line", "which_axes", "muon", "many_devices", "watching_training")
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def copies() -> dict[Path, Path]:
    """Return the pages that are copied, and where to below the generated folder."""
    results = {
        page: Path("results", f"{NAMES.get(page, page.stem)}.md")
        for page in sorted(RESULTS.glob("*.md"))
    }
    bench, log = ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"
    notebooks = {
        page: Path("notebooks", page.name) for page in sorted(NOTEBOOKS.glob("*.ipynb"))
    }
    return {
        **results,
        bench: Path("benchmarks", "speed.md"),
        log: Path("changelog.md"),
        **notebooks,
    }


def write_all(out: Path) -> None:
    """Write every page and picture that is not kept in `docs`, and nothing else."""
    shutil.rmtree(out, ignore_errors=True)
    for page, target in copies().items():
        path = out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".ipynb":
            path.write_text(relinked_notebook(page.read_text(), page, path, out))
        else:
            path.write_text(relinked(page.read_text(), page, path, out))
    digits = out / "results" / "digits.md"
    digits.write_text(digits_page(digits))
    parts = out / "parts"
    parts.mkdir(parents=True)
    (parts / "learning_rates.md").write_text(learning_rates.page())
    (parts / "notebooks.md").write_text(_notebooks(out))
    pictures.draw_all(out / "pictures")


def digits_page(path: Path) -> str:
    """Return the page on the digits, whose table is the README's."""
    parts = ["# Digits", readme.digits(readme.DIGITS)]
    for title, picture in readme.pictures(readme.DIGITS).items():
        parts.append(f"![{title}]({os.path.relpath(picture, path.parent)})")
    return "\n\n".join(parts) + "\n"


def relinked(text: str, page: Path, path: Path, out: Path = GENERATED) -> str:
    """Return a page whose links lead where they led, from another folder."""
    here = {}
    for source, target in copies().items():
        here[source.resolve()] = out / target
        if source.suffix == ".ipynb":  # which is linked by its text, a pair of it
            here[source.with_suffix(".md").resolve()] = out / target

    def led(found: re.Match) -> str:
        target = (page.parent / found[2]).resolve()
        target = here.get(target, target)
        return found[1] + Path(os.path.relpath(target, path.parent)).as_posix()

    return _LINK.sub(led, text)


def relinked_notebook(text: str, page: Path, path: Path, out: Path = GENERATED) -> str:
    """Return a notebook whose links lead where they led."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            cell["source"] = relinked(source, page, path, out)
    return json.dumps(notebook, ensure_ascii=False)


def _notebooks(out: Path) -> str:
    found = [page.stem for page in sorted((out / "notebooks").glob("*.ipynb"))]
    found.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    if not found:
        return "There are none in this version.\n"
    entries = "\n".join(f"/_generated/notebooks/{name}" for name in found)
    return f"```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```\n"
