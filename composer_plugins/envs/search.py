"""Grep, Glob and LS over files in memory, with the output of Claude Code's tools."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass

from composer_plugins.envs.globs import FILE_TYPES, Glob
from composer_plugins.envs.linear_regex import Budget, LinearPattern
from composer_plugins.envs.numbered import UNKNOWN, UNKNOWN_REST
from composer_plugins.envs.shell import children
from composer_plugins.envs.tool_errors import NOT_RECORDED, ToolError, flag_argument, integer_argument, invalid_argument

MODES = ("files_with_matches", "content", "count")
#: Grep's arguments whose names are not Python names, as Claude Code spells them.
FLAGS = ("-i", "-n", "-A", "-B", "-C")


@dataclass(frozen=True)
class GrepOptions:
    """Checked arguments of one Grep call."""

    pattern: LinearPattern
    mode: str
    numbers: bool
    before: int
    after: int
    limit: int | None
    multiline: bool


def grep_options(
    pattern: str, mode: str | None, flags: Mapping[str, object], limit: object, multiline: object
) -> GrepOptions:
    """Check the arguments of a Grep call. Raises `ToolError` for a wrong type, value or pattern."""
    mode = "files_with_matches" if mode is None else mode
    if mode not in MODES:
        raise invalid_argument("Grep", f"The parameter `output_mode` must be one of {', '.join(MODES)}")
    around = integer_argument("Grep", "-C", flags.get("-C")) or 0
    spanning = flag_argument("Grep", "multiline", multiline)
    if spanning and mode != "files_with_matches":
        raise ToolError(f"{NOT_RECORDED} multiline search with another output_mode than files_with_matches")
    ignore_case = flag_argument("Grep", "-i", flags.get("-i"))
    return GrepOptions(
        pattern=LinearPattern(pattern, ignore_case=ignore_case, dot_all=spanning),
        mode=mode,
        numbers=flag_argument("Grep", "-n", flags.get("-n")),
        before=integer_argument("Grep", "-B", flags.get("-B")) or around,
        after=integer_argument("Grep", "-A", flags.get("-A")) or around,
        limit=integer_argument("Grep", "head_limit", limit),
        multiline=spanning,
    )


def select_files(files: Mapping[str, str], root: str, glob: str | None, kind: str | None, budget: Budget) -> list[str]:
    """Return the files under `root` (or `root` itself) that pass Grep's `glob` and `type` filters."""
    chosen = sorted(f for f in files if f == root or f.startswith(root.rstrip("/") + "/"))
    if not chosen:
        raise ToolError(f"Path does not exist: {root}")
    if kind is not None and kind not in FILE_TYPES:
        raise ToolError(f"rg: unrecognized file type: {kind[:40]}")
    for pattern in (glob, FILE_TYPES.get(kind) if kind else None):
        if pattern is not None:
            wanted = Glob(pattern, any_depth=True)
            chosen = [f for f in chosen if wanted.matches(f[len(root) :].lstrip("/") or posixpath.basename(f), budget)]
    return chosen


def grep(files: Mapping[str, str], chosen: list[str], single: bool, options: GrepOptions, budget: Budget) -> str:
    """Return what Grep prints for `chosen`; `single` leaves the file name off each line."""
    if options.multiline:
        hits = {f: [0] for f in chosen if options.pattern.search(_known_text(files[f]), budget)}
    else:
        hits = {f: found for f in chosen if (found := _matching_lines(files[f], options.pattern, budget))}
    if options.mode == "files_with_matches":
        names = list(hits)[: options.limit]
        if not names:
            return "No files found"
        return f"Found {len(names)} file{'s' if len(names) > 1 else ''}\n" + "\n".join(names)
    if not hits:
        return "No matches found"
    if options.mode == "count":
        rows = [f"{f}:{len(lines)}" for f, lines in hits.items()][: options.limit]
        total = sum(map(len, hits.values()))
        return "\n".join(rows) + f"\n\nFound {total} total occurrences across {len(hits)} files."
    rows = []
    for file, lines in hits.items():
        rows.extend(_context_rows("" if single else file, files[file].split("\n"), lines, options))
    return "\n".join(rows[: options.limit])


def _known_text(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if line not in (UNKNOWN, UNKNOWN_REST))


def _matching_lines(text: str, pattern: LinearPattern, budget: Budget) -> list[int]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()  # the end of the last line, not a line
    return [
        index
        for index, line in enumerate(lines)
        if line not in (UNKNOWN, UNKNOWN_REST) and pattern.search(line.removesuffix("\r"), budget)
    ]


def _context_rows(name: str, lines: list[str], hits: list[int], options: GrepOptions) -> list[str]:
    """Return one file's rows: `name:number:line` for a match, `-` instead of `:` around it, `--` between groups."""
    last = len(lines) - (lines[-1] == "")
    shown: list[int] = []
    for hit in hits:  # in order, and each line once, however wide the context
        low = max(0, hit - options.before, shown[-1] + 1 if shown else 0)
        shown.extend(range(low, min(last, hit + options.after + 1)))
    matched, rows, previous = set(hits), [], None
    for index in shown:
        if previous is not None and index > previous + 1 and (options.before or options.after):
            rows.append("--")
        mark = ":" if index in matched else "-"
        parts = ([name] if name else []) + ([str(index + 1)] if options.numbers else [])
        rows.append(mark.join([*parts, lines[index]]))
        previous = index
    return rows


def glob_files(files: Mapping[str, str], pattern: str, root: str) -> str:
    """Return what Glob prints: the matching paths, or "No files found"."""
    budget = Budget()
    if pattern.startswith("/"):
        root = "/"
    base = root.rstrip("/") + "/"
    wanted = Glob(pattern.lstrip("/").removeprefix("./"))
    found = [f for f in sorted(files) if f.startswith(base) and wanted.matches(f[len(base) :], budget)]
    return "\n".join(found) or "No files found"


def list_directory(files: Mapping[str, str], path: str) -> str:
    """Return what LS prints. Raises `ToolError` when nothing is known under `path`."""
    names = children(files, path)
    if not names:
        raise ToolError(f"Directory does not exist: {path}")
    return "\n".join([f"- {path.rstrip('/')}/", *(f"  - {name}" for name in names)])
