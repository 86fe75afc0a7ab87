"""What a compiled program does on each device, counted in its own text.

XLA's `cost_analysis` counts the body of a loop once, and no collectives. Here loops of
known length count as often as they run, and of the branches of a condition the one
that does most.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|"
    r"false_computation|called_computations)=(\{[^}]*\}|%[\w.-]+)"
)
_CONTRACTED = re.compile(
    r'lhs_contracting_dim(?:s=\{([\d,]*)\}|ensions":\[([\d",]*)\])'
)


class Counts(NamedTuple):
    """What one device does in one call of a program.

    Attributes:
      collectives: how often it takes part in one, by kind.
      moved: bytes of their operands or results, whichever are more.
      sent: bytes that it sends if rings carry them out: of n bytes on each of p
        devices, (p - 1) n for an all-gather, twice (p - 1) / p n for an all-reduce, n
        for a permutation, (p - 1) / p n for any other.
      flops: operations of matrix products; no others, and none inside of LAPACK.
      endless: loops of unknown length, which count as one turn.
    """

    collectives: Mapping[str, int]
    moved: float = 0.0
    sent: float = 0.0
    flops: float = 0.0
    endless: int = 0

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        """Return the sum with another, which happens several times."""
        kinds = dict(self.collectives)
        for kind, n in other.collectives.items():
            kinds[kind] = kinds.get(kind, 0) + n * times
        return Counts(
            kinds,
            self.moved + other.moved * times,
            self.sent + other.sent * times,
            self.flops + other.flops * times,
            self.endless + other.endless,
        )


class _Operation(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


def count(text: str) -> Counts:
    """Return what a device does, from `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: for a text without an entry.
    """
    entry, computations = _parsed(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    return _total(entry, computations, int(devices[1]) if devices else 1, {})


def _parsed(text: str) -> tuple[str, dict[str, list[_Operation]]]:
    computations: dict[str, list[_Operation]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            lines += _operation(found[1], found[2])
    if entry is None:
        raise ValueError("The text is no HLO module: no line begins with 'ENTRY'.")
    return entry, computations


def _operation(name: str, rest: str) -> Iterator[_Operation]:
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode:
        last = _closing(rest, opcode.end() - 1)
        operands = tuple(re.findall(r"%([\w.-]+)", rest[opcode.end() : last]))
        yield _Operation(name, rest[:end], opcode[1], operands, rest[last:])


def _closing(text: str, start: int) -> int:
    """Return where the bracket that opens at `start` has been closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    return len(text)


def _total(
    name: str,
    computations: Mapping[str, Sequence[_Operation]],
    devices: int,
    known: dict[str, Counts],
) -> Counts:
    """Return the counts of a computation and of all that it calls."""
    if name not in known:
        total = Counts({})
        types = {each.name: each.type for each in computations.get(name, ())}
        for each in computations.get(name, ()):
            total = total.plus(_own(each, types, devices))
            if _kind(each.opcode) is None and not each.opcode.endswith("-done"):
                called = [
                    _total(other, computations, devices, known)
                    for other in _called(each)
                ]
                total = total.plus(*_repeated(each, called))
        known[name] = total
    return known[name]


def _called(operation: _Operation) -> list[str]:
    found = _CALLED.findall(operation.attributes)
    return [name for _, names in found for name in re.findall(r"[\w.-]+", names)]


def _repeated(operation: _Operation, called: Sequence[Counts]) -> tuple[Counts, int]:
    """Return what an operation calls, and how often."""
    if operation.opcode == "conditional":
        return max(called, key=lambda c: (c.moved, c.flops), default=Counts({})), 1
    together = Counts({})
    for each in called:
        together = together.plus(each)
    if operation.opcode != "while":
        return together, 1
    trips = _TRIPS.search(operation.attributes)
    if trips:
        return together, int(trips[1])
    return together._replace(endless=together.endless + 1), 1


def _own(operation: _Operation, types: Mapping[str, str], devices: int) -> Counts:
    """Return what an operation does by itself."""
    kind = _kind(operation.opcode)
    if kind is None:
        return Counts({}, flops=_products(operation, types))
    has = sum(map(_bytes, (types.get(name, "") for name in operation.operands)))
    p = _group(operation.attributes, devices)
    if kind == "all-gather":
        return Counts({kind: 1}, has * p, has * (p - 1))
    if kind == "all-reduce":
        return Counts({kind: 1}, has, 2 * has * (p - 1) / p)
    whole = kind in ("collective-permute", "collective-broadcast")
    return Counts({kind: 1}, has, has if whole else has * (p - 1) / p)


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _shapes(type_: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, sizes in _SHAPE.findall(type_):
        yield dtype, tuple(int(n) for n in sizes.split(",") if n)


def _bytes(type_: str) -> float:
    total = 0.0
    for dtype, shape in _shapes(type_):
        bits = re.search(r"\d+", dtype)
        total += math.prod(shape) * (int(bits[0]) if bits else 8) / 8
    return total


def _group(attributes: str, devices: int) -> int:
    """Return how many devices take part, of the ways in which XLA writes it."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    grid = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if grid:
        return int(grid[1])
    mesh = re.search(r"replica_groups=[@\w]*mesh\w*\[(.*?)\] ?\{(.*?)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return devices


def _products(operation: _Operation, types: Mapping[str, str]) -> float:
    """Return the operations of a matrix product; those of complex ones count four."""
    gemm = operation.opcode == "custom-call" and "gemm" in operation.attributes
    contracted = _CONTRACTED.search(operation.attributes)
    if not contracted or not (gemm or operation.opcode == "dot"):
        return 0.0
    dtype, result = next(_shapes(operation.type))
    _, left = next(_shapes(types.get(operation.operands[0], "")), ("", ()))
    summed = re.findall(r"\d+", contracted[1] or contracted[2] or "")
    each = 8.0 if dtype.startswith("c") else 2.0
    return each * math.prod(result) * math.prod(left[int(i)] for i in summed)
