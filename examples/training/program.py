"""How the programs end when they are interrupted."""

import sys
from collections.abc import Callable


def run(main: Callable[[], object]) -> None:
    """Call `main`; end with two lines, and no traceback, at Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        command = " ".join(["python", "-m", *_module(), *sys.argv[1:]])
        print(
            "\nStopped. Finished runs are kept, and of the current one the last "
            f"checkpoint.\nIt goes on from there: {command}",
            file=sys.stderr,
        )
        sys.exit(130)


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name] if spec else [sys.argv[0]]
