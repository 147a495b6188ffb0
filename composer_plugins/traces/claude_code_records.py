"""Lines of a Claude Code log, decoded: what is on a line, and what is wrong with it.

Decoding is typed, so that the fields we do not need (above all `toolUseResult`, which repeats every result)
are skipped by the parser and never built.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from composer_plugins.traces.schema import ToolCall

#: What stands for an image in a text.
IMAGE = "[image]"


class Block(msgspec.Struct):
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


class Body(msgspec.Struct):
    """The `message` of a user or assistant record."""

    content: str | list[Block]
    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: dict[str, Any] | None = None


class Attachment(msgspec.Struct):
    """What the program put into the context by itself; only a queued prompt is the user's."""

    type: str = ""
    prompt: Any = None


class Line(msgspec.Struct):
    """One record. Names follow the log's own."""

    type: str = ""
    uuid: str | None = None
    parentUuid: str | None = None
    sessionId: str | None = None
    agentId: str | None = None
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
    compactedToolIds: list[str] | None = None
    microcompactMetadata: dict[str, Any] | None = None


class Damage(msgspec.Struct):
    """Something wrong with a line. `fatal`: nothing of the line could be used."""

    reason: str
    detail: str
    fatal: bool = True


_decoder = msgspec.json.Decoder(Line)
_scanner = json.JSONDecoder()


def decode_line(raw: bytes) -> tuple[list[Line], list[Damage]]:
    """Return the records on one physical line and what is wrong with it; never raises.

    A whole line is decoded in one go. Anything else (objects glued together, a cut end, bytes that are not
    UTF-8, a lone surrogate, a field of the wrong type) takes the slow way and yields what can be saved.
    """
    try:
        return [_decoder.decode(raw)], []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _salvage(raw)


def _salvage(raw: bytes) -> tuple[list[Line], list[Damage]]:
    text = raw.decode("utf-8", "replace").strip("\ufeff \t\r\n")
    if not text:
        return [], [Damage("blank_line", "the line is empty")]
    text = text.strip("\x00")
    if not text:
        return [], [Damage("not_json", "zero bytes, as a crash leaves them")]
    if "{" not in text and not text[0].isprintable():
        return [], [Damage("not_json", "binary data")]
    records: list[Line] = []
    damage: list[Damage] = []
    objects, rest = _objects(text)
    for value in objects:
        try:
            records.append(msgspec.convert(_printable(value), Line))
        except msgspec.ValidationError as error:
            damage.append(Damage("malformed_record", str(error)))
        except RecursionError:
            damage.append(Damage("malformed_record", "nested too deeply"))
    if rest:
        damage.append(Damage("cut_or_not_json", f"not JSON from {rest[:60]!r}"))
    if len(records) > 1:
        damage.append(Damage("glued", f"{len(records)} records on one line", fatal=False))
    for item in damage:
        item.fatal = item.fatal and not records
    return records, damage


def _objects(text: str) -> tuple[list[Any], str]:
    """Split glued JSON values; return them and the rest that is not JSON."""
    found, position = [], 0
    while position < len(text):
        try:
            value, position = _scanner.raw_decode(text, position)
        except (ValueError, RecursionError):
            return found, text[position:]
        found.append(value)
        while position < len(text) and text[position] in " \t\r\n\x00,":
            position += 1
    return found, ""


def _printable(value: Any) -> Any:
    """Replace lone surrogates, which JSON escapes allow and UTF-8 does not."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


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
        if not isinstance(value, dict) or value.get("type") not in _RECORD_TYPES:
            continue
        if value["type"] in ("user", "assistant") and not isinstance(value.get("message"), dict):
            continue
        if {"sessionId", "uuid", "leafUuid", "snapshot"} & set(value):
            return True
    return False


def blocks_of(body: Body) -> list[Block]:
    """The content as blocks (a plain string is one text block)."""
    if isinstance(body.content, str):
        return [Block(type="text", text=body.content)]
    return body.content


def to_call(block: Block) -> ToolCall:
    """A call block; arguments that are not an object are kept raw."""
    if isinstance(block.input, dict):
        return ToolCall(id=block.id, name=block.name, arguments=block.input)
    if isinstance(block.input, str):
        try:
            parsed = json.loads(block.input)
        except ValueError:
            return ToolCall(id=block.id, name=block.name, raw_arguments=block.input)
        if isinstance(parsed, dict):
            return ToolCall(id=block.id, name=block.name, arguments=parsed)
    if block.input is None:
        return ToolCall(id=block.id, name=block.name)
    return ToolCall(id=block.id, name=block.name, raw_arguments=msgspec.json.encode(block.input).decode())


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
            texts.append(part if isinstance(part, str) else msgspec.json.encode(part).decode())
    return "\n".join(texts), images


def cleared_ids(record: Line) -> list[str]:
    """Calls whose results a micro-compaction cleared."""
    nested = (record.microcompactMetadata or {}).get("compactedToolIds")
    return record.compactedToolIds or (nested if isinstance(nested, list) else [])
