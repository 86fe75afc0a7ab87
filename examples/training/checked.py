"""Settings that say what is wrong with them."""

import math
from collections.abc import Sequence
from typing import Any


class Checked:
    """What settings expect of themselves; each raises ValueError unless it holds."""

    def expect(self, holds: Any, name: str, expected: str) -> None:
        """Expect that something holds of a setting."""
        if not holds:
            found = getattr(self, name)
            raise ValueError(f"`{name}` is {found!r}; expected {expected}")

    def expect_at_least(self, least: int, *names: str) -> None:
        """Expect numbers that are finite and not too small."""
        for name in names:
            holds = least <= getattr(self, name) < math.inf
            self.expect(holds, name, f"at least {least}")

    def expect_positive(self, *names: str) -> None:
        """Expect positive numbers; infinity is none."""
        for name in names:
            self.expect(0 < getattr(self, name) < math.inf, name, "a positive number")

    def expect_share(self, *names: str) -> None:
        """Expect numbers of at least zero and below one."""
        for name in names:
            self.expect(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")

    def expect_increasing(self, *names: str) -> None:
        """Expect one positive number or more, in increasing order, each once."""
        for name in names:
            found = getattr(self, name)
            holds = found and all(0 < x < math.inf for x in found)
            holds = holds and list(found) == sorted(set(found))
            expected = "positive numbers in increasing order, each once"
            self.expect(holds, name, expected)

    def expect_among(self, known: Sequence[str], *names: str) -> None:
        """Expect names that are known, each once."""
        for name in names:
            found = getattr(self, name)
            holds = set(found) <= set(known) and len(set(found)) == len(found)
            self.expect(holds, name, f"names among {', '.join(known)}, each once")
