"""The rule that is a tree of matricisations, like the parameters or a prefix."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from orthax.components._matricisation import Decision, Matricisation
from orthax.components._paths import path_string

Cuts = tuple[tuple[str, Matricisation | None], ...]


@dataclasses.dataclass(frozen=True)
class ByTree:
    """A tree of matricisations like the parameters, or a prefix of such a tree.

    A tree that is passed as `rule=` becomes a `ByTree`.

    Attributes:
      cuts: a tree of `Matricisation`, or None to leave leaves alone, with the structure
        of the parameters or a prefix of it: an entry holds for all leaves below it.
        `optax.contrib.MuonDimensionNumbers` are accepted too: reduction axes are rows,
        output axes columns. Stored as pairs (path, matricisation).

    Raises:
      TypeError: if the tree contains anything else.
      ValueError: for two entries of one path; from `resolve`, for a leaf that no entry
        covers (leaves of rank below 2 need none); from `components.resolve`, also for
        an entry that matches no parameter.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> from orthax import components
      >>> params = {"embed": jnp.ones((9, 4)), "mlp": {"up": jnp.ones((4, 8))}}
      >>> dense = components.Matricisation(rows=(0,), columns=(1,))
      >>> tx = orthax.muon(1e-3, rule={"embed": None, "mlp": dense})
      >>> rule = components.ByTree({"embed": None, "mlp": dense})
      >>> rule.resolve("mlp/up", params["mlp"]["up"])
      Matricisation((0,), (1,))
    """

    # An entry that matches no path is a mistake.
    unmatched: ClassVar[str] = "raise"

    cuts: Any

    def __post_init__(self):
        cuts = self.cuts if _is_table(self.cuts) else _table(self.cuts)
        object.__setattr__(self, "cuts", cuts)
        if len(self._by_path) < len(cuts):
            paths = [path for path, _ in cuts]
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(f"The tree of cuts has two entries called '{twice}'.")

    def resolve(self, path: str, leaf: Any) -> Matricisation | None:
        """Return the matricisation of the leaf at `path`."""
        return self.decide(path, leaf).cut

    def decide(self, path: str, leaf: Any) -> Decision:
        """Return the decision on the leaf at `path`, with its entry as the reason."""
        entry = next((above for above in _above(path) if above in self._by_path), None)
        if entry is None:
            raise ValueError(
                f"The tree of cuts has no entry for leaf '{path}' of shape "
                f"{tuple(leaf.shape)}: put Matricisation(rows=..., columns=...) there, "
                "or None to leave it alone."
            )
        return Decision(self._by_path[entry], f"entry '{entry}' of the tree of cuts")

    def unused(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Return the entries that match none of the paths, for `explain`."""
        known = {above for path in paths for above in _above(path)}
        return tuple(f"entry {path!r}" for path, _ in self.cuts if path not in known)

    @functools.cached_property
    def _by_path(self) -> dict[str, Matricisation | None]:
        return dict(self.cuts)


def _above(path: str) -> list[str]:
    """Return a path and its prefixes, down to the root, which is empty."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _is_table(cuts: Any) -> bool:
    """Whether these are pairs already, as `dataclasses.replace` passes them."""
    return isinstance(cuts, tuple) and all(
        type(pair) is tuple
        and [isinstance(pair[0], str), len(pair)] == [True, 2]
        and (pair[1] is None or isinstance(pair[1], Matricisation))
        for pair in cuts
    )


def _table(tree: Any) -> Cuts:
    entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_entry)
    return tuple(_named(path_string(path), entry) for path, entry in entries)


def _named(path: str, entry: Any) -> tuple[str, Matricisation | None]:
    if not is_entry(entry):
        raise TypeError(
            f"Its entry '{path}' is of type {type(entry).__name__}; in a tree of cuts "
            "it must be a Matricisation, an optax.contrib.MuonDimensionNumbers or None."
        )
    if _is_dimension_numbers(entry):
        try:
            return path, Matricisation(entry.reduction_axis, entry.output_axis)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Entry '{path}' of the tree of cuts: {error}") from None
    return path, entry


def is_entry(x: Any) -> bool:
    """Return whether `x` is an entry of such a tree."""
    return x is None or isinstance(x, Matricisation) or _is_dimension_numbers(x)


def _is_dimension_numbers(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "reduction_axis")
