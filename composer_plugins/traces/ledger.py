"""What a reader did with every line, and where a file is damaged."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Problem(NamedTuple):
    """One damaged place. `lost` is false when everything on the line could still be read."""

    file: str
    line: int
    reason: str
    detail: str
    lost: bool = True

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason.replace('_', ' ')} ({self.detail})"


class Ledger(Counter):
    """A `Counter` of `read`, `used` and `skipped:<reason>` that also keeps the damaged places.

    Readers take any `Counter`; the places are kept when it is a `Ledger`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.problems: list[Problem] = []

    def skipped(self) -> dict[str, int]:
        """Reason → number of lines that led to nothing."""
        return {key.split(":", 1)[1]: n for key, n in sorted(self.items()) if key.startswith("skipped:") and n}

    def balanced(self) -> bool:
        """True when every line read is used or skipped by a named reason."""
        return self["read"] == self["used"] + sum(self.skipped().values())
