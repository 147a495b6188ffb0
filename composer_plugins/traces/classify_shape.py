"""What a format wraps around the text of a result: exit codes, status lines, error objects."""

from __future__ import annotations

import ast
import json
import re

_EXIT = re.compile(
    r"\A(?:Error: )?(?:Exit code:? |\[?exit[_ ]code[:=] ?|<exit_code>|Process exited with code |<returncode>)(-?\d{1,10})\b"
    r"|(?:^|\n)(?:\[exit code: ?|\[?(?:Command finished|The command completed) with exit code |Process exited with code "
    r"|exit code: |Exit Code: )(-?\d{1,10})[\].]*\s*\Z",
    re.IGNORECASE,
)
_SANDBOX = re.compile(r"\A(?:execution error: )?failed in sandbox[^\n]{0,200}?exit code: (-?\d{1,10}), stdout:")
_HEADER = re.compile(r"\A(?:Chunk ID: [^\n]*\n|Wall time: [^\n]*\n)+Process exited with code (-?\d{1,10})\n")
_TAG = re.compile(r"\A\s*<tool_use_error>([\s\S]*?)(?:</tool_use_error>)?\s*\Z")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: Lines that the harness puts after the program's own last line.
_FOOTER = re.compile(
    r"(?:\n*(?:\[(?:Current working directory|Python interpreter|Command finished with exit code|The command completed "
    r"with exit code|Jupyter current working directory|Jupyter Python interpreter)[^\n]*\]|\(Open file: [^\n]*\)"
    r"|\(Current directory: [^\n]*\)|bash-\$|</?output>|Shell cwd was reset to [^\n]*))+\s*\Z"
)
_FOOTERS = (
    "[Current working directory", "[Python interpreter", "[Command finished with", "[The command completed", "[Jupyter",
    "(Open file", "(Current directory", "bash-$", "</output", "Shell cwd was reset",
)  # fmt: skip
_GEMINI_FOOTER = re.compile(
    r"\n(?:Error: (?P<error>[^\n]*(?:\n(?!Exit Code: )[^\n]*){0,40})\n)?Exit Code: (?P<code>-?\d{1,10}|\(none\))"
    r"(?:\n(?:Signal|Background PIDs|Process Group PGID): [^\n]*){0,3}\s*\Z"
)
_GEMINI_HEADER = re.compile(r"\ACommand: [\s\S]*?\nDirectory: [^\n]*\n(?:Output|Stdout): ?")
_FAILED_WORDS = ("error", "failed", "failure")


def split_exit(text: str) -> tuple[str, int | None]:
    """Return (the text without the harness's own lines at its end, the exit code that they or its start name).

    Args:
        text: a tool result; only its first and last hundreds of characters are looked at.
    """
    first = text[:1]
    if first == "C" and text.startswith("Command: "):
        return _gemini(text)
    if first == "{" and '"exit_code"' in text[-200:]:
        inner, code = _codex(text)
        if code is not None:
            return inner, code
    ends = text[:200] + text[-300:]
    # One rare character first: it is looked for ten times as fast as a word.
    named = ("x" in ends and "xit" in ends) or ("X" in ends and "EXIT" in ends) or ("<" in ends and "<ret" in ends)
    code = _exit_code(text) if named else None
    tail = text[-400:].rstrip()
    if tail.startswith(_FOOTERS, tail.rfind("\n") + 1):
        end = _FOOTER.search(text, max(len(text) - 800, 0))
        if end is not None:
            text = text[: end.start()]
    return text, code


def _exit_code(text: str) -> int | None:
    found = (
        _EXIT.search(text[:200]) or _SANDBOX.match(text[:400]) or _HEADER.match(text[:400]) or _EXIT.search(text[-300:])
    )
    return None if found is None else int(next(group for group in found.groups() if group is not None))


def _gemini(text: str) -> tuple[str, int | None]:
    """Gemini CLI's shell result: labelled lines around the output."""
    end, start = _GEMINI_FOOTER.search(text, max(len(text) - 4000, 0)), _GEMINI_HEADER.match(text[:2000])
    if end is None or start is None:
        return text, None
    error = end["error"] if end["error"] not in (None, "(none)") else ""
    code = None if end["code"] == "(none)" else int(end["code"])
    return f"{text[start.end() : end.start()].rstrip()}\n{error}".strip(), code


def _codex(text: str) -> tuple[str, int | None]:
    """Codex's structured shell result: `{"output": ..., "metadata": {"exit_code": ...}}`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text, None
    metadata = value.get("metadata") if isinstance(value, dict) else None
    code = metadata.get("exit_code") if isinstance(metadata, dict) else None
    if type(code) is not int or not isinstance(value.get("output"), str):
        return text, None
    return value["output"], code


def untag(text: str) -> tuple[str, bool]:
    """Return (text without Claude Code's error tag, whether it had one)."""
    head = text[:200]
    if "<" not in head or "<tool_use_error>" not in head:
        return text, False
    found = _TAG.match(text)
    return (found.group(1), True) if found else (text, False)


def plain(text: str) -> str:
    """Return the text without terminal colours."""
    return _COLOUR.sub("", text) if "\x1b" in text else text


def error_object(text: str) -> str | None:
    """Return the message of a result that is nothing but an error object, else None.

    `{"error": ...}` in JSON or in Python's form, or an object that says of itself `"success": false` or
    `"status": "error"`.
    """
    first = text[:1]
    if first != "{" and not first.isspace():
        return None
    head = text[:200].lstrip()
    if head[:1] != "{" or len(text) > 100_000 or not text.rstrip().endswith("}"):
        return None
    lone = re.match(r"\{\s*['\"]error['\"]\s*:", head)
    if lone is None and not re.search(
        r"['\"](?:success|ok|status)['\"]\s*:\s*(?:[Ff]alse|['\"](?:error|fail))", text[:4000]
    ):
        return None
    value = _parsed(text.strip())
    if not isinstance(value, dict):
        return None
    if value.get("error") and set(value) <= {"error", "message", "code", "type"}:
        return value["error"] if isinstance(value["error"], str) else json.dumps(value["error"], default=str)
    failed = value.get("success") is False or value.get("ok") is False or value.get("status") in _FAILED_WORDS
    if not failed:
        return None
    said = next((value[key] for key in ("error", "message", "reason", "detail") if value.get(key)), "")
    return said if isinstance(said, str) else json.dumps(said, default=str)


def _parsed(text: str) -> object:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None
