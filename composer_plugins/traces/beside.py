"""Files that lie beside a log and complete it: opened only when they are what they should be.

A folder of logs may hold anything under a name that a format gives to a companion: a pipe, a device, a file of many
gigabytes. None of them may stop or exhaust a reader that only looks for context.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_beside(path: Path, limit: int, *, first: int | None = None) -> bytes | None:
    """The bytes of a regular file, at most `limit`; None for anything else. Never raises, never waits.

    Args:
        path: the file, or a link to it.
        limit: in bytes. A file that is longer is not cut: half a document means something else than the whole one.
        first: so many bytes of the start are wanted, and the file may go on after them; None when it has fewer.
    """
    if first is not None and not 0 <= first <= limit:
        return None
    try:
        with open(path, "rb", opener=_at_once) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or (state.st_size > limit if first is None else state.st_size < first):
                return None
            data = file.read(state.st_size + 1 if first is None else first)
    except (OSError, ValueError):
        return None
    return data if len(data) == (state.st_size if first is None else first) else None  # it changed just now


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe would wait for somebody who writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
