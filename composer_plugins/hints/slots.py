"""What a hint can say about a failure: read from the failed call and its own result, never from what came later."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from composer_plugins.traces.classify_shape import error_object, plain, split_exit, untag
from composer_plugins.traces.schema import Hint, State, Status, ToolCall, ToolResult

#: The fields that a template may use.
FIELDS = frozenset({"tool", "error", "path", "command", "exit_code", "test", "tools"})
#: What stands in a field for which nothing was found.
UNKNOWN = {
    "tool": "the tool", "error": "no message", "path": "the file", "command": "the command", "exit_code": "other than 0",
    "test": "the first failing test", "tools": "the tools that are listed",
}  # fmt: skip

#: How many characters of each end of a result are read.
ENDS = 8000

_WORST = (Status.HUMAN_REJECT, Status.ERROR, Status.INFERRED_ERROR)
_PATH_KEYS = ("file_path", "path", "notebook_path", "absolute_path", "target_file", "filename", "file")
_COMMAND_KEYS = ("command", "cmd", "script", "code")
#: A path: something with a slash, or a name with an extension in quotes.
_PATH = r"(?<![\w:/.<])(?:(?:~|\.{1,2})?/(?:[\w@.+()-]+/)*[\w@.+()-]+|(?:[\w@.+()-]+/)+[\w@.+()-]+)(?<![.:,])"
_PATH_IN_TEXT = re.compile(_PATH)
_MISSING_PATH = re.compile(
    r"No such file or directory: ['\"](?P<a>[^'\"\n]+)['\"]|can(?:not|'t) (?:access|open|stat|find)(?: file)? ['\"`‘](?P<b>[^'\"`’\n]+)['\"`’]"
    r"|ENOENT: no such file or directory, \w+ ['\"](?P<c>[^'\"\n]+)['\"]|no matches found: (?P<d>\S+)"
    r"|^[\w./-]+: (?!can(?:not|'t) )(?P<e>[^:\n]+): No such file or directory|^(?:\w*sh: )?(?:line \d+: )?(?P<f>[^:\s]+): No such file"
    r"|(?:[Ff]ile|[Pp]ath|[Dd]irectory)(?: not found)?:? ['\"`]?(?P<g>[^\s'\"`]*[/.][^\s'\"`]*)['\"`]?(?: (?:does not exist|not found)|$)",
    re.MULTILINE,
)  # fmt: skip
_MISSING_COMMAND = re.compile(
    r"(?:^|: )(?P<a>[\w./+-]+): (?:command )?not found|command not found: (?P<b>\S+)|'(?P<c>[^'\n]+)' is not recognized",
    re.MULTILINE,
)
_TEST = re.compile(
    r"^(?:FAILED|ERROR) (?P<a>\S+::\S.*?)(?: - .*)?$|^--- FAIL: (?P<b>\S+)|^(?:FAIL|ERROR): (?P<c>test\w* \([\w.]+\))"
    r"|^[ \t]*(?:FAIL|×|✕|✗)[ \t]+(?P<d>\S.*?)(?:\s+\(?\d+ ?ms\)?)?$|^test (?P<e>\S+) \.\.\. FAILED|^[ \t]*● (?P<f>.+)$|^FAIL (?P<g>\S+)$",
    re.MULTILINE,
)
#: Where the cause stands in the long outputs of test runs, checks and refused edits.
_ESSENCE = {
    "test_failure": re.compile(
        r"^E {2,}\S.*$|^.{0,40}?\b\w*(?:AssertionError|Error|Exception)\b.*$|^FAIL Required .*$|^.*\b[1-9]\d* failed\b.*$", re.MULTILINE
    ),
    "type_check": re.compile(r"^(?!.*\b0 errors\b).*(?:\berror\b|^[A-Z]+\d+ |×|✖).*$", re.MULTILINE | re.IGNORECASE),
    "timeout": re.compile(r"^.*(?:[Tt]imed out|TIMED OUT|exceeded the timeout|no new output after).*$", re.MULTILINE),
    "syntax_error": re.compile(r"^.*(?:SyntaxError|IndentationError|TabError|syntax error near|E999|F\d{3}).*$", re.MULTILINE),
}  # fmt: skip
_TAGS = re.compile(r"</?tool_use_error>|\x1b\[[0-9;?]*[A-Za-z]")
_EXIT_LINE = re.compile(r"\A(?:Error: )?Exit code:? -?\d+\n|\A<returncode>-?\d+</returncode>\n?(?:<output>\n?)?")


@dataclass(frozen=True)
class Failure:
    """The failed call of a step that a hint is about. `tools` are the names that the model could call."""

    tool: str | None
    text: str
    status: Status
    error_class: str | None
    call: ToolCall | None = None
    exit_code: int | None = None
    tools: tuple[str, ...] = ()


class FailureHints:
    """Base of the generators that see one failure at a time, recorded or live: they write `_hint`."""

    def generate(self, state: State) -> Hint | None:
        """Return the hint for the first result of the worst outcome of the state's step."""
        failure = failure_of(state)
        return None if failure is None else self._hint(failure)

    def generate_for(self, tool: str | None, result_text: str, status: Status, error_class: str | None) -> Hint | None:
        """Return the hint for a live tool result; None when `status` is not a failure."""
        return self._hint(Failure(tool, result_text, status, error_class)) if status.failed else None


def failure_of(state: State) -> Failure | None:
    """Return the first result of the worst outcome of the state's step, or None when nothing failed."""
    failed = sorted((r for r in state.results if r.status.failed), key=lambda r: _WORST.index(r.status))
    return _failure(state, failed[0]) if failed else None


def _failure(state: State, result: ToolResult) -> Failure:
    call = next((c for c in state.action.tool_calls if c.id == result.call_id), None)
    # A log's tools are those that were called: a name that no tool has is among them.
    missing = {
        c.name
        for c in state.action.tool_calls
        for r in state.results
        if r.call_id == c.id and r.error_class == "unknown_tool"
    }
    tools = tuple(sorted(set(state.tools) - missing))
    return Failure(
        call.name if call is not None else None, result.content, result.status, result.error_class, call,
        result.exit_code, tools,
    )  # fmt: skip


def fill(failure: Failure, max_error: int) -> dict[str, str]:
    """Return every field of `FIELDS`.

    Args:
        failure: what failed.
        max_error: longest quotation of the error, in characters.
    """
    text = body_of(failure.text)
    code = failure.exit_code if failure.exit_code is not None else split_exit(failure.text)[1]
    found = {
        "tool": failure.tool,
        "error": shorten(clean(essence(text, failure.error_class, max_error)), max_error).rstrip("."),
        "path": _path(failure, text, max_error),
        "command": _command(failure, text),
        "exit_code": None if code in (None, 0) else str(code),
        "test": _first(_TEST, text),
        "tools": _list(failure.tools),
    }
    return {name: value or UNKNOWN[name] for name, value in found.items()}


def body_of(text: str) -> str:
    """Return a result's text without what its format wraps around it."""
    inner, _ = split_exit(text)
    inner, _ = untag(inner)
    if len(inner) > 2 * ENDS:
        inner = inner[:ENDS] + "\n" + inner[-ENDS:]
    return plain(_EXIT_LINE.sub("", inner)).strip()


def essence(text: str, error_class: str | None = None, limit: int = 200) -> str:
    """Return the part of an error text that says what is wrong, when the whole is longer than `limit`.

    Of an error object its message, of a traceback its last line, of a test run the first assertion, of a check the
    first line with an error.
    """
    said = error_object(text)
    if said:
        return said
    if "Traceback (most" in text:
        last = text.rstrip().rpartition("\n")[2]
        if last and not last[0].isspace():
            return last
    pattern = _ESSENCE.get(error_class or "")
    found = pattern.search(text) if pattern is not None and len(text) > limit else None
    return found.group(0).strip() if found else text


def _path(failure: Failure, text: str, limit: int) -> str | None:
    if failure.error_class == "file_not_found" and failure.call is not None and _argument(failure, _COMMAND_KEYS):
        missing = _first(_MISSING_PATH, text)
        if missing:
            return shorten(missing, 160)
    own = _argument(failure, _PATH_KEYS)
    if own:
        return own
    if failure.error_class == "file_not_found" and (missing := _first(_MISSING_PATH, text)):
        return shorten(missing, 160)
    found = _PATH_IN_TEXT.search(shorten(clean(text), limit))
    return found.group(0) if found else None


def _command(failure: Failure, text: str) -> str | None:
    if failure.error_class == "command_not_found" and (missing := _first(_MISSING_COMMAND, text)):
        return f"`{missing}`"
    own = _argument(failure, _COMMAND_KEYS)
    return f"`{shorten(own.strip().partition(chr(10))[0], 80)}`" if own and own.strip() else None


def _argument(failure: Failure, keys: Iterable[str]) -> str | None:
    if failure.call is None:
        return None
    values = (_as_text(failure.call.arguments.get(key)) for key in keys)
    return next((value for value in values if value), None)


def _as_text(value: Any) -> str | None:
    """A command may be a list of words, with the script last after `bash -lc`."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value[-1] if len(value) > 2 and value[1].startswith("-") and "c" in value[1] else " ".join(value)
    return value if isinstance(value, str) else None


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return next((g.strip() for g in found.groups() if g and g.strip()), None) if found else None


def _list(names: tuple[str, ...], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def clean(text: str) -> str:
    """Strip error tags, terminal colours and surplus white space."""
    return re.sub(r"\s+", " ", _TAGS.sub("", text)).strip()


def shorten(text: str, limit: int) -> str:
    """Return `text` with its middle left out when longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head].rstrip()} ... {text[len(text) - (limit - 5 - head) :].lstrip()}"
