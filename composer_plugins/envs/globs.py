"""Glob patterns, through the linear regular expression search."""

from __future__ import annotations

import re

from composer_plugins.envs.linear_regex import MAX_PATTERN, Budget, LinearPattern
from composer_plugins.envs.tool_errors import ToolError

#: File types of Grep's `type` argument (the part of ripgrep's list that agents use).
FILE_TYPES = {
    "c": "*.{c,h}", "cpp": "*.{cc,cpp,cxx,h,hh,hpp}", "css": "*.css", "go": "*.go", "html": "*.{htm,html}",
    "java": "*.java", "js": "*.{js,jsx,mjs,cjs}", "json": "*.json", "md": "*.{md,markdown}", "py": "*.{py,pyi}",
    "rust": "*.rs", "sh": "*.{sh,bash,zsh}", "toml": "*.toml", "ts": "*.{ts,tsx,mts,cts}", "yaml": "*.{yml,yaml}",
}  # fmt: skip


class Glob:
    """A glob with `*`, `?`, `[...]`, `{a,b}` and `**`. Raises `ToolError` when it is malformed.

    Args:
        pattern: the glob.
        any_depth: a pattern without a slash matches a file name at any depth (ripgrep's `--glob`).
    """

    def __init__(self, pattern: str, *, any_depth: bool = False) -> None:
        if len(pattern) > MAX_PATTERN:
            raise ToolError(f"Error: invalid glob pattern: longer than {MAX_PATTERN} characters.")
        if any_depth and "/" not in pattern:
            pattern = "**/" + pattern
        try:
            self._regex = LinearPattern(f"\\A(?:{_translate(pattern)})\\Z", dot_all=True)
        except ToolError as error:
            raise ToolError(f"Error: invalid glob pattern {pattern[:80]!r}: {error}") from None

    def matches(self, path: str, budget: Budget) -> bool:
        """Return whether the whole of `path` matches."""
        return self._regex.search(path, budget)


def _translate(pattern: str) -> str:
    """Return the regular expression of a glob (without anchors)."""
    out, index, depth = [], 0, 0
    while index < len(pattern):
        char = pattern[index]
        index += 1
        if pattern.startswith("**/", index - 1):
            out.append("(?:.*/)?")
            index += 2
        elif pattern.startswith("**", index - 1):
            out.append(".*")
            index += 1
        elif char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[" and "]" in pattern[index + 1 :]:
            end = pattern.index("]", index + 1)
            out.append(_character_class(pattern[index:end]))
            index = end + 1
        elif char == "{" and "}" in pattern[index:]:
            depth += 1
            out.append("(?:")
        elif char == "}" and depth:
            depth -= 1
            out.append(")")
        elif char == "," and depth:
            out.append("|")
        else:
            out.append(re.escape(char))
    return "".join(out) + ")" * depth


def _character_class(members: str) -> str:
    negated = len(members) > 1 and members[0] in "!^"
    members = members[negated:].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
    return f"[{'^' if negated else ''}{members}]"
