"""What was replaced: counts and places, never values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Finding:
    """One secret, by its placeholder: how often it was replaced, and where it stood first."""

    kind: str
    placeholder: str
    file: str | None
    line: int
    where: str
    count: int = 0


@dataclass
class ScrubReport:
    """Everything that a scrubber replaced so far. A text that occurs twice in a trace counts once."""

    kinds: Counter[str] = field(default_factory=Counter)
    files: dict[str | None, Counter[str]] = field(default_factory=dict)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    records: int = 0
    changed: int = 0

    def add(self, kind: str, placeholder: str, file: str | None, line: int, where: str) -> None:
        """Count one replacement."""
        self.kinds[kind] += 1
        self.files.setdefault(file, Counter())[kind] += 1
        finding = self.findings.get((kind, placeholder))
        if finding is None:
            finding = self.findings[kind, placeholder] = Finding(kind, placeholder, file, line, where)
        finding.count += 1

    def merge(self, other: ScrubReport) -> None:
        """Add the replacements of records that came after those of this report."""
        self.kinds.update(other.kinds)
        for file, kinds in other.files.items():
            self.files.setdefault(file, Counter()).update(kinds)
        for key, finding in other.findings.items():
            known = self.findings.setdefault(key, finding)
            if known is not finding:
                known.count += finding.count
        self.records += other.records
        self.changed += other.changed

    def rows(self) -> list[tuple[str, int, int, str]]:
        """(kind, replacements, different values, first place) of each kind, the most frequent first."""
        rows = []
        for kind, count in self.kinds.most_common():
            mine = [finding for finding in self.findings.values() if finding.kind == kind]
            first = mine[0]
            rows.append((kind, count, len(mine), f"{first.file or 'text'}, line {first.line}, {first.where}"))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: counts by kind, and by file and kind."""
        files = {file or "": dict(sorted(kinds.items())) for file, kinds in self.files.items()}
        return {
            "records": self.records,
            "changed": self.changed,
            "kinds": dict(sorted(self.kinds.items())),
            "files": files,
        }
