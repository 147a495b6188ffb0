"""Which fields of the records hold free text, and a walk over them.

Scrubbed: message contents, thinking, call arguments (keys and values), results, hints, tool schemas, outcomes,
`extra`, file names. Never touched: ids of any kind, roles, names of tools and models, formats, reasons, classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def change(record: Any, to: Change, enter: Enter) -> Any:
    """Return `record` with every text replaced by `to`; parts without a change are shared with the original."""
    enter(record)
    changed = {}
    for name, how in FIELDS[type(record)].items():
        value = getattr(record, name)
        if value is None or value == "":
            continue
        if how == "records":
            new = _each(value, lambda item: change(item, to, enter))
        elif how == "record":
            new = change(value, to, enter)
        elif how == "json":
            new = change_json(value, to)
        else:
            new = _replaced(value, to, how, None)
        if new is not value:
            changed[name] = new
    return msgspec.structs.replace(record, **changed) if changed else record


def _replaced(text: str, to: Change, how: str, name: str | None) -> str:
    """The replacement; the text itself when nothing changed, so that unchanged parts are shared and counted so."""
    new = to(text, how, name)
    return text if new == text else new


def _each(items: list, function: Callable[[Any], Any]) -> list:
    new = [function(item) for item in items]
    return items if all(a is b for a, b in zip(items, new, strict=True)) else new


def change_json(value: Any, to: Change, name: str | None = None) -> Any:
    """Return a JSON value with its strings and its keys replaced; two keys never become one."""
    if isinstance(value, str):
        return _replaced(value, to, "text", name)
    if isinstance(value, list):
        return _each(value, lambda item: change_json(item, to, name))
    if not isinstance(value, dict):
        return value
    new: dict[str, Any] = {}
    same = True
    title = value.get("name") or value.get("key")
    for key, item in value.items():
        label = title if key == "value" and isinstance(title, str) else key
        fresh_item = change_json(item, to, label)
        fresh_key = _replaced(key, to, "text", None) if len(key) > 5 else key
        same = same and fresh_item is item and fresh_key is key
        while fresh_key in new:
            fresh_key += "_"
        new[fresh_key] = fresh_item
    return value if same else new


def strings(record: Any) -> Iterator[str]:
    """Yield every text that `change` would be asked about."""
    for name, how in FIELDS[type(record)].items():
        value = getattr(record, name)
        if value is None or value == "":
            continue
        if how == "records":
            for item in value:
                yield from strings(item)
        elif how == "record":
            yield from strings(value)
        elif how == "json":
            yield from json_strings(value)
        else:
            yield value


def json_strings(value: Any) -> Iterator[str]:
    """Yield the strings and keys of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from json_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from json_strings(item)
