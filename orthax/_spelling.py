"""American spellings of public names."""

import re
import sys
from collections.abc import Callable
from typing import Any


def american(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that knows its names by both spellings.

    Args:
      module: the module's `__name__`.

    Returns:
      A function that finds `normalise` when asked for `normalize`, and raises
      `AttributeError` for what the module has under neither spelling.
    """

    def get(name: str) -> Any:
        british = re.sub(r"iz(e|ation)", r"is\1", name)
        names = vars(sys.modules[module])
        if british != name and british in names:
            return names[british]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get
