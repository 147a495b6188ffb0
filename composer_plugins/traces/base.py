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
    """

    name: str

    def sniff(self, head: bytes) -> bool:
        """Return True when `head` (up to 64 KiB from the start of a file) is of this format."""

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of `path`.

        Every physical record increments `counts["read"]` and either `counts["used"]` or
        `counts["skipped:<reason>"]`; nothing is lost silently. Damaged lines are counted, never fatal.
        """
