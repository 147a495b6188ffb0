"""What stood before a Codex rollout that begins where another one ends.

Since version 0.154 a fork, and a thread after a rollback, repeat nothing of their origin: `history_base` in the header
names the other rollout (its id is the end of its file's name) and how much of it counts. It is looked for in the same
folder, or in the year/month/day folders around it.

Format source: openai/codex `codex-rs/history/src/lib.rs`, `codex-rs/rollout/src/rollout_reference_index.rs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from composer_plugins.traces.lines import decode_objects
from composer_plugins.traces.model_fields import dig, text_or_none, whole

#: So many rollouts may follow each other, and so many bytes of one are read.
MOST_BASES, MOST_BYTES = 50, 256 * 2**20
_NAME = re.compile(r"rollout-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-(.+)\.jsonl\Z")
_DATE = re.compile(r"\d{2}(\d{2})?\Z")


def records_before(path: Path, meta: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The records of the rollouts that come before the one in `path`, oldest first; None when not all can be read.

    Args:
        path: the rollout.
        meta: its header.
    """
    parts: list[list[dict[str, Any]]] = []
    base = meta.get("history_base")
    while isinstance(base, dict):
        name = text_or_none(base.get("thread_id"))
        file = _rollouts(_root(path)).get(name or "")
        records = None if file is None or len(parts) >= MOST_BASES else list(_until(file, base))
        if not records:
            return None
        parts.append(records)
        base = dig(records[0], "payload", "history_base") if records[0].get("type") == "session_meta" else None
    return [record for records in reversed(parts) for record in records]


def _until(file: Path, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a rollout that a later one builds on: so many bytes of it, or those before an ordinal."""
    size, ordinal = whole(base.get("end_byte_offset")), whole(base.get("end_ordinal_exclusive"))
    try:
        with file.open("rb") as opened:
            data = opened.read(min(MOST_BYTES, MOST_BYTES if size is None else max(size, 0)))
    except OSError:
        return
    for raw in data.split(b"\n"):
        for record in decode_objects(raw)[0] if raw.strip() else ():
            place = whole(record.get("ordinal"))
            if size is None and ordinal is not None and place is not None and place >= ordinal:
                return
            yield record


def _root(path: Path) -> Path:
    """The folder above the year, month and day folders that the rollout lies in, else its own."""
    folder = path.resolve().parent
    above = [folder, *folder.parents][:3]
    return folder.parents[2] if len(above) == 3 and all(_DATE.match(place.name) for place in above) else folder


def _rollouts(root: Path) -> dict[str, Path]:
    try:
        return _listed(root, root.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=4)
def _listed(root: Path, changed: int) -> dict[str, Path]:
    """Rollouts by the id that ends their names; one that two files have is nobody's."""
    found: dict[str, Path | None] = {}
    for path in sorted(root.glob("*.jsonl")) + sorted(root.glob("[0-9]*/[0-9]*/[0-9]*/*.jsonl")):
        if (name := _NAME.match(path.name)) is not None:
            found[name[1]] = None if name[1] in found else path
    return {name: path for name, path in found.items() if path is not None}
