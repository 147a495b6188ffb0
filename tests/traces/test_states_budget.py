"""States under a token budget: nothing that must stay is cut, and everything cut is counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_plugins.traces.budget import MARKER, shorten_middle
from composer_plugins.traces.schema import Cut, Message, SourceRef, Status, Step, ToolCall, ToolResult, Trace
from composer_plugins.traces.states import Selection, build_states
from composer_plugins.traces.tools import infer_tools

REF = SourceRef(file="x", line=1)
MARK = MARKER.split("{}")[0].strip()


def words(messages, tools):
    """A tokenizer of another kind than the default: words, plus 3 a message, plus the tools."""
    total = sum(3 + len((m.get("content") or "").split()) for m in messages)
    total += sum(len(json.dumps(m["tool_calls"]).split()) for m in messages if m.get("tool_calls"))
    return total + (len(json.dumps(tools).split()) if tools else 0) + 2


def make_trace(turns, system=None, injected=()):
    """turns: list of (user text or None, argument text, result texts)."""
    messages = [] if system is None else [Message(role="system", content=system)]
    steps = []
    for number, (user, argument, results) in enumerate(turns):
        if user is not None:
            messages.append(Message(role="user", content=user))
        calls = [
            ToolCall(id=f"c{number}.{i}", name=f"T{i % 3}", arguments={"a": argument}) for i in range(len(results))
        ]
        messages.append(Message(role="assistant", content="go", tool_calls=calls, thinking="secret"))
        found = [ToolResult(call_id=c.id, content=r) for c, r in zip(calls, results, strict=True)]
        steps.append(Step(index=number, action=len(messages) - 1, source_ref=REF, results=found))
        messages += [Message(role="tool", content=r, tool_call_id=c.id, name=c.name) for c, r in zip(calls, results, strict=True)]  # fmt: skip
    extra = {"injected": [list(i) for i in injected]}
    return Trace(id="t", format="x", messages=messages, steps=steps, tools=infer_tools(messages), extra=extra)


text = st.integers(0, 120).map(lambda n: " ".join(f"w{i}" for i in range(n)))
turn = st.tuples(st.one_of(st.none(), text), text, st.lists(text, min_size=0, max_size=3))


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(turn, min_size=1, max_size=8),
    system=st.one_of(st.none(), text),
    budget=st.integers(16, 500),
    max_tools=st.one_of(st.none(), st.integers(1, 3)),
)
def test_budget_properties(turns, system, budget, max_tools):
    trace = make_trace(turns, system)
    before = [m for m in trace.messages]
    counts = Counter()
    choice = Selection(with_text=True, max_tools=max_tools)
    states = list(build_states([trace], budget=budget, count_tokens=words, selection=choice, counts=counts))
    assert counts["read"] == len(trace.steps)
    assert counts["read"] == counts["used"] + sum(v for k, v in counts.items() if k.startswith("skipped:"))
    assert counts["used"] == len(states)
    assert trace.messages == before  # the trace itself is never changed
    for state in states:
        history = trace.messages[: trace.steps[state.step].action]
        assert words([m.to_chat() for m in state.messages], state.tool_schemas()) <= budget
        assert state.action == trace.messages[trace.steps[state.step].action]
        if system is not None:
            assert state.messages[0] == trace.messages[0]
        assert state.messages[-1].role == history[-1].role  # the newest message always stays
        assert len(state.messages) + state.cut.messages_dropped == len(history)
        changed = [m for m in state.messages if m not in history]
        assert len(changed) == state.cut.messages_shortened
        assert all(m.role in ("tool", "user") and MARK in m.content for m in changed)
        seen = set()
        for message in state.messages:
            seen |= {c.id for c in message.tool_calls}
            assert message.tool_call_id is None or message.tool_call_id in seen
        kept = {m.tool_call_id for m in state.messages if m.role == "tool"}
        assert kept == seen  # no call without its results either
        assert {c.name for c in state.action.tool_calls} <= set(state.tools)
        assert (state.cut == Cut()) == (
            len(changed) == 0 and state.cut.messages_dropped == 0 and len(state.tools) == len(trace.tools)
        )


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(turn, min_size=1, max_size=6), budget=st.integers(30, 600), frame=st.integers(0, 40))
def test_the_budget_holds_when_whole_prompts_cost_more_than_their_parts(turns, budget, frame):
    """Templates put more around an action or a result than around a user text; only the whole counts."""

    def count(messages, tools):
        return words(messages, tools) + frame * sum(m["role"] != "user" for m in messages)

    trace = make_trace(turns)
    for state in build_states([trace], budget=budget, count_tokens=count):
        assert count([m.to_chat() for m in state.messages], state.tool_schemas()) <= budget


def test_without_a_budget_nothing_is_cut():
    trace = make_trace([("task", "x", ["long " * 5000]), (None, "y", ["ok"])])
    first, second = build_states([trace])
    assert (first.messages, second.messages) == (trace.messages[:1], trace.messages[:3])
    assert second.cut == Cut()


def test_the_oldest_messages_go_first_and_the_task_stays():
    turns = [("the task", "x", ["r0"])] + [(None, "y", [f"r{i} " + "w " * 30]) for i in range(1, 10)]
    trace = make_trace(turns)
    *_, last = build_states([trace], budget=140, count_tokens=words)
    assert last.messages[0].content == "the task"
    kept = [m.content.split()[0] for m in last.messages if m.role == "tool"]
    assert kept == [f"r{i}" for i in range(9 - len(kept), 9)] and 1 <= len(kept) < 9
    assert last.cut.messages_dropped == 2 * (9 - len(kept))
    assert last.cut.tokens_removed > 0 and not last.history_exact


def test_one_huge_result_is_shortened_before_messages_are_dropped():
    trace = make_trace([("task", "x", ["HEAD " + "w " * 2000 + "TAIL"]), (None, "y", ["small"]), (None, "z", ["end"])])
    *_, last = build_states([trace], budget=300, count_tokens=words)
    assert (last.cut.messages_dropped, last.cut.messages_shortened) == (0, 1)
    shortened = last.messages[2].content
    assert shortened.startswith("HEAD") and shortened.endswith("TAIL") and MARK in shortened


def test_a_state_that_cannot_fit_is_skipped_and_counted():
    trace = make_trace([("task", "w " * 500, ["r"]), (None, "small", ["r2"])], system="s " * 40)
    counts = Counter()
    states = list(build_states([trace], budget=120, count_tokens=words, counts=counts))
    # The second state needs the first action, whose arguments are never cut.
    assert [s.step for s in states] == [0]
    assert counts["skipped:over_budget"] == 1


def test_the_task_is_the_first_text_that_the_user_wrote():
    turns = [("<command-name>/x</command-name>", "x", ["r"]), ("the real task", "x", ["r " * 30])]
    turns += [(None, "x", [f"r{i} " + "w " * 25]) for i in range(6)]
    trace = make_trace(turns, injected=[(0, "command")])
    *_, last = build_states([trace], budget=120, count_tokens=words)
    assert last.messages[0].content == "the real task"


def test_tools_give_way_to_messages_but_never_the_actions_own():
    messages = [Message(role="user", content="task")]
    calls = [
        ToolCall(id=f"c{i}", name=f"Tool{i}", arguments={f"argument_{k}": "x" for k in range(8)}) for i in range(12)
    ]
    steps = []
    for number, item in enumerate(calls):
        messages.append(Message(role="assistant", tool_calls=[item]))
        steps.append(Step(index=number, action=len(messages) - 1, source_ref=REF, results=[ToolResult(call_id=item.id, content="r")]))  # fmt: skip
        messages.append(Message(role="tool", content="r", tool_call_id=item.id))
    trace = Trace(id="t", format="x", messages=messages, steps=steps, tools=infer_tools(messages))
    for state in build_states([trace], budget=200, count_tokens=words):
        assert f"Tool{state.step}" in state.tools
        assert 1 <= len(state.tools) < 12
        assert state.cut.tools_dropped == 12 - len(state.tools)
    limited = list(build_states([trace], selection=Selection(max_tools=2)))
    assert {len(s.tools) for s in limited} == {2}


def test_selections_and_their_reasons():
    trace = make_trace([("task", "x", ["r"])] * 6)
    trace.steps[0].trainable, trace.steps[0].not_trainable_reason = False, "synthetic"
    trace.steps[1].results[0].status = Status.ERROR
    trace.steps[2].history_exact, trace.steps[2].inexact = False, ["system_prompt"]
    trace.steps[3].history_exact, trace.steps[3].inexact = False, ["system_prompt", "compaction"]
    trace.action_of(trace.steps[4]).tool_calls[0].raw_arguments = "{"

    def steps(**options):
        counts = Counter()
        found = [s.step for s in build_states([trace], selection=Selection(**options), counts=counts)]
        return found, {k.removeprefix("skipped:"): v for k, v in counts.items() if k.startswith("skipped:")}

    base = {"not_trainable_synthetic": 1, "unparsed_arguments": 1}
    assert steps() == ([1, 2, 3, 5], base)
    assert steps(only_failed=True) == ([1], base | {"not_failed": 3})
    assert steps(only_exact=True) == ([1, 5], base | {"inexact_history": 2})
    assert steps(only_exact=True, tolerate={"system_prompt"}) == ([1, 2, 5], base | {"inexact_history": 1})
    assert steps(with_untrainable=True)[0] == [0, 1, 2, 3, 5]
    assert steps(max_action=1)[0] == []


def test_the_cost_of_a_trace_grows_linearly():
    def renders(turns: int) -> int:
        calls = 0

        def count(messages, tools):
            nonlocal calls
            calls += sum(len(m.get("content") or "") for m in messages)
            return words(messages, tools)

        trace = make_trace([("task", "x", ["w " * 50])] + [(None, "x", ["w " * 50])] * turns)
        assert len(list(build_states([trace], budget=200, count_tokens=count))) == turns + 1
        return calls

    assert renders(200) < 2.5 * renders(100)


@pytest.mark.parametrize("keep", [0, 1, 10, 99, 100, 101, 5000])
def test_shorten_middle_never_grows_and_counts_what_is_gone(keep):
    source = "abcdefghij" * 30
    result = shorten_middle(source, keep)
    assert len(result) <= len(source)
    if result != source:
        head, _, rest = result.partition(MARKER.split("{}")[0])
        number, _, tail = rest.partition(MARKER.split("{}")[1])
        assert source.startswith(head) and source.endswith(tail)
        assert len(head) + int(number) + len(tail) == len(source)
