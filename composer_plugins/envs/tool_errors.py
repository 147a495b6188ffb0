"""What a tool raises, in the words Claude Code uses, and the checks of a tool's arguments."""

from __future__ import annotations

from typing import Any

NOT_FOUND = "File does not exist."
NOT_READ = "File has not been read yet. Read it first before writing to it."
SAME_STRINGS = "No changes to make: old_string and new_string are exactly the same."
EXISTS = "Cannot create new file - file already exists."
IS_DIRECTORY = "EISDIR: illegal operation on a directory, read"
REJECTED = "The user doesn't want to proceed with this tool use. To tell you how to proceed, the user said:"

#: How every error begins that says nothing about the agent's call, only that the log cannot answer it. What
#: learns from errors should leave these out.
NOT_RECORDED = "Error: not recorded in this session:"

#: Longest text a tool takes or a file may grow to, in characters: keeps every call fast.
MAX_TEXT = 2_000_000


class ToolError(Exception):
    """A tool call failed. `str()` is the whole text that the agent sees."""


def string_not_found(old_string: str) -> ToolError:
    """The error for an edit whose `old_string` is not in the file."""
    return ToolError(f"String to replace not found in file.\nString: {old_string}")


def several_matches(count: int, old_string: str) -> ToolError:
    """The error for an edit that matches more than once without `replace_all`."""
    return ToolError(
        f"Found {count} matches of the string to replace, but replace_all is false. To replace all occurrences, "
        "set replace_all to true. To replace only one occurrence, please provide more context to uniquely "
        f"identify the instance.\nString: {old_string}"
    )


def invalid_argument(tool: str, problem: str) -> ToolError:
    """The error for an argument of the wrong type or value."""
    return ToolError(f"InputValidationError: {tool} failed due to the following issue:\n{problem}")


def json_type(value: Any) -> str:
    """Name the JSON type of a Python value, as Claude Code's messages do."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float):
        return "number"
    return "array" if isinstance(value, list | tuple) else "object"


def text_argument(tool: str, name: str, value: Any) -> str:
    """Return `value` when it is a string of a sane length. Raises `ToolError` otherwise."""
    if not isinstance(value, str):
        raise _wrong_type(tool, name, "string", value)
    if len(value) > MAX_TEXT:
        raise invalid_argument(tool, f"The parameter `{name}` is longer than {MAX_TEXT} characters")
    return value


def integer_argument(tool: str, name: str, value: Any, *, low: int = 0) -> int | None:
    """Return an optional whole number ≥ `low` (JSON's 10.0 counts). Raises `ToolError` otherwise."""
    if value is None:
        return None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise _wrong_type(tool, name, "number", value)
    if not low <= value <= 10**9:
        raise invalid_argument(tool, f"The parameter `{name}` must be at least {low} and at most {10**9}")
    return int(value)


def flag_argument(tool: str, name: str, value: Any) -> bool:
    """Return an optional boolean (None counts as False). Raises `ToolError` otherwise."""
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong_type(tool, name, "boolean", value)
    return value


def _wrong_type(tool: str, name: str, expected: str, value: Any) -> ToolError:
    problem = f"The parameter `{name}` type is expected as `{expected}` but provided as `{json_type(value)}`"
    return invalid_argument(tool, problem)
