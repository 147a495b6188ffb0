"""Which texts a regular expression cannot match without: a search for a plain text is far faster than for a pattern.

`literals(pattern)` reads them off the parsed pattern, so that they never have to be kept up by hand. Python's parser is
not a public module: where it is missing or says something unknown, there are no literals, and every text is searched.
"""

from __future__ import annotations

import re
from typing import Any

try:
    from re import _constants as sre
    from re import _parser as parser
except ImportError:  # pragma: no cover (another Python: slower, and as right)
    parser = None

#: More alternatives than this cost as much as the search that they save.
_MOST = 16
#: From the most frequent to the rarest in the texts that tools return; capitals and signs are rarer still.
_FREQUENT = " etaoinsrlcdupmhg.,_-/\n:fbyvw01k=jxqz"
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def literals(pattern: re.Pattern[str], least: int = 3) -> tuple[str, ...]:
    """Return texts of which every match of `pattern` has at least one; () when there is no such set.

    Args:
        least: texts that are shorter are of no use.
    """
    if parser is None or pattern.flags & re.IGNORECASE:
        return ()
    found = _of_sequence(parser.parse(pattern.pattern, pattern.flags))
    if not found or len(found) > _MOST or min(map(len, found)) < least:
        return ()
    return tuple(sorted(found))


def rarest(text: str) -> str:
    """Return the character of `text` that other texts have least often: to look for one is far quicker than for a text."""
    return max(text, key=lambda c: _FREQUENT.find(c) % 99, default="")


def beginnings(pattern: re.Pattern[str]) -> frozenset[str] | None:
    """Return the characters with which a match of `pattern` can begin; None when that is not known."""
    if parser is None or pattern.flags & re.IGNORECASE:
        return None
    found, empty = _beginnings(parser.parse(pattern.pattern, pattern.flags))
    return None if empty else found


def _beginnings(items: Any) -> tuple[frozenset[str], bool]:
    """(characters, whether what they are of may be empty or is not known)."""
    found: frozenset[str] = frozenset()
    for operation, argument in items:
        name = str(operation)
        if name == "AT":
            continue
        if name == "LITERAL":
            return found | {chr(argument)}, False
        if name == "IN" and all(part is sre.LITERAL for part, _ in argument):
            return found | {chr(code) for _, code in argument}, False
        if name == "BRANCH":
            parts = [_beginnings(branch) for branch in argument[1]]
        elif name == "SUBPATTERN" or name in _REPEATS:
            parts = [_beginnings(argument[-1])]
        else:
            return found, True
        found = found.union(*(characters for characters, _ in parts))
        unknown = any(empty for _, empty in parts)
        if unknown:
            return found, True
        if name not in _REPEATS or argument[0] > 0:
            return found, False
    return found, True


def line_search(pattern: re.Pattern[str]) -> re.Pattern[str] | None:
    r"""Return a pattern that is found in `"\n" + text` when `pattern` is found in `text`; None when it may not be.

    That is so when every branch begins with `^`: Python then looks for line breaks and tries nowhere else.
    """
    if parser is None or not pattern.flags & re.MULTILINE:
        return None
    parts = parser.parse(pattern.pattern, pattern.flags)
    first = str(parts[0][0]) if len(parts) else ""
    branches = parts[0][1][1] if first == "BRANCH" and len(parts) == 1 else [parts]
    if all(len(b) and b[0] == (sre.AT, sre.AT_BEGINNING) for b in branches) and r"\A" not in pattern.pattern:
        return re.compile(rf"\n(?:{pattern.pattern})", pattern.flags)
    return None


def _of_sequence(items: Any) -> frozenset[str]:
    """The best set among those that the parts of a sequence give; a run of single characters is one text."""
    best: frozenset[str] = frozenset()
    run = ""
    for operation, argument in items:
        if operation is sre.LITERAL:
            run += chr(argument)
            continue
        best, run = _better(best, frozenset([run] if run else [])), ""
        best = _better(best, _of_part(str(operation), argument))
    return _better(best, frozenset([run] if run else []))


def _of_part(operation: str, argument: Any) -> frozenset[str]:
    if operation == "SUBPATTERN":
        return _of_sequence(argument[-1]) if not argument[1] & re.IGNORECASE else frozenset()
    if operation == "ATOMIC_GROUP":
        return _of_sequence(argument)
    if operation in _REPEATS:
        return _of_sequence(argument[2]) if argument[0] > 0 else frozenset()
    if operation == "BRANCH":
        sets = [_of_sequence(branch) for branch in argument[1]]
        return _shortest(frozenset().union(*sets)) if all(sets) else frozenset()
    return frozenset()


def _shortest(texts: frozenset[str]) -> frozenset[str]:
    """Without those that hold another one."""
    return frozenset(text for text in texts if not any(other != text and other in text for other in texts))


def _better(first: frozenset[str], second: frozenset[str]) -> frozenset[str]:
    return max(first, second, key=_worth)


def _worth(texts: frozenset[str]) -> tuple[int, int]:
    """Long texts are rare; of equally long ones, few are quick."""
    return (min(map(len, texts)), -len(texts)) if texts else (0, 0)
