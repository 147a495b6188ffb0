"""Reader of OpenHands logs, V0 and V1, in each form in which they are written.

- `output.jsonl` of an evaluation or of the resolver: one instance a line, its events in `history` (V0 also as
  [action, observation] pairs);
- an event stream as JSON Lines: one event a line;
- an event stream as one document: a list of events (V0's downloaded trajectory), or an object that holds it;
- a folder with one file for each event, as both versions keep a conversation on disk (see `openhands_folder`).

What the events mean is in `openhands_v0` and `openhands_v1`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer_plugins.traces import openhands_folder, openhands_v0, openhands_v1
from composer_plugins.traces.accounts import Records
from composer_plugins.traces.documents import iter_arrays, peek, read_document
from composer_plugins.traces.ledger import Problem
from composer_plugins.traces.lines import decode_objects, iter_lines
from composer_plugins.traces.model_fields import dict_at, text_or_none
from composer_plugins.traces.openhands_v0 import V0Events
from composer_plugins.traces.openhands_v1 import V1Events
from composer_plugins.traces.schema import SourceRef, Trace

#: Where an object keeps its events.
HOLDERS = ("history", "events", "trajectory", "items")
#: What a line of an evaluation has even before its history: read as an instance when two of them are there.
_ROW_KEYS = ("instance_id", "metadata", "test_result", "instruction", "instance", "issue", "issue_type", "metrics")
_SNIFFED_LINES = 50


class OpenHandsReader:
    """Turns an OpenHands log into one trace per instance or conversation."""

    name = "openhands"

    def sniff(self, head: bytes) -> bool:
        """True for events, or instances with events, of either version; one event may be longer than `head`."""
        if _is_log(peek(head)) or openhands_folder.cut_event(head):
            return True
        return any(_is_log(peek(raw)) for raw in head.split(b"\n")[1:_SNIFFED_LINES])

    def companion(self, head: bytes) -> str | None:
        """One word for the files beside the events of a conversation: its state, its description."""
        return openhands_folder.companion(head)

    def part_of(self, path: Path) -> Path | None:
        """The first event of the conversation that an event file belongs to (see `TraceReader`)."""
        return openhands_folder.first_event(path)

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of one file (see `composer_plugins.traces.base.TraceReader`).

        A record is one event; a line that holds none (damaged, or an instance without events) is one too.

        Raises:
            TraceError: the file is one document and larger than `MAX_DOCUMENT`.
        """
        if self.part_of(path) == path:
            yield from _read_folder(path, counts)
        else:
            yield from (_read_document if _is_document(path) else _read_lines)(path, counts)


def _events(value: Any) -> list[Any] | None:
    """The events that an object holds."""
    if isinstance(value, list):
        return value
    for _, found in iter_arrays(value, *HOLDERS):
        return found
    return None


def _is_event(value: Any) -> bool:
    while isinstance(value, list) and value:  # a pair of action and observation; a loop, as JSON may nest deeply
        value = value[0]
    return openhands_v0.is_event(value) or openhands_v1.is_event(value)


def _is_log(value: Any) -> bool:
    if isinstance(value, dict) and _is_event(value):
        return True
    if _is_row(value):
        return True
    events = _events(value)
    return bool(events) and any(_is_event(event) for event in events[:5])


def _is_row(value: Any) -> bool:
    """True for an instance whose history is empty, or lies behind the part of the line that was looked at."""
    if not isinstance(value, dict) or sum(key in value for key in _ROW_KEYS) < 2 or value.get("history"):
        return False
    metadata = value.get("metadata")
    return isinstance(metadata, dict) and bool({"agent_class", "llm_config", "llm"} & set(metadata))


def _is_document(path: Path) -> bool:
    """True when the file is one JSON value over several lines, or a list; else it is read line by line."""
    with path.open("rb") as file:
        first = b""
        while not first.strip(b"\xef\xbb\xbf \t\r\n"):
            first = file.readline(1 << 20)
            if not first:
                return False
    first = first.strip(b"\xef\xbb\xbf \t\r\n")
    return first[:1] == b"[" or first in (b"{",) or (first[:1] == b"{" and first[-1:] in b",[{" and not _whole(first))


def _whole(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


class _Conversation:
    """The events of one conversation, handed to the version they are of.

    Args:
        path: the log.
        row: what stands around the events.
        files: where each event has a file of its own: these, and `line` is the number of the file.
    """

    def __init__(self, path: Path, row: dict[str, Any] | None = None, files: list[Path] | None = None) -> None:
        self.path, self.row, self.files = path, row or {}, [str(file) for file in files or ()]
        self.records = Records(str(path))
        self.collector: V0Events | V1Events | None = None
        self._lost_before = False

    def feed(self, event: Any, line: int) -> None:
        if isinstance(event, list):
            for item in event:
                self.feed(item, line)
            return
        if not isinstance(event, dict):
            self.records.damage("malformed_record", line, "expected an event object")
            self.lost()
            return
        if self.collector is None and _is_event(event):
            kind = V1Events if openhands_v1.is_event(event) else V0Events
            self.collector = kind(str(self.path), self.records, _model(self.row))
            if self._lost_before:
                self.collector.lost()
        if self.collector is None:
            self.records.damage("unknown_record", line, "expected an OpenHands event")
            self.lost()
        else:
            self.collector.feed(event, line)

    def lost(self) -> None:
        """Something before the next event could not be read."""
        if self.collector is not None:
            self.collector.lost()
        self._lost_before = True

    def finish(self, counts: Counter, name: str | None = None) -> Trace | None:
        trace = None
        if self.collector is not None:
            self.collector.close()
            trace = self._trace(self.collector, name or self.path.name.split(".json")[0])
        if self.files:
            self._place(trace)
        self.records.settle(counts, any_steps=trace is not None)
        return trace

    def _place(self, trace: Trace | None) -> None:
        """Every step, result and damaged place names the file of its event."""
        problems = self.records.problems
        problems[:] = [p._replace(file=self.files[p.line - 1], line=1) for p in problems]
        for step in trace.steps if trace is not None else ():
            for item in (step, *step.results):
                if item.source_ref is not None:
                    item.source_ref = SourceRef(file=self.files[item.source_ref.line - 1], line=1)

    def _trace(self, collector: V0Events | V1Events, name: str) -> Trace | None:
        row = self.row
        success = row.get("success")
        return collector.talk.trace(
            text_or_none(row.get("instance_id")) or name, OpenHandsReader.name, agent="openhands",
            outcome=collector.outcome, tools=collector.tools,
            extra={
                "version": collector.version,
                "agent_class": text_or_none(dict_at(row, "metadata").get("agent_class")),
                "error": text_or_none(row.get("error")),
                "success": success if isinstance(success, bool) else None,
                "text_actions": collector.text_action,
            },
        )  # fmt: skip


def _model(row: dict[str, Any]) -> str | None:
    """The model of an evaluation, from its metadata."""
    names = (text_or_none(dict_at(row, "metadata", key).get("model")) for key in ("llm_config", "llm"))
    return next(filter(None, names), None)


def _read_lines(path: Path, counts: Counter) -> Iterator[Trace]:
    stream = _Conversation(path)
    number_of_rows = 0
    for line, raw in iter_lines(path):
        records, damage = decode_objects(raw)
        for item in damage:
            if item.reason == "blank_line":
                stream.records.skip("blank_line")
            elif item.fatal:
                stream.records.damage(item.reason, line, item.detail)
                stream.lost()
            else:
                _note(stream, line, item)
        for record in records:
            events = None if _is_event(record) else _events(record)
            if events is None and not _is_row(record):
                stream.feed(record, line)
                continue
            number_of_rows += 1
            trace = _row(path, record, events or [], line, counts, number_of_rows)
            if trace is not None:
                yield trace
    trace = stream.finish(counts)
    if trace is not None:
        yield trace


def _note(stream: _Conversation, line: int, item: Any) -> None:
    """Part of a line was lost: named, and counted as a record of its own."""
    if item.lost and item.reason not in ("not_utf8", "too_deep"):
        stream.records.damage(item.reason, line, item.detail)
        stream.lost()


def _row(
    path: Path, row: dict[str, Any], events: list[Any], line: int, counts: Counter, number: int
) -> Trace | None:  # fmt: skip
    conversation = _Conversation(path, row)
    if not events:
        conversation.records.skip("no_events")
    for event in events:
        conversation.feed(event, line)
    return conversation.finish(counts, f"{path.name.split('.json')[0]}/{number}")


def _read_document(path: Path, counts: Counter) -> Iterator[Trace]:
    document = read_document(path)
    document.note_damage(counts)
    if document.value is None:
        return
    root = document.value if isinstance(document.value, dict) else {}
    keys = [] if isinstance(document.value, list) else [key for key, _ in iter_arrays(root, *HOLDERS)][:1]
    events = _events(document.value)
    if isinstance(document.value, list) and events and not any(map(_is_event, events[:5])):
        for number, (row, line) in enumerate(zip(events, document.lines(), strict=True), 1):
            inner = _events(row) if isinstance(row, dict) else None
            trace = _row(path, row if isinstance(row, dict) else {}, inner or [], line, counts, number)
            if trace is not None:
                yield trace
        return
    conversation = _Conversation(path, root)
    if not events:
        conversation.records.skip("no_events")
    for event, line in zip(events or [], document.lines(*keys), strict=True):
        conversation.feed(event, line)
    trace = conversation.finish(counts)
    if trace is not None:
        yield trace


def _read_folder(first: Path, counts: Counter) -> Iterator[Trace]:
    """The conversation that begins with the event file `first`. A record is a file, and counts as its line 1."""
    files = openhands_folder.members(first)
    conversation = _Conversation(first, {"metadata": {"llm": {"model": openhands_folder.model_of(first)}}}, files)
    for number, file in enumerate(files, 1):
        document = read_document(file)
        damage = document.damage
        if damage is not None and (damage.fatal or damage.reason not in ("not_utf8", "too_deep")):
            conversation.records.damage(damage.reason, number, damage.detail)
            conversation.lost()
            continue
        if damage is not None:
            conversation.records.problems.append(Problem("", number, damage.reason, damage.detail, lost=False))
        conversation.feed(document.value, number)
    trace = conversation.finish(counts, openhands_folder.name_of(first))
    if trace is not None:
        yield trace


#: What `register_trace_readers` names.
READER = OpenHandsReader()
