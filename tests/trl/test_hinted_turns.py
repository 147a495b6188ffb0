"""Where the hint goes: turns of a completion, and splicing at token level."""

import copy

import pytest

pytest.importorskip("trl")

from composer_trl.hinted_turns import HintSplicer, tool_results, turns_of

from composer_plugins.errors import ModelError


@pytest.mark.parametrize(
    ("tool_mask", "length", "expected"),
    [
        (None, 4, [(0, 4)]),
        (None, 0, []),
        ([1, 1, 0, 0, 1], 5, [(0, 2), (4, 5)]),
        ([1, 0, 1, 0], 4, [(0, 1), (2, 3)]),
        ([0, 0, 1], 3, [(2, 3)]),
        ([1, 1, 1, 1], 2, [(0, 2)]),
    ],
)
def test_turns_are_the_runs_of_sampled_tokens(tool_mask, length, expected):
    assert turns_of(tool_mask, length) == expected


def test_tool_results_belong_to_the_assistant_turn_before_them():
    completion = [
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "name": "Read", "content": "ok"},
        {"role": "tool", "name": "Edit", "content": "{'error': 'no'}"},
        {"role": "assistant", "content": "again"},
        {"role": "tool", "name": "Read", "content": [{"type": "text", "text": "x"}]},
    ]
    assert [(turn, message["name"]) for turn, message, _ in tool_results(completion)] == [
        (0, "Read"),
        (0, "Edit"),
        (1, "Read"),
    ]
    assert all(isinstance(text, str) for _, _, text in tool_results(completion))


def ids(tokenizer, messages, generate):
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=True, return_dict=False)
    )


CONTEXTS = {
    "user": [{"role": "user", "content": "edit a.py"}],
    "system": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "edit a.py"}],
    "tool": [
        {"role": "user", "content": "edit a.py"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "Read", "arguments": {"file_path": "a.py"}}}],
        },
        {"role": "tool", "name": "Read", "content": "File does not exist."},
    ],
}


@pytest.mark.parametrize("name", sorted(CONTEXTS))
def test_local_splice_equals_rendering_the_hint_as_a_message(tokenizer, name):
    context = CONTEXTS[name]
    splicer = HintSplicer(tokenizer, role="user")
    spliced = splicer.splice(ids(tokenizer, context, True), "read it first")
    assert spliced == ids(tokenizer, [*context, {"role": "user", "content": "read it first"}], True)


def test_an_empty_hint_changes_nothing(tokenizer):
    prefix = ids(tokenizer, CONTEXTS["tool"], True)
    assert HintSplicer(tokenizer, role="user").splice(prefix, "") == prefix


def test_a_context_that_does_not_end_in_a_generation_prompt_is_refused(tokenizer):
    with pytest.raises(ModelError, match="generation prompt"):
        HintSplicer(tokenizer, role="user").splice(ids(tokenizer, CONTEXTS["user"], False), "hint")


def test_templates_that_insist_on_alternating_roles(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if loop.index0 % 2 == 0 and m.role != 'user' %}{{ raise_exception('alternate') }}"
        "{% endif %}{% if loop.index0 % 2 == 1 and m.role != 'assistant' %}{{ raise_exception('alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    splicer = HintSplicer(strict, role="user")
    text = strict.decode(splicer.splice(ids(strict, CONTEXTS["user"], True), "read it first"))
    assert text.endswith("<|im_end|>\n<|im_start|>user\nread it first<|im_end|>\n<|im_start|>assistant\n")


def test_a_thinking_block_in_the_generation_prompt_stays_behind_the_hint(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    splicer = HintSplicer(thinking, role="user")
    text = thinking.decode(splicer.splice(ids(thinking, CONTEXTS["user"], True), "h"))
    assert text.endswith("<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_without_generation_prompt_is_refused(tokenizer):
    flat = copy.deepcopy(tokenizer)
    flat.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="no generation prompt"):
        HintSplicer(flat, role="user")
