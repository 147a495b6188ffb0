"""Lines of a line-oriented log: read one at a time in bounded memory, decoded as far as they can be.

Every reader of a JSONL format shares this: what a crash or a copy does to a line is the same in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec

#: Longest line that is read (bytes). A longer one is skipped without being held in memory, and counted.
MAX_LINE = 64 * 1024 * 1024

#: So many bytes are read at a time.
_BATCH = 256 * 1024

#: Deepest nesting that is kept: what is deeper could not be written again within Python's recursion limit.
MAX_DEPTH = 200

#: How many starts of an object are tried behind a damaged place, and how much is parsed doing so (× its length).
_TRIES, _EFFORT = 1000, 16

_CONTAINERS = frozenset([dict, list])
_scanner = json.JSONDecoder()
_decoder = msgspec.json.Decoder()


class Damage(msgspec.Struct):
    """Something wrong with a line.

    Args:
        reason: one word for the counts (`cut_or_not_json`, `glued`, `not_utf8`, `line_too_long`, ...).
        detail: what was found, for people.
        fatal: nothing of the line could be used.
        lost: something of the line could not be used (false for records that were merely glued together).
    """

    reason: str
    detail: str
    fatal: bool = True
    lost: bool = True


def iter_batches(path: Path, *, max_line: int = MAX_LINE) -> Iterator[tuple[int, list[bytes | None]]]:
    """Yield (1-based number of the first one, lines with their ends), some hundred lines at a time.

    A line of more than `max_line` bytes comes as None: it is read over in pieces and never held.
    """
    number = 1
    with path.open("rb") as file:
        while block := file.read(_BATCH):
            lines: list[bytes | None] = BytesIO(block).readlines()  # the quickest way to split
            del block
            if not lines[-1].endswith(b"\n"):
                rest = file.readline(max(max_line + 1 - len(lines[-1]), 0))
                lines[-1] += rest
                if len(lines[-1]) > max_line and not rest.endswith(b"\n"):
                    lines[-1] = None
                    _pass_over(file)
            if max_line < _BATCH or lines[-1] is None or len(lines[-1]) > max_line:
                lines = [line if line and len(line.removesuffix(b"\n")) <= max_line else None for line in lines]
            yield number, lines
            number += len(lines)


def iter_lines(path: Path, *, max_line: int = MAX_LINE) -> Iterator[tuple[int, bytes | None]]:
    r"""Yield (1-based number, bytes without the line end `\n` or `\r\n`) for every physical line.

    A line of more than `max_line` bytes comes as None.
    """
    for first, lines in iter_batches(path, max_line=max_line):
        for number, raw in enumerate(lines, first):
            yield number, raw and without_end(raw)


def without_end(raw: bytes) -> bytes:
    r"""Return a line without its end, `\n` or `\r\n`."""
    if not raw.endswith(b"\n"):
        return raw
    return raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]


def _pass_over(file) -> None:
    while piece := file.readline(1 << 20):
        if piece.endswith(b"\n"):
            return


def decode_objects(raw: bytes | None) -> tuple[list[dict[str, Any]], list[Damage]]:
    """Return the JSON objects on one physical line and what is wrong with it; never raises.

    A whole line is decoded in one go. Anything else takes the slow way and yields what can be saved: objects
    glued together, a cut end, a whole record behind a cut one, bytes that are not UTF-8 (replaced), zero bytes
    of a crash. Lone surrogates, which programs do write, are replaced without being damage.

    Args:
        raw: as `iter_lines` yields it; None is a line that was too long.

    Returns:
        Objects nested no deeper than `MAX_DEPTH`, whose texts can be encoded as UTF-8, and the damage. With no
        objects there is at least one damage with `fatal` set; `blank_line` is no loss.
    """
    if raw is None:
        return [], [Damage("line_too_long", f"longer than {MAX_LINE >> 20} MiB, the most that is read")]
    try:
        value = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _salvage(raw)
    return _checked([value], [], deep=raw.count(b"{") + raw.count(b"[") > MAX_DEPTH)


def _salvage(raw: bytes) -> tuple[list[dict[str, Any]], list[Damage]]:
    damage: list[Damage] = []
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8", "replace")
        damage.append(Damage("not_utf8", f"byte {raw[error.start]:#04x} at column {error.start + 1} was replaced"))
    text = text.strip("\ufeff \t\r\n")
    if not text:
        return [], [Damage("blank_line", "the line is empty", lost=False)]
    text = text.strip("\x00")
    if not text:
        return [], [Damage("not_json", "zero bytes, as a crash leaves them")]
    if "{" not in text and not text[0].isprintable():
        return [], [Damage("not_json", "binary data")]
    found, rest, depth = _objects(text)
    if depth:
        damage.append(Damage("too_deep", f"nested deeper than {MAX_DEPTH} levels"))
    elif rest:
        damage.append(Damage("cut_or_not_json", f"not JSON from {rest[:60]!r}"))
        found += _behind(rest)
    return _checked(found, damage, deep=True)


def _checked(found: list[Any], damage: list[Damage], *, deep: bool) -> tuple[list[dict[str, Any]], list[Damage]]:
    """Keep the values that are usable objects; say what is wrong with the others."""
    records: list[dict[str, Any]] = []
    for value in found:
        if not isinstance(value, dict):
            damage.append(Damage("malformed_record", f"expected an object, found {_kind(value)}"))
        elif deep and too_deep(value):
            damage.append(Damage("too_deep", f"nested deeper than {MAX_DEPTH} levels"))
        else:
            records.append(printable(value) if deep else value)
    if len(records) > 1:
        damage.append(Damage("glued", f"{len(records)} records on one line", lost=False))
    for item in damage:
        item.fatal = not records
    return records, damage


def _objects(text: str) -> tuple[list[Any], str, bool]:
    """Split glued JSON values; return them, the rest that is not JSON, and whether it is too deep to read."""
    found, position = [], 0
    while position < len(text):
        try:
            value, position = _scanner.raw_decode(text, position)
        except RecursionError:
            return found, text[position:], True
        except ValueError:
            return found, text[position:], False
        found.append(value)
        while position < len(text) and text[position] in " \t\r\n\x00,":
            position += 1
    return found, "", False


def _behind(text: str) -> list[Any]:
    """The whole record at the end of `text`, whose start is damaged; [] when there is none.

    A program that was killed leaves half a record, and its next record follows on the same line. Only an object
    that ends where the line ends is taken, and none that may be a value inside the damaged one. (Objects quoted in
    its texts do not parse: their quotes are escaped.)
    """
    position, effort = text.find("{", 1), _EFFORT * len(text)
    for _ in range(_TRIES):
        if position < 0 or effort < 0:
            break
        try:
            value, end = _scanner.raw_decode(text, position)
        except json.JSONDecodeError as error:
            end = error.pos
        except (ValueError, RecursionError):
            break
        else:
            if end == len(text):
                inside = text[:position].rstrip().endswith((":", ",", "["))
                return [value] if value and not inside else []
        effort -= max(end - position, 0)
        position = text.find("{", position + 1)
    return []


def too_deep(value: Any, limit: int = MAX_DEPTH) -> bool:
    """True when lists and objects are nested deeper than `limit` (found without recursion)."""
    if type(value) is dict and not _CONTAINERS.intersection(map(type, value.values())):
        return False  # most arguments of calls
    level = [value]
    for _ in range(limit + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = [item for item in below if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def printable(value: Any) -> Any:
    """Return `value` with lone surrogates replaced, which JSON escapes allow and UTF-8 does not."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return value


def call_arguments(value: Any) -> tuple[dict[str, Any], str | None]:
    """Return (arguments, raw text) of a tool call as `ToolCall` keeps them; never raises.

    Args:
        value: an object, JSON text of one (as the OpenAI vocabulary has it), None or "" (no arguments), or
            anything else, which is kept as text and not guessed at.
    """
    if value is None or value == "":
        return {}, None
    if isinstance(value, dict):
        return (value, None) if not too_deep(value) else ({}, f"[arguments nested deeper than {MAX_DEPTH} levels]")
    if isinstance(value, str):
        try:
            parsed = _scanner.decode(value)
        except (ValueError, RecursionError):
            return {}, printable(value)
        if isinstance(parsed, dict) and not too_deep(parsed):
            return printable(parsed), None
        return {}, printable(value)
    return {}, json_text(value)


def json_text(value: Any) -> str:
    """`value` as compact JSON; a marker when it is nested too deeply to be written. Never raises."""
    if too_deep(value):
        return f"[nested deeper than {MAX_DEPTH} levels]"
    return msgspec.json.encode(printable(value)).decode()


def _kind(value: Any) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "null")
