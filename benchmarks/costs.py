"""What a compiled program costs by its own text: cycles on a TPU, kernels on a GPU.

Loops count as often as they run, and of the branches of a condition the dearest. On a
TPU the compiler writes the cycles that it expects beside every instruction; on a GPU it
writes none, and the time is a model of ours (`H100`). Neither is a measurement.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from benchmarks import hlo
from benchmarks.products import Product, product

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_CONSTANT = re.compile(
    r"^\s+(?:ROOT )?%?([\w.-]+) = [su]\d+\[\]\S* constant\((\d+)\)", re.MULTILINE
)
# Instructions that hand on what is there and start nothing.
_FREE = {
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "copy-done",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# Instructions whose computations hold instructions of the schedule; what the others
# call (fusions, reductions) is a part of them.
_SCHEDULED = {"async-start", "call", "call-start", "conditional", "while"}
_SLICES = ("dynamic-slice", "gather", "slice")
_UPDATE = "dynamic-update-slice"


@dataclasses.dataclass(frozen=True)
class H100:
    """What a kernel takes on an H100 SXM5: the longest of three.

    The time to start it, that of its bytes, that of the operations of its products.
    The rates are NVIDIA's for dense products (H100 data sheet, 2023: half of those
    "with sparsity"); a launch of 2.5 microseconds is customary, not measured by us.
    Products of float32 run as TF32 in XLA unless their precision is HIGHEST.

    Attributes:
      launch: seconds.
      bandwidth: of the memory, bytes per second.
      bf16: operations per second, also of float16.
      tf32: operations per second.
      f32: outside of the tensor cores, operations per second.
      f64: operations per second.
    """

    launch: float = 2.5e-6
    bandwidth: float = 3.35e12
    bf16: float = 990e12
    tf32: float = 495e12
    f32: float = 67e12
    f64: float = 67e12

    def rate(self, kind: str) -> float:
        """Return the operations per second of a product, by `Product.kind`."""
        dtype, _, how = kind.partition(" ")
        if found := re.fullmatch(r"(BF16|TF32)_\w*?(?:_X(\d))?", how):
            return getattr(self, found[1].lower()) / int(found[2] or 1)
        if dtype in ("bf16", "f16"):
            return self.bf16
        if dtype == "f64":
            return self.f64
        exact = how == "HIGHEST" or how.startswith("F32")
        return self.f32 if exact else self.tf32


class Costs(NamedTuple):
    """What one device does in one call of a program.

    Attributes:
      cycles: by the compiler's own estimates; none where it writes none.
      kernels: that are launched.
      seconds: the model's.
      collectives: how often it takes part in one, by kind.
      products: how many large ones, by kind.
      endless: loops of unknown length, which count as one turn.
    """

    cycles: int
    kernels: int
    seconds: float
    collectives: Mapping[str, int]
    products: Mapping[str, int]
    endless: int


def read(text: str, gpu: H100 | None = None) -> Costs:
    """Return what a device does, from `jax.stages.Compiled.as_text()`.

    Args:
      text: an HLO module after optimisation.
      gpu: what its kernels are timed by, and what decides which branch is the
        dearest; without one, the cycles decide, and the time is none.

    Raises:
      ValueError: for a text without an entry.
    """
    module = Module(text)
    seconds = functools.partial(module.seconds, gpu=gpu) if gpu else None
    done, endless = module.schedule(seconds or cycles)
    kinds, products = collections.Counter(), collections.Counter()
    for each, times in done:
        if kind := collective(each):
            kinds[kind] += times
        for found in module.products(each):
            if found.large:
                products[found.kind] += times
    return Costs(
        sum(cycles(each) * times for each, times in done),
        sum(times for each, times in done if launches(each)),
        sum(seconds(each) * times for each, times in done) if seconds else 0.0,
        kinds,
        products,
        endless,
    )


def cycles(operation: hlo._Operation) -> int:
    """Return what the TPU compiler expects, nothing where it says nothing."""
    found = _CYCLES.search(operation.attributes)
    return int(found[1]) if found else 0


def collective(operation: hlo._Operation) -> str | None:
    """Return the kind of a collective, once for its two halves."""
    return hlo._kind(operation.opcode)


def launches(operation: hlo._Operation) -> bool:
    """Return whether an instruction of the schedule starts a kernel or a copy."""
    return not (
        operation.opcode in _FREE | _SCHEDULED
        or operation.opcode.endswith("-done")
        or 'custom_call_target="AllocateBuffer"' in operation.attributes
    )


Schedule = list[tuple[hlo._Operation, int]]


class Module:
    """The computations of a program, and what happens in them."""

    def __init__(self, text: str):
        self.entry, self.computations = hlo._parsed(text)
        self.constants = {name: int(n) for name, n in _CONSTANT.findall(text)}
        self.types = {
            each.name: each.type for ops in self.computations.values() for each in ops
        }

    def schedule(self, cost: Callable[[hlo._Operation], float]) -> tuple[Schedule, int]:
        """Return every instruction with how often it runs, and endless loops.

        Args:
          cost: of one instruction; the dearest branch of a condition is taken.
        """
        endless = 0

        def walk(name: str) -> Schedule:
            nonlocal endless
            done: Schedule = []
            for each in self.computations.get(name, ()):
                done.append((each, 1))
                if each.opcode not in _SCHEDULED:
                    continue
                parts = [walk(other) for other in self._scheduled(each)]
                if each.opcode == "conditional":
                    parts = sorted(parts, key=total)[-1:]
                times = self._times(each)
                endless += times is None
                done += [
                    (inner, n * (times or 1)) for part in parts for inner, n in part
                ]
            return done

        def total(part: Schedule) -> float:
            return sum(cost(each) * times for each, times in part)

        return walk(self.entry), endless

    def _scheduled(self, operation: hlo._Operation) -> list[str]:
        """Return what an instruction runs; conditions of loops cost next to nothing."""
        if operation.opcode == "while":
            return _BODY.findall(operation.attributes)
        return hlo._called(operation)

    def _times(self, operation: hlo._Operation) -> int | None:
        """Return how often an instruction's computations run, if that is known.

        The TPU compiler leaves the length of a loop in its condition alone.
        """
        if operation.opcode != "while":
            return 1
        if known := _TRIPS.search(operation.attributes):
            return int(known[1])
        condition = _CONDITION.search(operation.attributes)
        bounds = {
            self.constants[name]
            for each in self.computations.get(condition[1] if condition else "", ())
            for name in (each.name, *each.operands)
            if name in self.constants
        }
        return bounds.pop() if len(bounds) == 1 else None

    def products(self, operation: hlo._Operation) -> Iterator[Product]:
        """Yield the products of an instruction, those inside of a fusion too."""
        if found := product(operation, self.types):
            yield found
        if operation.opcode == "fusion":
            for name in hlo._called(operation):
                for each in self.computations.get(name, ()):
                    yield from self.products(each)

    def seconds(self, operation: hlo._Operation, gpu: H100) -> float:
        """Return the time of one instruction of the schedule by the model."""
        if not launches(operation):
            return 0.0
        computing = sum(x.flops / gpu.rate(x.kind) for x in self.products(operation))
        moving = self.bytes(operation) / gpu.bandwidth
        return max(gpu.launch, moving, computing)

    def bytes(self, operation: hlo._Operation) -> float:
        """Return the bytes read and written: of a slice, no more than the slice.

        What is updated in place counts as its update.
        """
        fused = self._fused(operation)
        ends = fused[-1:] or [operation]
        if fused and ends[0].opcode == "tuple":
            by_name = {each.name: each for each in fused}
            ends = [by_name[name] for name in ends[0].operands if name in by_name]
        starts = [x.name for x in fused if x.opcode == "parameter"]
        read = sum(
            self._read(name, fused or [operation])
            for name in (starts if fused else dict.fromkeys(operation.operands))
        )
        return read + sum(map(self._written, ends))

    def _fused(self, operation: hlo._Operation) -> list[hlo._Operation]:
        called = hlo._called(operation) if operation.opcode == "fusion" else ()
        return [each for name in called for each in self.computations.get(name, ())]

    def _read(self, name: str, inside: Iterable[hlo._Operation]) -> float:
        """Return the bytes that instructions take of one value."""
        users = [each for each in inside if name in each.operands]
        if users and all(
            each.opcode in (*_SLICES, _UPDATE) and each.operands.index(name) == 0
            for each in users
        ):
            slices = (each for each in users if each.opcode != _UPDATE)
            return sum(hlo._bytes(each.type) for each in slices)
        return hlo._bytes(self.types.get(name, ""))

    def _written(self, operation: hlo._Operation) -> float:
        if operation.opcode == _UPDATE:
            return hlo._bytes(self.types.get(operation.operands[1], ""))
        return hlo._bytes(operation.type)
