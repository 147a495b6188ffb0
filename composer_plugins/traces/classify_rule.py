"""What a rule of the error detector is, and how a text is searched with many of them at once.

Most results are good, and are read for nothing: so a pattern is tried only where a text has one of the literals that
it cannot match without, and each literal is looked for once, whichever rules need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from composer_plugins.traces.literals import beginnings, line_search, literals, rarest
from composer_plugins.traces.schema import Status

#: How many characters from the end a `tail` rule sees.
TAIL = 1500

#: A rule about the start that begins with any text at all has its literals in so many characters.
_OPEN = 400

#: How many tools begin an error of their own.
SHARED_START = r"\A\[?(?:<tool_use_error>)?(?:E(?:rror|RROR):\s*)?"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        error_class: names the template in `composer_plugins/hints/templates.toml`.
        pattern: searched in the result (multi-line).
        infers: the pattern alone makes an unflagged result an error; otherwise it only names the class.
        quoted: with `infers`, holds for tools that quote other texts too (the tool's own error form).
        needs: a text that must be there as well (what a match cannot be without is found by itself, see `signs`).
        tail: searched in the last `TAIL` characters only.
        vague: the class is a last resort; a more specific one elsewhere in the text wins.
        status: what the result becomes.
    """

    error_class: str
    pattern: re.Pattern[str]
    infers: bool = False
    quoted: bool = False
    needs: str = ""
    tail: bool = False
    vague: bool = False
    status: Status = Status.ERROR
    #: A rule about the start of the result: its pattern is tried there only.
    tied: bool = field(init=False)
    #: Every match has one of these texts in it (none: nothing is known), each with its rarest character.
    signs: tuple[tuple[str, str], ...] = field(init=False)
    #: The pattern in the form that is searched for at the starts of lines only.
    lines: re.Pattern[str] | None = field(init=False)

    def __post_init__(self) -> None:
        tied = self.pattern.pattern.startswith(r"\A")
        object.__setattr__(self, "tied", tied)
        object.__setattr__(self, "signs", tuple((text, rarest(text)) for text in literals(self.pattern)))
        object.__setattr__(self, "lines", None if tied else line_search(self.pattern))

    def found_in(self, text: str) -> bool:
        """True when the rule holds."""
        if self.tail:
            text = text[-TAIL:]
        if self.needs not in text:
            return False
        if self.tied:
            return self.pattern.match(text) is not None
        if not self.possible_in(text):
            return False
        found = self.pattern.search(text) if self.lines is None else self.lines.search("\n" + text)
        return found is not None

    def possible_in(self, text: str) -> bool:
        """False when the text has none of the `literals`: most good results have not."""
        for literal, character in self.signs:  # a loop: `any` costs more than the search
            if character in text and literal in text:
                return True
        return not self.signs


#: A character, and the texts (with the numbers of the rules that need one) that are looked for where it is.
Signs = list[tuple[str, list[tuple[str, tuple[int, ...]]]]]


class RuleSet:
    """Rules in their order, of which most texts match none: `holding` gives those that hold."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        tied = {number: beginnings(rule.pattern) for number, rule in enumerate(self.rules) if rule.tied}
        self._tied = list(tied)
        self._gate = _gate([self.rules[number].pattern.pattern for number, first in tied.items() if first])
        self._first = frozenset().union(*(first for first in tied.values() if first))
        self._open = [sign for number, first in tied.items() if not first for sign in self.rules[number].signs]
        self._signs, self._tail_signs = self._find_signs(tail=False), self._find_signs(tail=True)

    def _find_signs(self, *, tail: bool) -> Signs:
        """The literals of the rules that are searched for, by their rarest character."""
        found: dict[str, dict[str, list[int]]] = {}
        for number, rule in enumerate(self.rules):
            signs = [rule.needs] if rule.needs else [text for text, _ in rule.signs] or [""]
            for sign in signs if not rule.tied and rule.tail is tail else ():
                found.setdefault(rarest(sign), {}).setdefault(sign, []).append(number)
        return [(char, [(sign, tuple(some)) for sign, some in signs.items()]) for char, signs in found.items()]

    def may_start(self, text: str) -> bool:
        """False when no rule about the start of a text holds."""
        if text[:1] in self._first and self._gate.match(text):
            return True
        head, found = text[:_OPEN], False
        for sign, character in self._open:
            found = found or (character in head and sign in head)
        return found

    def one_by_one(self, text: str) -> Iterator[Rule]:
        """The same as `holding`, quicker where one of the first rules is likely to hold."""
        starts = self.may_start(text)
        return (rule for rule in self.rules if (starts or not rule.tied) and rule.found_in(text))

    def holding(self, text: str) -> Iterator[Rule]:
        """Return the rules that hold for `text`, in order."""
        possible: set[int] = set()
        if self._tied and self.may_start(text):
            possible.update(self._tied)
        for signs, part in (self._signs, text), (self._tail_signs, text[-TAIL:]):
            for character, texts in signs:
                if character in part:
                    for sign, numbers in texts:
                        if sign in part:
                            possible.update(numbers)
        return (self.rules[number] for number in sorted(possible) if self.rules[number].found_in(text))


def _gate(patterns: list[str]) -> re.Pattern[str]:
    r"""One pattern for the start of a text, which matches when one of those does.

    Without its `\A` an alternative begins with a letter, and Python passes over it by that alone; the start that many
    of them share is tried once.
    """
    shared, plain = [], []
    for pattern in patterns:
        if pattern.startswith(SHARED_START):
            shared.append(pattern.removeprefix(SHARED_START))
        else:
            plain.append(pattern.removeprefix(r"\A") if pattern.count(r"\A") == 1 else pattern)
    plain += [SHARED_START.removeprefix(r"\A") + f"(?:{'|'.join(shared)})"] if shared else []
    return re.compile("|".join(f"(?:{pattern})" for pattern in plain), re.MULTILINE)
