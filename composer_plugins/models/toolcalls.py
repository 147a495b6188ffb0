"""Tool calls as text: the chat template that renders them, the parser, and their canonical form.

The wire format is the one Qwen and Hermes models use, one JSON object per call between two tags::

    <tool_call>
    {"name": "Read", "arguments": {"file_path": "a.py"}}
    </tool_call>

`render_action` writes exactly what the template writes for the same message, and `parse_action` reads it
back; what cannot be read is kept in `raw_arguments`, never dropped (`problems` says why).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import unicodedata
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from composer_plugins.traces.schema import Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE, END_OF_TURN = "<tool_call>", "</tool_call>", "<|im_end|>"

#: Arguments nested deeper than this are not read: templates, comparison and storage all recurse into them.
MAX_DEPTH = 64


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
#: What reading model-written JSON can raise: ValueError covers syntax, NaN and integers of over 4300 digits.
_UNREADABLE = (ValueError, RecursionError)
_THINKING = re.compile(r"\A<think>\n?(.*?)\n?</think>\n?", re.DOTALL)
# The beginning of a call whose name can be read although its arguments cannot.
_NAMED = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:')

#: Legacy response schema of transformers (before 5.13), which TRL's `parse_response` reads. It yields
#: `content` and `tool_calls`; a broken call makes the whole message plain text, as TRL does for any model.
RESPONSE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "x-regex": (
        r"\A(?:<think>\n?(?P<reasoning_content>.*?)\n?</think>\n?)?"
        r"(?P<content>(?:(?!<tool_call>).)*?)"
        r"(?:\n?(?P<tool_calls><tool_call>.*</tool_call>)\s*)?(?:<\|im_end\|>|\Z)"
    ),
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "string"},
        "reasoning_content": {"type": "string"},
        "tool_calls": {
            "type": "array",
            "x-regex-iterator": r"<tool_call>\s*(.*?)\s*</tool_call>",
            # No "transform" here: it would need jmespath, and one level of nesting says the same.
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "x-parser": "json",
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "arguments": {"type": "object", "additionalProperties": {}},
                        },
                    },
                },
            },
        },
    },
}


@functools.cache
def tool_template() -> str:
    """Return the Jinja source of the ChatML template with tools."""
    return files("composer_plugins.models").joinpath("templates/chatml_tools.jinja").read_text(encoding="utf-8")


def install_tool_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a ChatML tokenizer our tool template and the schema that parses its tool calls; return it.

    Sets `chat_template` and `response_schema` in place. Raises `ModelError` when the tokenizer has no
    `<|im_start|>`/`<|im_end|>` tokens: the template would be plain text to such a model.
    """
    from composer_plugins.errors import ModelError

    missing = [token for token in ("<|im_start|>", END_OF_TURN) if token not in tokenizer.get_vocab()]
    if missing:
        raise ModelError(
            f"The tool template is ChatML, but this tokenizer has no token {' or '.join(missing)}. "
            "Use the model's own chat template (one that renders tools), or a ChatML model."
        )
    tokenizer.chat_template = tool_template()
    tokenizer.response_schema = RESPONSE_SCHEMA
    return tokenizer


def render_call(call: ToolCall) -> str:
    """Return one call as the template renders it, tags included."""
    raw = call.raw_arguments
    arguments = raw if raw is not None else json.dumps(call.arguments, ensure_ascii=False)
    return f'{OPEN}\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {arguments}}}\n{CLOSE}'


def render_action(message: Message, *, thinking: bool = False) -> str:
    """Return an assistant message as the template renders it, without header and end-of-turn token.

    Args:
        message: content and calls are rendered; a call with `raw_arguments` is rendered as it was written.
        thinking: also render `message.thinking` as a `<think>` block.
    """
    parts = [message.content] if message.content else []
    parts += [render_call(call) for call in message.tool_calls]
    prefix = f"<think>\n{message.thinking}\n</think>\n" if thinking and message.thinking else ""
    return prefix + "\n".join(parts)


def parse_action(text: str) -> Message:
    """Read an assistant turn back: thinking, content and calls.

    Args:
        text: a completion; what follows an end-of-turn token is ignored.

    Returns:
        A `Message` with calls `call_0`, `call_1`, ... in order of appearance. A call that cannot be read
        (not closed, not JSON, no name, arguments that are no object) has `raw_arguments` set to what was
        written, and an empty name when none could be read; `problems` turns these into sentences. Text
        between or after calls is kept in `content`.
    """
    text = text.split(END_OF_TURN, 1)[0]
    thinking = None
    if match := _THINKING.match(text):
        thinking, text = match.group(1), text[match.end() :]
    start = text.find(OPEN)
    if start < 0:
        return Message(role="assistant", content=text, thinking=thinking)
    content, calls, position = [text[:start].removesuffix("\n")], [], start
    while start >= 0:
        if between := text[position:start].strip():
            content.append(between)
        call, position = _read_call(text, start + len(OPEN))
        call.id = f"call_{len(calls)}"
        calls.append(call)
        start = text.find(OPEN, position)
    if rest := text[position:].strip():
        content.append(rest)
    content = [part for i, part in enumerate(content) if part or (i == 0 and len(content) == 1)]
    return Message(role="assistant", content="\n".join(content), tool_calls=calls, thinking=thinking)


def problems(message: Message) -> list[str]:
    """Return one sentence per call of `message` that could not be read; empty when all could."""
    found = []
    for number, call in enumerate(message.tool_calls, 1):
        if call.raw_arguments is None:
            continue
        who = f"tool call {number}" + (f" ({call.name})" if call.name else "")
        found.append(f"{who}: {_why_broken(call)}")
    return found


def canonical_call(call: ToolCall) -> tuple[str, str]:
    """Return (name, canonical JSON of the arguments): equal for calls that mean the same.

    Keys are sorted, integral floats become integers, strings are NFC with line feeds and without trailing
    blanks; indentation and inner blanks stay, because code needs them. Arguments that could not be parsed
    are compared as text with blanks collapsed.

    >>> canonical_call(ToolCall(id="a", name="Read", arguments={"limit": 5.0, "file": "a.py "}))
    ('Read', '{"file":"a.py","limit":5}')
    """
    if call.raw_arguments is not None:
        return call.name, "raw:" + " ".join(call.raw_arguments.split())
    canonical = _canonical(call.arguments)
    return call.name, json.dumps(canonical, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _read_call(text: str, start: int) -> tuple[ToolCall, int]:
    """Read the call whose payload begins at `start`; return it and the position after it."""
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except _UNREADABLE:
        value, end = None, -1
    else:
        tail = text[end:].lstrip()
        if tail.startswith(CLOSE):  # reading to the JSON's own end lets arguments contain the closing tag
            end = len(text) - len(tail) + len(CLOSE)
            if (call := _as_call(value)) is not None:
                return call, end
    close = text.find(CLOSE, start)
    payload, position = (text[start:], len(text)) if close < 0 else (text[start:close], close + len(CLOSE))
    return _broken_call(payload.strip()), position


def _why_broken(call: ToolCall) -> str:
    try:
        value = _DECODER.decode(call.raw_arguments)
    except RecursionError:
        return "not valid JSON (nested too deeply)"
    except ValueError as error:
        return f"not valid JSON ({getattr(error, 'msg', None) or str(error).split(';')[0]})"
    if reason := _unusable(value):
        return reason
    if call.name and not isinstance(value, dict):
        return f"arguments must be an object, found {type(value).__name__}"
    return 'expected {"name": ..., "arguments": {...}} closed by ' + CLOSE


def _as_call(value: Any) -> ToolCall | None:
    """Return the call that a JSON value is, or None. Arguments may be an object or a JSON string of one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except _UNREADABLE:
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or _unusable([value["name"], arguments]):
        return None
    return ToolCall(id="", name=value["name"], arguments=arguments)


def _unusable(value: Any) -> str | None:
    """Say why a JSON value cannot be kept as arguments (it could not be stored and read back), or return None."""
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii() and any("\ud800" <= character <= "\udfff" for character in item):
                    return "half a surrogate pair (\\ud800 to \\udfff), which is no character"
            elif isinstance(item, float) and not math.isfinite(item):
                return "a number beyond the range of a float"
            elif isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
        if depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} levels deep"
    return None


def _broken_call(payload: str) -> ToolCall:
    """Keep an unreadable payload: name and raw arguments when the name can be told, else all of it as raw."""
    if match := _NAMED.match(payload):
        rest = payload[match.end() :].strip().removesuffix("}").rstrip()
        with contextlib.suppress(json.JSONDecodeError):
            name = json.loads(match.group(1))
            if not _unusable(name):
                return ToolCall(id="", name=name, raw_arguments=rest)
    return ToolCall(id="", name="", raw_arguments=payload)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {unicodedata.normalize("NFC", str(k)): _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        lines = unicodedata.normalize("NFC", value).replace("\r\n", "\n").split("\n")
        return "\n".join(line.rstrip() for line in lines).strip("\n").rstrip()
    return value
