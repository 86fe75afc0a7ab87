"""The user's own line that made an equation."""

import os
import sys
from typing import Any

_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "haiku", "optax", "jaxtyping", "jmp")
_LIBRARIES += ("beartype", "einops", "chex", "quax", "orthax")


def library_paths() -> tuple[str, ...]:
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    paths = [os.path.dirname(file) + os.sep for file in files if file]
    return (*paths, os.path.dirname(os.__file__) + os.sep + "contextlib", "<frozen")


def line_of(eqn: Any, libraries: tuple[str, ...]) -> str:
    """Return file and line of the user's code that made an equation, if it is known.

    What a library's own jitted function holds has no line of the user's: that of the
    call stands for it.
    """
    for frame in getattr(getattr(eqn.source_info, "traceback", None), "frames", ()):
        name = getattr(frame, "file_name", "")
        if not name.startswith(libraries):
            line = getattr(frame, "line_num", None) or getattr(frame, "start_line", "?")
            return f"{os.path.basename(name)}:{line}"
    return ""
