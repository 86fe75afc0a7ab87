"""How long calls take, each beside the others: rounds in a new order every time.

Whatever else the machine does falls on all of them; ratios are taken inside a round.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

# Calls longer than this are made in fewer rounds.
SLOW_SECONDS = 0.5


def seconds_of(call: Callable[[], Any]) -> float:
    """Return how long a call takes, until what it returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def pause() -> float:
    """Return the seconds to wait before a call, so that none slows down the next.

    On CPU, threads of OpenBLAS (in which SVD and `eigh` run) spin for 40 ms after their
    last work. On other platforms there is nothing to wait for.
    """
    return 0.05 if jax.default_backend() == "cpu" else 0.0


def interleaved(
    calls: Mapping[str, Callable[[], Any]], counts: Mapping[str, int], pause: float
) -> dict[str, dict[int, float]]:
    """Return the seconds of every call by round, in a new order every round.

    Compile and call everything once before: the first call counts like any other.

    Args:
      calls: functions without arguments, by name.
      counts: in how many rounds each is called, the first ones.
      pause: seconds to wait before every call.
    """
    seconds: dict[str, dict[int, float]] = {name: {} for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(max(counts.values())):
        shuffle(order)
        for name in order:
            if turn < counts[name]:
                time.sleep(pause)
                seconds[name][turn] = seconds_of(calls[name])
    return seconds


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    low, median, high = np.quantile([*values], (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def ratios(theirs: Mapping[int, float], ours: Mapping[int, float]) -> list[float]:
    """Return, for every round that both ran in, how much longer `theirs` took."""
    return [theirs[turn] / ours[turn] for turn in sorted(theirs.keys() & ours.keys())]


def ratio(theirs: Mapping[int, float], ours: Mapping[int, float]) -> float:
    """Return the median of `ratios`."""
    return statistics.median(ratios(theirs, ours))
