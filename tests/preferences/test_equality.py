"""When two calls do the same: pairs on both sides of the line, and the properties of an equivalence relation."""

from __future__ import annotations

import json
import os.path
import posixpath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer_plugins.errors import ConfigError
from composer_plugins.preferences.canonical import canonical_action
from composer_plugins.preferences.equality import Equality, default_equality, normal_path
from composer_plugins.preferences.text import normal_text
from composer_plugins.traces.schema import Message, SourceRef, State, ToolCall

SCHEMA = {
    "Todo": {"name": "Todo", "parameters": {"type": "object", "properties": {"items": {"type": "array"}, "o": {"type": "object"}, "s": {"type": "string"}}}},
}  # fmt: skip


def call(name, arguments) -> ToolCall:
    return ToolCall(id=str(id(arguments)), name=name, arguments=arguments)


def same(one, other, *, cwd=None, tools=None, rules=None) -> bool:
    rules = rules or default_equality()
    left, right = (rules.canonical(call(*c), cwd=cwd, tools=tools) for c in (one, other))
    return left == right


SAME = [
    (("Read", {"file_path": "a", "limit": 5}), ("Read", {"limit": 5.0, "file_path": "a"})),
    (("Read", {"file_path": "./a/../b.py"}), ("Read", {"file_path": "b.py"})),
    (("LS", {"path": "src/"}), ("LS", {"path": "src"})),
    (("LS", {"path": "/w//src/./x"}), ("LS", {"path": "/w/src/x"})),
    (("Read", {"file_path": "~/./a//b"}), ("Read", {"file_path": "~/a/b"})),
    (("Bash", {"command": "ls  -la"}), ("Bash", {"command": "ls -la "})),
    (("Bash", {"command": "ls", "description": "List"}), ("Bash", {"command": "ls", "description": "Show files"})),
    (("Bash", {"command": "ls", "run_in_background": False}), ("Bash", {"command": "ls"})),
    (("Edit", {"file_path": "a", "old_string": "x", "new_string": "y", "replace_all": False}),
     ("Edit", {"file_path": "a", "old_string": "x", "new_string": "y"})),
    (("shell", {"command": ["bash", "-lc", "ls  a"]}), ("shell", {"command": ["bash", "-lc", "ls a"]})),
    (("Todo", {"items": "[1, {\"a\": 2}]"}), ("Todo", {"items": [1, {"a": 2.0}]})),
    (("call", {"arguments": '{"a": 1, "b": 2}'}), ("call", {"arguments": '{"b":2.0,"a":1}'})),
    (("Multi", {"paths": ["./a", "b/"]}), ("Multi", {"paths": ["a", "b"]})),
]  # fmt: skip
DIFFERENT = [
    (("Read", {"file_path": "a"}), ("Write", {"file_path": "a"})),
    (("Read", {"file_path": "a", "limit": 5}), ("Read", {"file_path": "a", "limit": "5"})),
    (("Read", {"file_path": "a", "x": True}), ("Read", {"file_path": "a", "x": 1})),
    (("Read", {"file_path": "a", "x": None}), ("Read", {"file_path": "a"})),
    (("Read", {"file_path": "a", "x": 2**53 + 1}), ("Read", {"file_path": "a", "x": float(2**53)})),
    (("Read", {"file_path": "a", "x": 2**60}), ("Read", {"file_path": "a", "x": float(2**60)})),
    (("Read", {"file_path": "../a"}), ("Read", {"file_path": "a"})),
    (("Read", {"file_path": "/a"}), ("Read", {"file_path": "a"})),
    (("Read", {"file_path": "A"}), ("Read", {"file_path": "a"})),
    (("Read", {"file_path": "~/a"}), ("Read", {"file_path": "~b/a"})),
    (("Read", {"file_path": "~/../a"}), ("Read", {"file_path": "~/a"})),
    (("Read", {"file_path": ""}), ("Read", {"file_path": "."})),
    (("Read", {"file_path": "$X/../a"}), ("Read", {"file_path": "a"})),
    (("Read", {"file_path": "C:\\a\\..\\b"}), ("Read", {"file_path": "C:\\b"})),
    (("Fetch", {"path": "http://a//b"}), ("Fetch", {"path": "http://a/b"})),
    (("Grep", {"pattern": "foo "}), ("Grep", {"pattern": "foo"})),
    (("Grep", {"pattern": "a/./b"}), ("Grep", {"pattern": "a/b"})),
    (("Write", {"file_path": "a", "content": "x\n"}), ("Write", {"file_path": "a", "content": "x"})),
    (("Write", {"file_path": "a", "content": '{"a": 1}'}), ("Write", {"file_path": "a", "content": '{"a":1}'})),
    (("Edit", {"file_path": "a", "old_string": "x", "new_string": "y"}),
     ("Edit", {"file_path": "a", "old_string": "x", "new_string": "y", "replace_all": True})),
    (("Bash", {"command": "ls a b"}), ("Bash", {"command": "ls 'a b'"})),
    (("Bash", {"command": "ls", "timeout": 5}), ("Bash", {"command": "ls"})),
    (("str_replace_editor", {"command": "view", "path": "a"}), ("str_replace_editor", {"command": "create", "path": "a"})),
    (("shell", {"command": ["bash", "-lc", "ls a"]}), ("shell", {"command": ["bash", "-c", "ls a"]})),
    (("shell", {"command": ["echo", "a  b", "c"]}), ("shell", {"command": ["echo", "a b", "c"]})),
    (("Todo", {"items": "[1]"}), ("Todo", {"items": "[2]"})),
    (("Todo", {"s": "[1]"}), ("Todo", {"s": [1]})),
    (("Todo", {"s": "[1, 2]"}), ("Todo", {"s": "[1,2]"})),
    (("call", {"arguments": '{"a": 1, "a": 2}'}), ("call", {"arguments": '{"a": 2}'})),
    (("call", {"arguments": '{"a": 1}'}), ("call", {"arguments": {"a": 1}})),
    (("Task", {"description": "a"}), ("Task", {"description": "b"})),
    (("Multi", {"paths": ["a", "b"]}), ("Multi", {"paths": ["b", "a"]})),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_calls_that_do_the_same_are_equal(one, other):
    assert same(one, other, tools=SCHEMA)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_near_misses_stay_different(one, other):
    assert not same(one, other, tools=SCHEMA)


def test_relative_and_absolute_meet_only_where_the_directory_is_known():
    relative, absolute = ("Read", {"file_path": "a.py"}), ("Read", {"file_path": "/w/p/a.py"})
    assert not same(relative, absolute)
    assert same(relative, absolute, cwd="/w/p") and not same(relative, absolute, cwd="/w")
    action = Message(role="assistant", tool_calls=[call(*relative)])
    other = Message(role="assistant", tool_calls=[call(*absolute)])
    state = State(
        id="s", trace_id="t", step=0, messages=[], action=action, source_ref=SourceRef(file="f", line=1), cwd="/w/p"
    )
    assert canonical_action(action, state=state) == canonical_action(other, state=state)
    assert canonical_action(action) != canonical_action(other)


SEGMENTS = st.lists(st.sampled_from(["a", "b", ".", "..", "", "c d"]), min_size=1, max_size=6)


@given(SEGMENTS, st.booleans())
def test_paths_against_the_standard_library(segments, absolute):
    path = ("/" if absolute else "") + "/".join(segments)
    if not path.startswith("/") and path:
        assert normal_path(path, "/w/x") == "/" + posixpath.normpath("/w/x/" + path).lstrip("/")
    normal = normal_path(path)
    assert normal_path(normal) == normal
    if path:
        assert os.path.abspath(posixpath.join("/q/r", path)).lstrip("/") == os.path.abspath(
            posixpath.join("/q/r", normal)
        ).lstrip("/")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([1.0, 2.5, "a", "b ", "./a", "a", "[1]", "ls  a", "ls a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["k", "path", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
CALLS = st.tuples(
    st.sampled_from(["Read", "Bash", "Todo"]),
    st.dictionaries(st.sampled_from(["command", "path", "limit", "items", "description"]), VALUES, max_size=4),
)


@given(st.lists(CALLS, min_size=3, max_size=3))
@settings(max_examples=150, deadline=None)
def test_it_is_an_equivalence_relation(calls):
    a, b, c = calls
    copy = (a[0], json.loads(json.dumps(dict(reversed(a[1].items())))))
    assert same(a, copy, tools=SCHEMA) and same(a, a)
    assert same(a, b, tools=SCHEMA) == same(b, a, tools=SCHEMA)
    if same(a, b, tools=SCHEMA) and same(b, c, tools=SCHEMA):
        assert same(a, c, tools=SCHEMA)


def strict(value):
    """The oracle's reading of generic values: JSON equality with whole floats as integers."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return int(value) if isinstance(value, float) and value == int(value) else value


@given(VALUES, VALUES)
@settings(max_examples=300, deadline=None)
def test_arguments_that_nothing_is_known_about_are_compared_exactly(a, b):
    equal = json.dumps(strict(a), sort_keys=True) == json.dumps(strict(b), sort_keys=True)
    assert same(("Tool", {"q": a}), ("Tool", {"q": b})) == equal


def test_a_file_of_ones_own(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('[aliases]\nrun_shell = "Bash"\n[ignored]\nread = ["why"]\n')
    rules = Equality(mine)
    assert same(("run_shell", {"command": "ls  a"}), ("Bash", {"command": "ls a"}), rules=rules)
    assert same(("Read", {"path": "a", "why": "x"}), ("Read", {"path": "./a"}), rules=rules)
    assert same(("Bash", {"command": "ls", "description": "x"}), ("Bash", {"command": "ls"}), rules=rules)
    assert not same(("run_shell", {"command": "ls"}), ("Bash", {"command": "ls"}))
    for text, message in (
        ("x = [", "no TOML"),
        ("[shel]\n", "no equality file"),
        ("[paths]\nkeys = 3\n", "no equality file"),
    ):
        mine.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Equality(mine)
    with pytest.raises(ConfigError, match="cannot be read"):
        Equality(tmp_path / "none.toml")


SAME_TEXT = [
    ("Done.", " Done. \n"),
    ("caf\u00e9", "cafe\u0301"),
    ("a  b\r\nc", "a b\nc"),
    ("It\u2019s \u201cok\u201d", 'It\'s "ok"'),
    ("* one\n* two", "- one\n+ two"),
    ("# Title #", "# Title"),
    ("__very bold__ x", "**very bold** x"),
    ("```Python\nx = 1  \n```", "```python\nx = 1\n```"),
    ("a\n\n\n\nb", "a\n\nb"),
]
DIFFERENT_TEXT = [
    ("yes", "no"), ("US", "us"), ("```\na  b\n```", "```\na b\n```"), ("````\n```\na  b\n````", "````\n```\na b\n````"), ("use `a  b`", "use `a b`"),
    ("- a\n  - b", "- a\n- b"), ("# C#", "# C"), ("rename __init__", "rename **init**"), ("a b", "ab"),
    ("1.0", "10"), ("```py\nx\n```", "x"), ("`\u2018`", "`'`"), ("a\nb", "a b"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME_TEXT)
def test_answers_in_words_that_say_the_same(one, other):
    assert normal_text(one) == normal_text(other) == normal_text(normal_text(one))


@pytest.mark.parametrize(("one", "other"), DIFFERENT_TEXT)
def test_answers_in_words_that_do_not(one, other):
    assert normal_text(one) != normal_text(other)


@given(st.text(alphabet="ab `*_-#\n\t~\u2019e\u0301", max_size=40))
@example(text=" # _ #")
@settings(max_examples=300, deadline=None)
def test_normal_text_is_a_projection(text):
    once = normal_text(text)
    assert normal_text(once) == once


def test_the_directory_is_known_until_a_call_may_have_left_it():
    from composer_plugins.traces.schema import Step, Trace
    from composer_plugins.traces.states import build_states

    messages, steps = [Message(role="user", content="go")], []
    for index, command in enumerate(("ls", "true\ncd sub && ls", "ls")):
        steps.append(Step(index=index, action=len(messages), source_ref=SourceRef(file="f", line=index), model="m-1"))
        messages.append(Message(role="assistant", tool_calls=[call("Bash", {"command": command})]))
    trace = Trace(id="t", format="x", messages=messages, steps=steps, extra={"cwd": "/w"})
    states = list(build_states([trace]))
    assert [s.cwd for s in states] == ["/w", "/w", None] and {s.model for s in states} == {"m-1"}
    trace.extra = {"cwd": 3}
    assert [s.cwd for s in build_states([trace])] == [None] * 3
