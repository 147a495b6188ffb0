"""Where a hint lands in the messages."""

from __future__ import annotations

import copy

import pytest

from composer_plugins.errors import ConfigError
from composer_plugins.hints.splice import splice_messages

CONTEXT = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "task"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]},
    {"role": "tool", "content": "result", "tool_call_id": "c"},
]


@pytest.mark.parametrize("placement", ["local", "leading_system", "last_user"])
def test_the_input_is_not_changed_and_an_empty_hint_changes_nothing(placement):
    before = copy.deepcopy(CONTEXT)
    splice_messages(CONTEXT, "HINT", placement)
    assert before == CONTEXT
    assert splice_messages(CONTEXT, " ", placement) == CONTEXT


@pytest.mark.parametrize("role", ["user", "system"])
def test_local_comes_right_before_the_turn_even_after_a_tool_message(role):
    assert splice_messages(CONTEXT, "HINT", "local", role) == [*CONTEXT, {"role": role, "content": "HINT"}]


def test_leading_system_adds_to_the_system_prompt_or_makes_one():
    assert splice_messages(CONTEXT, "HINT", "leading_system")[0]["content"] == "sys\n\nHINT"
    made = splice_messages(CONTEXT[1:], "HINT", "leading_system")
    assert made == [{"role": "system", "content": "HINT"}, *CONTEXT[1:]]


def test_last_user_adds_to_the_last_user_message_or_becomes_local():
    spliced = splice_messages(CONTEXT, "HINT", "last_user")
    assert spliced[1]["content"] == "task\n\nHINT"
    assert spliced[2:] == CONTEXT[2:]
    assert splice_messages(CONTEXT[2:], "HINT", "last_user")[-1] == {"role": "user", "content": "HINT"}


def test_content_in_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "task"}]}]
    spliced = splice_messages(parts, "HINT", "last_user")
    assert spliced[0]["content"] == [{"type": "text", "text": "task"}, {"type": "text", "text": "HINT"}]
    assert len(parts[0]["content"]) == 1


def test_unknown_placement():
    with pytest.raises(ConfigError, match="elsewhere"):
        splice_messages(CONTEXT, "HINT", "elsewhere")
