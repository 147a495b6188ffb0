"""Which fields of the records hold free text, and a walk over them.

Scrubbed: message contents, thinking, call arguments (keys and values), results, hints, tool schemas, outcomes,
`extra`, file names. Never touched: ids of any kind, roles, names of tools and models, formats, reasons, classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter, is_
from typing import Any

import msgspec

from composer_plugins.traces.schema import Hint, Message, SourceRef, State, Step, ToolCall, ToolResult, Trace

#: By record: the fields that are walked, and how (text, json, path, or a record within).
FIELDS: dict[type, dict[str, str]] = {
    Trace: {"messages": "records", "steps": "records", "tools": "json", "outcome": "text", "source_file": "path", "extra": "json"},
    State: {"messages": "records", "action": "record", "source_ref": "record", "tools": "json", "results": "records", "hint": "record", "cwd": "path"},
    Step: {"source_ref": "record", "results": "records"},
    Message: {"content": "text", "tool_calls": "records", "thinking": "text"},
    ToolCall: {"arguments": "json", "raw_arguments": "text"},
    ToolResult: {"content": "text", "source_ref": "record"},
    SourceRef: {"file": "path"},
    Hint: {"text": "text", "evidence": "text"},
}  # fmt: skip

#: Fields with text that is an id or a word of ours: a test demands that every field of a record is in one table.
KEPT: dict[type, set[str]] = {
    Trace: {"id", "format", "agent", "session_id", "parent_id"},
    State: {"id", "trace_id", "status", "model"},
    Step: {"inexact", "model", "not_trainable_reason"},
    Message: {"role", "tool_call_id", "name"},
    ToolCall: {"id", "name"},
    ToolResult: {"call_id", "status", "error_class"},
    SourceRef: set(),
    Hint: {"error_class", "status", "generator"},
}

#: (text, how, name of the field it is in or None for a value without a name) -> replacement.
Change = Callable[[str, str, str | None], str]
#: Told about every record before its fields are walked.
Enter = Callable[[Any], None]


def _getter(names: Iterable[str]) -> Callable[[Any], tuple]:
    first, *rest = names
    get = attrgetter(first, *rest)
    return get if rest else lambda record: (get(record),)


#: By record: [(field, how)], and what reads all the fields at once.
_PLANS = {record: (list(fields.items()), _getter(fields)) for record, fields in FIELDS.items()}


class Walk:
    """One walk over a record: every text is replaced by `to`; parts without a change are shared with the original.

    Args:
        to: asked once for a text, and for every value that has a name which `tells`.
        tells: True for names of fields whose value `to` must see together with its name.
    """

    def __init__(self, to: Change, tells: Callable[[str], Any] | None = None, enter: Enter | None = None) -> None:
        self.to, self.tells, self.enter = to, tells, enter
        self._same: set[str] = set()

    def record(self, record: Any) -> Any:
        """Return the record with its texts replaced."""
        if self.enter is not None:
            self.enter(record)
        fields, get = _PLANS[type(record)]
        changed = None
        for (name, how), value in zip(fields, get(record), strict=True):
            if not value:
                continue
            if how == "text" or how == "path":
                if value in self._same:
                    continue
                new = self._text(value, how)
            elif how == "records":
                new = self._records(value)
            elif how == "json":
                new = self.json(value)
            else:
                new = self.record(value)
            if new is not value:
                changed = changed or {}
                changed[name] = new
        return msgspec.structs.replace(record, **changed) if changed else record

    def _records(self, items: list) -> list:
        new = [self.record(item) for item in items]
        return items if all(map(is_, items, new)) else new

    def _text(self, text: str, how: str = "text") -> str:
        if text in self._same:
            return text
        new = self.to(text, how, None)
        if new == text:
            self._same.add(text)
            return text
        return new

    def json(self, value: Any, name: str | None = None) -> Any:
        """Return a JSON value with its strings and its keys replaced; two keys never become one."""
        if isinstance(value, str):
            if name is not None and self.tells is not None and self.tells(name):
                new = self.to(value, "text", name)
                return value if new == value else new
            return self._text(value)
        if isinstance(value, dict):
            return self._object(value)
        if isinstance(value, list):
            new = [self.json(item, name) for item in value]
            return value if all(map(is_, value, new)) else new
        return value

    def _object(self, value: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, Any] = {}
        same = True
        title = value.get("name") or value.get("key")
        for key, item in value.items():
            label = title if key == "value" and isinstance(title, str) else key
            fresh_item = self.json(item, label)
            fresh_key = self._text(key) if len(key) > 5 else key
            same = same and fresh_item is item and fresh_key is key
            while fresh_key in new:
                fresh_key += "_"
            new[fresh_key] = fresh_item
        return value if same else new


def texts_of(record: Any) -> set[str]:
    """Return every text that a `Walk` asks about."""
    found: set[str] = set()
    _collect(record, found)
    return found


def _collect(record: Any, found: set[str]) -> None:
    fields, get = _PLANS[type(record)]
    for (_, how), value in zip(fields, get(record), strict=True):
        if not value:
            continue
        if how == "text" or how == "path":
            found.add(value)
        elif how == "records":
            for item in value:
                _collect(item, found)
        elif how == "json":
            _collect_json(value, found)
        else:
            _collect(value, found)


def _collect_json(value: Any, found: set[str]) -> None:
    if isinstance(value, str):
        found.add(value)
    elif isinstance(value, dict):
        found.update(value)
        for item in value.values():
            _collect_json(item, found)
    elif isinstance(value, list):
        for item in value:
            _collect_json(item, found)
