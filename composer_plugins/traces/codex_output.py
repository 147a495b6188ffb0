"""Results of Codex tool calls: four ways of writing an exit code, and Codex's own sentences.

Sources: openai/codex `codex-rs/core/src/tools/mod.rs` (structured and freeform output), `context.rs` (unified
exec), `codex-rs/core/src/tools/events.rs` (rejections), `codex-rs/core/src/tools/code_mode/` (scripts).
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from composer_plugins.traces.model_fields import content_of
from composer_plugins.traces.schema import Status

_HEADER_CODE = re.compile(r"^(?:Exit code: |Process exited with code )(-?\d+)[ \t]*$", re.MULTILINE)
_REJECTED = re.compile(
    r"\A(?:(?:exec(?:[ _]command)?|patch|apply_patch|command|request|tool call)\b[^\n]{0,400})?"
    r"\brejected by (?:the )?user\b",
    re.IGNORECASE,
)
_ABORTED = re.compile(r"\A(?:Wall time: [^\n]*\n)?(?:command )?aborted(?: by user\b|\s*\Z)", re.IGNORECASE)
#: Code mode: the model writes a script that calls the tools, and this stands before what the script printed.
_SCRIPT = re.compile(r"\AScript (completed|failed|terminated|running with cell ID [^\n]*)\nWall time [^\n]*\nOutput:\n")
#: How Codex itself reports that a call could not be carried out; it records no flag with them.
_FAILED = re.compile(
    r"\A(?:unsupported (?:custom tool )?call: |failed to parse function arguments|apply_patch verification failed"
    r"|execution error: |exec_command failed|write_stdin failed|failed in sandbox|sandbox denied exec error"
    r"|tool call error: |err: )",
    re.IGNORECASE,
)


class Output(NamedTuple):
    """One result: the text the model saw, the text to classify, and what the format itself says."""

    text: str
    judged: str
    exit_code: int | None
    flagged: bool
    status: Status | None
    error_class: str | None
    images: int


def read_output(value: Any) -> Output:
    """Read the `output` of a call: text, a list of parts, or an object with `content` and `success`."""
    flagged = False
    if isinstance(value, dict) and ("content" in value or "success" in value):
        flagged = value.get("success") is False
        value = value.get("content_items") or value.get("content")
    text, _, images = content_of(value)
    script = _SCRIPT.match(text)
    flagged = flagged or (script is not None and script[1] == "failed")
    inner, exit_code = _unwrap(text) if script is None else _printed(text[script.end() :])
    if _REJECTED.match(inner):
        return Output(text, inner, exit_code, True, Status.HUMAN_REJECT, "user_rejected", images)
    if _ABORTED.match(inner):
        return Output(text, inner, exit_code, True, Status.INTERRUPTED, "interrupted", images)
    flagged = flagged or _FAILED.match(inner) is not None
    return Output(text, inner, exit_code, flagged, None, None, images)


def _printed(text: str) -> tuple[str, int | None]:
    """What a script printed; when that is the result of one command, the command's output and exit code."""
    text = text.removeprefix("\n")  # between the header, a part of its own, and the next part
    value = _object(text)
    code = value.get("exit_code")
    if isinstance(value.get("output"), str) and type(code) is int and abs(code) < 2**31:
        return value["output"], code
    return text, None


def _object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; {} when it is none."""
    try:
        value = json.loads(text) if text.lstrip()[:1] == "{" else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def _unwrap(text: str) -> tuple[str, int | None]:
    """Return (what the command printed, its exit code) out of the wrapping that Codex put around it."""
    if text.startswith("{") and '"metadata"' in text:
        value = _object(text)
        if isinstance(value.get("output"), str):
            metadata = value.get("metadata")
            code = metadata.get("exit_code") if isinstance(metadata, dict) else None
            return value["output"], code if type(code) is int and abs(code) < 2**31 else None
    header, found, body = text[:2000].partition("Output:\n")
    if not found:
        header, body = text[:300], text
    else:
        body = text[len(header) + len("Output:\n") :]
    code = _HEADER_CODE.search(header)
    if code is None:
        return text, None
    number = int(code.group(1)[:12])
    return body, number if abs(number) < 2**31 else None
