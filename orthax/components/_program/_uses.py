"""What is known of the arrays of a program, and what is found of its parameters.

Plain data; nothing here knows a primitive.
"""

import dataclasses
from typing import Any, NamedTuple

from orthax.components._program._views import Dims, Piece

CONSTANT, PARAMETER, DATA = range(3)


class View(NamedTuple):
    """A parameter, or part of it, seen as the array at hand.

    Attributes:
      leaf: which parameter.
      dims: where the array's axes come from.
      fixed: pieces at one position that a loop or an index counts.
      inner: for each product with another parameter before, what it contracted.
      product: the primitive of these products, and its line.
      scaled: whether the values depend on data by now; 2 if something was added.
      looked: where rows were looked up.
      resized: whether a constant was among these products.
      batch: pieces among `dims` that were a batch in these products.
      partners: the other parameters of these products.
    """

    leaf: int
    dims: Dims
    fixed: tuple[Piece, ...] = ()
    inner: tuple[tuple[Piece, ...], ...] = ()
    product: tuple[str, str] = ("", "")
    scaled: int = 0
    looked: tuple[str, str] | None = None
    resized: bool = False
    batch: tuple[Piece, ...] = ()
    partners: tuple[int, ...] = ()


class Product(NamedTuple):
    """Activations that a parameter has just made, and their columns."""

    leaf: int
    dims: Dims
    use: tuple[Any, ...]
    depth: int
    part: bool = False


class Value(NamedTuple):
    """What is known of an array.

    Attributes:
      kind: a constant, made of parameters, or data.
      views: the parameters that can be seen in it.
      products: the parameters that made it.
      iota: whether it counts positions.
      grid: whether it was made from what does.
      hot: whether it is one-hot.
      signal: whether a constant stands for data (noise, sinusoids, captured arrays).
      known: the value of an integer scalar.
    """

    kind: int = CONSTANT
    views: tuple[View, ...] = ()
    products: tuple[Product, ...] = ()
    iota: bool = False
    grid: bool = False
    hot: bool = False
    signal: bool = False
    known: int | None = None

    @property
    def is_plain(self) -> bool:
        """Return whether no parameter can be followed in it."""
        return not self.views and not self.products

    @property
    def acts(self) -> bool:
        """Return whether it is what a parameter is multiplied with, not another one."""
        constant = self.kind == CONSTANT and (self.signal or not self.grid)
        return self.kind == DATA or constant


class Use(NamedTuple):
    """One use of a parameter.

    Attributes:
      leaf: which parameter.
      kind: "matrix", or "look-up", "element-wise", "scaled" (element-wise, but what
        comes of it may be used as a matrix), "adapted" (a matrix to which data were
        added before), "statistic", "vector", "depthwise",
        "returned", "unknown".
      primitive: the name of the primitive.
      where: file and line, "" if not known.
      rows, columns, fixed: pieces of the parameter that a matrix has there.
      groups: whether the columns' batch pieces are a convolution's groups.
      spatial: the axes of a convolution's taps.
      weak: whether it counts only if there is no other (products of parameters alone,
        and backward passes).
      times: how many vectors it is applied to.
      partners: the parameters that it was multiplied with before.
    """

    leaf: int
    kind: str
    primitive: str
    where: str
    rows: tuple[Piece, ...] = ()
    columns: tuple[Piece, ...] = ()
    fixed: tuple[Piece, ...] = ()
    groups: bool = False
    spatial: tuple[int, ...] = ()
    weak: bool = False
    times: int = 1
    partners: tuple[int, ...] = ()


class Part(NamedTuple):
    """A contiguous range of a column axis that was cut out of a product."""

    axis: int
    lo: int
    hi: int
    of: tuple[int, int]


@dataclasses.dataclass
class Found:
    """All that a program says of one parameter.

    Attributes:
      uses: in the order of the program.
      parts: what was cut out of its products.
      joined: ranges whose parts were put together again.
      stacked: column axes that later products keep apart, one matrix for each position.
      summed: whether two of its products were added, as those of parts of its rows.
    """

    uses: dict[Use, None] = dataclasses.field(default_factory=dict)
    parts: dict[Part, None] = dataclasses.field(default_factory=dict)
    joined: set[tuple[int, int, int]] = dataclasses.field(default_factory=set)
    stacked: dict[int, str] = dataclasses.field(default_factory=dict)
    summed: bool = False


def constant(value: Any) -> Value:
    """Return what is known of an array that the program holds."""
    shape = getattr(value, "shape", ())
    kind = getattr(getattr(value, "dtype", type(value)), "kind", "")
    whole_number = isinstance(value, int) or (shape == () and kind in ("i", "u", "b"))
    return Value(signal=len(shape) > 0, known=int(value) if whole_number else None)
