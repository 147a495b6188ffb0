"""What is read off a regular expression holds for all that it matches."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_plugins.traces import classify
from composer_plugins.traces.classify_rules import RULES
from composer_plugins.traces.literals import beginnings, line_search, literals, rarest

NAMES = [f"{number} {rule.error_class}" for number, rule in enumerate(RULES)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("abc", {"abc"}),
        ("ab[cd]+efg", {"efg"}),
        ("abcd|xyz", {"abcd", "xyz"}),
        ("(?:abcd|xyz)?", set()),
        ("(?:abcd|xyz){0,3}long", {"long"}),
        ("(?:abcd|xyz)+lo", {"abcd", "xyz"}),
        ("error|errors?", {"error"}),
        ("ab|[c-z]x", set()),
        ("abcd|[c-z]", set()),
        ("(?i:abcd)x", set()),
        (r"^\d+ failed\b", {" failed"}),
        ("(?>abcd)x", {"abcd"}),
    ],
)
def test_the_texts_that_a_pattern_needs(pattern, expected):
    assert set(literals(re.compile(pattern))) == expected


def test_without_case_nothing_is_known():
    assert literals(re.compile("abcd", re.IGNORECASE)) == ()
    assert beginnings(re.compile("abcd", re.IGNORECASE)) is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("abc", "a"),
        ("a?b", "ab"),
        ("(?:ab|[cd]x)", "acd"),
        ("a*", None),
        (".x", None),
        (r"\Ax", "x"),
        ("(?:a|)b", None),
    ],
)
def test_the_characters_that_a_pattern_begins_with(pattern, expected):
    assert beginnings(re.compile(pattern)) == (None if expected is None else frozenset(expected))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_every_match_of_a_rule_passes_what_stands_before_it(rule):
    """Texts made from each pattern: the literals, the first characters, the gate, the form for lines."""

    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(
        st.from_regex(rule.pattern), st.sampled_from(["", "x", "a line\n", "\n"]), st.sampled_from(["", "\nend", " "])
    )
    def check(match, before, after):
        text = match if rule.tied else before + match + after
        if rule.needs not in text or (rule.pattern.match if rule.tied else rule.pattern.search)(text) is None:
            return
        assert rule.possible_in(text)
        if rule.tied:
            first = beginnings(rule.pattern)
            assert first is None or text[:1] in first
            assert classify.RuleSet([rule]).may_start(text)
        if rule.lines is not None:
            assert rule.lines.search("\n" + text)
        held = [r for r in (rule,) if r.found_in(text)]
        assert list(classify.RuleSet([rule]).holding(text)) == held == list(classify.RuleSet([rule]).one_by_one(text))
        assert held or rule.tail

    check()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["\n", "^", "fatal: x", "error", "FAILED (errors=", " ", "a", "1 failed"]), max_size=8))
def test_the_form_for_lines_finds_the_same(parts):
    text = "".join(parts)
    for rule in RULES:
        if rule.lines is not None:
            assert (rule.lines.search("\n" + text) is None) == (rule.pattern.search(text) is None), rule


def test_only_patterns_about_lines_have_that_form():
    assert line_search(re.compile("^a|^b", re.MULTILINE))
    assert line_search(re.compile("^a|b", re.MULTILINE)) is None
    assert line_search(re.compile("^a")) is None
    assert sum(rule.lines is not None for rule in RULES) > 10


def test_the_rarest_character_is_one_of_the_text():
    assert (rarest("the Fox"), rarest("aaa"), rarest("e,x"), rarest("")) == ("F", "a", "x", "")
