"""What stands in front of the rules changes no result: every rule on every text finds the same, only slower."""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from composer_plugins.scrub import gates, personal
from composer_plugins.scrub.assignments import ANCHORS
from composer_plugins.scrub.blocks import BLOCKS
from composer_plugins.scrub.detectors import detectors
from composer_plugins.scrub.gates import Active, Gates
from composer_plugins.scrub.placeholders import Pseudonyms
from composer_plugins.scrub.records import texts_of
from composer_plugins.scrub.rules import UserRules
from composer_plugins.scrub.text import TextScrubber
from composer_plugins.scrub.tokens import TOKENS
from composer_plugins.traces.claude_code import READER

SALT = b"a salt for tests only"
SAMPLE = Path(__file__).parents[2] / "composer_plugins/data/samples/claude_code_session.jsonl"
_SPEC = importlib.util.spec_from_file_location("scrub_gates_generator", Path(__file__).parent / "generator.py")
generator = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(generator)

#: Every rule there is.
ALL = Active(
    tokens=tuple(TOKENS), key_blocks=tuple(b for b in BLOCKS if b.kind == "private_key"),
    blocks=tuple(b for b in BLOCKS if b.kind != "private_key"), anchors=tuple(ANCHORS), plugins=detectors(),
    manifests=True, aws=True, key_ends=True, emails=True, homes=personal.HOME_WORDS, projects=True,
)  # fmt: skip
PERSONAL = [
    "mail jane@corp.example", "%40 jane%40corp.example.org", "/home/jane/x", "/Users/jane/x", "C:\\Users\\jane\\x", "c:/users/jane/x",
    "\\/home\\/jane\\/x", "-Users-jane-app", "-home-jane-app", "%2Fhome%2Fjane%2Fx", "file:///home/jane/x", "/mnt/c/Users/jane/x",
]  # fmt: skip


@functools.cache
def planted(seed: int) -> list[str]:
    """Every kind of secret in every form, in an order of its own, and the texts of a real session between them."""
    maker, found = generator.Maker(seed), []
    for build in generator.KINDS.values():
        found += generator.places(build(maker), maker).values()
    for trace in READER.read(SAMPLE, Counter()):
        found += texts_of(trace)
    found += PERSONAL
    random.Random(seed).shuffle(found)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [11, 12])
def test_every_text_is_given_to_every_rule_that_finds_something_in_it(seed):
    """All texts are searched at once, as those of a record are: each must get its own rules, and no neighbour's."""
    texts = list(dict.fromkeys(planted(seed)))
    scrubber = TextScrubber(Pseudonyms(SALT), UserRules())
    prepared = scrubber.prepare(texts)
    for text in texts:
        active, words = prepared.rules.get(text, scrubber._nothing)
        assert scrubber._scrub(text, active, words, prepared.names) == scrubber._scrub(text, ALL, None, prepared.names)


def test_a_rule_is_not_asked_about_texts_that_it_cannot_match():
    """Otherwise the gates would be of no use, and the test above of no worth."""
    texts = [text for trace in READER.read(SAMPLE, Counter()) for text in texts_of(trace)]
    active = [rules for rules, _ in Gates().rules(texts).values()]
    assert len(active) < 0.9 * len(texts)
    asked = sum(len(a.tokens) + len(a.blocks) + len(a.key_blocks) + len(a.plugins) for a in active)
    assert asked < 0.2 * len(texts) * (len(TOKENS) + len(BLOCKS) + len(detectors()))


def literals_of_rules():
    """(name of the rule, one literal, in any case?, whether a rule set has the rule) of all that are told by literals."""
    for token in TOKENS:
        yield f"token {token.kind}", token.prefix, False, lambda active, t=token: t in active.tokens
    for block in BLOCKS:
        for literal in block.literals if block.literals != (".",) else ():
            yield f"block {block.kind}", literal, False, lambda a, b=block: b in (*a.blocks, *a.key_blocks)
    for anchor in ANCHORS:
        yield "anchor", anchor, True, lambda active, a=anchor: a in active.anchors
    for plugin in detectors():
        for literal in sorted(plugin.literals - set(gates.LENGTHS)):
            yield f"plugin {plugin.kind}", literal, True, lambda active, p=plugin: p in active.plugins
    for sign, words in personal.HOME_SIGNS.items():
        yield "home", sign, True, lambda active, w=words: set(w) <= set(active.homes)
    for sign in personal.AT_SIGNS:
        yield "e-mail", sign, False, lambda active: active.emails


@pytest.mark.parametrize(
    ("literal", "any_case", "has"),
    [
        pytest.param(literal, any_case, has, id=f"{name} {literal}")
        for name, literal, any_case, has in literals_of_rules()
    ],
)
def test_each_literal_alone_brings_its_rule_between_others_and_at_both_ends(literal, any_case, has):
    find = Gates()
    for before, after in (("", ""), ("\n\0", " x"), ("sk-é→", ""), ("-----END", "AKIA")):
        text = before + (literal.upper() if any_case else literal) + after
        (active, _) = find.rules(["", text, "x" * 30])[text]
        assert has(active)


@pytest.mark.parametrize("sign", [gates.LONG_WORD, gates.DOTTED])
def test_long_words_are_told_by_their_exact_length(sign):
    length, letters = gates.LENGTHS[sign], "ab.c.d_-9" if sign == gates.DOTTED else "abcd_-9"
    word = (letters * length)[:length]
    for before, after in (("", ""), ("é ", "\n"), ("\n\0", "/x"), (f"{word[:-1]} ", "")):
        for text, there in ((f"{before}{word}{after}", True), (f"{before}{word[:-1]}{after}", False)):
            active, words = Gates().rules(["é" * 7, text, ""]).get(text, (Active(), []))
            assert [p for p in active.plugins if sign in p.literals] == [
                p for p in detectors() if sign in p.literals and there
            ]
            assert (word in words) is there


def test_words_of_twenty_letters_are_handed_on():
    text = f"AKIA {'a' * gates.LONG} {'b' * (gates.LONG - 1)} {'c' * 30}"
    (_, words) = Gates().rules([text])[text]
    assert words == ["a" * gates.LONG, "c" * 30]
