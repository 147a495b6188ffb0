"""A conversation that OpenHands keeps as a folder with one file for each event.

V1 writes `<conversation>/events/event-00000-<event id>.json`, beside `events/` the `base_state.json`; V0 writes
`<conversation>/events/0.json`, beside it `metadata.json` and the pages `event_cache/0-25.json`, which repeat events.
The order of the events is in the names of the files only, so this is the one place where names are read: what a file
is, its content decides.

Format source: OpenHands/software-agent-sdk (MIT) `openhands-sdk/openhands/sdk/conversation/{event_store,
persistence_const,state}.py`; OpenHands/OpenHands (MIT) `openhands/storage/locations.py`,
`openhands/events/event_store.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from composer_plugins.traces.documents import peek
from composer_plugins.traces.model_fields import dig, text_or_none

#: Names of event files; the group is the place in the conversation.
_NAMES = (re.compile(r"event-(\d{5,})-[0-9A-Za-z-]+\.json\Z"), re.compile(r"(\d+)\.json\Z"))
_PAGE = re.compile(r"\d+-\d+\.json\Z")
_HEAD = 64 * 1024
#: What files beside the events are, by keys that no other file has.
_BESIDE = (
    ("conversation_state", {"agent", "workspace", "execution_status"}),
    ("conversation_state", {"agent", "workspace", "max_iterations"}),
    ("conversation_metadata", {"conversation_id", "selected_repository"}),
)


def parts(path: Path) -> list[Path]:
    """The event files of the conversation that `path` is one of by its name, in their order; else an empty list."""
    folder = path.parent
    if _PAGE.match(path.name) and folder.name == "event_cache":
        return _numbered(folder.parent / "events", 1)
    for kind, name in enumerate(_NAMES):
        if name.match(path.name):
            return _numbered(folder, kind)
    return []


def first_event(path: Path, is_event: Callable[[Any], bool]) -> Path | None:
    """The file through which the conversation that `path` belongs to is read: its first event.

    None when `path` is a log of its own: by its name no event file, or a list of events, or no event at all.
    """

    def one_event(file: Path) -> bool:
        value = _peek(file)
        return isinstance(value, dict) and is_event(value)

    files = parts(path)
    if not files or not (_PAGE.match(path.name) or one_event(path)):
        return None
    return next((file for file in files if one_event(file)), None)


def name_of(path: Path) -> str:
    """Name of the conversation of an event file: its folder's, above `events`."""
    folder = path.resolve().parent
    return (folder.parent if folder.name == "events" else folder).name


def model_of(path: Path) -> str | None:
    """The model that `base_state.json` or `metadata.json` names for the conversation; the events of V1 do not."""
    for name in ("base_state.json", "metadata.json"):
        try:
            value = json.loads((path.parent.parent / name).read_bytes()[: 32 * 2**20])
        except (OSError, ValueError, RecursionError):
            continue
        model = text_or_none(dig(value, "agent", "llm", "model")) or text_or_none(dig(value, "llm_model"))
        if model:
            return model
    return None


def companion(head: bytes) -> str | None:
    """One word for a file beside the events, by its content; None for any other file."""
    value = peek(head)
    keys = set(value) if isinstance(value, dict) else set()
    return next((word for word, wanted in _BESIDE if wanted <= keys), None)


def _peek(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return peek(file.read(_HEAD))
    except OSError:
        return None


def _numbered(folder: Path, kind: int) -> list[Path]:
    try:
        return list(_listed(folder, kind, folder.stat().st_mtime_ns))
    except OSError:
        return []


@lru_cache(maxsize=8)
def _listed(folder: Path, kind: int, changed: int) -> tuple[Path, ...]:
    """Kept for the files that follow: each of them asks for the same folder."""
    found = [(int(m.group(1)), p) for p in folder.iterdir() if (m := _NAMES[kind].match(p.name)) and p.is_file()]
    return tuple(path for _, path in sorted(found, key=lambda item: (item[0], item[1].name)))
