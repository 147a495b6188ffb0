"""File contents as an agent has seen them: numbered listings, gaps, and edits that respect gaps.

A partly known file is ordinary text in which each unknown line is the single character `UNKNOWN`, with a
last line `UNKNOWN_REST` when the file's length is not known either. Both are Unicode non-characters, so
no search can match across a gap, and an edit is a plain string replacement that shifts the gaps along.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from composer_plugins.envs.tool_errors import SAME_STRINGS, ToolError, several_matches, string_not_found

UNKNOWN = "\ufdd0"
UNKNOWN_REST = "\ufdd1"

#: Claude Code shows this many lines, and this many characters of each, when no limit is given.
READ_LINES, READ_COLUMNS = 2000, 2000
SNIPPET_CONTEXT = 4

_NUMBERED = re.compile(r"[ ]{0,12}(\d{1,9})(?:→|\t)(.*)", re.DOTALL)


def parse_numbered(listing: str) -> tuple[int, list[str]] | None:
    """Return (first line number, lines) of the `cat -n` listing that `listing` starts with, or None.

    Lines are taken as long as their numbers count up by one, so what the tool appends after the listing
    (reminders, notes) is left out whatever it says.
    """
    first, lines = 0, []
    for raw in listing.split("\n"):
        match = _NUMBERED.fullmatch(raw)
        number = int(match[1]) if match else -1
        if not match or (lines and number != first + len(lines)):
            break
        if not lines:
            first = number
        lines.append(match[2])
    return (first, lines) if lines and first > 0 else None


def find_listing(result: str) -> tuple[int, list[str]] | None:
    """Return the listing that follows the first line of an edit's result, or None."""
    head, _, rest = result.partition("\n")
    return parse_numbered(rest) if "cat -n" in head else None


def format_numbered(lines: Sequence[str], first: int) -> str:
    """Return `lines` as `cat -n` shows them; `first` is the first line's number. Gaps are named."""
    shown, gap = [], 0
    for number, line in enumerate([*lines, ""], first):
        last = number == first + len(lines)
        if not last and line in (UNKNOWN, UNKNOWN_REST):
            gap += 1
            continue
        if gap:
            shown.append(f"[{gap} or more lines not recorded]" if last else f"[{gap} lines not recorded]")
            gap = 0
        if not last:
            shown.append(f"{number:6d}→{line[:READ_COLUMNS]}")
    return "\n".join(shown)


def is_complete(text: str) -> bool:
    """True when every line of the file is known."""
    return UNKNOWN not in text and UNKNOWN_REST not in text


def sanitised(text: str) -> str:
    """Return `text` without the two non-characters that mark gaps."""
    return text.replace(UNKNOWN, "").replace(UNKNOWN_REST, "")


def overlay(text: str | None, first: int, lines: Sequence[str], *, to_end: bool, only_gaps: bool = False) -> str:
    """Return `text` with `lines` put at line number `first` (from 1).

    Args:
        text: what was known before; None when nothing was.
        first: line number of `lines[0]`.
        lines: the lines seen.
        to_end: True when `lines` are known to reach the end of the file.
        only_gaps: keep what was known, fill only unknown lines.
    """
    known = [UNKNOWN_REST] if text is None else text.split("\n")
    open_end = known[-1] == UNKNOWN_REST
    if open_end:
        known.pop()
    end = first - 1 + len(lines)
    if len(known) < end and (open_end or not only_gaps):
        known.extend([UNKNOWN] * (end - len(known)))
    for index, line in enumerate(lines, first - 1):
        if index >= len(known):
            break
        if not only_gaps or known[index] == UNKNOWN:
            known[index] = UNKNOWN if len(line) >= READ_COLUMNS else line
    if to_end and (open_end or not only_gaps):
        del known[end:]
        open_end = False
    return "\n".join([*known, UNKNOWN_REST] if open_end else known)


def replace_text(text: str, old: str, new: str, *, replace_all: bool = False) -> str:
    """Return `text` after one edit, with Claude Code's rules.

    An empty `new` also takes the line break after `old`, as Claude Code does, so that deleting a whole
    line leaves no empty one.

    Raises:
        ToolError: nothing to change, `old` not found, or found more than once without `replace_all`.
    """
    if old == new:
        raise ToolError(SAME_STRINGS)
    marked = UNKNOWN in old or UNKNOWN_REST in old
    count = 0 if marked or not old else text.count(old)
    if count == 0:
        raise string_not_found(old)
    if count > 1 and not replace_all:
        raise several_matches(count, old)
    if not new and not old.endswith("\n") and old + "\n" in text:
        old += "\n"
    return _whole_gaps(text.replace(old, sanitised(new), -1 if replace_all else 1))


def _whole_gaps(text: str) -> str:
    """Return `text` with each line that an edit joined to an unknown one made unknown as a whole."""
    if is_complete(text):
        return text
    lines = text.split("\n")
    return "\n".join(UNKNOWN_REST if UNKNOWN_REST in x else UNKNOWN if UNKNOWN in x else x for x in lines)


def snippet_of(before: str, after: str, old: str, new: str) -> str:
    """Return the numbered lines of `after` around the first replaced text, with four lines of context."""
    start = before.partition(old)[0].count("\n")
    low = max(0, start - SNIPPET_CONTEXT)
    lines = after.split("\n")
    return format_numbered(lines[low : start + new.count("\n") + 1 + SNIPPET_CONTEXT], low + 1)


def contradicts(text: str, first: int, lines: Sequence[str], *, to_end: bool) -> bool:
    """Return whether a listing shows another file than the known lines of `text`."""
    known = text.split("\n")
    open_end = known[-1] == UNKNOWN_REST
    if open_end:
        known.pop()
    end = first - 1 + len(lines)
    if (to_end and len(known) > end) or (not open_end and len(known) < end):
        return True
    pairs = zip(known[first - 1 : end], lines, strict=False)
    return any(old not in (UNKNOWN, new) and len(new) < READ_COLUMNS for old, new in pairs)


def replay_edit(text: str | None, old: str, new: str, *, replace_all: bool, result: str) -> str | None:
    """Return the text after a recorded edit that is known to have succeeded.

    The listing in the result is the truth about the lines that it shows, and says where the edit was
    when the replaced text lies in a gap.
    """
    listing = find_listing(result)
    if not old and not text:
        return new
    try:
        text = replace_text(text or "", old, new, replace_all=replace_all)
    except ToolError:
        if text is not None and text.count(old) > 1 and old:
            text = text.replace(old, new, 1)
        elif listing is not None:
            text = _splice_in_gap(text, old, new, listing)
    if listing is not None:
        text = overlay(text, *listing, to_end=False)
    return text


def _splice_in_gap(text: str | None, old: str, new: str, listing: tuple[int, list[str]]) -> str | None:
    """Shift the known lines below an edit whose place is known only from the listing."""
    first, lines = listing
    position = "\n".join(lines).find(new) if new else -1
    if text is None or position < 0:
        return text
    line = first - 1 + "\n".join(lines)[:position].count("\n")
    known = text.split("\n")
    if line < len(known) and known[line] != UNKNOWN_REST:
        known[line : line + old.count("\n") + 1] = [UNKNOWN] * (new.count("\n") + 1)
    return "\n".join(known)


def before_edit(old: str, new: str, result: str) -> tuple[int, list[str]] | None:
    """Return (first line number, lines) of the file around an edit as it was before the edit, or None."""
    listing = find_listing(result)
    if listing is None or not new:
        return None
    first, lines = listing
    shown = "\n".join(lines)
    return (first, shown.replace(new, old, 1).split("\n")) if new in shown else None
