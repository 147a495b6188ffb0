"""What became of every line of a Claude Code file."""

from __future__ import annotations

import re
from collections import Counter

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}\Z")


class Fates:
    """One byte a line: used, or why not. A line has none until `use` or `skip` is called for it."""

    USED = 1

    def __init__(self) -> None:
        self.codes = bytearray(1)  # lines count from 1
        self.names = ["not_used", "used"]
        self._index = {name: code for code, name in enumerate(self.names)}

    def extend(self, lines: int) -> None:
        """More lines follow."""
        self.codes.extend(bytes(lines))

    def settle(self, line: int, reason: str | None) -> None:
        """The line is used (None), or leads to nothing. The first reason stands, and use is stronger than any."""
        if reason is None:
            self.codes[line] = self.USED
        elif not self.codes[line]:
            self.codes[line] = self._code(reason)

    def _code(self, reason: str) -> int:
        code = self._index.get(reason)
        if code is None:
            if len(self.names) > 250 or not _NAME.match(reason):
                reason = "unknown_record"
            code = self._index.get(reason)
        if code is None:
            code = self._index[reason] = len(self.names)
            self.names.append(reason)
        return code

    def count(self, counts: Counter) -> None:
        """Add `read`, `used` and `skipped:<reason>` of the whole file."""
        counts["read"] += len(self.codes) - 1
        for code, number in Counter(memoryview(self.codes)[1:]).items():
            counts["used" if code == self.USED else "skipped:" + self.names[code]] += number
