"""How Sphinx builds the documentation: `sphinx-build -W docs docs/_build`."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import orthax  # noqa: E402
from docs.generators import docstrings, pages  # noqa: E402

project = "orthax"
author = "The orthax authors"
copyright = "The orthax authors"
release = version = orthax.__version__
language = "en-GB"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_generated/parts"]
html_theme = "sphinx_book_theme"
html_title = f"orthax {release}"
html_show_sourcelink = False

# Pages: code in them is run by tests/test_docs.py, notebooks by the tests of notebooks.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
# Result pages keep the levels of the files that they are copies of.
suppress_warnings = ["myst.header"]

# Docstrings: Google sections; `docstrings` turns what is Markdown in them into RST.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Limits"]


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for its sources."""
    pages.write_all(HERE / "_generated")
    app.connect("autodoc-process-docstring", docstrings.process, priority=100)
    app.connect("autodoc-skip-member", docstrings.skip)
