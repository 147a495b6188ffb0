"""The chat template for tools: what the parser and TRL's rollout loop rely on."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("transformers")

from composer_plugins.errors import ModelError
from composer_plugins.models import install_tool_template, parse_action, render_action
from composer_plugins.traces.schema import Message, ToolCall

READ = {
    "type": "function",
    "function": {
        "name": "Read",
        "parameters": {
            "type": "object",
            "properties": {
                "file_path": {"type": "string", "description": "left out: tokens are dear"},
                "limit": {"type": ["null", "integer"]},
                "deep": {"type": "boolean"},
                "any": True,
            },
            "required": ["file_path"],
        },
    },
}
BARE = {"name": "ls", "parameters": {}}
AWKWARD = {"file_path": 'a "b" <c> & é\n\t' + "日本", "limit": 5, "deep": None, "nested": {"k": [1.5, "</tool_call>"]}}


def messages(arguments=None, content="I look."):
    call = {"id": "c0", "type": "function", "function": {"name": "Read", "arguments": arguments or {}}}
    return [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "Show a.py"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c0", "name": "Read", "content": "no such file"},
        {"role": "assistant", "content": "There is none."},
        {"role": "user", "content": "Thanks"},
    ]


def render(tokenizer, conversation, *, tools=(READ, BARE), header=False) -> str:
    return tokenizer.apply_chat_template(
        conversation, tools=list(tools) or None, add_generation_prompt=header, tokenize=False
    )


def test_a_conversation_renders_to_exactly_this(tokenizer):
    assert render(tokenizer, messages({"file_path": "a.py"})[:4], header=True) == (
        "<|im_start|>system\nYou are an agent.\n\nTools:\n"
        "Read(file_path, limit?: int, deep?: bool, any?)\nls()\n"
        'Call one with <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nShow a.py<|im_end|>\n"
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>tool\nno such file<|im_end|>\n<|im_start|>assistant\n"
    )


def test_each_message_renders_the_same_whatever_follows(tokenizer):
    conversation = messages(AWKWARD)
    for tools in ((), (READ,)):
        whole = render(tokenizer, conversation, tools=tools)
        for end in range(1, len(conversation)):
            assert whole.startswith(render(tokenizer, conversation[:end], tools=tools))
            header = conversation[end]["role"] == "assistant"
            assert whole.startswith(render(tokenizer, conversation[:end], tools=tools, header=header))


@pytest.mark.parametrize("content", ["", "I look.", "line\n", " "])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_template_writes_what_render_action_writes(tokenizer, content, number):
    calls = [ToolCall(id=str(i), name='Read "it"', arguments=AWKWARD) for i in range(number)]
    action = Message(role="assistant", content=content, tool_calls=calls)
    before = [{"role": "user", "content": "x"}]
    start = render(tokenizer, before, header=True)
    assert render(tokenizer, [*before, action.to_chat()]) == start + render_action(action) + "<|im_end|>\n"
    assert [call.arguments for call in parse_action(render_action(action)).tool_calls] == [AWKWARD] * number


def test_arguments_as_object_and_as_json_text_render_the_same(tokenizer):
    text = json.dumps(AWKWARD, ensure_ascii=False)
    assert render(tokenizer, messages(AWKWARD)) == render(tokenizer, messages(text))


def test_unreadable_arguments_are_rendered_as_they_were_written(tokenizer):
    assert '"arguments": {"file_path": oops}\n' in render(tokenizer, messages('{"file_path": oops'))


def test_content_may_be_parts_or_none(tokenizer):
    parts = [{"type": "text", "text": "I "}, {"type": "text", "text": "look."}]
    assert render(tokenizer, messages(content=parts)) == render(tokenizer, messages(content="I look."))
    assert render(tokenizer, messages(content=None)) == render(tokenizer, messages(content=""))


def test_rendering_changes_nothing_it_was_given(tokenizer):
    given = messages(AWKWARD)
    kept = copy.deepcopy(given)
    render(tokenizer, given)
    assert given == kept


def test_thinking_is_rendered_in_front(tokenizer):
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "hm"}]
    assert render(tokenizer, conversation, tools=()).endswith("<think>\nhm\n</think>\ny<|im_end|>\n")


def test_trl_finds_the_template_prefix_preserving(tokenizer):
    utils = pytest.importorskip("trl.chat_template_utils")
    assert utils.is_chat_template_prefix_preserving(tokenizer) is True


@pytest.mark.parametrize("end", ["<|im_end|>", "\n<|im_end|>", "<|im_end|>\n", ""])
@pytest.mark.parametrize("content", ["", "I look."])
@pytest.mark.parametrize("number", [1, 2])
def test_trl_reads_the_calls_from_the_ids(tokenizer, number, content, end):
    utils = pytest.importorskip("trl.chat_template_utils")
    given = {"file_path": 'a "b".py', "limit": 5, "nested": {"k": [1.5, None]}}
    calls = [ToolCall(id="", name="Read", arguments=given) for _ in range(number)]
    text = render_action(Message(role="assistant", content=content, tool_calls=calls)) + end
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    call = {"type": "function", "function": {"name": "Read", "arguments": given}}
    assert utils.parse_response(tokenizer, ids) == {
        "role": "assistant", "content": content, "tool_calls": [call] * number,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["just words", "two\nlines", '<tool_call>\n{"name": "Read", "arguments": {oops}}\n</tool_call>', "<tool_call>"],
)
def test_trl_keeps_what_is_no_call_as_text(tokenizer, text):
    utils = pytest.importorskip("trl.chat_template_utils")
    ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    parsed = utils.parse_response(tokenizer, ids)
    assert parsed["content"].removesuffix("<|im_end|>") == text and not parsed.get("tool_calls")


def test_a_tokenizer_without_the_chatml_tokens_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<|im_start|>": 1}, "a")))
    with pytest.raises(ModelError, match=r"no token <\|im_end\|>\."):
        install_tool_template(plain)
    assert not plain.chat_template
