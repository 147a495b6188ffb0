"""A conversation that OpenHands keeps as a folder with one file for each event.

V1 writes `<conversation>/events/event-00000-<event id>.json`, beside `events/` the `base_state.json`; V0 writes
`<conversation>/events/0.json`, beside it `metadata.json` and the pages `event_cache/0-25.json`, which repeat events.
The order of the events is in the names of the files only, so this is the one place where names are read: what a file
is, its content decides.

Which files of a folder are the conversation is decided once, here: those that hold an event, and those in which an
event is lost (cut, damaged, of a kind that we do not know) unless a reader knows them as a log of their own.

Format source: OpenHands/software-agent-sdk (MIT) `openhands-sdk/openhands/sdk/conversation/{event_store,
persistence_const,state}.py`; OpenHands/OpenHands (MIT) `openhands/storage/locations.py`,
`openhands/events/event_store.py`.
"""

from __future__ import annotations

import json
import re
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from composer_plugins.plugins import get_plugin_manager
from composer_plugins.traces import openhands_v0, openhands_v1
from composer_plugins.traces.beside import read_beside
from composer_plugins.traces.documents import peek
from composer_plugins.traces.model_fields import dig, text_or_none

#: Names of event files; the group is the place in the conversation.
_NAMES = (re.compile(r"event-(\d{5,})-[0-9A-Za-z-]+\.json\Z"), re.compile(r"(\d+)\.json\Z"))
_PAGE = re.compile(r"\d+-\d+\.json\Z")
_HEAD = 64 * 1024
#: How every event begins; V1 writes its `kind` last, behind all that it holds.
_FIRST_KEYS = ["id", "timestamp", "source"]
#: The largest state or description of a conversation that is opened, in bytes.
_MAX_BESIDE = 32 * 2**20
#: What files beside the events are, by keys that no other file has.
_BESIDE = (
    ("conversation_state", {"agent", "workspace", "execution_status"}),
    ("conversation_state", {"agent", "workspace", "max_iterations"}),
    ("conversation_metadata", {"conversation_id", "selected_repository"}),
)
#: Folders are remembered until they hold so many files together (some 30 MB).
_MOST_FILES = 100_000


class _Folder(NamedTuple):
    """What was found in a folder.

    Args:
        changed: when the folder was last changed, in ns.
        stamps: size in bytes and time of the last change in ns of every file that has the name of an event.
        members: those of them that are the conversation, in its order.
        first: the first of these that holds an event; without one there is no conversation.
    """

    changed: int
    stamps: dict[Path, tuple[int, int]]
    members: dict[Path, None]
    first: Path | None


_known: OrderedDict[tuple[Path, int], _Folder] = OrderedDict()
_decoder = json.JSONDecoder(strict=False)


def members(path: Path) -> list[Path]:
    """The files of the conversation that `path` belongs to, in their order; empty when `path` is a log of its own."""
    found = _found(path)
    return list(found.members) if found is not None else []


def first_event(path: Path) -> Path | None:
    """The file through which the conversation that `path` belongs to is read: its first whole event.

    None when `path` is a log of its own: by its name no event file, or by what it holds no part of the conversation.
    """
    found = _found(path)
    return found.first if found is not None else None


def cut_event(head: bytes) -> bool:
    """True for the first 64 KiB of a longer event, whose kind may be behind them."""
    if len(head) < _HEAD or _decoded(head.decode("utf-8-sig", "ignore").lstrip())[1] is not None:
        return False
    return _begins_as_event(peek(head))


def name_of(path: Path) -> str:
    """Name of the conversation of an event file: its folder's, above `events`."""
    return _home(path.resolve()).name


def model_of(path: Path) -> str | None:
    """The model that `base_state.json` or `metadata.json` names for the conversation; the events of V1 do not."""
    for name in ("base_state.json", "metadata.json"):
        raw = read_beside(_home(path) / name, _MAX_BESIDE)
        try:
            value = json.loads(raw) if raw else None
        except (ValueError, RecursionError):
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


def _home(path: Path) -> Path:
    """The folder of a conversation: that of its event files, or the one above when these lie in `events`."""
    return path.parent.parent if path.parent.name == "events" else path.parent


def _found(path: Path) -> _Folder | None:
    """The folder of the conversation that `path` belongs to; None when it belongs to none."""
    if _PAGE.match(path.name) and path.parent.name == "event_cache":
        found = _folder(path.parent.parent / "events", 1)
        return found if found is not None and found.first is not None else None
    kind = next((kind for kind, name in enumerate(_NAMES) if name.match(path.name)), None)
    found = _folder(path.parent, kind, path) if kind is not None else None
    return found if found is not None and found.first is not None and path in found.members else None


def _folder(folder: Path, kind: int, path: Path | None = None) -> _Folder | None:
    """What is in a folder, remembered for the files that follow: each of them asks for the same folder."""
    try:
        changed = folder.stat().st_mtime_ns
        found = _known.pop((folder, kind), None)
        if found is None or found.changed != changed or not _unchanged(found, path):
            found = _look(folder, kind, changed)
    except OSError:
        return None
    _known[folder, kind] = found
    while len(_known) > 1 and sum(len(one.stamps) for one in _known.values()) > _MOST_FILES:
        _known.popitem(last=False)
    return found


def _unchanged(found: _Folder, path: Path | None) -> bool:
    """False when a file was written anew, which does not touch its folder.

    `path` and the first event are looked at, and every file when the conversation is to be read through `path`.
    """
    if path is not None and path == found.first:
        asked = set(found.stamps)
    else:
        asked = {path, found.first} - {None}
    return all(_stamp(one) == found.stamps.get(one) for one in asked)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None when it is no regular file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return (state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else None


def _look(folder: Path, kind: int, changed: int) -> _Folder:
    """Decide for every file of a folder whether it is part of the conversation."""
    named = [(int(m.group(1)), path.name, path) for path in folder.iterdir() if (m := _NAMES[kind].match(path.name))]
    stamps = {path: stamp for _, _, path in sorted(named) if (stamp := _stamp(path)) is not None}
    held = {path: _holds(_start(path, size)) for path, (size, _) in stamps.items()}
    first = next((path for path, what in held.items() if what == "event"), None)
    found: dict[Path, None] = {}
    for path, what in held.items() if first is not None else ():
        if what == "event" or (what == "lost" and not _is_log(_start(path, stamps[path][0]))):
            found[path] = None
    return _Folder(changed, stamps, found, first)


def _start(path: Path, size: int) -> bytes | None:
    return read_beside(path, _HEAD, first=min(size, _HEAD))


def _holds(head: bytes | None) -> str | None:
    """What the file of a conversation holds, by its start: an `event`, one that is `lost`, or (None) something else."""
    text = (head or b"").decode("utf-8-sig", "ignore").lstrip()
    if head is None or text.startswith("["):
        return None
    value, end = _decoded(text)
    if end is None:
        value = peek(head)
        whole = _is_event(value) or (len(head) >= _HEAD and _begins_as_event(value))
        return "event" if whole else "lost"
    if text[end:].lstrip().startswith("{"):  # JSON Lines, whatever the name
        return None
    if _is_event(value):
        return "event"
    of_unknown_kind = isinstance(value, dict) and "id" in value and value.get("source") in openhands_v1.SOURCES
    return "lost" if of_unknown_kind else None


def _decoded(text: str) -> tuple[Any, int | None]:
    """The value at the start of a text, and where it ends; (None, None) when it is cut, damaged or no JSON."""
    try:
        return _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None, None


def _is_event(value: Any) -> bool:
    return openhands_v0.is_event(value) or openhands_v1.is_event(value)


def _begins_as_event(value: Any) -> bool:
    return isinstance(value, dict) and list(value)[:3] == _FIRST_KEYS and value["source"] in openhands_v1.SOURCES


def _is_log(head: bytes) -> bool:
    """True when any reader knows the file as a log of its own."""
    for entry in get_plugin_manager().trace_readers:
        try:
            if entry.load().sniff(head):
                return True
        except Exception:  # a plugin's bug is told when a file is to be read with it
            continue
    return False
