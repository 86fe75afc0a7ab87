"""Matrix products in the text of a compiled program: how large, and how computed.

XLA writes a product as `dot`, on a TPU as `convolution`, and on a GPU also as a call of
a library.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks import hlo

# A product is large where each of its three sides is at least as long as this.
LARGE = 256

_PRECISION = re.compile(
    r'operand_precision(?:=\{(\w+),(\w+)\}|":\["(\w+)","(\w+)"\])', re.IGNORECASE
)
_ALGORITHM = re.compile(r'\balgorithm(?:=dot_|":"ALG_DOT_)(\w+)', re.IGNORECASE)
_LABELS = re.compile(r"dim_labels=(\w+?)_(\w+?)->")


class Product(NamedTuple):
    """A stack of matrix products, m x k times k x n.

    Attributes:
      kind: the dtype that goes in, and the precision or the algorithm asked for, which
        say nothing for dtypes of half the length.
      stack: how many.
      sides: m, n and k.
    """

    kind: str
    stack: float
    sides: tuple[float, float, float]

    @property
    def flops(self) -> float:
        """Additions and multiplications."""
        return 2.0 * self.stack * math.prod(self.sides)

    @property
    def large(self) -> bool:
        """Whether operations decide its time, not launches and bytes."""
        return min(self.sides) >= LARGE


def product(operation: hlo._Operation, types: Mapping[str, str]) -> Product | None:
    """Return the product that an instruction is, if it is one.

    Args:
      operation: an instruction.
      types: those of the values of its program, by name.
    """

    def first(name: str) -> tuple[str, tuple[int, ...]]:
        return next(hlo._shapes(types.get(name, "")), ("", ()))

    axes = _contracted(operation)
    if not axes:
        return None
    # Its operands hold B m k and B k n numbers, and its result B m n.
    (dtype, left), (_, right) = (first(name) for name in operation.operands[:2])
    _, result = next(hlo._shapes(operation.type))
    a, b, c = map(math.prod, (left, right, result))
    k = math.prod(left[i] for i in axes)
    stack = a * b / (c * k**2)
    how = kind(dtype, operation.attributes)
    return Product(how, stack, (a / (stack * k), b / (stack * k), k))


def _contracted(operation: hlo._Operation) -> list[int]:
    """Return the axes of the first operand that are summed over, none of no product."""
    gemm = operation.opcode == "custom-call" and "gemm" in operation.attributes
    if operation.opcode == "dot" or gemm:
        found = hlo._CONTRACTED.search(operation.attributes)
        listed = (found[1] or found[2] or "") if found else ""
        return [int(i) for i in re.findall(r"\d+", listed)]
    labels = _LABELS.search(operation.attributes)
    if operation.opcode == "convolution" and labels:
        return [labels[1].index("f")]
    return []


def kind(dtype: str, attributes: str) -> str:
    """Return how a product is computed, such as `bf16` or `f32 HIGHEST`."""
    if dtype not in ("f32", "f64"):
        return dtype
    if found := _ALGORITHM.search(attributes):
        return f"{dtype} {found[1].upper()}"
    asked = _PRECISION.search(attributes)
    names = dict.fromkeys(x.upper() for x in asked.groups() if x) if asked else ()
    return f"{dtype} {'/'.join(names) or 'DEFAULT'}"
