"""One text: find its secrets with the rules that can matter, and replace them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from composer_plugins.scrub import personal
from composer_plugins.scrub.assignments import assignment_spans
from composer_plugins.scrub.blocks import beside_aws_keys, key_ends, manifest_values
from composer_plugins.scrub.gates import Active, Gates
from composer_plugins.scrub.placeholders import PLACEHOLDER, Pseudonyms
from composer_plugins.scrub.rules import UserRules
from composer_plugins.scrub.spans import BREAK, Span, Taken, merge, mixed

#: (kind, value, placeholder): what was found, for the report and for later occurrences.
Found = Callable[[str, str, str], None]


#: Between texts that are searched together: no rule goes on over a zero character between two line breaks.
_BETWEEN = "\n\0\n"
#: No secret, address or home folder is shorter.
_SHORTEST = 6
#: Of so many characters of texts the result is remembered: states repeat the history, and sub-agents their prompts.
_REMEMBERED = 4_000_000


#: The new text, and what was found in it.
Result = tuple[str, list[tuple[str, str, str]]]


@dataclass
class Prepared:
    """For a set of texts: (rules that can match, long words) of those that have any, and the users of home folders."""

    rules: dict[str, tuple[Active, list[str]]]
    names: set[str] = field(default_factory=set)


class TextScrubber:
    """All rules together.

    Args:
        names: the placeholders.
        rules: the user's rules and exceptions.
    """

    def __init__(self, names: Pseudonyms, rules: UserRules) -> None:
        self.names = names
        self.gates = Gates()
        self._nothing: tuple[Active, list[str]] = (self.gates.active(frozenset()), [])
        self.allowed = frozenset(rules.allow)
        self.allow_patterns = [re.compile(pattern) for pattern in rules.allow_regex]
        self.own = [(rule.kind, re.compile(rule.regex), tuple(rule.literals)) for rule in rules.rule]
        self._results: dict[str, Result] = {}
        self._remembered = 0

    def keep(self, value: str) -> bool:
        """True for a value that the user allows."""
        return value in self.allowed or any(pattern.match(value) for pattern in self.allow_patterns)

    def prepare(self, texts: Collection[str]) -> Prepared:
        """Find out which rules can match in which of the texts; they are searched as one, which is much faster."""
        if self._remembered > _REMEMBERED:  # only here: what a record was prepared with stays until it is done
            self._results.clear()
            self._remembered = 0
        fresh = [text for text in texts if text not in self._results]
        prepared = Prepared(self.gates.rules(fresh) if fresh else {})
        if any(active.projects for active, _ in prepared.rules.values()):
            prepared.names = personal.home_names(_BETWEEN.join(texts))
        return prepared

    def scrub(self, text: str, prepared: Prepared, found: Found) -> str:
        """Return the text without secrets, addresses and user names; `found` hears of each.

        Args:
            prepared: from `prepare`, for a set of texts with this one in it.
        """
        if len(text) < _SHORTEST and not self.own:
            return text
        known = self._results.get(text)
        if known is None:
            active, words = prepared.rules.get(text, self._nothing)
            known = self._scrub(text, active, words, prepared.names)
            if not active.projects:  # all others have the same result in every record
                self._results[text] = known
                self._remembered += len(text)
        for find in known[1]:
            found(*find)
        return known[0]

    def _scrub(self, text: str, active: Active, words: list[str], names: set[str]) -> Result:
        finds: list[tuple[str, str, str]] = []

        def found(*find: str) -> None:
            finds.append(find)

        if active.secrets or self.own:
            text = self._replace(text, self._spans(text, active, words), found)
        return self.scrub_personal(text, active, names, found), finds

    def scrub_personal(self, text: str, active: Active, names: set[str], found: Found) -> str:
        """Replace e-mail addresses and the names in home folders only.

        Args:
            names: the users of home folders near the text.
        """
        if active.emails:
            text = personal.scrub_emails(text, self.names, found, self.keep)
        if active.homes:
            text = personal.scrub_homes(text, self.names, names, found, self.keep, active.homes)
        return text

    def _spans(self, text: str, active: Active, words: list[str]) -> list[Span]:
        spans: list[Span] = []
        for block in active.key_blocks:
            if block.may_match(text):
                spans.extend(block.spans(text))
        if active.key_ends and "-----END" in text:
            spans.extend(key_ends(text))
        for kind, pattern, literals in self.own:
            if not literals or any(literal in text for literal in literals):
                spans.extend(_own_spans(kind, pattern, text))
        for token in active.tokens:
            spans.extend(token.spans(text))
        for block in active.blocks:
            if block.may_match(text):
                spans.extend(block.spans(text))
        if active.manifests:
            spans.extend(manifest_values(text))
        if active.aws:
            spans.extend(beside_aws_keys(text))
        low = lower(text) if active.anchors or active.plugins else ""
        if active.anchors:
            spans.extend(assignment_spans(text, low, active.anchors))
        if active.plugins:
            ours = Taken((span.start, span.end) for span in spans)
            for plugin in active.plugins:
                spans.extend(s for s in plugin.spans(text, low, words) if not ours.overlap(s))
        return spans

    def _replace(self, text: str, spans: list[Span], found: Found) -> str:
        if not spans:
            return text
        taken = [match.span() for match in PLACEHOLDER.finditer(text)] if "[SECRET:" in text else []
        out, end = [], 0
        for span in merge((s for s in spans if not self.keep(text[s.start : s.end])), taken):
            value = text[span.start : span.end]
            whole = BREAK.sub("", value) if "\n" in value or "\\n" in value else value
            new = self.names.secret(span.kind, whole)
            found(span.kind, whole, new)
            out += [text[end : span.start], new]
            end = span.end
        return "".join([*out, text[end:]])


def _own_spans(kind: str, pattern: re.Pattern, text: str) -> Iterable[Span]:
    group: int | str = "secret" if "secret" in pattern.groupindex else 1 if pattern.groups else 0
    for match in pattern.finditer(text):
        if match.end(group) > match.start(group):
            yield Span(match.start(group), match.end(group), kind)


def lower(text: str) -> str:
    """ASCII letters in lower case, every other character as `?`, in the same length and a byte a letter.

    Names of secrets are ASCII, and Python's own lower case is slow for texts that are not. The two letters beyond ASCII
    whose lower case is one are seen to.
    """
    if not text.isascii() and ("\u0130" in text or "\u212a" in text):
        text = text.replace("\u0130", "I").replace("\u212a", "K")
    return text.encode("ascii", "replace").lower().decode("ascii")


def worth_finding_again(value: str) -> bool:
    """True for a value that is no ordinary word, so that it can be replaced wherever else it stands."""
    return (len(value) >= 8 and mixed(value)) or len(value) >= 24
