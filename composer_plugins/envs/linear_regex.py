"""A regular expression search whose time grows linearly with the text, whatever the pattern.

Patterns come from a model, and Python's backtracking `re` takes exponential time on some of them. Like
ripgrep, which Claude Code's Grep runs, this one refuses look-around and back-references and walks all
alternatives at once (Thompson, "Regular Expression Search Algorithm", CACM 1968), remembering the sets of
states that it has met. It answers "is there a match?", which is all that a line search needs.
"""

from __future__ import annotations

import re
import warnings
from re import _constants as sre
from re import _parser

from composer_plugins.envs.tool_errors import ToolError

MAX_PATTERN = 1000
MAX_STATES = 4000
#: Set operations one tool call may spend on building states, and characters it may look at.
MAX_WORK, MAX_CHARS = 500_000, 4_000_000

_CHAR, _SPLIT, _AT, _MATCH = range(4)
_START, _NEWLINE, _WORD, _OTHER, _END = range(5)
_REFUSED = {
    sre.ASSERT: "look-around, including look-ahead and look-behind, is not supported",
    sre.ASSERT_NOT: "look-around, including look-ahead and look-behind, is not supported",
    sre.GROUPREF: "backreferences are not supported",
    sre.GROUPREF_EXISTS: "backreferences are not supported",
    sre.ATOMIC_GROUP: "atomic groups are not supported",
    sre.POSSESSIVE_REPEAT: "possessive repeats are not supported",
}
_CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Budget:
    """What one tool call may still spend. Raises `ToolError` when it is used up."""

    def __init__(self, work: int = MAX_WORK, chars: int = MAX_CHARS) -> None:
        self.work, self.chars = work, chars

    def spend(self, *, work: int = 0, chars: int = 0) -> None:
        """Subtract; raise `ToolError` below zero."""
        self.work -= work
        self.chars -= chars
        if self.work < 0 or self.chars < 0:
            raise ToolError("Error: the search was stopped: too much text or too complex a pattern.")


class LinearPattern:
    """A compiled pattern. `search` tells whether it matches anywhere in a text.

    Args:
        pattern: Python syntax, which agrees with ripgrep's on what agents write. `^` and `$` match at
            line breaks too.
        ignore_case: match letters of either case.
        dot_all: let `.` match a line break.

    Raises:
        ToolError: the pattern is malformed, too large, or needs what a linear search cannot do.
    """

    def __init__(self, pattern: str, *, ignore_case: bool = False, dot_all: bool = False) -> None:
        if len(pattern) > MAX_PATTERN:
            raise ToolError(f"regex parse error: the pattern is longer than {MAX_PATTERN} characters")
        flags = (re.IGNORECASE if ignore_case else 0) | (re.DOTALL if dot_all else 0)
        self._nodes: list[list] = [[_MATCH]]
        self._items = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "possible nested set": the pattern is the model's
                tree = _parser.parse(pattern, flags)
            self._entry = self._sequence(tree, 0, tree.state.flags)
        except re.error as error:
            raise ToolError(f"regex parse error: {error}") from None
        except (RecursionError, OverflowError):
            raise ToolError("regex parse error: the pattern is nested too deeply") from None
        self._sets: dict[tuple[frozenset, int], int] = {}
        self._states: list[tuple[frozenset, int]] = []
        self._moves: dict[tuple[int, str], int] = {}
        self._ends: dict[int, bool] = {}
        self._first = self._state(frozenset([self._entry]), _START)

    def search(self, text: str, budget: Budget | None = None) -> bool:
        """Return whether the pattern matches anywhere in `text`.

        Raises:
            ToolError: `budget` (shared by the files of one call) is used up.
        """
        budget = budget or Budget()
        budget.spend(chars=len(text))
        moves, state = self._moves, self._first
        for char in text:
            following = moves.get((state, char))
            if following is None:
                following = moves[state, char] = self._move(state, char, budget)
            if following < 0:
                return True
            state = following
        if state not in self._ends:
            self._ends[state] = 0 in self._closure(*self._states[state], _END, budget)
        return self._ends[state]

    def _sequence(self, items, following: int, flags: int) -> int:
        """Compile `items` so that they lead to node `following`; return the entry node."""
        self._count()
        for op, argument in reversed(list(items)):
            following = self._item(op, argument, following, flags)
        return following

    def _item(self, op, argument, following: int, flags: int) -> int:
        self._count()
        if op in _REFUSED:
            raise ToolError(f"regex parse error: {_REFUSED[op]}")
        if op is sre.BRANCH:
            entries = [self._sequence(branch, following, flags) for branch in argument[1]]
            return self._add(_SPLIT, entries)
        if op is sre.SUBPATTERN:
            _, added, removed, items = argument
            return self._sequence(items, following, (flags | added) & ~removed)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(*argument, following, flags)
        if op is sre.AT:
            return self._add(_AT, argument, following)
        return self._add(_CHAR, _char_test(op, argument, flags), following)

    def _repeat(self, low: int, high: int, items, following: int, flags: int) -> int:
        if high == sre.MAXREPEAT:
            entry = self._add(_SPLIT, [following])
            self._nodes[entry][1].append(self._sequence(items, entry, flags))
        else:
            entry = following
            for _ in range(high - low):
                entry = self._add(_SPLIT, [following, self._sequence(items, entry, flags)])
        for _ in range(low):
            entry = self._sequence(items, entry, flags)
        return entry

    def _add(self, *node) -> int:
        self._nodes.append(list(node))
        return len(self._nodes) - 1

    def _count(self) -> None:
        self._items += 1
        if self._items > MAX_STATES:
            raise ToolError("regex parse error: the compiled pattern is too large")

    def _state(self, nodes: frozenset, previous: int) -> int:
        key = (nodes, previous)
        if key not in self._sets:
            self._sets[key] = len(self._states)
            self._states.append(key)
        return self._sets[key]

    def _move(self, state: int, char: str, budget: Budget) -> int:
        """Return the state after `char`, or -1 when a match ended before it."""
        kind = _kind(char)
        reached = self._closure(*self._states[state], kind, budget)
        if 0 in reached:
            return -1
        nodes = self._nodes
        targets = {nodes[n][2] for n in reached if nodes[n][0] == _CHAR and nodes[n][1](char)}
        return self._state(frozenset(targets | {self._entry}), kind)

    def _closure(self, start: frozenset, previous: int, following: int, budget: Budget) -> set[int]:
        """Return all nodes reachable without reading a character, between two kinds of characters."""
        reached, todo = set(start), list(start)
        while todo:
            node = self._nodes[todo.pop()]
            if node[0] == _SPLIT:
                targets = node[1]
            elif node[0] == _AT and _holds(node[1], previous, following):
                targets = [node[2]]
            else:
                continue
            fresh = [target for target in targets if target not in reached]
            reached.update(fresh)
            todo.extend(fresh)
        budget.spend(work=len(reached) + 1)
        return reached


def _kind(char: str) -> int:
    if char == "\n":
        return _NEWLINE
    return _WORD if char.isalnum() or char == "_" else _OTHER


def _holds(at, previous: int, following: int) -> bool:
    """Return whether the assertion `at` is true between two kinds of characters."""
    if at is sre.AT_BEGINNING:
        return previous in (_START, _NEWLINE)
    if at is sre.AT_BEGINNING_STRING:
        return previous == _START
    if at is sre.AT_END:
        return following in (_END, _NEWLINE)
    if at is sre.AT_END_STRING:
        return following == _END
    boundary = (previous == _WORD) != (following == _WORD)
    return boundary if at is sre.AT_BOUNDARY else not boundary


def _char_test(op, argument, flags: int):
    """Return a predicate on one character for a literal, `.` or a class."""
    if op is sre.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if op is sre.LITERAL:
        members = [(sre.LITERAL, argument)]
    elif op is sre.NOT_LITERAL:
        members = [(sre.NEGATE, None), (sre.LITERAL, argument)]
    else:
        members = argument
    negate = members[0][0] is sre.NEGATE
    tests = [_member_test(*member) for member in members[negate:]]
    if flags & re.IGNORECASE:
        return lambda c: any(t(x) for x in {c, c.lower(), c.upper()} if len(x) == 1 for t in tests) != negate
    return lambda c: any(test(c) for test in tests) != negate


def _member_test(op, argument):
    if op is sre.LITERAL:
        return lambda c: ord(c) == argument
    if op is sre.RANGE:
        return lambda c: argument[0] <= ord(c) <= argument[1]
    return _CATEGORIES[argument]
