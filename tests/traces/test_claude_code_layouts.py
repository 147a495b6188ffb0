"""Layouts beyond a plain session: sub-agents and who started them, compaction, queued prompts, huge lines."""

from __future__ import annotations

import json

import pytest
from log_lines import Log, call, text

from composer_plugins.traces import lines
from composer_plugins.traces.claude_code import READER
from composer_plugins.traces.find import find_reader


def test_the_call_that_started_a_sub_agent_is_known_from_the_programs_own_record(tmp_path, read_log):
    log = Log()
    log.user("delegate")
    log.assistant(call("c1", "Task", prompt="count"), call("c2", command="echo"), id="m1")
    log.result("c2", "agentId: poison", toolUseResult={"stdout": "agentId: poison"})
    log.result("c1", "counted", toolUseResult={"status": "completed", "agentId": "abc123", "content": []})
    log.result("c1", "again", toolUseResult="Error: agentId")
    log.assistant(text("ok"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.extra["sub_agents"] == {"abc123": "c1"}


@pytest.mark.parametrize("outcome", [None, "text", 3, 1.5, True, [1], ["x"], {"agentId": 5}, {"agentId": None}, {}])
def test_any_form_of_the_programs_own_record_is_read(tmp_path, read_log, outcome):
    log = Log()
    log.user("task")
    log.assistant(call("c1"), id="m1")
    log.result("c1", toolUseResult=outcome)
    log.assistant(text("ok"), id="m2")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert (ledger["used"], len(trace.steps), ledger.problems) == (4, 2, [])


def test_the_description_beside_a_sub_agents_file(tmp_path, read_log):
    log = Log()
    log.user("count files", isSidechain=True, agentId="abc")
    log.assistant(text("7"), id="m1", isSidechain=True, agentId="abc")
    path = log.write(tmp_path / "agent-abc.jsonl")
    meta = path.with_suffix(".meta.json")
    meta.write_text('{"agentType": "Explore", "description": "count"}')
    (trace,), _ = read_log(path)
    assert (trace.id, trace.parent_id) == ("s1/abc", "s1")
    assert trace.extra["description"] == {"agentType": "Explore", "description": "count"}
    assert READER.companion(meta.read_bytes()) == "sub_agent_description" and not READER.sniff(meta.read_bytes())
    for other in ('{"agentType": 5}', '{"type": "user", "agentType": "x"}', '["agentType"]', '{"agentType": '):
        meta.write_text(other)
        assert READER.companion(other.encode()) is None
        assert "description" not in read_log(path)[0][0].extra


def test_a_rewind_to_before_a_compaction_drops_what_came_after_it(tmp_path, read_log):
    log = Log()
    log.user("task")
    base = log.assistant(text("first"), id="m1")
    log.record("system", parent=None, subtype="compact_boundary", logicalParentUuid=base)
    log.user("Summary", isCompactSummary=True)
    log.assistant(text("after"), id="m2")
    log.user("another way", parent=base)
    log.assistant(text("second"), id="m3")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.content for m in trace.messages] == ["task", "first", "another way", "second"]
    assert ledger.skipped() == {"rewound": 3}
    assert [s.inexact for s in trace.steps] == [["system_prompt"]] * 2


def test_a_session_that_begins_with_a_compaction_of_another(tmp_path, read_log):
    log = Log()
    log.record("system", parent=None, subtype="compact_boundary", logicalParentUuid="in-another-file")
    log.user("Summary of before", isCompactSummary=True)
    log.assistant(text("going on"), id="m1")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.steps[0].inexact == ["system_prompt", "compaction"]


def test_a_queued_prompt_can_be_blocks(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("on it"), id="m1")
    blocks = [text("and look at this"), {"type": "image", "source": {"data": "AAAA"}}]
    log.record("attachment", attachment={"type": "queued_command", "prompt": blocks})
    log.assistant(text("seen"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.messages[2].content == "and look at this\n[image]"


def test_a_turn_into_another_session_midway_is_not_linked(tmp_path, read_log):
    one, two = Log("s1"), Log("s2")
    one.user("task one", uuid="a1")
    answer = one.assistant(text("ok"), id="m1", uuid="a2")
    two.user("task two", uuid="b1")
    two.assistant(text("ok"), id="m2", uuid="b2")
    two.user("go on from the other one", parent=answer, uuid="b3")
    two.assistant(text("hm"), id="m3", uuid="b4")
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(one.lines + two.lines))
    _, second = read_log(path)[0]
    assert [s.inexact for s in second.steps] == [["system_prompt"], ["system_prompt", "unlinked"]]


def test_damage_in_one_session_leaves_the_histories_of_another_alone(tmp_path, read_log):
    one, two = Log("s1"), Log("s2")
    for log, name in ((one, "a"), (two, "b")):
        log.user("task", uuid=f"{name}1")
        log.assistant(text("ok"), id=f"m{name}1", uuid=f"{name}2")
        log.user("more", uuid=f"{name}3")
        log.assistant(text("ok again"), id=f"m{name}2", uuid=f"{name}4")
    damaged = '{"type": "user", "sessionId": "s1", "message": {"role'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*one.lines[:2], *two.lines[:2], damaged, *one.lines[2:], *two.lines[2:]]))
    first, second = read_log(path)[0]
    assert ["damaged_line" in s.inexact for s in first.steps] == [False, True]
    assert ["damaged_line" in s.inexact for s in second.steps] == [False, False]
    assert "problems" in first.extra and "problems" not in second.extra
    path.write_text(path.read_text().replace('"s1", "message": {"role\n', '"s\n'))  # of which session, nobody knows
    first, second = read_log(path)[0]
    assert "damaged_line" in first.steps[1].inexact and "damaged_line" in second.steps[1].inexact


def test_a_line_too_long_is_counted_and_named(tmp_path, read_log, monkeypatch):
    monkeypatch.setattr(lines.iter_batches, "__kwdefaults__", {"max_line": 5000})
    log = Log()
    log.user("task")
    log.assistant(call("c1"), id="m1")
    log.result("c1", "x" * 6000)
    log.assistant(text("done"), id="m2")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert ledger.skipped() == {"line_too_long": 1}
    assert [(p.line, p.reason) for p in ledger.problems] == [(3, "line_too_long")]
    assert {"missing_result", "damaged_line"} <= set(trace.steps[1].inexact)


def test_types_nobody_knows_are_counted_by_name_and_odd_ones_together(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("ok"), id="m1")
    for number in range(400):
        log.record(f"new-type-{number}")
    log.record("with\x1b[31m colour")
    (_,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    skipped = ledger.skipped()
    assert skipped["new-type-7"] == 1 and sum(skipped.values()) == 401
    assert skipped["unknown_record"] == 401 - sum(name.startswith("new-type") for name in skipped)


def test_what_the_program_prints_is_a_log_too(tmp_path, read_log):
    """`claude -p --output-format stream-json`: no tree, other names, sub-agents between the lines of the session."""

    def printed(kind, agent=None, **more):
        return json.dumps({"type": kind, "session_id": "s1", "parent_tool_use_id": agent, **more})

    def said(kind, *blocks, id=None, agent=None):
        body = {"role": kind, "content": list(blocks)} | ({"id": id, "model": "claude-x"} if id else {})
        return printed(kind, agent, message=body)

    def came(call_id, content, agent=None):
        return said("user", {"type": "tool_result", "tool_use_id": call_id, "content": content}, agent=agent)

    rows = [
        printed("system", subtype="init", cwd="/x", tools=["Bash", "Task"]),
        said("assistant", text("I delegate."), id="m1"),
        said("assistant", call("c1", "Task", prompt="count"), id="m1"),
        said("user", text("count"), agent="c1"),
        said("assistant", call("d1", command="ls"), id="n1", agent="c1"),
        came("d1", "a b", agent="c1"),
        said("assistant", text("2"), id="n2", agent="c1"),
        came("c1", "2"),
        said("assistant", text("Two."), id="m2"),
        printed("result", subtype="success", result="Two."),
    ]
    path = tmp_path / "run.log"
    path.write_text("\n".join(rows))
    assert find_reader(path) is READER
    (session, agent), ledger = read_log(path)
    assert (session.id, session.outcome, session.extra["sub_agents"]) == ("s1", "success", {"c1": "c1"})
    assert [m.content or m.tool_calls[0].id for m in session.messages] == ["I delegate.", "2", "Two."]
    assert [s.inexact for s in session.steps] == [["system_prompt", "unlinked"]] * 2  # the prompt is not printed
    assert (agent.id, agent.parent_id) == ("s1/c1", "s1")
    assert [m.content or m.tool_calls[0].id for m in agent.messages] == ["count", "d1", "a b", "2"]
    assert [s.inexact for s in agent.steps] == [["system_prompt"]] * 2
    assert (ledger["used"], ledger.skipped()) == (8, {"result": 1, "system": 1})


def test_a_logged_record_that_says_the_session_in_both_ways_is_a_logged_one(tmp_path, read_log):
    log = Log()
    log.user("task", session_id="s1", parent_tool_use_id=None)
    log.assistant(text("a"), id="m1", session_id="s1")
    log.user("a new root", parent=None, session_id="s1", parent_tool_use_id="x")
    log.assistant(text("b"), id="m2", session_id="s1")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", "unlinked"]]
    assert [m.content for m in trace.messages] == ["task", "a", "a new root", "b"]


def test_many_answers_to_one_prompt_are_no_hang(tmp_path, read_log):
    log = Log()
    root = log.user("task")
    for number in range(3000):
        log.assistant(text(f"try {number}"), id=f"m{number}", parent=root)
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert len(trace.steps) == 1 and ledger.skipped() == {"rewound": 2999}
