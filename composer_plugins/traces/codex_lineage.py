"""What stood before a Codex rollout that begins where another one ends.

Since version 0.154 a fork, and a thread after a rollback, repeat nothing of their origin: `history_base` in the header
names the other rollout (its id is the end of its file's name) and how much of it counts. It is looked for in the same
folder, or in the year/month/day folders around it.

Format source: openai/codex `codex-rs/history/src/lib.rs`, `codex-rs/rollout/src/rollout_reference_index.rs`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from composer_plugins.traces.beside import read_beside
from composer_plugins.traces.lines import decode_objects
from composer_plugins.traces.model_fields import dig, text_or_none, whole

#: So many rollouts may follow each other, and so many bytes of all of them together are read.
MOST_BASES, MOST_BYTES = 50, 256 * 2**20
_NAME = re.compile(r"rollout-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-(.+)\.jsonl\Z")
_DATE = re.compile(r"\d{2}(\d{2})?\Z")


def records_before(path: Path, meta: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The records of the rollouts that come before the one in `path`, oldest first.

    Args:
        path: the rollout.
        meta: its header.

    Returns:
        None when not all of them can be read, each up to the place that the next one names: a file is missing,
        shorter, damaged or too large, it is no rollout, it comes twice, or the place is not said.
    """
    parts: list[list[dict[str, Any]]] = []
    seen, budget, root = {path.resolve()}, MOST_BYTES, _root(path)
    base = meta.get("history_base")
    while base is not None:
        name = text_or_none(base.get("thread_id")) if isinstance(base, dict) else None
        file = _rollouts(root).get(name or "")
        if file is None or file.resolve() in seen or len(parts) >= MOST_BASES:
            return None
        seen.add(file.resolve())
        size, ordinal = base.get("end_byte_offset"), base.get("end_ordinal_exclusive")
        if whole(ordinal if size is None else size) is None:
            return None
        data = read_beside(file, budget, first=size)
        records = None if data is None else _until(data, ordinal if size is None else None)
        header = dig(records[0], "payload") if records and records[0].get("type") == "session_meta" else None
        if not isinstance(header, dict):
            return None
        budget -= len(data)
        parts.append(records)
        base = header.get("history_base")
    return [record for records in reversed(parts) for record in records]


def _until(data: bytes, ordinal: int | None) -> list[dict[str, Any]] | None:
    """The records of a rollout that a later one builds on; None when one of them is damaged or cannot be placed.

    Args:
        data: the rollout, or as much of it as counts. An end inside a line is damage.
        ordinal: that of the first record that does not count; None: all of `data` counts.
    """
    records: list[dict[str, Any]] = []
    for raw in BytesIO(data):
        found, damage = decode_objects(raw)
        for record in found:
            place = whole(record.get("ordinal"))
            if ordinal is not None and (place is None or place >= ordinal):
                return None if place is None or any(item.lost for item in damage) else records
            records.append(record)
        if any(item.lost for item in damage):
            return None
    # without a record after it, the last one must be the one that the ordinal says
    return records if ordinal is None or (records and records[-1]["ordinal"] == ordinal - 1) else None


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
        if (name := _NAME.match(path.name)) is not None and path.is_file():
            found[name[1]] = None if name[1] in found else path
    return {name: path for name, path in found.items() if path is not None}
