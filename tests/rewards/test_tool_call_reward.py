"""The graded tool-call reward: its table, its order, and its words.

The expected numbers are worked out by hand from the definition in the docstring of `ToolCallReward`.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer_plugins.errors import ConfigError
from composer_plugins.models.toolcalls import CLOSE, OPEN, render_action
from composer_plugins.plugins import get_plugin_manager
from composer_plugins.rewards.tool_call import ToolCallReward, argument_problems, text_similarity
from composer_plugins.traces.schema import Message, SourceRef, State, ToolCall

PARTS = ("parse", "known_tool", "arguments", "same_tool", "agreement")
WEIGHT = {"parse": 0.2, "known_tool": 0.1, "arguments": 0.2, "same_tool": 0.2, "agreement": 0.3}
TOOLS = {
    "Bash": {
        "name": "Bash",
        "parameters": {
            "type": "object",
            "properties": {
                "command": {"type": "string"},
                "description": {"type": "string"},
                "timeout": {"type": "integer"},
            },
            "required": ["command"],
        },
    },
    "Read": {"type": "object", "properties": {"file_path": {"type": "string"}}, "required": ["file_path"]},
    "Free": {"name": "Free", "parameters": {"type": "object", "properties": {}}},
    "List": {"name": "List", "parameters": {"properties": {"items": {"type": ["array", "null"]}, "any": True}}},
}


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(id="", name=name, arguments=arguments)


def said(*calls: ToolCall, content: str = "") -> Message:
    return Message(role="assistant", content=content, tool_calls=list(calls))


def text(*calls: ToolCall, content: str = "") -> str:
    return render_action(said(*calls, content=content))


PUSH = call("Bash", command="git push origin main")
TARGET = [said(PUSH)]


def score(action: str, targets=TARGET, **weights):
    return ToolCallReward(**weights).score(action, tools=TOOLS, targets=targets)


TABLE = [
    # action, parse, known tool, arguments, same tool, agreement
    ("I would rather not.", 0, 0, 0, 0, 0),
    ("", 0, 0, 0, 0, 0),
    (OPEN, 0.25, 0, 0, 0, 0),
    (f"{OPEN}git push{CLOSE}", 0.25, 0, 0, 0, 0),
    (f'{OPEN}{{"name": "Bash", "arguments": {{command}}}}{CLOSE}', 0.5, 0, 0, 0, 0),
    (text(call("Shell", command="git push origin main")), 1, 0, 0, 0, 0),
    (text(call("Read", file_path="a.py")), 1, 1, 1, 0, 0),
    (text(call("Bash")), 1, 1, 0, 1, 0),
    (text(call("Bash", command=5)), 1, 1, 0, 1, 0),
    (text(call("Bash", cmd="git push origin main")), 1, 1, 0, 1, 0),
    (text(call("Bash", command="ls", cmd=1)), 1, 1, 0.5, 1, 0),
    # three of the four words are the same: 2·3 / (4 + 4)
    (text(call("Bash", command="git push origin dev")), 1, 1, 1, 1, 0.75),
    # the extra optional argument weighs a quarter of the required one: 1 / 1.25
    (text(call("Bash", command="git push origin main", description="x")), 1, 1, 1, 1, 0.8),
    # two calls where one was expected: half of each
    (text(PUSH, call("Read", file_path="a")), 1, 1, 1, 0.5, 0.5),
    (text(PUSH, PUSH), 1, 1, 1, 0.5, 0.5),
    (text(PUSH) + f"\n{OPEN}{{", 0.25, 0.5, 0.5, 0.5, 0.5),
    (text(PUSH), 1, 1, 1, 1, 1),
    (text(PUSH, content="Pushing now."), 1, 1, 1, 1, 1),
    (text(call("Bash", command="git push origin main  \n")), 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize(
    ("action", "expected"), [(action, dict(zip(PARTS, row, strict=True))) for action, *row in TABLE]
)
def test_the_table(action, expected):
    found = score(action)
    assert found.parts == pytest.approx(expected)
    assert found.value == pytest.approx(sum(WEIGHT[name] * expected[name] for name in PARTS))
    assert (found.feedback is None) == (found.value == 1.0)


def test_better_actions_get_more():
    """Each step of repairing an action raises the reward: that is what makes it graded."""
    steps = [
        "git push",
        f"{OPEN}git push",
        f'{OPEN}{{"name": "Bash", "arguments": {{',
        text(call("Shell", command="x")),
        text(call("Bash")),
        text(call("Bash", command="ls -la")),
        text(call("Bash", command="git status")),
        text(call("Bash", command="git push origin dev")),
        text(PUSH),
    ]
    values = [score(step).value for step in steps]
    assert values == sorted(values) and len(set(values)) == len(values)
    assert values[0] == 0.0 and values[-1] == 1.0  # exactly: success thresholds compare with it


junk = st.lists(
    st.sampled_from(
        [
            OPEN,
            CLOSE,
            '{"name": ',
            '"Bash"',
            '"Free"',
            ', "arguments": ',
            '{"command": "ls"}',
            "{",
            "}",
            "1",
            "null",
            "\n",
        ]
    )
    | st.text(max_size=5),
    max_size=12,
).map("".join)
arguments = st.dictionaries(
    st.sampled_from(["command", "description", "timeout", "items", "any", "x"]),
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=6) | st.lists(st.integers(0, 3), max_size=3),
    max_size=3,
)
some_call = st.builds(
    lambda name, values: ToolCall(id="", name=name, arguments=values), st.sampled_from([*TOOLS, "Nope"]), arguments
)
some_action = st.builds(
    lambda calls, content: said(*calls, content=content), st.lists(some_call, max_size=3), st.text()
)


@given(junk | some_action.map(render_action), st.lists(some_action, max_size=3), some_action)
@settings(max_examples=400, deadline=None)
def test_values_stay_in_range_and_a_further_target_never_lowers_them(action, targets, further):
    found = score(action, targets)
    assert set(found.parts) == set(PARTS)
    assert 0.0 <= found.value <= 1.0 and all(0.0 <= part <= 1.0 for part in found.parts.values())
    assert found.feedback is None or found.feedback.strip()
    assert score(action, [*targets, further]).value >= found.value - 1e-9


@given(some_action)
@example(said(content="<think>"))
@settings(max_examples=200, deadline=None)
def test_doing_what_the_target_does_agrees_with_it(target):
    if OPEN in target.content or "<|im_end|>" in target.content or target.content.startswith("<think>"):
        target.content = ""
    assert score(render_action(target), [target]).parts["agreement"] == 1.0


def test_the_best_target_counts_by_value():
    """The first shares both tools and no argument (0.2), the second one tool and its argument (0.25)."""
    action = text(call("Bash", command="ls"), call("Read", file_path="x"))
    first, second = said(call("Bash", command="git"), call("Read", file_path="y")), said(call("Bash", command="ls"))
    assert score(action, [first, second]).parts["agreement"] == 0.5
    assert score(action, [first, second]).value == score(action, [second, first]).value == score(action, [second]).value


def test_calls_are_matched_in_any_order():
    other = call("Read", file_path="a.py")
    assert score(text(other, PUSH), [said(PUSH, other)]).value == 1.0
    # each is matched with the one it resembles, not with the first of its tool
    ls = call("Bash", command="ls")
    assert score(text(ls, PUSH), [said(PUSH, ls)]).value == 1.0


def test_without_a_target_the_last_two_parts_are_zero():
    found = score(text(PUSH), [])
    assert found.parts == dict.fromkeys(PARTS, 1.0) | {"same_tool": 0.0, "agreement": 0.0}
    assert found.value == pytest.approx(0.5) and found.feedback is None


def test_a_final_answer_is_compared_as_text():
    target = said(content="All tests pass now.")
    assert score("All tests pass now.", [target]).value == 1.0
    near = score("All tests pass.", [target])
    assert near.parts == dict.fromkeys(PARTS, 1.0) | {"agreement": pytest.approx(2 * 4 / 9)}
    assert "differs from the expected" in near.feedback
    called = score(text(PUSH), [target])
    assert called.value == pytest.approx(0.5) and "final answer" in called.feedback
    # when one target answers and another calls, either is right
    assert score("All tests pass now.", [target, *TARGET]).value == 1.0
    assert score(text(PUSH), [target, *TARGET]).value == 1.0


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("no", f"holds no tool call. Call a tool with {OPEN}"),
        (f"{OPEN}oops{CLOSE}", "cannot be read: tool call 1: not valid JSON"),
        (text(call("Shell")), "There is no tool 'Shell'; the tools are Bash, Free, List, Read."),
        (text(call("Bash")), "Bash needs the argument 'command'."),
        (
            text(call("Bash", command="x", path="y")),
            "Bash has no argument 'path'; it takes command, description, timeout.",
        ),
        (text(call("Bash", command=["x"])), "Argument 'command' of Bash must be string, found list."),
        (text(call("Bash", command="x", timeout=True)), "Argument 'timeout' of Bash must be integer, found bool."),
        (text(call("Read", file_path="x")), "use another tool, or another number of calls"),
        (text(call("Bash", command="git pull")), "The tool is right, but its arguments"),
        (text(call("Bash", command="git pull"), call("Nope")), "There is no tool 'Nope'"),
    ],
)
def test_the_feedback_names_the_first_thing_to_repair(action, words):
    assert words in score(action).feedback


@pytest.mark.parametrize(
    ("schema", "values", "number"),
    [
        (TOOLS["Free"], {"whatever": 1}, 0),
        (TOOLS["List"], {"items": None, "any": object()}, 0),
        (TOOLS["List"], {"items": {}}, 1),
        (TOOLS["Bash"], {"command": "x", "timeout": 1.5}, 1),
        ({"properties": {"x": {"type": "number"}}}, {"x": 1}, 0),
        ({"properties": {"x": {"type": "number"}}}, {"x": True}, 1),
        ({"properties": {"x": {"type": "boolean"}}}, {"x": 1}, 1),
        ({"properties": {"x": {"type": "of the future"}}}, {"x": 1}, 0),
        ({"properties": {"x": {"enum": ["a"]}}}, {"x": "a"}, 0),
        ({"properties": {"x": {}}, "required": ["x", "x"]}, {}, 1),
        ({}, {"x": 1}, 0),
    ],
)
def test_arguments_are_checked_against_the_schema(schema, values, number):
    assert len(argument_problems(ToolCall(id="", name="T", arguments=values), schema)) == number


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("", "", 1.0),
        ("a", "", 0.0),
        ("a b c", "x y z", 0.0),
        ("a b c d", "a c d", 2 * 3 / 7),
        ("a x b", "a y b", 2 * 2 / 6),
        ("x y a b c z", "a b c", 2 * 3 / 9),
        ("cat  file", "cat file", 1.0),
        ("if x:\n    y", "if x:\ny", 2 * 4 / 9),  # four tokens, and the indentation
    ],
)
def test_similarity_by_hand(a, b, expected):
    assert text_similarity(a, b) == pytest.approx(expected) == text_similarity(b, a)


def test_what_stands_after_a_long_beginning_is_not_overlooked():
    long = " ".join(f"w{i}" for i in range(2000))
    assert text_similarity(long, long + " rm") == pytest.approx(4000 / 4001)
    assert text_similarity(f"{long} rm {long}", f"{long} ls {long}") == pytest.approx(2 * 4000 / 8002)
    write = {"Write": {"properties": {"content": {"type": "string"}}, "required": ["content"]}}
    reward = ToolCallReward().score(
        text(call("Write", content=long + " wrong")),
        tools=write,
        targets=[said(call("Write", content=long + " right"))],
    )
    assert 0.99 < reward.parts["agreement"] < 1.0 and reward.feedback is not None


def test_weights_choose_what_counts():
    assert score(text(call("Bash", command="x")), agreement=0).value == 1.0
    only = dict.fromkeys(PARTS, 0.0) | {"agreement": 7.0}
    assert score(text(call("Bash", command="git push origin dev")), **only).value == pytest.approx(0.75)


@pytest.mark.parametrize(
    "weights",
    [
        {"pars": 1},
        {"parse": -0.1},
        {"parse": float("nan")},
        {"parse": float("inf")},
        {"parse": "1"},
        {"parse": None},
        dict.fromkeys(PARTS, 0),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights):
    with pytest.raises(ConfigError, match=next(iter(weights))):
        ToolCallReward(**weights)


def test_it_is_registered_and_scores_a_state():
    reward = get_plugin_manager().rewards.get("tool_call").load()()
    state = State(
        id="s", trace_id="t", step=0, messages=[Message(role="user", content="push")], action=TARGET[0],
        source_ref=SourceRef(file="f", line=1), tools=json.loads(json.dumps(TOOLS)),
    )  # fmt: skip
    assert reward(text(PUSH), state).value == 1.0
    assert reward(text(call("Bash", command="git push origin dev")), state).value == pytest.approx(0.925)
