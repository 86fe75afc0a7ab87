"""The words that CONTRIBUTING rules out are in nothing that a user reads."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RULED_OUT = re.compile(
    r"\b(behind|in front of|mend(s|ed|ing)?|told|foretells?|slips? of the pen"
    r"|lies like|where it lies|worked on together|hyper-parameters?|what is no matrix"
    r"|turned (matri\w+|stacks?|leaf|leaves)|looks at validation)\b",
    re.IGNORECASE,
)
PLACES = ("orthax", "docs", "README.md", "CHANGELOG.md", "benchmarks/README.md")


@pytest.mark.parametrize("place", PLACES)
def test_words(place):
    top = ROOT / place
    files = sorted(top.rglob("*")) if top.is_dir() else [top]
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.suffix in (".py", ".md") and "_generated" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if RULED_OUT.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_the_table_of_words_is_what_is_looked_for():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Words")[2]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", text.partition("## Numbers")[0], re.M)[1:]
    words = [word.strip() for row in rows for word in row.split(",")]
    assert len(words) > 10
    assert not [word for word in words if not RULED_OUT.search(word)]
