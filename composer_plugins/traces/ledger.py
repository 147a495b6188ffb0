"""What a reader did with every record, and where a file is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

#: So many damaged places are kept with their text; the others are only counted (a file of garbage has millions).
MAX_PROBLEMS = 1000

#: Reasons that mean a damaged file. A reader may list other oddities (a result without a call): they are no damage.
DAMAGE = frozenset(
    [
        "cut_or_not_json", "glued", "line_too_long", "malformed_record", "not_json", "not_utf8", "too_deep", "trailing_data",
        "unknown_record",
    ]
)  # fmt: skip


class Problem(NamedTuple):
    """One damaged place. `lost` is false when everything on the line could still be read."""

    file: str
    line: int
    reason: str
    detail: str
    lost: bool = True

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason.replace('_', ' ')} ({self.detail})"


class Problems(list):
    """Damaged and odd places, the first `MAX_PROBLEMS` of them; `total` counts all, `damage` the damaged ones."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.damage = 0

    def append(self, problem: Problem) -> None:
        """Keep a damaged place, or only count it."""
        self.total += 1
        self.damage += problem.reason in DAMAGE
        if len(self) < MAX_PROBLEMS:
            super().append(problem)

    def extend(self, problems: Iterable[Problem]) -> None:
        """Keep several; those that `problems` itself only counted are counted here too."""
        if isinstance(problems, Problems):
            self.total += problems.total - len(problems)
            self.damage += problems.damage - sum(problem.reason in DAMAGE for problem in problems)
        for problem in problems:
            self.append(problem)


class Ledger(Counter):
    """A `Counter` of `read`, `used` and `skipped:<reason>` that also keeps the damaged places.

    Readers take any `Counter`; the places are kept when it is a `Ledger`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.problems = Problems()

    def __reduce__(self) -> tuple:
        """Pickled with its places, which a `Counter` alone would leave behind."""
        return _restored, (dict(self), list(self.problems), self.problems.total, self.problems.damage)

    def skipped(self) -> dict[str, int]:
        """Reason → number of records that led to nothing."""
        return {key.split(":", 1)[1]: n for key, n in sorted(self.items()) if key.startswith("skipped:") and n}

    def balanced(self) -> bool:
        """True when every record read is used or skipped by a named reason, and no count is negative."""
        skipped = self.skipped()
        counts = (self["used"], *skipped.values())
        return self["read"] == sum(counts) and min(counts) >= 0

    def add(self, other: Ledger) -> None:
        """Take over the counts and places of another ledger (of one file)."""
        self.update(other)
        self.problems.extend(other.problems)


def _restored(counts: dict[str, int], places: list[Problem], total: int, damage: int) -> Ledger:
    ledger = Ledger(counts)
    list.extend(ledger.problems, places)
    ledger.problems.total, ledger.problems.damage = total, damage
    return ledger
