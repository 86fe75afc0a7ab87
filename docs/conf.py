"""How Sphinx builds the documentation: `sphinx-build -W docs docs/_build`."""

import os
import re
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
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_generated/parts"]
html_theme = "sphinx_book_theme"
html_title = f"orthax {release}"
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "logo": {"text": html_title},
    "navbar_persistent": [],
}
# The one place for the address of the repository, once there is one: buttons of the
# pages lead there, and notebooks to Colab.
if repository := os.environ.get("ORTHAX_REPOSITORY"):
    html_theme_options |= {
        "repository_url": repository,
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Links to other documentations need the network, and without it a warning is an error.
if os.environ.get("ORTHAX_ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

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
# Names instead of the unions that they stand for.
autodoc_type_aliases = {
    name: name
    for name in (
        "optax.ScalarOrSchedule",
        "optax.Params",
        "optax.Updates",
        "components.RuleOrTree",
        "RuleOrTree",
        "Scale",
    )
}
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Limits"]


def show_tests_on_hover(app: Any, page: str, text: list[str]) -> None:
    """Put the tests that prove a claim of a table where they do not widen it."""
    if page == "comparison":
        tests = r":?((?:,? ?`tests/[\w./]+::\w+`)+)"
        shown = r' <abbr title="{}">test</abbr>'
        text[0] = re.sub(
            tests,
            lambda found: shown.format(found[1].replace("`", "").strip()),
            text[0],
        )


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for its sources."""
    pages.write_all(HERE / "_generated")
    app.connect("source-read", show_tests_on_hover)
    app.connect("autodoc-process-docstring", docstrings.process, priority=100)
    app.connect("autodoc-skip-member", docstrings.skip)
