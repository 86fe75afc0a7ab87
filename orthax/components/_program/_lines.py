"""The user's own line that made an equation."""

import os
import sys
from typing import Any

_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "haiku", "optax", "jaxtyping", "jmp")
_LIBRARIES += ("beartype", "einops", "chex", "quax", "orthax")
_CALLS = ("_run_python_pjit", "_python_pjit_helper", "cache_miss")
_IN_BINDS = ("pjit.py", "core.py", "partial_eval.py", "source_info_util.py")
_IN_BINDS += ("traceback_util.py", "batching.py", "ad.py")


def library_paths() -> tuple[str, ...]:
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    paths = [os.path.dirname(file) + os.sep for file in files if file]
    return (*paths, os.path.dirname(os.__file__) + os.sep + "contextlib", "<frozen")


def line_of(eqn: Any, libraries: tuple[str, ...]) -> str:
    """Return file and line of the user's code that made an equation, if it is known.

    What a library's own jitted function holds may have been traced for another call:
    its equations have no line, and that of the call stands for them.
    """
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    inside = False
    for frame in frames:
        name = getattr(frame, "file_name", "")
        if name.startswith(libraries):
            at_call = getattr(frame, "function_name", "").endswith(_CALLS)
            if name.endswith("pjit.py") and inside and not at_call:
                return ""
            inside = inside or not name.endswith(_IN_BINDS)
            continue
        line = getattr(frame, "line_num", None) or getattr(frame, "start_line", "?")
        return f"{os.path.basename(name)}:{line}"
    return ""
