"""Whole updates of a tree of gradients: what is compared, compiled and called.

Every update is compiled once and then called in turn with the others, in a new order
every round, so that whatever else the machine does falls on all of them.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import orthax
from benchmarks import errors, gemm, peers, tables, timing, trees
from benchmarks.summary import FAST, OURS
from orthax import polar

# The threads of OpenBLAS and OpenMP wait for more work in a loop, for 30 ms: what is
# called next would run on what they leave of the cores.
_PAUSE = 0.04
# Where the first call of all takes longer than this, it counts like any other.
_LONG_SECONDS = 5.0


class Entry(NamedTuple):
    """What is timed, and the method whose operations it performs."""

    make: Callable[[trees.Network], optax.GradientTransformation]
    method: polar.PolarMethod | None


def _ours(method: polar.PolarMethod) -> Entry:
    return Entry(lambda net: orthax.orthogonalise(method, rule=net.rule), method)


def _with_momentum(net: trees.Network) -> optax.GradientTransformation:
    momentum = orthax.transforms.nesterov_ema(0.95)
    return optax.chain(momentum, orthax.orthogonalise(rule=net.rule))


def _optax(
    table: Sequence[Sequence[float]] | None = None, precision: str | None = None
) -> Entry:
    return Entry(
        lambda net: peers.optax_muon(net.params, net.rule, table, precision),
        polar.NewtonSchulz(table or polar.JORDAN, gram=False),
    )


ENTRIES: dict[str, Entry] = {
    "identity": Entry(lambda net: optax.identity(), None),
    OURS: _ours(polar.Auto()),
    FAST: _ours(polar.Auto("fast")),
    "orthogonalise(GramEigh())": _ours(polar.GramEigh()),
    "orthogonalise(SVD())": _ours(polar.SVD()),
    "nesterov_ema(), orthogonalise()": Entry(_with_momentum, polar.Auto()),
    peers.OPTAX: _optax(),
    peers.OPTAX_ROWS: _optax(polar.JORDAN),
    peers.OPTAX_EXACT: _optax(polar.polar_express(), "highest"),
    peers.SVD_PER_LEAF: Entry(
        lambda net: peers.per_leaf(peers.svd, net.rule), polar.SVD()
    ),
    peers.SVD_STACKED: Entry(
        lambda net: peers.stacked(peers.svd, net.rule), polar.SVD()
    ),
    peers.QDWH_PER_LEAF: Entry(
        lambda net: peers.per_leaf(peers.qdwh, net.rule), polar.QDWH()
    ),
}
METHODS = [*ENTRIES, peers.TORCH]
KINDS: dict[str, Callable[[trees.Network], Any]] = {
    "gaussian": lambda net: trees.gaussian(net.params),
    "decaying": trees.decaying,
}


class Limits(NamedTuple):
    """How many calls are made, and what is not called at all."""

    rounds: int
    slow_rounds: int
    patience: float  # seconds of calls for each entry, two calls not counted
    most_gib: float  # of temporary memory


class Program(NamedTuple):
    """A compiled update, and what it took to make it."""

    call: Callable[[Any], Any]
    numbers: tables.Row
    temporary_bytes: int | None


def compiled(entry: Entry, network: trees.Network) -> Program:
    """Trace, lower and compile an update, with nothing remembered from before."""
    transform = entry.make(network)
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), network.params)
    state = transform.init(zeros)
    jax.clear_caches()
    clock = [time.perf_counter()]
    traced = jax.jit(lambda g, s: transform.update(g, s, g)[0]).trace(zeros, state)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    program = lowered.compile()
    clock.append(time.perf_counter())
    memory = program.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else None
    numbers = dict(
        zip(("trace_s", "lower_s", "compile_s"), np.diff(clock), strict=True)
    )
    numbers = {name: float(value) for name, value in numbers.items()}
    numbers["products"] = gemm.inputs_of_products(lowered.as_text())
    return Program(lambda grads: program(grads, state), numbers, temporary)


class Measured(NamedTuple):
    """What the calls of an entry showed."""

    seconds: dict[int, float]
    errors: tables.Row


def measure(
    network: trees.Network,
    grads: Any,
    programs: Mapping[str, Program],
    limits: Limits,
    torch: str | None = None,
) -> tuple[dict[str, Measured], str]:
    """Return what every program took and gave, and how many matrices were compared.

    Args:
      network: what the gradients belong to.
      grads: the gradients.
      programs: what is called, by name.
      limits: how often.
      torch: an interpreter that has torch, whose Muon is called too.
    """
    everywhere, at = errors.places(network), errors.sample(network)
    references = [errors.directions(x) for x in errors.pick(grads, network, at)]
    calls, picked, first = {}, {}, {}
    with contextlib.ExitStack() as stack:
        if torch:
            everything = errors.pick(grads, network, everywhere)
            factors, step = stack.enter_context(peers.torch_muon(everything, torch))
            calls[peers.TORCH], first[peers.TORCH] = step, 0.0
            picked[peers.TORCH] = [factors[place.number] for place in at]
        for name, program in programs.items():
            calls[name] = functools.partial(program.call, grads)
            first[name], found = _timed(calls[name])
            picked[name] = errors.pick(found, network, at)
            del found
        seconds = _seconds(calls, first, limits)
    measured = {
        name: Measured(seconds[name], errors.worst(picked[name], references))
        for name in [*programs, *calls.keys() - programs.keys()]
    }
    return measured, f"{len(at)} of {len(everywhere)}"


def _seconds(
    calls: Mapping[str, Callable[[], Any]], first: Mapping[str, float], limits: Limits
) -> dict[str, dict[int, float]]:
    """Return the seconds of every call by round, given those of the first of all."""
    second = {
        name: first[name] if first[name] > _LONG_SECONDS else _timed(call)[0]
        for name, call in calls.items()
    }
    counts = {name: _count(second[name], limits) for name in calls}
    on_cpu = jax.default_backend() == "cpu"
    seconds = timing.interleaved(calls, counts, _PAUSE if on_cpu else 0.0)
    # Where patience allows for one call only, it has been made.
    return {name: spent or {0: second[name]} for name, spent in seconds.items()}


def _count(seconds: float, limits: Limits) -> int:
    """Return how many calls there is time for, after one that took so long."""
    if seconds <= timing.SLOW_SECONDS:
        return limits.rounds
    calls = min(limits.rounds, limits.slow_rounds, int(limits.patience / seconds))
    return calls if calls > 1 else 0


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = jax.block_until_ready(call())
    return time.perf_counter() - start, found
