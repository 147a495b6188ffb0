"""Which rules can match in which text: every match of a rule has one of its literals, and all are looked for at once.

PyPI `ahocorasick_rs` finds hundreds of literals in one pass over all texts of a record, at about a gigabyte a second.
Most texts have none, and are done; the others are given only to the rules whose literals they have.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from composer_plugins.errors import ConfigError
from composer_plugins.scrub.assignments import ANCHORS
from composer_plugins.scrub.blocks import BLOCKS, Block
from composer_plugins.scrub.detectors import DOTTED, LENGTHS, LONG, LONG_WORD, Detector, detectors
from composer_plugins.scrub.personal import AT_SIGNS, HOME_SIGNS, HOME_WORDS
from composer_plugins.scrub.tokens import ALIKE, TOKENS, Token

#: Between texts that are searched together: no literal has a line break.
_BETWEEN = b"\n\0\n"
#: So many different sets of rules are remembered.
_MOST_RULES = 4096

#: What a text was found to have: a literal (bytes: as it is; str: in lower case), or a kind of long word.
Sign = Hashable


@dataclass(frozen=True)
class Active:
    """The rules that can match in a text."""

    tokens: tuple[Token, ...] = ()
    key_blocks: tuple[Block, ...] = ()
    blocks: tuple[Block, ...] = ()
    anchors: tuple[str, ...] = ()
    plugins: tuple[Detector, ...] = ()
    manifests: bool = False
    aws: bool = False
    key_ends: bool = False
    emails: bool = False
    homes: tuple[str, ...] = ()
    projects: bool = False

    @property
    def secrets(self) -> bool:
        """True when a rule for secrets can match."""
        found = self.tokens or self.key_blocks or self.blocks or self.anchors or self.plugins
        return bool(found) or self.manifests or self.key_ends


#: For texts that were not searched: addresses and home folders only.
PERSONAL = Active(emails=True, homes=HOME_WORDS, projects=True)


def _raw(text: str) -> bytes:
    return text.strip().encode()


def _of_block(block: Block) -> frozenset[Sign]:
    """A block whose literal is everywhere is told by its long word."""
    return frozenset([DOTTED]) if block.literals == (".",) else frozenset(map(_raw, block.literals))


_TOKENS = [(_raw(token.prefix), token) for token in TOKENS]
_BLOCKS = [(_of_block(block), block) for block in BLOCKS]
_EMAILS, _PROJECTS = frozenset(map(_raw, AT_SIGNS)), frozenset([b"-Users-", b"-home-"])
_AWS, _SECRET, _KIND, _KEY_END = frozenset([b"AKIA", b"ASIA"]), b"Secret", b"kind", b"-----END"
_CASED = sorted(
    _EMAILS.union(_PROJECTS, _AWS, [_SECRET, _KIND, _KEY_END], (literal for literal, _ in _TOKENS))
    | frozenset(itertools.chain(*(literals for literals, _ in _BLOCKS))) - {DOTTED}
)


class Gates:
    """Finds the signs of texts, and the rules that they stand for."""

    def __init__(self) -> None:
        plugins = detectors()
        self._low = sorted({*ANCHORS, *HOME_SIGNS, *itertools.chain(*(p.literals for p in plugins))} - set(LENGTHS))
        self._find_cased = _searcher(tuple(_CASED))
        self._find_low = _searcher(tuple(text.encode() for text in self._low))
        self._plugins = plugins
        self._rules: dict[frozenset[Sign], Active] = {}

    def rules(self, texts: Sequence[str]) -> dict[str, tuple[Active, list[str]]]:
        """Return (rules that can match, words of at least `LONG` letters) of each text; the others have neither."""
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        raw = _BETWEEN.join(parts)
        starts = list(itertools.accumulate((len(part) + len(_BETWEEN) for part in parts), initial=0))
        signs: defaultdict[int, set[Sign]] = defaultdict(set)
        words: defaultdict[int, list[str]] = defaultdict(list)
        for literal, start, _ in self._find_cased(raw, overlapping=True):
            signs[bisect.bisect_right(starts, start)].add(_CASED[literal])
        for literal, start, _ in self._find_low(raw.lower(), overlapping=True):
            signs[bisect.bisect_right(starts, start)].add(self._low[literal])
        for start, end in _long_words(raw):
            number = bisect.bisect_right(starts, start)
            words[number].append(raw[start:end].decode())
            if end - start >= LENGTHS[LONG_WORD]:
                signs[number].add(LONG_WORD)
            if end - start >= LENGTHS[DOTTED] and raw.count(b".", start, end) > 1:
                signs[number].add(DOTTED)
        return {texts[number - 1]: (self.active(frozenset(some)), words[number]) for number, some in signs.items()}

    def active(self, signs: frozenset[Sign]) -> Active:
        """Return the rules whose literals are among these signs."""
        found = self._rules.get(signs)
        if found is None:
            if len(self._rules) > _MOST_RULES:
                self._rules.clear()
            found = self._rules[signs] = self._choose(signs)
        return found

    def _choose(self, signs: frozenset[Sign]) -> Active:
        blocks = [block for literals, block in _BLOCKS if not signs.isdisjoint(literals)]
        return Active(
            tokens=tuple(token for literal, token in _TOKENS if literal in signs),
            key_blocks=tuple(block for block in blocks if block.kind == "private_key"),
            blocks=tuple(block for block in blocks if block.kind != "private_key"),
            anchors=tuple(anchor for anchor in ANCHORS if anchor in signs),
            plugins=tuple(p for p in self._plugins if not p.literals or not signs.isdisjoint(p.literals)),
            manifests=_SECRET in signs and _KIND in signs,
            aws=not signs.isdisjoint(_AWS),
            key_ends=_KEY_END in signs,
            emails=not signs.isdisjoint(_EMAILS),
            homes=tuple(word for sign, words in HOME_SIGNS.items() if sign in signs for word in words),
            projects=not signs.isdisjoint(_PROJECTS),
        )


def _long_words(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where the words of at least `LONG` letters are: looked for in a copy in which all letters are the same."""
    alike, needle = raw.translate(ALIKE), b"w" * LONG
    start = alike.find(needle)
    while start >= 0:
        end = alike.find(b" ", start)
        end = len(alike) if end < 0 else end
        yield start, end
        start = alike.find(needle, end)


@functools.lru_cache(8)
def _searcher(literals: tuple[bytes, ...]) -> Callable[..., list[tuple[int, int, int]]]:
    """A function that finds all of these literals in bytes: (number of the literal, start, end) of each place."""
    try:
        from ahocorasick_rs import BytesAhoCorasick, Implementation
    except ModuleNotFoundError as error:
        raise ConfigError(f"Scrubbing needs {error.name}: pip install ahocorasick_rs.") from error
    return BytesAhoCorasick(list(literals), implementation=Implementation.DFA).find_matches_as_indexes
