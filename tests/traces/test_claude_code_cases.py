"""Each fact about Claude Code logs, on lines made for it."""

from __future__ import annotations

import json
import sys

import pytest
from log_lines import Log, call, text, thinking

from composer_plugins.traces.schema import Status


def test_a_message_split_over_lines_is_one_step_with_the_last_usage(tmp_path, read_log):
    log = Log()
    log.user("do it")
    log.assistant(thinking("hmm"), id="m1", usage={"output_tokens": 1})
    log.assistant(text("I will."), id="m1", usage={"output_tokens": 1})
    log.assistant(call("c1", command="ls"), id="m1", usage={"output_tokens": 1})
    log.result("c1", "a.py")
    log.assistant(call("c2", command="pwd"), id="m1", usage={"output_tokens": 77})
    log.result("c2", "/x")
    log.assistant(text("Done."), id="m2", usage={"output_tokens": 5})
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.role for m in trace.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    action = trace.action_of(trace.steps[0])
    assert (action.thinking, action.content, [c.id for c in action.tool_calls]) == ("hmm", "I will.", ["c1", "c2"])
    assert [m.content for m in trace.messages[2:4]] == ["a.py", "/x"]
    assert trace.extra["usage"]["output_tokens"] == 82


def test_parallel_calls_whose_results_fork_the_tree(tmp_path, read_log):
    log = Log()
    log.user("both")
    first = log.assistant(call("c1", command="a"), id="m1")
    second = log.assistant(call("c2", command="b"), id="m1")
    log.result("c2", "B", parent=second)
    log.result("c1", "A", parent=first)
    log.assistant(text("ok"), id="m2")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.content for m in trace.messages if m.role == "tool"] == ["A", "B"]
    assert ledger["used"] == 6


def test_rewinds_are_found_through_progress_and_attachment_links(tmp_path, read_log):
    log = Log()
    log.user("start")
    base = log.assistant(text("hello"), id="m1")
    log.record("progress", data={})
    log.user("wrong turn")
    log.assistant(call("c1", command="rm"), id="m2")
    log.result("c1")
    log.record("attachment", parent=base, attachment={"type": "hook_success"})
    log.user("right turn")
    log.assistant(text("good"), id="m3")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.content for m in trace.messages] == ["start", "hello", "right turn", "good"]
    assert ledger.skipped() == {"attachment": 1, "progress": 1, "rewound": 3}


def test_compaction_starts_a_new_state_and_is_never_exact(tmp_path, read_log):
    log = Log()
    log.user("long task")
    end = log.assistant(text("working"), id="m1")
    log.record(
        "system", parent=None, subtype="compact_boundary", logicalParentUuid=end, content="Conversation compacted"
    )
    log.user("This session is being continued. Summary: ...", isCompactSummary=True)
    log.assistant(call("c1", command="ls"), id="m2")
    log.result("c1")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    before, after = trace.steps
    assert (before.state_start, before.inexact) == (0, ["system_prompt"])
    assert [m.content[:12] for m in trace.state_of(after)] == ["This session"]
    assert "compaction" in after.inexact and not after.history_exact
    assert ledger["used"] == 6


@pytest.mark.parametrize("ends_only", [False, True])
def test_messages_that_a_compaction_kept_stand_after_the_summary_and_are_no_new_steps(tmp_path, read_log, ends_only):
    log = Log()
    log.user("long task")
    log.assistant(text("old"), id="m1")
    head = log.user("look at b.py")
    middle = log.assistant(call("c1", command="cat b.py"), id="m2")
    tail = log.result("c1", "b = 1")
    kept = {"preservedMessages": {"anchorUuid": "x", "uuids": [head, tail], "allUuids": [head, middle, tail]}}
    if ends_only:
        kept = {"preservedSegment": {"headUuid": head, "anchorUuid": "x", "tailUuid": tail}}
    log.record("system", parent=None, subtype="compact_boundary", logicalParentUuid=tail, compactMetadata=kept)
    log.user("Summary: ...", isCompactSummary=True)
    log.user("go on")
    log.assistant(text("next"), id="m3")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.content or m.tool_calls[0].id for m in trace.state_of(trace.steps[-1])] == [
        "Summary: ...", "look at b.py", "c1", "b = 1", "go on",
    ]  # fmt: skip
    assert [trace.action_of(s).content for s in trace.steps] == ["old", "", "next"]
    assert [s.results[0].content for s in trace.steps if s.results] == ["b = 1"]
    assert trace.steps[-1].inexact == ["system_prompt", "compaction"]
    assert ledger["used"] == 9


def compaction(log, names, *, ends_only=False, summary="Summary"):
    kept = {"preservedMessages": {"allUuids": names}}
    if ends_only:
        kept = {"preservedSegment": {"headUuid": names[0], "tailUuid": names[-1]}}
    log.record("system", parent=None, subtype="compact_boundary", logicalParentUuid=log.last, compactMetadata=kept)
    return log.user(summary, isCompactSummary=True)


@pytest.mark.parametrize("ends_only", [False, True])
def test_a_message_that_two_compactions_keep_stands_after_both_summaries(tmp_path, read_log, ends_only):
    log = Log()
    log.user("forgotten")
    first = log.user("look at b.py")
    old = log.assistant(text("A0"), id="m1")
    compaction(log, [first, old], ends_only=ends_only, summary="One")
    log.user("Q1")
    log.assistant(text("A1"), id="m2")
    # the walk goes through the first boundary and its summary, which the list does not name
    compaction(log, [first, old, log.last], ends_only=ends_only, summary="Two")
    log.assistant(text("A2"), id="m3")
    compaction(log, [log.last], ends_only=ends_only, summary="Three")
    log.assistant(text("A3"), id="m4")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    states = [[m.content for m in trace.state_of(step)] for step in trace.steps]
    between = ["One", "Q1"] if ends_only else []
    assert states == [
        ["forgotten", "look at b.py"],
        ["One", "look at b.py", "A0", "Q1"],
        ["Two", "look at b.py", "A0", *between, "A1"],
        ["Three", "A2"],
    ]
    assert [trace.action_of(s).content for s in trace.steps] == ["A0", "A1", "A2", "A3"]
    assert ledger["used"] == 13


def test_a_kept_message_of_several_lines_is_shown_again_once(tmp_path, read_log):
    log = Log()
    log.user("task")
    names = [log.assistant(text("a"), id="m1"), log.assistant(call("c1", command="ls"), id="m1"), log.result("c1", "x")]
    compaction(log, [*reversed(names), *names, "not in the file"])
    log.assistant(text("b"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.content for m in trace.state_of(trace.steps[-1])] == ["Summary", "a", "x"]


def test_a_compaction_does_not_bring_back_what_only_a_later_one_kept(tmp_path, read_log):
    log = Log()
    first = log.user("first")
    second = log.user("second")
    compaction(log, [second], summary="One")
    log.assistant(text("a"), id="m1")
    compaction(log, [first], summary="Two")
    log.assistant(text("b"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [[m.content for m in trace.state_of(s)] for s in trace.steps] == [["One", "second"], ["Two", "first"]]


def test_a_resumed_session_sees_what_a_compaction_of_its_past_kept(tmp_path, read_log):
    log = Log()
    first = log.user("first")
    compaction(log, [first], summary="One")
    log.assistant(text("a"), id="m1")
    log.session = "s2"
    log.user("go on")
    log.assistant(text("b"), id="m2")
    (_, trace), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [m.content for m in trace.messages] == ["first", "One", "first", "a", "go on", "b"]


@pytest.mark.parametrize("where", ["before", "after the last", "in what was not gone on from"])
def test_a_resumed_session_knows_what_changed_the_context_of_its_past(tmp_path, read_log, where):
    log = Log()
    log.user("task")
    log.assistant(text("a"), id="m1")
    if where == "before":
        log.record("system", subtype="snip_boundary")
    log.user("more")
    end = log.assistant(text("b"), id="m2")
    if where != "before":
        log.record("system", subtype="snip_boundary")
    if where.startswith("in"):
        log.user("another way")
    log.session = "s2"
    log.user("go on", parent=end if where.startswith("in") else log.last)
    log.assistant(text("c"), id="m3")
    log.session, log.last = "s3", log.last
    log.user("and on")
    log.assistant(text("d"), id="m4")
    (_, second, third), _ = read_log(log.write(tmp_path / "x.jsonl"))
    expected = ["system_prompt"] if where.startswith("in") else ["system_prompt", "compaction"]
    assert [s.inexact for s in (*second.steps, *third.steps)] == [expected, expected]


@pytest.mark.parametrize(("session", "spoiled"), [("s1", True), ("another", False), (None, True)])
def test_a_line_that_was_lost_in_the_past_of_a_resumed_session_spoils_its_histories(
    tmp_path, read_log, session, spoiled
):
    log = Log()
    log.user("task")
    names = f'"sessionId": "{session}", ' if session else ""
    log.lines.append("{" + names + '"type": "assistant", "message": {"role"')
    log.assistant(text("a"), id="m1")
    log.session = "s2"
    log.user("go on")
    log.assistant(text("b"), id="m2")
    (_, trace), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.inexact for s in trace.steps] == [["system_prompt", *["damaged_line"] * spoiled]]


def _keeping(count):
    log = Log()
    names = [log.user(f"q{n}") for n in range(count)]
    compaction(log, names)
    log.assistant(text("ok"), id="m1")
    return log


def _walking(count, head):
    """Every one of `count` compactions names a stretch of all `count` records, or one that ends nowhere."""
    log = Log()
    side = log.user("on another branch")
    names = [log.user(f"q{n}", parent=None if n == 0 else log.last) for n in range(count)]
    for _ in range(count):
        kept = {"preservedSegment": {"tailUuid": names[-1], "headUuid": {"there": names[0], "aside": side}.get(head)}}
        log.record("system", parent=None, subtype="compact_boundary", logicalParentUuid=names[-1], compactMetadata=kept)
    log.user("Summary", isCompactSummary=True)
    log.assistant(text("ok"), id="m1")
    return log


@pytest.mark.parametrize("make", [
    _keeping, lambda n: _walking(n, "there"), lambda n: _walking(n, "aside"), lambda n: _walking(n, "nowhere"),
])  # fmt: skip
def test_the_work_for_what_compactions_keep_grows_with_the_file_and_not_with_its_square(tmp_path, read_log, make):
    """Counted in calls, not in seconds: four times the file is four times the work."""

    def work(count):
        path, calls = make(count).write(tmp_path / "x.jsonl"), 0

        def called(*_):
            nonlocal calls
            calls += 1

        before = sys.getprofile()
        sys.setprofile(called)
        try:
            read_log(path)
        finally:
            sys.setprofile(before)
        return calls

    assert work(400) < 6 * work(100)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"type_": "content-replacement", "replacements": [{"kind": "tool-result", "toolUseId": "c1"}]},
            "microcompaction",
        ),
        ({"type_": "marble-origami-commit", "summary": "s", "firstArchivedUuid": "u1"}, "compaction"),
        ({"type_": "system", "subtype": "snip_boundary", "snipMetadata": {"removedUuids": ["u1"]}}, "compaction"),
    ],
)
def test_records_that_change_the_context_silently_make_later_histories_inexact(tmp_path, read_log, record, reason):
    log = Log()
    log.user("task")
    log.assistant(call("c1", command="ls"), id="m1")
    log.result("c1", "a long result")
    log.record(**record)
    log.assistant(text("next"), id="m2")
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", reason]]
    assert ledger.skipped() == {record["type_"]: 1}


def test_a_forked_sub_agent_has_the_context_of_its_session_before_its_own(tmp_path, read_log):
    log = Log()
    side = {"isSidechain": True, "agentId": "a1"}
    own = {"type": "fork-context-ref", "agentId": "a1", "parentSessionId": "s1", "parentLastUuid": "p9"}
    log.lines.append(json.dumps(own))
    log.user("do this part", parent=None, **side)
    log.assistant(text("done"), id="m1", **side)
    (trace,), _ = read_log(log.write(tmp_path / "agent-a1.jsonl"))
    assert (trace.id, trace.steps[0].inexact) == ("s1/a1", ["system_prompt", "unlinked"])


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"type": "redacted_thinking", "data": "x"}, "encrypted_reasoning"),
        ({"type": "thinking", "thinking": "", "signature": "x"}, "encrypted_reasoning"),
        ({"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}, "attachment"),
    ],
)
def test_blocks_that_cannot_be_shown_make_later_histories_inexact(tmp_path, read_log, block, reason):
    log = Log()
    log.user("task")
    log.assistant(block, id="m1")
    log.assistant(call("c1", command="ls"), id="m1")
    log.result("c1")
    log.assistant(text("next"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", reason]]


def test_micro_compaction_makes_later_histories_inexact(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(call("c1", command="ls"), id="m1")
    log.result("c1", "old result")
    log.record("system", subtype="microcompact_boundary", microcompactMetadata={"compactedToolIds": ["c1"]})
    log.assistant(text("next"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", "microcompaction"]]
    assert trace.extra["cleared_results"] == 1


def test_injected_texts_are_not_the_user(tmp_path, read_log):
    log = Log()
    log.user("Caveat: The messages below were generated by the user while running local commands.", isMeta=True)
    log.user("<command-name>/model</command-name>")
    log.user("<local-command-stdout>Set model</local-command-stdout>")
    log.user("<task-notification>\n<task-id>x</task-id></task-notification>")
    log.user("the real task")
    log.assistant(text("yes"), id="m1")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.extra["injected"] == [[0, "meta"], [1, "command"], [2, "command"], [3, "command"]]
    assert trace.messages[4].content == "the real task"


def test_a_queued_prompt_is_the_users_and_other_attachments_are_not_logged_context(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(call("c1", command="ls"), id="m1")
    log.result("c1")
    log.record("attachment", attachment={"type": "queued_command", "prompt": "also run the tests"})
    log.assistant(text("ok"), id="m2")
    log.record("attachment", attachment={"type": "todo_reminder"})
    log.assistant(text("more"), id="m3")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.messages[3].content == "also run the tests"
    assert [s.inexact for s in trace.steps] == [["system_prompt"]] * 2 + [["system_prompt", "attachment"]]


def test_synthetic_and_interrupted_actions_are_not_trainable(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("No response requested."), id="m1", model="<synthetic>")
    log.user("again")
    log.assistant(text("I was about to"), id="m2")
    log.user([text("[Request interrupted by user]")])
    log.user("and again")
    log.assistant(call("c1", command="ls"), id="m3")
    log.user([text("[Request interrupted by user for tool use]")])
    log.assistant(text("fine"), id="m4")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.not_trainable_reason for s in trace.steps] == ["synthetic", "interrupted", "interrupted", None]
    assert trace.steps[2].results[0].status is Status.INTERRUPTED


def test_duplicates_by_uuid_are_counted(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("ok"), id="m1")
    log.lines += list(log.lines)
    (trace,), ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert len(trace.messages) == 2
    assert ledger.skipped() == {"duplicate": 2}


def test_a_call_without_result_is_missing_and_taints_what_follows(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(call("c1", command="ls"), id="m1")
    log.assistant(text("on we go"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.steps[0].results[0].status is Status.MISSING
    assert trace.messages[2].content == "[no result in the log]"
    assert "missing_result" in trace.steps[1].inexact


def test_glued_cut_and_binary_lines(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(call("c1", command="ls"), id="m1")
    log.result("c1")
    log.assistant(text("done"), id="m2")
    user, action, result, last = log.lines
    body = f"{user}{action}\n\x00\x01\x02\n{result}\n\n{last}\n".encode() + b'{"type":"assistant","uu'
    path = tmp_path / "x.jsonl"
    path.write_bytes(body)
    (trace,), ledger = read_log(path)
    assert [m.role for m in trace.messages] == ["user", "assistant", "tool", "assistant"]
    assert (ledger["read"], ledger["used"]) == (6, 3)
    assert ledger.skipped() == {"blank_line": 1, "cut_or_not_json": 1, "not_json": 1}
    assert [(p.line, p.reason) for p in ledger.problems] == [
        (1, "glued"), (2, "not_json"), (6, "cut_or_not_json"),
    ]  # fmt: skip
    assert trace.steps[0].inexact == ["system_prompt"]


def test_a_damaged_line_makes_later_histories_inexact(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("a"), id="m1")
    log.lines.append('{"type": "user", "message": {"role": "us')
    log.assistant(text("b"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert ["damaged_line" in s.inexact for s in trace.steps] == [False, True]


def test_lone_surrogates_and_wrong_bytes_do_not_lose_a_line(tmp_path, read_log):
    log = Log()
    log.user("emoji cut: \ud83d")
    log.assistant(text("ok"), id="m1")
    path = log.write(tmp_path / "x.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"ok"', b'"o\xff"'))
    (trace,), ledger = read_log(path)
    assert [m.content for m in trace.messages] == ["emoji cut: ?", "o\ufffd"]
    assert ledger["used"] == 2


def test_byte_order_marks_zero_bytes_and_deep_nesting(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("ok"), id="m1")
    user, action = (line.encode() for line in log.lines)
    deep = action.replace(b'"usage": {}', b'"usage": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + user + b"\r\n" + b"\x00" * 64 + b"\n" + deep + b"\n" + action)
    (trace,), ledger = read_log(path)
    assert [m.content for m in trace.messages] == ["task", "ok"]
    assert [p.line for p in ledger.problems] == [2, 3]


def test_a_file_without_a_model_step_yields_nothing_and_says_so(tmp_path, read_log):
    log = Log()
    log.user("hello?")
    traces, ledger = read_log(log.write(tmp_path / "x.jsonl"))
    assert traces == []
    assert ledger.skipped() == {"no_model_step": 1}


def test_a_parent_that_is_not_in_the_file_makes_the_history_inexact(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant(text("a"), id="m1")
    log.user("resumed elsewhere", parent="not-here")
    log.assistant(text("b"), id="m2")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", "unlinked"]]
    assert len(trace.messages) == 4


def test_arguments_that_are_not_an_object_are_kept_raw(tmp_path, read_log):
    log = Log()
    log.user("task")
    log.assistant({"type": "tool_use", "id": "c1", "name": "T", "input": '{"a": 1}'}, id="m1")
    log.assistant({"type": "tool_use", "id": "c2", "name": "T", "input": "{broken"}, id="m2")
    log.assistant({"type": "tool_use", "id": "c3", "name": "T", "input": [1]}, id="m3")
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    calls = [c for s in trace.steps for c in trace.action_of(s).tool_calls]
    assert [(c.arguments, c.raw_arguments) for c in calls] == [({"a": 1}, None), ({}, "{broken"), ({}, "[1]")]


def test_an_image_in_a_tool_result_becomes_a_placeholder(tmp_path, read_log):
    log = Log()
    log.user("look")
    log.assistant(call("c1", "Read", file_path="a.png"), id="m1")
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 5000, "media_type": "image/png"}}
    log.result("c1", [text("the picture:"), image])
    (trace,), _ = read_log(log.write(tmp_path / "x.jsonl"))
    assert trace.messages[2].content == "the picture:\n[image]"
    assert trace.extra["images"] == 1


def test_every_line_is_accounted_for_when_one_byte_is_destroyed(tmp_path, data, read_log):
    raw = (data / "v2.1.17_headless.jsonl").read_bytes()
    whole, _ = read_log(data / "v2.1.17_headless.jsonl")
    for position in range(0, len(raw), 997):
        path = tmp_path / "x.jsonl"
        path.write_bytes(raw[:position] + b"\x00" + raw[position + 1 :])
        traces, ledger = read_log(path)  # asserts the balance
        assert ledger["used"] >= 15
        assert len(traces[0].steps) >= len(whole[0].steps) - 1


def test_the_format_is_found_by_content(data, sample):
    from composer_plugins.traces.claude_code import READER

    for path in [sample, *data.glob("*.jsonl"), *(data / "subagents_v2.1.114").rglob("*.jsonl")]:
        assert READER.sniff(path.read_bytes()[:65536]), path
    others = [
        json.dumps({"timestamp": "t", "type": "session_meta", "payload": {"id": "x"}}),
        json.dumps([{"role": "system", "content": "x"}]),
        json.dumps({"trajectory": [], "info": {}}),
        json.dumps({"type": "user", "text": "x"}),
        "not json at all",
    ]
    assert not any(READER.sniff(other.encode()) for other in others)
