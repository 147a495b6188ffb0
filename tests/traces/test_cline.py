"""The Cline reader: real sessions with expectations read off the files, XML tasks, and generated cases."""

from __future__ import annotations

import json
import os

import agent_logs
import pytest

from composer_plugins.traces import cline
from composer_plugins.traces.cline import READER
from composer_plugins.traces.cline_results import read_result, split_environment
from composer_plugins.traces.cline_xml import parse_text, result_header
from composer_plugins.traces.schema import Status

FOLDER = agent_logs.DATA / "cline"


def user(*blocks):
    return {"role": "user", "content": [b if isinstance(b, dict) else {"type": "text", "text": b} for b in blocks]}


def assistant(*blocks):
    return {**user(*blocks), "role": "assistant"}


def use(call_id, name="read_file", **values):
    return {"type": "tool_use", "id": call_id, "name": name, "input": values}


def came(call_id, content, **more):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


TASK = user("<task>\nDo it\n</task>")


def test_a_real_session_of_the_sdk():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "session.messages.json")
    assert (ledger["read"], ledger["used"]) == (9, 9)
    assert (trace.session_id, trace.outcome, trace.extra["forked_from"]) == (
        "1784094124598_rruoq", "completed", "1784094053271_p8pzo",
    )  # fmt: skip
    raw = json.loads((FOLDER / "session.messages.json").read_text())["messages"]
    assert len(trace.steps) == sum(m["role"] == "assistant" for m in raw) == 4
    calls = [b["id"] for m in raw for b in m["content"] if b["type"] == "tool_use"]
    assert [c.id for s in trace.steps for c in trace.action_of(s).tool_calls] == calls
    assert {r.status for s in trace.steps for r in s.results} == {Status.OK}
    assert all(s.inexact == ["attachment"] for s in trace.steps)  # how the attached file was shown is not recorded
    assert trace.messages[0].role == "system"
    lines = (FOLDER / "session.messages.json").read_text().splitlines()
    assert [lines[s.source_ref.line - 1].strip() for s in trace.steps] == ["{"] * 4


def test_a_compacted_session_has_no_exact_history_and_copied_actions():
    (trace,), _ = agent_logs.read(READER, FOLDER / "basic.compaction.json")
    assert [s.inexact for s in trace.steps] == [["compaction"]] * 3
    assert [s.not_trainable_reason for s in trace.steps] == ["copied"] * 3
    assert "system_notice" in [kind for _, kind in trace.extra["injected"]]


def test_a_task_whose_calls_are_xml():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "xml_task.json")
    assert (ledger["read"], ledger["used"]) == (14, 14)
    found = [(c.name, c.arguments) for s in trace.steps for c in trace.action_of(s).tool_calls]
    assert [name for name, _ in found] == [
        "read_file", "write_to_file", "execute_command", "replace_in_file", "search_files", "attempt_completion",
    ]  # fmt: skip
    assert found[1][1] == {"path": "src/a.ts", "content": "const bar = '</content>';"}
    assert found[2][1] == {"command": "npm test", "requires_approval": "false"}
    assert [(r.status, r.error_class) for s in trace.steps for r in s.results][:5] == [
        (Status.OK, None), (Status.HUMAN_REJECT, "user_feedback"), (Status.HUMAN_REJECT, "user_rejected"),
        (Status.ERROR, trace.steps[3].results[0].error_class), (Status.INTERRUPTED, "interrupted"),
    ]  # fmt: skip
    first = trace.action_of(trace.steps[0])
    assert (first.content, first.thinking) == ("Let me read it.", "I need the file first.")
    assert trace.steps[0].results[0].content == "const foo = '</content>';"
    assert len(trace.extra["calls_from_xml"]) == 6
    assert trace.extra["unclosed_xml_calls"] == 1
    kinds = [kind for _, kind in trace.extra["injected"]]
    assert kinds.count("environment_details") == 7
    assert "no_tool_used" in kinds and "task_resumption" in kinds
    said = [m.content for m in trace.messages if m.role == "user"]
    assert "New instructions for task continuation:\n<user_message>\njust finish\n</user_message>" in said


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        ("no tools <b>here</b>", "no tools <b>here</b>", []),
        ("use <read_file> to read", "use <read_file> to read", []),
        ("<read_file><path>a</path></read_file>", "", [("read_file", {"path": "a"}, True)]),
        ("a<list_files></list_files>b", "ab", [("list_files", {}, True)]),
        ("<read_file>\n<path>a</path>\n</read_file>\n<read_file>\n<path>b</path>\n</read_file>", "",
         [("read_file", {"path": "a"}, True), ("read_file", {"path": "b"}, True)]),
        ("<write_to_file><path>x</path><content>\n<path>y</path>\n</content></write_to_file>", "",
         [("write_to_file", {"path": "x", "content": "<path>y</path>"}, True)]),
        ("<execute_command><command>echo hi", "", [("execute_command", {"command": "echo hi"}, False)]),
    ],
)  # fmt: skip
def test_xml_calls_are_read_as_cline_reads_them(text, visible, calls):
    found = parse_text(text)
    assert (found.text.strip(), found.calls) == (visible, calls)


def test_parsing_stays_linear_on_hostile_text():
    for text in ("<read_file>" * 20_000, "<read_file>" + "<a></a>" * 20_000, "<write_to_file>" + "<content>" * 20_000,
                 "<write_to_file>" + "<content></content>" * 20_000):  # fmt: skip
        parse_text(text)
    assert result_header("[read_file for '" + "]" * 100_000) is None


def test_results_of_native_calls_may_be_texts(tmp_path):
    value = [
        TASK,
        assistant(use("1"), use("2"), use("3", "use_subagents")),
        user(
            "[read_file for 'a'] Result:\nA",
            "[read_file for 'b'] Result:\nB",
            "[subagents] Result:\nC",
            "\n\t# TODO LIST UPDATE",
        ),
        assistant("<read_file> is only a word here <path>x</path>"),
    ]
    (trace,), _ = agent_logs.read_value(READER, value, tmp_path)
    assert [r.content for r in trace.steps[0].results] == ["A", "B", "C"]
    assert trace.action_of(trace.steps[1]).tool_calls == []
    assert "calls_from_xml" not in trace.extra
    assert [kind for _, kind in trace.extra["injected"]] == ["todo_list"]


def test_anthropic_results_errors_and_images(tmp_path):
    parts = [{"type": "text", "text": "see"}, {"type": "image", "source": {}}]
    value = [
        TASK, assistant({"type": "thinking", "thinking": "hm"}, use("1"), use("2")),
        user(came("2", "File not found: b", is_error=True), came("1", parts), came("9", "?"), "and now?"), assistant("end"),
    ]  # fmt: skip
    (trace,), _ = agent_logs.read_value(READER, value, tmp_path)
    assert [(r.content, r.status) for r in trace.steps[0].results] == [
        ("see\n[image]", Status.OK), ("File not found: b", Status.ERROR),
    ]  # fmt: skip
    assert trace.action_of(trace.steps[0]).thinking == "hm"
    assert (trace.messages[-2].content, trace.extra["images"]) == ("and now?", 1)


@pytest.mark.parametrize(
    ("content", "flagged", "status"),
    [
        ([{"query": "x", "result": "ok", "success": True}], False, None),
        ([{"query": "x", "error": "no", "success": False}], True, None),
        ('{"query": "x", "result": "no match", "success": false}', True, None),
        ("The user denied this operation.", False, Status.HUMAN_REJECT),
        ("Done.\nThe user provided the following feedback:\n<feedback>\nno\n</feedback>", False, Status.HUMAN_REJECT),
        ("a file that has <feedback> in it", False, None),
        ("Task was interrupted before this tool call could be completed.", False, Status.INTERRUPTED),
        ("The tool execution failed with the following error:\n<error>\nx\n</error>", True, None),
    ],
)
def test_what_a_result_says_of_itself(content, flagged, status):
    found = read_result(content)
    assert (found.flagged, found.status) == (flagged, status)


def test_environment_details_are_split_off_the_end_only():
    assert split_environment("x\n<environment_details>\ny\n</environment_details>") == (
        "x", "<environment_details>\ny\n</environment_details>",
    )  # fmt: skip
    assert split_environment("<environment_details> is a tag") == ("<environment_details> is a tag", "")


#: `context_history.json`: message 3 was shown with a note in the place of a file's older contents from then on.
_NOTE = [[0, [[1750000000000, "text", ["[DUPLICATE FILE READ] ..."], [[]]]]]]
EDITS = [[0, [0, []]], [3, [2, _NOTE]], [5, [2, _NOTE]]]


def test_messages_that_the_extension_changed_later_are_not_called_exact(tmp_path):
    talk = [TASK, assistant(use("c1")), user(came("c1", "x")), assistant(use("c2")), user(came("c2", "y"))]
    (tmp_path / "log").write_text(json.dumps([*talk, assistant("Done.")]))
    for edits, expected in (([[0, [0, []]]], [[], [], []]), (EDITS, [[], [], ["microcompaction"]])):
        (tmp_path / "context_history.json").write_text(json.dumps(edits))
        (trace,), _ = agent_logs.read(READER, tmp_path / "log")
        assert [s.inexact for s in trace.steps] == [["system_prompt", *more] for more in expected]
    (tmp_path / "context_history.json").unlink()
    (trace,), _ = agent_logs.read(READER, tmp_path / "log")
    assert {tuple(s.inexact) for s in trace.steps} == {("system_prompt",)}


@pytest.mark.parametrize("case", ["cut", "another shape", "no file", "nested", "too large", "pipe"])
def test_changes_that_cannot_be_read_may_be_of_any_message(tmp_path, monkeypatch, case):
    talk = [TASK, assistant(use("c1")), user(came("c1", "x")), assistant(use("c2")), user(came("c2", "y"))]
    (tmp_path / "log").write_text(json.dumps([*talk, assistant("Done.")]))
    place = tmp_path / "context_history.json"
    if case == "no file":
        place.mkdir()
    elif case == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no named pipes")
        os.mkfifo(place)
    else:
        texts = {"cut": json.dumps(EDITS)[:-4], "another shape": '{"0": []}', "nested": "[" * 100_000}
        place.write_text(texts.get(case, "[]"))
    if case == "too large":
        monkeypatch.setattr(cline, "MAX_DOCUMENT", 1)
    (trace,), _ = agent_logs.read(READER, tmp_path / "log")
    assert [s.inexact for s in trace.steps] == [["system_prompt", "microcompaction"]] * 3


def test_a_long_history_of_changes_is_read_whole(tmp_path):
    """Above 1 MiB it was once cut, and a cut one said that nothing was changed."""
    talk = [TASK, assistant(use("c1")), user(came("c1", "x")), assistant(use("c2")), user(came("c2", "y"))]
    (tmp_path / "log").write_text(json.dumps([*talk, assistant("Done.")]))
    note = [[0, [[1750000000000, "text", ["x" * (3 << 20)], [[]]]]]]
    (tmp_path / "context_history.json").write_text(json.dumps([[4, [2, note]]]))
    (trace,), _ = agent_logs.read(READER, tmp_path / "log")
    assert [s.inexact[1:] for s in trace.steps] == [[], [], ["microcompaction"]]


def test_a_pipe_beside_a_session_is_not_opened_in_search_of_its_description(tmp_path):
    (tmp_path / "log").write_text(json.dumps({"sessionId": "s", "messages": [user("hi"), assistant("Done.")]}))
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"session_id": "s", "status": "completed"}))
    (trace,), _ = agent_logs.read(READER, tmp_path / "log")
    assert trace.outcome == "completed"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_summary_of_a_fork_of_the_extension_starts_a_new_history_and_is_no_action(tmp_path, role):
    summary = {"role": role, "content": [{"type": "text", "text": "So far: ..."}], "isSummary": True, "condenseId": "x"}
    talk = [TASK, assistant(use("c1")), user(came("c1", "x")), summary, user("go on"), assistant("Done.")]
    (trace,), _ = agent_logs.read_value(READER, talk, tmp_path)
    assert [m.content for m in trace.state_of(trace.steps[-1])] == ["So far: ...", "go on"]
    assert trace.steps[-1].inexact == ["system_prompt", "compaction"]
    assert [s.not_trainable_reason for s in trace.steps] == [None, *["copied"] * (role == "assistant"), None]


def test_files_beside_a_conversation_are_companions_and_no_logs():
    session = (FOLDER / "session.json").read_bytes()
    assert (READER.companion(session), READER.sniff(session)) == ("session_description", False)
    assert READER.companion(b'[{"ts": 1, "type": "say", "say": "task", "text": "x"}]') == "shown_messages"
    assert READER.companion(b'{"files_in_context": [], "model_usage": []}') == "task_metadata"
    assert READER.companion(json.dumps(EDITS).encode()) == "context_history"
    assert READER.companion((FOLDER / "xml_task.json").read_bytes()) is None


def test_anthropic_shaped_messages_without_another_mark_are_taken():
    assert READER.sniff(json.dumps([user("hi"), assistant(use("1")), user(came("1", "x"))]).encode())


def test_a_chat_that_is_not_of_cline_is_left_alone():
    assert not READER.sniff(b'[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]')
    assert not READER.sniff(b'[{"role": "system", "content": "x"}, {"role": "user", "content": "<task>\\nhi"}]')
    assert not READER.sniff(b"[]")


@pytest.mark.parametrize(
    ("value", "reason"),
    [({"sessionId": "s", "messages": None}, "malformed_record"), ({"x": 1}, "malformed_record"), ([], "no_messages")],
)
def test_a_document_without_messages_counts_as_one_record(value, reason, tmp_path):
    path = tmp_path / "log"
    path.write_text(json.dumps(value))
    traces, ledger = agent_logs.read(READER, path)
    assert (traces, ledger["read"], ledger.skipped()) == ([], 1, {reason: 1})


def test_malformed_messages_are_counted_and_named(tmp_path):
    value = [
        TASK,
        {"role": "user"},
        5,
        assistant(7, {"type": "hologram"}, use("1", values=1)),
        {"role": "alien", "content": []},
    ]
    path = tmp_path / "log"
    path.write_text(json.dumps(value, indent=0))
    (trace,), ledger = agent_logs.read(READER, path)
    assert ledger.skipped() == {"malformed_record": 3}
    assert trace.steps[0].inexact == ["system_prompt", "damaged_line"]
    assert trace.extra["other_blocks"] == 2


@pytest.mark.parametrize("name", ["xml_task.json", "session.messages.json"])
def test_damaged_copies_are_read_and_the_counts_add_up(name, tmp_path):
    assert agent_logs.survives(READER, (FOLDER / name).read_bytes(), tmp_path, range(60)) > 20


def test_every_real_session_agrees_with_its_raw_json_and_with_agentpile():
    agentpile = pytest.importorskip("agentpile")
    paths = [path for path in agent_logs.corpus("cline") if READER.sniff(path.read_bytes()[:65536])]
    assert paths
    for path in paths:
        (trace,), ledger = agent_logs.read(READER, path)
        raw = json.loads(path.read_text())["messages"]
        calls = [b for m in raw for b in m["content"] if b["type"] == "tool_use"]
        assert ledger["read"] == ledger["used"] == len(raw)
        assert [c.id for s in trace.steps for c in trace.action_of(s).tool_calls] == [b["id"] for b in calls]
        (run,) = agentpile.load(str(path))
        assert len(trace.steps) == sum(step["source"] == "agent" for step in run.record["steps"])
