"""Reader of Cline tasks: `api_conversation_history.json`, and the session documents of the 2026 SDK.

Both hold Anthropic-shaped messages. Older models called tools in XML inside their text: those calls are parsed
and named in `trace.extra["calls_from_xml"]`. The extension does not record its system prompt; the SDK does.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer_plugins.traces.accounts import Records
from composer_plugins.traces.beside import read_beside
from composer_plugins.traces.cline_build import Task
from composer_plugins.traces.cline_xml import TOOLS
from composer_plugins.traces.documents import MAX_DOCUMENT, peek, read_document
from composer_plugins.traces.model_fields import text_or_none
from composer_plugins.traces.schema import Trace

_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")
_MARKS = ("<environment_details>", "[TASK RESUMPTION]", "[ERROR] You did not use a tool")
_TAGS = tuple(f"<{name}>" for name in TOOLS)
#: A description of a session is small; a larger file beside a log is none.
_DESCRIPTION = 1 << 20


class ClineReader:
    """Turns a task into one trace."""

    name = "cline"

    def sniff(self, head: bytes) -> bool:
        """True for a document of Anthropic-shaped messages with a trait of Cline."""
        return looks_like_cline(peek(head))

    def companion(self, head: bytes) -> str | None:
        """The files that Cline writes beside a conversation, by what they hold."""
        value = peek(head)
        if isinstance(value, dict):
            if "session_id" in value and ("messages_path" in value or "started_at" in value):
                return "session_description"
            return "task_metadata" if {"files_in_context", "model_usage"} <= set(value) else None
        if _edits(value):
            return "context_history"
        first = value[0] if isinstance(value, list) and value else None
        shown = isinstance(first, dict) and "ts" in first and first.get("type") in ("say", "ask")
        return "shown_messages" if shown and first["type"] in first else None

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the trace of one file (see `composer_plugins.traces.base.TraceReader`).

        A record is one message.

        Raises:
            TraceError: the file is larger than `documents.MAX_DOCUMENT`.
        """
        document = read_document(path)
        document.note_damage(counts)
        value, records, about, keys = document.value, Records(str(path)), None, ()
        if isinstance(value, dict) and "messages" in value:
            about, keys = {k: v for k, v in value.items() if k != "messages"}, ("messages",)
            about["description"] = _description(path, value.get("sessionId"))
            value = value["messages"] if value["messages"] is not None else {}
        trace = None
        if isinstance(value, list) and value:
            trace = _read(Task(records, about), value, document.lines(*keys), None if keys else _edited(path))
        else:
            records.nothing(value)
        records.settle(counts, any_steps=trace is not None)
        if trace is not None:
            yield trace


def _read(task: Task, messages: list[Any], lines: list[int], edited: int | None) -> Trace | None:
    for number, message in enumerate(messages, 1):
        task.records.total = number
        if edited is not None and number - 1 > edited:
            task.talk.inexact("microcompaction")
        line = lines[number - 1] if number <= len(lines) else 0
        task.records.settle_one(number, task.add(message, line, number))
    return task.trace()


def looks_like_cline(value: Any) -> bool:
    """True for a decoded document (or the start of one) that a Cline task could be."""
    if isinstance(value, dict):
        messages = value.get("messages")
        if "sessionId" not in value or "projectHash" in value or not _is_talk(messages):
            return False
        return {"version", "agent"} <= set(value) or "system_prompt" in value or any(map(_trait, messages[:20]))
    return _is_talk(value) and any(map(_trait, value[:20]))


def _is_talk(messages: Any) -> bool:
    """True for a list of messages of the two roles that Anthropic's API has."""
    if not isinstance(messages, list):
        return False
    return all(isinstance(m, dict) and m.get("role") in ("user", "assistant") and "content" in m for m in messages[:20])


def _trait(message: Any) -> bool:
    """True for a message that only Cline, or a program of its family, writes."""
    if not isinstance(message, dict) or "parts" in message:
        return False
    content = message.get("content")
    for block in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if not isinstance(block, dict):
            continue
        if block.get("type") in _BLOCKS:
            return True
        text = block.get("text")
        if not isinstance(text, str):
            continue
        if message.get("role") == "user" and any(mark in text for mark in _MARKS):
            return True
        if not isinstance(content, list):
            continue
        if text.startswith("<task>") if message["role"] == "user" else any(tag in text for tag in _TAGS):
            return True
    return False


def _edited(path: Path) -> int | None:
    """The first message (from 0) that the extension changed in later requests; None when it changed none.

    It keeps such changes (a file's older contents replaced by a note, the notice that messages were left out) beside
    the conversation, in `context_history.json`: pairs of a message's index and its changes. When that is there and
    cannot be read, nobody knows what was changed: -1, every message may be another one.
    """
    place = path.parent / "context_history.json"
    data = read_beside(place, MAX_DOCUMENT)
    if data is None:
        return -1 if os.path.lexists(place) else None
    try:
        edits = _edits(json.loads(data))
    except (ValueError, RecursionError):
        edits = None
    return -1 if edits is None else min(edits, default=None)


def _edits(value: Any) -> list[int] | None:
    """The indices in a history of changes that have one; None when the value is no such history."""
    if not isinstance(value, list):
        return None
    found = []
    for entry in value:
        pair = entry[1] if isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int else None
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or not isinstance(pair[1], list):
            return None
        found += [entry[0]] if pair[1] else []
    return found


def _description(path: Path, session: Any) -> dict[str, Any]:
    """What the SDK wrote of the session in a file beside it, found by the session's id; {} when there is none."""
    if not text_or_none(session):
        return {}
    for place in sorted(path.parent.glob("*.json"))[:50]:
        data = None if place == path else read_beside(place, _DESCRIPTION)
        if data is None:
            continue
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and value.get("session_id") == session and "messages" not in value:
            return value
    return {}


#: What `register_trace_readers` names.
READER = ClineReader()
