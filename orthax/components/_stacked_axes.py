"""Which axes of a layer's leaves are stacked, found by the sizes of the layer."""

import itertools
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
Sizes = tuple[int | None, ...]  # None: not known


def stacked_axes(
    shapes: Mapping[str, Shape], sizes: Mapping[str, Sizes]
) -> dict[str, list[Shape]]:
    """Return which axes of every leaf may be those that the layer does not have.

    The leaves of a layer are stacked alike: along the same axes, counted from the front
    or from the end. So one leaf may tell what another leaves open.

    Args:
      shapes: by name, the shapes that the leaves have.
      sizes: by name, the shapes that the layer makes when it is not stacked.

    Returns:
      By name, all choices of axes without which `shapes` are `sizes`: one if the sizes
      tell, none if they do not fit.
    """
    alone = {name: _choices(shape, sizes[name]) for name, shape in shapes.items()}
    found = {}
    for name, shape in shapes.items():
        n = len(shape)
        alike = [
            other
            for other in shapes
            if len(shapes[other]) - len(sizes[other]) == n - len(sizes[name])
        ]
        front = set.intersection(*(alone[other] for other in alike))
        end = set.intersection(
            *(_shifted(alone[other], -len(shapes[other])) for other in alike)
        )
        found[name] = sorted(front | _shifted(end, n) or alone[name])
    return found


def _choices(shape: Shape, sizes: Sizes) -> set[Shape]:
    """Return the choices of axes without which a shape is `sizes`."""
    extra = len(shape) - len(sizes)
    return {
        axes
        for axes in itertools.combinations(range(len(shape)), max(extra, 0))
        if _fit([n for i, n in enumerate(shape) if i not in axes], sizes)
    }


def _fit(shape: Sequence[int], sizes: Sizes) -> bool:
    known = zip(shape, sizes, strict=False)
    return len(shape) == len(sizes) and all(n in (m, None) for m, n in known)


def _shifted(choices: set[Shape], by: int) -> set[Shape]:
    return {tuple(axis + by for axis in axes) for axes in choices}
