"""What a script says while it works: tqdm's bar where there is one, else lines."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

try:
    import tqdm
except ImportError:
    tqdm = None

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Yield the items of a collection, and show how many are done."""
    if tqdm is not None:
        yield from tqdm.tqdm(items, desc=what, dynamic_ncols=True)
        return
    count = len(items) if isinstance(items, Sized) else "?"
    for i, item in enumerate(items):
        print(f"{what}: {i + 1} of {count}, {item}", flush=True)
        yield item


def say(line: str) -> None:
    """Print a line, above the bars."""
    if tqdm is None:
        print(line, flush=True)
    else:
        tqdm.tqdm.write(line)
