"""Tool calls as text: what is rendered is read back, and nothing that a model writes can break the parser."""

from __future__ import annotations

import json
import time
import unicodedata

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer_plugins.models import canonical_call, parse_action, problems, render_action
from composer_plugins.models.toolcalls import CLOSE, END_OF_TURN, MAX_DEPTH, OPEN
from composer_plugins.traces.schema import Message, ToolCall

#: Words that have a meaning in the wire format, mixed into any text.
MARKS = [OPEN, CLOSE, "<think>", "</think>", '{"name": "Read", "arguments": {', "}", '"', "\\", "\n", "  "]
any_text = st.lists(st.one_of(st.sampled_from([*MARKS, END_OF_TURN, "\\ud800", "NaN"]), st.text(max_size=8))).map(
    "".join
)
words = st.text(max_size=20).filter(lambda t: END_OF_TURN not in t)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
values = st.recursive(
    scalars | st.sampled_from([OPEN, CLOSE, f"a {CLOSE} b {OPEN} c"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(
    lambda name, arguments: ToolCall(id="", name=name, arguments=arguments),
    words.filter(bool),
    st.dictionaries(words, values, max_size=4),
)
# Content cannot hold what opens a call or a thought; everything else must come back as it was.
contents = words.filter(lambda t: OPEN not in t and not t.startswith("<think>"))


def call_text(arguments: str, name: str = '"Read"') -> str:
    return f'{OPEN}\n{{"name": {name}, "arguments": {arguments}}}\n{CLOSE}'


def without_ids(message: Message) -> list[tuple[str, dict]]:
    assert [call.id for call in message.tool_calls] == [f"call_{i}" for i in range(len(message.tool_calls))]
    assert all(call.raw_arguments is None for call in message.tool_calls)
    return [(call.name, call.arguments) for call in message.tool_calls]


@given(contents, st.lists(calls, max_size=3), st.none() | contents.filter(bool))
@example("text\n", [ToolCall(id="", name="a", arguments={"x": CLOSE})], None)
@example("", [], "thought")
@settings(max_examples=300, deadline=None)
def test_what_is_rendered_is_read_back(content, given_calls, thinking):
    message = Message(role="assistant", content=content, tool_calls=given_calls, thinking=thinking)
    if thinking and ("</think>" in thinking or thinking.startswith("\n") or thinking.endswith("\n")):
        message.thinking = thinking = None
    read = parse_action(render_action(message, thinking=True) + END_OF_TURN + "ignored")
    assert (read.content, read.thinking) == (content, thinking)
    assert without_ids(read) == [(call.name, call.arguments) for call in given_calls]
    assert problems(read) == []


@given(any_text)
@example(call_text("1" * 5000))
@example(call_text('{"x": ' + "[" * 900 + "]" * 900 + "}"))
@example(call_text('{"x": ' + "[" * 100_000))
@example(call_text('{"x": "\\ud83d"}'))
@example(call_text("{}", name='"\\ud83d"'))
@example(call_text('{"x": 1180591620717411303424, "y": 1.5e300}'))
@example(call_text('{"x": 1e999}'))
@example(call_text("{oops", name='"\\ud83d"'))
@settings(max_examples=500, deadline=None)
def test_whatever_a_model_writes_can_be_read_scored_and_stored(text):
    read = parse_action(text)
    broken = [call for call in read.tool_calls if call.raw_arguments is not None]
    assert len(problems(read)) == len(broken)
    assert all(isinstance(part, str) for call in read.tool_calls for part in canonical_call(call))
    assert msgspec.json.decode(msgspec.json.encode(read), type=Message).tool_calls == read.tool_calls


@pytest.mark.parametrize(
    ("text", "name", "raw", "reason"),
    [
        (call_text('{"a": 1')[: -len(CLOSE)], "Read", '{"a": 1', "not valid JSON"),
        (call_text("{a: 1}"), "Read", "{a: 1}", "not valid JSON"),
        (call_text("[1]"), "Read", "[1]", "arguments must be an object, found list"),
        (call_text('{"a": 1}')[: -len(CLOSE)], "Read", '{"a": 1}', f"closed by {CLOSE}"),
        (call_text('{"a": NaN}'), "Read", '{"a": NaN}', "NaN is not JSON"),
        (call_text('{"a": "\\udc00"}'), "Read", '{"a": "\\udc00"}', "half a surrogate pair"),
        (
            call_text('{"a": %s}' % ("1" * 5000)),
            "Read",
            '{"a": %s}' % ("1" * 5000),
            "not valid JSON (Exceeds the limit",
        ),
        (call_text('{"a": %s1%s}' % ("[" * 64, "]" * 64)), "Read", None, f"more than {MAX_DEPTH} levels"),
        (call_text("{}", name="7"), "", '{"name": 7, "arguments": {}}', '{"name": ..., "arguments": {...}}'),
        (f"{OPEN}\nRead a.py\n{CLOSE}", "", "Read a.py", "not valid JSON"),
        (OPEN, "", "", "not valid JSON"),
    ],
)
def test_an_unreadable_call_is_kept_and_explained(text, name, raw, reason):
    [call] = parse_action(text).tool_calls
    assert call.name == name and call.raw_arguments == (raw if raw is not None else call.raw_arguments)
    [sentence] = problems(parse_action(text))
    assert sentence.startswith("tool call 1" + (f" ({name}): " if name else ": ")) and reason in sentence


def test_a_broken_call_does_not_hide_the_next_one():
    text = f"first {call_text('{a}')} between {call_text('{}', name='')} then {call_text('{}')} last"
    read = parse_action(text)
    assert [call.raw_arguments is None for call in read.tool_calls] == [False, False, True]
    assert read.content == "first \nbetween\nthen\nlast"


def test_arguments_may_be_a_string_of_json_or_absent():
    assert without_ids(parse_action(call_text('"{\\"a\\": 1}"'))) == [("Read", {"a": 1})]
    assert without_ids(parse_action(f'{OPEN}{{"name": "ls"}}{CLOSE}')) == [("ls", {})]


def test_a_call_with_raw_arguments_is_rendered_as_it_was_written():
    message = Message(role="assistant", tool_calls=[ToolCall(id="", name="Read", raw_arguments='{"a": oops')])
    assert render_action(message) == call_text('{"a": oops')
    assert parse_action(render_action(message)).tool_calls[0].raw_arguments == '{"a": oops'


def test_a_run_of_blanks_does_not_stop_the_clock():
    """A small model repeats itself; time must grow with the text, not with a power of it."""
    text = call_text('{"x": "' + " " * 20_000 + "b")[: -len(CLOSE)]
    started = time.perf_counter()
    parse_action(text)
    assert time.perf_counter() - started < 1.0


SAME = [
    ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
    ({"limit": 5.0}, {"limit": 5}),
    ({"x": [1.0, {"y": 2.0}]}, {"x": [1, {"y": 2}]}),
    ({"code": "a  \nb\t\n"}, {"code": "a\nb"}),
    ({"code": "a\r\nb"}, {"code": "a\nb"}),
    ({"name": unicodedata.normalize("NFD", "é")}, {"name": unicodedata.normalize("NFC", "é")}),
    ({unicodedata.normalize("NFD", "é"): 1}, {unicodedata.normalize("NFC", "é"): 1}),
]
DIFFERENT = [
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ({"a": True}, {"a": 1}),
    ({"a": "1"}, {"a": 1}),
    ({"a": None}, {}),
    ({"code": "  a"}, {"code": "a"}),
    ({"code": "a  b"}, {"code": "a b"}),
    ({"code": "if x:\n    y"}, {"code": "if x:\ny"}),
    ({"x": [1, 2]}, {"x": [2, 1]}),
    ({"limit": 5.5}, {"limit": 5}),
]


def canonical(arguments, name="Read"):
    return canonical_call(ToolCall(id=str(id(arguments)), name=name, arguments=arguments))


@pytest.mark.parametrize(("one", "other"), SAME)
def test_calls_that_mean_the_same_are_equal(one, other):
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_calls_that_differ_are_not_equal(one, other):
    assert canonical(one) != canonical(other)


def test_the_tool_is_part_of_the_call_and_raw_arguments_never_equal_read_ones():
    assert canonical({}, "Read") != canonical({}, "Write")
    raw = ToolCall(id="", name="Read", raw_arguments="{}")
    assert canonical_call(raw) != canonical({})
    assert canonical_call(raw) == canonical_call(ToolCall(id="x", name="Read", raw_arguments=" {} "))


@given(st.dictionaries(words, values, max_size=4), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_canonical_form_ignores_order_and_is_stable(arguments, random):
    items = list(arguments.items())
    random.shuffle(items)
    name, text = canonical(arguments)
    assert canonical(dict(items)) == (name, text)
    assert canonical(json.loads(text)) == (name, text)
