"""What stands in front of the rules of the error detector changes no answer: the same as every rule, one by one."""

from __future__ import annotations

import functools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import agent_logs
import pytest

from composer_plugins.errors import TraceError
from composer_plugins.traces import classify
from composer_plugins.traces.classify_rule import TAIL, Rule, RuleSet
from composer_plugins.traces.classify_rules import RULES
from composer_plugins.traces.find import find_reader

LABELS = Path(__file__).parent / "labels"
SAMPLES = Path(classify.__file__).parents[1] / "data/samples"
#: Starts and ends that pass the first gates and are no error, and the other way round.
STARTS = ("", "Error: ", "<tool_use_error>", "x\n", "\n", "F", "[Error: ", "ok\n" * 200)
ENDS = ("", "\n", "\n1 failed", "\nexit status 3", " " * TAIL, "\n" + "ok\n" * (TAIL // 3))
SETS = {
    "all": RuleSet(RULES), "naming": classify._NAMING, "human": classify._HUMAN, "searched": classify._SEARCHED,
    "tied": classify._TIED,
}  # fmt: skip


def holds(rule: Rule, text: str) -> bool:
    """What a rule says, with nothing in front of its pattern."""
    part = text[-TAIL:] if rule.tail else text
    return rule.needs in part and (rule.pattern.match if rule.tied else rule.pattern.search)(part) is not None


@functools.cache
def texts() -> list[str]:
    """All labelled results, and those of all logs that are here, as the detector is given them."""
    found = [json.loads(line)["text"] for file in LABELS.glob("*.jsonl") for line in file.read_text().splitlines()]
    for root in (agent_logs.DATA, SAMPLES, *filter(None, [os.environ.get("COMPOSER_TRACES")])):
        for path in Path(root).rglob("*.json*"):
            try:
                traces = list(find_reader(path).read(path, Counter()))
            except TraceError:
                continue
            found += [r.content for trace in traces for step in trace.steps for r in step.results]
    return list(dict.fromkeys(classify._ends(text) for text in found))


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_rules_gives_those_that_hold_one_by_one(name):
    rules, rng, held, many = SETS[name], random.Random(name), Counter(), texts()
    assert len(many) > 500
    for text in many:
        for changed in (text, rng.choice(STARTS) + text + rng.choice(ENDS), text[rng.randrange(len(text) + 1) :]):
            expected = [rule for rule in rules.rules if holds(rule, changed)]
            assert list(rules.holding(changed)) == expected, changed
            assert list(rules.one_by_one(changed)) == expected, changed
            assert all(rules.may_start(changed) for rule in expected if rule.tied)
            held.update(rule.error_class for rule in expected)
    assert len(held) >= (3 if name == "human" else 6)  # else the texts would show nothing


def test_a_rule_of_which_nothing_is_known_is_tried_on_every_text():
    bare = Rule("x", re.compile(r"(?:a|bc)\d"))
    tail = Rule("y", re.compile(r"(?:a|bc)\d"), tail=True)
    rules = RuleSet([bare, tail, Rule("z", re.compile("never"))])
    assert (bare.signs, tail.signs) == ((), ())
    for text, expected in (("say bc7", [bare, tail]), ("a1" + " " * TAIL, [bare]), ("nothing", [])):
        assert list(rules.holding(text)) == list(rules.one_by_one(text)) == expected


def test_most_texts_pass_no_gate():
    """Otherwise the gates would be of no use, and the test above of no worth."""
    good = [text for text in texts() if not any(holds(rule, text) for rule in classify.INFERRING)]
    assert sum(classify._TIED.may_start(text) for text in good) < 0.1 * len(good)
    tried = sum(rule.possible_in(text) for text in good for rule in classify._SEARCHED.rules)
    assert tried < 0.2 * len(good) * len(classify._SEARCHED.rules)
