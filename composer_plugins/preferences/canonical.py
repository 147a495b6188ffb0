"""Actions as what they do: ordered canonical calls, compared and measured."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from composer_plugins.models.toolcalls import canonical_call
from composer_plugins.traces.schema import Message

#: An action as comparable data: its calls in order, each as (name, canonical JSON of the arguments).
Canonical = tuple[tuple[str, str], ...]


class Kind(StrEnum):
    """What an action is, judged without running it."""

    CALLS = "calls"  # every call parses and, when the state lists tools, names one of them
    TEXT = "text"  # an answer in words: nothing to compare
    EMPTY = "empty"
    UNPARSED = "unparsed"  # some call cannot be read
    UNKNOWN_TOOL = "unknown_tool"


def kind_of(action: Message, tools: dict[str, Any]) -> Kind:
    """Classify an action against the tools of its state (an empty dict: any name is known)."""
    if not action.tool_calls:
        return Kind.TEXT if action.content.strip() else Kind.EMPTY
    if any(call.raw_arguments is not None or not call.name for call in action.tool_calls):
        return Kind.UNPARSED
    if tools and any(call.name not in tools for call in action.tool_calls):
        return Kind.UNKNOWN_TOOL
    return Kind.CALLS


def canonical_action(action: Message) -> Canonical:
    """Return the action's calls in order, canonical. Equal for actions that do the same; text is ignored."""
    return tuple(canonical_call(call) for call in action.tool_calls)


def similarity(a: Canonical, b: Canonical) -> float:
    """Return the edit similarity of two actions' calls in [0, 1]: 1 - Levenshtein / longer length, in characters."""
    left, right = _text(a), _text(b)
    longest = max(len(left), len(right))
    return 1.0 if longest == 0 else 1.0 - levenshtein(left, right) / longest


def levenshtein(a: str, b: str) -> int:
    """Return the edit distance of two strings (insert, delete and replace cost 1).

    Myers' bit-parallel algorithm with Python's long integers, O(len(b)) operations on len(a)-bit numbers.
    Source: G. Myers, J. ACM 46(3), 1999, in the global form of H. Hyyrö, 2003.

    >>> levenshtein("kitten", "sitting")
    3
    """
    if not a:
        return len(b)
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    where: dict[str, int] = {}
    for position, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << position
    plus, minus, distance = full, 0, len(a)
    for character in b:
        match = where.get(character, 0) | minus
        diagonal = (((match & plus) + plus) ^ plus) | match
        rise, fall = minus | (~(diagonal | plus) & full), plus & diagonal
        distance += bool(rise & last) - bool(fall & last)
        rise, fall = (rise << 1 | 1) & full, (fall << 1) & full
        plus, minus = fall | (~(diagonal | rise) & full), rise & diagonal
    return distance


def _text(action: Canonical) -> str:
    return "\n".join(f"{name} {arguments}" for name, arguments in action)
