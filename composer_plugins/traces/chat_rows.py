"""Which chat format a file is in, and the reading of files that hold one conversation per line.

Three formats share the chat vocabulary, and the first match must not depend on an order. A row is

- `verifiers` when it is an episode, a trace with message nodes, or `prompt` + `completion` with an `example_id` or
  a `reward`;
- `trl` when it has `prompt` + `completion` or `chosen` (+ `rejected`) as message lists, or `messages` with a trait
  that only TRL datasets have: arguments as objects, `tools` as JSON text, `chat_template_kwargs`;
- `openai_messages` when it has `messages` and none of these, or when the file is one JSON document of messages.

A file is of the first of these formats that one of its first rows has. Rows may also stand in one JSON document, a
list of them or a single one, as `datasets` and `json.dump` write them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from composer_plugins.traces.accounts import note_problem
from composer_plugins.traces.chat_messages import ROLES
from composer_plugins.traces.cline import looks_like_cline
from composer_plugins.traces.documents import Document, peek, read_document
from composer_plugins.traces.lines import decode_objects, iter_lines
from composer_plugins.traces.schema import Trace

#: Bytes at the start of a file that decide its layout.
HEAD = 64 * 1024

#: Keys of a conversation that the readers use themselves; what else a row has goes to `trace.extra["fields"]`.
CONVERSATION_KEYS = frozenset(["messages", "tools", "functions", "model"])

_ROW_KEYS = frozenset(["messages", "prompt", "completion", "chosen", "rejected", "nodes", "traces"])
_ID_KEYS = ("id", "uuid", "conversation_id", "session_id", "trajectory_id", "custom_id")
#: Keys of a message or of a document that other formats have and the chat vocabulary has not.
_FOREIGN_MESSAGE = frozenset(["agent", "message_type", "extra", "parentUuid", "parts"])
_FOREIGN_DOCUMENT = frozenset(
    ["sessionId", "projectHash", "schema_version", "history", "trajectory", "trajectory_format"]
)
_ANTHROPIC = frozenset(["tool_use", "tool_result", "redacted_thinking"])
Note = Callable[[str, str], None]


class RowError(Exception):
    """A row that is no record of the format: (reason for the counts, what was found)."""


@dataclass(frozen=True)
class Head:
    """The start of a file: JSON Lines or one document, what could be decoded, and which format it shows."""

    lines: bool
    values: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Head:
        """Read the head of a file. One line alone is a document: its messages are counted one by one."""
        with path.open("rb") as file:
            found = cls.parse(file.read(HEAD))
        if found.lines:
            filled = (number for number, raw in iter_lines(path) if raw is None or raw.strip())
            found = cls(next(filled, None) is not None and next(filled, None) is not None, found.values)
        return found

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """Decode the whole lines of `head`, or as much of a document as it holds."""
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text[:1] == b"[":
            return cls(False, [peek(text)])
        if text[:1] != b"{":
            return cls(True, _rows(text))
        rows = _rows(text)
        if rows or b"\n" not in text:
            return cls(True, rows or [peek(text)])
        return cls(False, [peek(text)])

    @property
    def format(self) -> str | None:
        """`verifiers`, `trl`, `openai_messages` or None."""
        if not self.lines:
            rows = [row for value in self.values for row in (value[:5] if isinstance(value, list) else [value])]
            found = {row_format(row) for row in rows if isinstance(row, dict) and "messages" not in row}
            chat = ["openai_messages"] if any(_is_chat_document(value) for value in self.values) else []
            return next((name for name in ("verifiers", "trl", *chat) if name in found or name in chat), None)
        found = {row_format(value) for value in self.values}
        return next((name for name in ("verifiers", "trl", "openai_messages") if name in found), None)


def _rows(text: bytes) -> list[dict[str, Any]]:
    """The lines of `text` that are whole objects with a key of a conversation."""
    found = []
    for raw in text.split(b"\n", 200)[:200]:
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(value, dict) and not _ROW_KEYS.isdisjoint(value):
            found.append(value)
    return found


@functools.lru_cache(maxsize=2)
def sniff_head(head: bytes) -> str | None:
    """The chat format that the start of a file shows (three readers ask for the same bytes)."""
    return Head.parse(head).format


def row_format(row: Any) -> str | None:
    """The format of one decoded row (see the module's docstring)."""
    if not isinstance(row, dict):
        return None
    if is_verifiers(row):
        return "verifiers"
    if any(is_chat(row.get(key)) for key in ("chosen", "completion")) or is_chat(row.get("prompt")):
        return "trl"
    if not is_chat(row.get("messages")) or not _FOREIGN_DOCUMENT.isdisjoint(row):
        return None
    return "trl" if _trl_trait(row) else "openai_messages"


def is_verifiers(row: dict[str, Any]) -> bool:
    """True for the three generations of rollouts that verifiers and prime-rl save."""
    if "prompt" in row and ("example_id" in row or ("completion" in row and "reward" in row)):
        return True
    task = row.get("task")
    if isinstance(task, dict) and "type" in task:
        return any(key in row for key in ("nodes", "traces", "env", "agent", "verifiers", "runtime"))
    return False


def is_chat(messages: Any) -> bool:
    """True for a list of OpenAI chat messages without a trait of another format; some of them may be damaged."""
    if not isinstance(messages, list) or not messages:
        return False
    good = 0
    for message in messages[:20]:
        if not isinstance(message, dict):
            continue
        if not _FOREIGN_MESSAGE.isdisjoint(message) or message.get("role") == "exit":
            return False
        content = message.get("content")
        if isinstance(content, list) and any(isinstance(p, dict) and str(p.get("type")) in _ANTHROPIC for p in content):
            return False
        role = message.get("role")
        good += isinstance(role, str) and role in ROLES
    return 2 * good >= len(messages[:20])


def _is_chat_document(value: Any) -> bool:
    if looks_like_cline(value):
        return False
    if isinstance(value, list):
        rows = [v for v in value[:5] if isinstance(v, dict) and "messages" in v]
        return any(_is_chat_document(row) for row in rows) if rows else is_chat(value)
    if not isinstance(value, dict) or not _FOREIGN_DOCUMENT.isdisjoint(value):
        return False
    return is_chat(value.get("messages"))


def _trl_trait(row: dict[str, Any]) -> bool:
    if isinstance(row.get("tools"), str) or "chat_template_kwargs" in row:
        return True
    for message in row["messages"]:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                return True
    return False


def row_id(row: dict[str, Any], path: Path, line: int) -> str:
    """The trace id of a row: its own, or the file's name and the line (0: the file holds one conversation)."""
    for key in _ID_KEYS:
        value = row.get(key)
        if (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool)):
            return str(value)
    return f"{path.stem}:{line}" if line else path.stem


def spare_fields(row: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """What a row says beyond the keys in `known`."""
    return {key: value for key, value in row.items() if key not in known and value is not None}


def read_rows(
    path: Path, counts: Counter, to_traces: Callable[[dict[str, Any], Path, int, Note], list[Trace]]
) -> Iterator[Trace]:
    """Yield the traces of a JSONL file of rows, and account for every line.

    Args:
        to_traces: (row, path, line, note) → traces; raises `RowError` for what is no row. `note(reason, detail)`
            names something that was lost inside a row that is used.
    """
    for number, raw in iter_lines(path):
        rows, damage = decode_objects(raw)
        for item in damage:
            if item.reason != "blank_line":
                note_problem(counts, path, number, item.reason, item.detail, lost=item.lost)
        if rows:
            yield from take_row(rows, path, number, counts, to_traces)
        else:
            counts["read"] += 1
            counts["skipped:" + damage[0].reason] += 1


def read_row_document(
    document: Document, counts: Counter, to_traces: Callable[[dict[str, Any], Path, int, Note], list[Trace]]
) -> Iterator[Trace]:
    """The same as `read_rows` for one JSON document: a list of rows, or one row."""
    document.note_damage(counts)
    value = document.value
    if isinstance(value, list):
        for row, line in zip(value, document.lines(), strict=False):
            yield from take_row([row], document.path, line, counts, to_traces)
    elif value is not None:
        yield from take_row([value], document.path, 1, counts, to_traces)


class RowReader(ABC):
    """Base of the readers of chat rows: a record is a row, told by `row_format`, and `_row` makes its traces."""

    name: str

    def sniff(self, head: bytes) -> bool:
        """True for rows with a trait that only this format has."""
        return sniff_head(head) == self.name

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of one file (see `composer_plugins.traces.base.TraceReader`)."""
        with path.open("rb") as file:
            start = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start[:1] == b"[" or start.split(b"\n", 1)[0].rstrip() == b"{":
            yield from read_row_document(read_document(path), counts, self._row)
        else:
            yield from read_rows(path, counts, self._row)

    @abstractmethod
    def _row(self, row: dict[str, Any], path: Path, line: int, note: Note) -> list[Trace]:
        """The traces of one row (see `read_rows`)."""


def take_row(rows: list[Any], path: Path, line: int, counts: Counter, to_traces) -> Iterator[Trace]:
    """Count one record (several rows when they were glued on one line) and yield its traces."""
    counts["read"] += 1
    found: list[Trace] = []
    reasons: list[str] = []
    for row in rows:
        try:
            if not isinstance(row, dict):
                raise RowError("malformed_record", "expected an object")
            traces = to_traces(row, path, line, lambda r, d: note_problem(counts, path, line, r, d))
        except RowError as error:
            reason, detail = error.args
            note_problem(counts, path, line, reason, detail)
            reasons.append(reason)
        else:
            found += traces
            reasons += [] if traces else ["no_model_step"]
    counts["used" if found else "skipped:" + reasons[0]] += 1
    yield from found
