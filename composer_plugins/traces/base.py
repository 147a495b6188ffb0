"""What a log reader is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from composer_plugins.traces.schema import Trace


class TraceReader(Protocol):
    """Turns log files of one format into traces. Registered through `register_trace_readers`.

    Found by content, never by file name: `sniff` sees the first bytes of a file.

    A reader may also have `companion(head: bytes) -> str | None`: the reason (one word for the counts) why a file
    is no log but belongs to one, such as the description of a sub-agent. It is then counted and not called unknown.

    For logs of several files it may have `part_of(path: Path) -> Path | None`: the one of them through which all are
    read; None for a log of one file. `read` is then called with that file only, and reads the others. It is asked of
    every file, before `sniff`, so it must be quick, and true of exactly those files that `read` reads.
    """

    name: str

    def sniff(self, head: bytes) -> bool:
        """Return True when `head` (up to 64 KiB from the start of a file) is of this format."""

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of `path`.

        Every record (a line of a line-oriented log, an element of a document's main lists) increments
        `counts["read"]` and either `counts["used"]` or `counts["skipped:<reason>"]`; nothing is lost silently.
        Damage is counted, named through `counts.problems` when there is such a list, and never fatal.

        Raises:
            TraceError: the file is refused as a whole (a document beyond the size that fits in memory).
        """
