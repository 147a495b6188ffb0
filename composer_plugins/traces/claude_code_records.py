"""Lines of a Claude Code log, decoded: what is on a line, and what is wrong with it.

Decoding is typed, so that the fields we do not need (above all `toolUseResult`, which repeats every result)
are skipped by the parser and never built.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from composer_plugins.traces.lines import Damage, call_arguments, decode_objects, json_text
from composer_plugins.traces.schema import ToolCall

#: What stands for an image in a text.
IMAGE = "[image]"


class Block(msgspec.Struct, gc=False):
    """One content block. `content` of a tool result is text or a list of parts."""

    type: str = ""
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: Any = None
    is_error: bool | None = None


class Body(msgspec.Struct, gc=False):
    """The `message` of a user or assistant record."""

    content: str | list[Block]
    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: dict[str, Any] | None = None


class Attachment(msgspec.Struct, gc=False):
    """What the program put into the context by itself; only a queued prompt is the user's."""

    type: str = ""
    prompt: Any = None


class Outcome(msgspec.Struct, gc=False):
    """The program's own account of a result; the sub-agent that the call started is all we need of it."""

    agentId: Any = None


class Line(msgspec.Struct, gc=False):
    """One record. Names follow the log's own."""

    type: str = ""
    uuid: str | None = None
    parentUuid: str | None = None
    logicalParentUuid: str | None = None
    sessionId: str | None = None
    #: In the place of `sessionId` and `agentId` in what `claude -p --output-format stream-json` prints.
    session_id: str | None = None
    parent_tool_use_id: str | None = None
    agentId: str | None = None
    parentSessionId: str | None = None
    subtype: str | None = None
    isSidechain: bool | None = None
    isMeta: bool | None = None
    isCompactSummary: bool | None = None
    isApiErrorMessage: bool | None = None
    version: str | None = None
    cwd: str | None = None
    gitBranch: str | None = None
    message: Body | None = None
    attachment: Attachment | None = None
    compactMetadata: dict[str, Any] | None = None
    compactedToolIds: list[str] | None = None
    microcompactMetadata: dict[str, Any] | None = None
    toolUseResult: Outcome | str | int | float | bool | list[Any] | None = None


_decode = msgspec.json.Decoder(Line).decode


def decode_batch(lines: list[bytes | None]) -> list[Line] | None:
    """Return the record of each line, or None when not every line is one whole record (see `decode_line`)."""
    try:
        return list(map(_decode, lines))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError):
        return None


def decode_line(raw: bytes | None) -> tuple[list[Line], list[Damage]]:
    """Return the records on one physical line and what is wrong with it; never raises.

    A whole line is decoded in one go; anything else goes through `decode_objects`.
    """
    try:
        if raw is not None:
            return [_decode(raw)], []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    objects, damage = decode_objects(raw)
    records: list[Line] = []
    for value in objects:
        try:
            records.append(msgspec.convert(value, Line))
        except msgspec.ValidationError as error:
            damage.append(Damage("malformed_record", str(error)))
    for item in damage:
        item.fatal = not records
    return records, damage


_RECORD_TYPES = frozenset(
    [
        "user",
        "assistant",
        "system",
        "summary",
        "progress",
        "attachment",
        "queue-operation",
        "file-history-snapshot",
        "permission-mode",
        "last-prompt",
    ]
)


def looks_like_agent_meta(head: bytes) -> bool:
    """True for the `agent-*.meta.json` that stands beside the log of a sub-agent."""
    if len(head) > 8192 or b'"agentType"' not in head:
        return False
    try:
        value = json.loads(head)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("agentType"), str) and "type" not in value


def looks_like_claude_code(head: bytes) -> bool:
    """True when one of the first lines is a Claude Code record (by its keys, never by the file name)."""
    for raw in head.split(b"\n")[:50]:
        if len(raw) == len(head) and b'"sessionId"' in raw and b'"isSidechain"' in raw and b'"type"' in raw:
            return True  # one line longer than the head
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            if b'"sessionId":' in raw.replace(b" ", b"") and b'"isSidechain":' in raw.replace(b" ", b""):
                return True
            continue
        if not isinstance(value, dict) or str(value.get("type")) not in _RECORD_TYPES:
            continue
        if value["type"] in ("user", "assistant") and not isinstance(value.get("message"), dict):
            continue
        if {"sessionId", "uuid", "leafUuid", "snapshot"} & set(value):
            return True
        if "session_id" in value and ("message" in value or value.get("subtype") == "init"):
            return True  # what the program prints
    return False


def blocks_of(body: Body) -> list[Block]:
    """The content as blocks (a plain string is one text block)."""
    if isinstance(body.content, str):
        return [Block(type="text", text=body.content)]
    return body.content


def to_call(block: Block) -> ToolCall:
    """A call block; arguments that are not an object are kept raw."""
    arguments, raw = call_arguments(block.input)
    return ToolCall(id=block.id, name=block.name, arguments=arguments, raw_arguments=raw)


def text_of(content: Any) -> tuple[str, int]:
    """Text of a tool result, and how many images were replaced by a placeholder."""
    if content is None:
        return "", 0
    if isinstance(content, str):
        return content, 0
    parts = content if isinstance(content, list) else [content]
    texts, images = [], 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(IMAGE)
            images += 1
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            texts.append(part if isinstance(part, str) else json_text(part))
    return "\n".join(texts), images


def prompt_text(prompt: Any) -> str:
    """What the user typed while the agent worked: text, or blocks of text and images."""
    return text_of(prompt)[0] if isinstance(prompt, str | list) else ""


def cleared_ids(record: Line) -> list[str]:
    """Calls whose results a micro-compaction cleared."""
    nested = (record.microcompactMetadata or {}).get("compactedToolIds")
    return record.compactedToolIds or (nested if isinstance(nested, list) else [])
