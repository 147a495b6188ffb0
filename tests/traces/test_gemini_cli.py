"""The Gemini CLI reader: real sessions with expectations read off the files, and generated cases."""

from __future__ import annotations

import json
from functools import partial

import agent_logs
import pytest

from composer_plugins.errors import TraceError
from composer_plugins.traces import documents
from composer_plugins.traces.gemini_cli import READER
from composer_plugins.traces.gemini_cli_parts import shell_output, split_calls
from composer_plugins.traces.schema import Status

read_rows = partial(agent_logs.read_lines, READER)
FOLDER = agent_logs.DATA / "gemini_cli"
HEAD = {"sessionId": "s", "projectHash": "p", "startTime": "t", "lastUpdated": "t"}


def message(key, kind, content, **more):
    return {"id": key, "timestamp": "2026-01-01T00:00:00Z", "type": kind, "content": content, **more}


def tool(key, status, result=None, **more):
    call = {"id": key, "name": "read_file", "args": {"path": "a"}, "status": status, **more}
    return call if result is None else {**call, "result": result}


def answer(key, **response):
    return [{"functionResponse": {"id": key, "name": "read_file", "response": response}}]


def test_a_real_session_with_a_cancelled_and_a_failed_call():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "session_cancelled_and_error.json")
    assert (ledger["read"], ledger["used"]) == (9, 9)
    assert [s.source_ref.line for s in trace.steps] == [13, 61, 109, 137, 191, 239]
    assert [r.status for s in trace.steps for r in s.results] == [
        Status.OK, Status.OK, Status.INTERRUPTED, Status.ERROR, Status.OK,
    ]  # fmt: skip
    assert trace.steps[3].not_trainable_reason == "interrupted"
    assert trace.action_of(trace.steps[0]).thinking.startswith("**Considering Project Structure** I've started by")
    assert trace.steps[0].results[0].content.endswith("test-project/ is empty.")
    assert all(s.inexact == ["system_prompt"] and s.model == "gemini-2.5-pro" for s in trace.steps)
    assert trace.session_id == "981c87cb-90ef-4c7f-948d-23173ff43e4e"


def test_the_lines_of_the_steps_are_the_lines_of_the_messages():
    for name in ("session_cancelled_and_error.json", "session_replace.json", "session_unknown_tool.json"):
        (trace,), _ = agent_logs.read(READER, FOLDER / name)
        lines = (FOLDER / name).read_text().splitlines()
        keys = [lines[s.source_ref.line].split('"')[3] for s in trace.steps]  # the id stands on the next line
        raw = json.loads((FOLDER / name).read_text())["messages"]
        assert keys == [m["id"] for m in raw if m["type"] == "gemini"]


def test_an_unknown_tool_is_an_error_turn():
    (trace,), _ = agent_logs.read(READER, FOLDER / "session_unknown_tool.json")
    assert (trace.steps[0].status, trace.steps[0].results[0].error_class is None) == (Status.ERROR, False)


def test_lines_with_updates_rewinds_and_a_compression():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "session_lines.jsonl")
    assert ledger.skipped() == {"superseded": 2, "info": 1, "rewound": 2, "command": 1}
    assert (ledger["read"], ledger["used"]) == (17, 11)
    assert [s.source_ref.line for s in trace.steps] == [7, 8, 14, 17]
    assert [s.state_start for s in trace.steps] == [0, 0, 0, 8]
    assert not any("delete" in m.content.lower() for m in trace.messages)
    shell = trace.steps[2].results[0]
    assert (shell.exit_code, shell.status) == (1, Status.INFERRED_ERROR)
    assert trace.state_of(trace.steps[3])[-1].content == "[masked]"
    assert trace.steps[3].inexact == ["system_prompt", "compaction"]
    assert trace.extra["injected"] == [[0, "session_context"], [8, "state_snapshot"]]
    assert trace.extra["usage"] == {"input": 230, "output": 13, "thoughts": 3}


def test_a_saved_chat_pairs_calls_without_ids_by_name_in_order():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "checkpoint.json")
    assert (ledger["read"], ledger["used"]) == (6, 6)
    assert [s.not_trainable_reason for s in trace.steps] == ["synthetic", None, None]
    assert [(r.content, r.status) for r in trace.steps[1].results] == [
        ("AAA", Status.OK), ("File not found: b.txt", Status.ERROR),
    ]  # fmt: skip
    assert trace.action_of(trace.steps[1]).thinking == "Two files."
    assert trace.action_of(trace.steps[2]).content == "a.txt holds AAA; b.txt is missing."


@pytest.mark.parametrize(("key", "wrap"), [("clientHistory", True), ("history", True), (None, False)])
def test_the_places_where_a_saved_chat_keeps_its_contents(key, wrap, tmp_path):
    contents = json.loads((FOLDER / "checkpoint.json").read_text())["history"]
    screen = {"history": [{"type": "user", "text": "hi"}]} if key == "clientHistory" else {}
    value = {**screen, key: contents} if wrap else contents
    (trace,), _ = agent_logs.read_value(READER, value, tmp_path)
    assert len(trace.steps) == 3


def test_a_declined_call_is_human_and_an_unfinished_one_is_missing(tmp_path):
    declined = tool("c1", "cancelled", answer("c1", error="[Operation Cancelled] Reason: User did not allow tool call"))
    waiting = tool("c2", "awaiting_approval")
    rows = [message("1", "gemini", "", toolCalls=[declined, waiting]), message("2", "gemini", "bye")]
    (trace,), _ = read_rows(tmp_path, HEAD, *rows)
    assert [r.status for r in trace.steps[0].results] == [Status.HUMAN_REJECT, Status.MISSING]
    assert trace.steps[1].inexact == ["system_prompt", "missing_result"]


def test_a_rewind_to_an_unknown_message_takes_everything_back(tmp_path):
    rows = [message("1", "user", "a"), message("2", "gemini", "b"), {"$rewindTo": "no such id"}]
    traces, ledger = read_rows(tmp_path, HEAD, *rows)
    assert (traces, ledger.skipped()) == ([], {"rewound": 2, "no_model_step": 2})
    (trace,), _ = read_rows(tmp_path, HEAD, *rows, message("3", "user", "c"), message("4", "gemini", "d"))
    assert [m.content for m in trace.messages] == ["c", "d"]


def test_masking_old_results_is_no_compaction(tmp_path):
    user, first = (
        message("1", "user", "go"),
        message("2", "gemini", "r", toolCalls=[tool("c", "success", answer("c", output="long"))]),
    )
    masked = message("2", "gemini", [{"text": "r"}], toolCalls=[tool("c", "success", answer("c", output="[masked]"))])
    update = {"$set": {"messages": [message("1", "user", [{"text": "go"}]), masked]}}
    (trace,), _ = read_rows(tmp_path, HEAD, user, first, update, message("3", "gemini", "end"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", "microcompaction"]]
    assert trace.steps[0].results[0].content == "long"
    assert [m.content for m in trace.state_of(trace.steps[1])] == ["go", "r", "[masked]"]


def test_the_same_history_written_again_changes_nothing(tmp_path):
    rows = [message("1", "user", "go"), message("2", "gemini", "r")]
    same = {"$set": {"messages": [message("1", "user", [{"text": "go"}]), message("2", "gemini", [{"text": "r"}])]}}
    (trace,), _ = read_rows(tmp_path, HEAD, *rows, same, message("3", "gemini", "end"))
    assert [s.inexact for s in trace.steps] == [["system_prompt"]] * 2
    assert len(trace.messages) == 3


def test_parts_of_newer_sessions_are_not_read_twice(tmp_path):
    content = [
        {"thought": True, "text": "hm"},
        {"text": "reading"},
        {"functionCall": {"id": "c", "name": "read_file", "args": {}}},
    ]
    rows = [
        message("1", "gemini", content, toolCalls=[tool("c", "success", answer("c", output="x"))], thoughts=[{"subject": "other"}]),
        message("2", "user", answer("c", output="x")), message("3", "gemini", [{"text": "end"}]),
    ]  # fmt: skip
    (trace,), ledger = read_rows(tmp_path, HEAD, *rows)
    assert [(len(trace.action_of(s).tool_calls), trace.action_of(s).thinking) for s in trace.steps] == [
        (1, "hm"),
        (0, None),
    ]
    assert ledger.skipped() == {"duplicate": 1}


def test_calls_that_the_program_added_to_the_message_before_are_inferences_of_their_own(tmp_path):
    def timed(start, end, key):
        return tool(f"read_file-{start}-{key}", "success", answer(key, output=key), timestamp=end)

    early = timed(1761734225259, "2025-10-29T10:37:05.300Z", "a")
    beside = timed(1761734225260, "2025-10-29T10:37:05.400Z", "b")
    later = timed(1761734228885, "2025-10-29T10:37:08.900Z", "c")
    assert [[c["id"][-1] for c in group] for group in split_calls([early, beside, later])] == [["a", "b"], ["c"]]
    assert [len(g) for g in split_calls([tool("x", "success"), tool("y", "success")])] == [2]
    (trace,), _ = read_rows(tmp_path, HEAD, message("1", "gemini", "t", toolCalls=[early, beside, later]))
    assert [[r.content for r in s.results] for s in trace.steps] == [["a", "b"], ["c"]]
    assert trace.extra["split_inferences"] == 1


def test_shell_output_is_taken_out_of_its_wrapping():
    text = "Command: ls\nDirectory: (root)\nOutput: a\nExit Code: 5\nb\nError: (none)\nExit Code: 2\nSignal: 0"
    assert shell_output(text) == ("a\nExit Code: 5\nb", 2)
    assert shell_output("Output: x") == ("x", None)
    assert shell_output("Exit Code: 1") == ("Exit Code: 1", None)


def test_unknown_types_and_damage_are_counted(tmp_path):
    rows = [message("1", "gemini", "a"), message("2", "hologram", "b"), {"id": "3", "type": None}, {"x": 1}]
    (trace,), ledger = read_rows(tmp_path, HEAD, *rows, raw=b'{"id": "4", "ty\n{"$set": {"summary": "S"}}\n')
    assert ledger.skipped() == {"hologram": 1, "malformed_record": 2, "cut_or_not_json": 1}
    assert trace.extra["summary"] == "S"


def test_a_document_keeps_messages_with_the_same_id_and_names_bad_ones(tmp_path):
    value = {**HEAD, "messages": [message("1", "gemini", "a"), 7, message("1", "gemini", "b")]}
    (trace,), ledger = agent_logs.read_value(READER, value, tmp_path)
    assert [trace.action_of(s).content for s in trace.steps] == ["a", "b"]
    assert ledger.skipped() == {"malformed_record": 1}
    assert [s.inexact for s in trace.steps] == [["system_prompt"], ["system_prompt", "damaged_line"]]
    (trace,), ledger = agent_logs.read_value(READER, value, tmp_path, indent=None)
    assert (len(trace.steps), ledger["read"]) == (2, 3)  # on one line it is still a document


@pytest.mark.parametrize(
    ("messages", "reason"), [(None, "malformed_record"), (7, "malformed_record"), ([], "no_messages")]
)
def test_a_document_without_messages_counts_as_one_record(messages, reason, tmp_path):
    path = tmp_path / "log"
    path.write_text(json.dumps({**HEAD, "messages": messages}, indent=1))
    traces, ledger = agent_logs.read(READER, path)
    assert (traces, ledger["read"], ledger.skipped()) == ([], 1, {reason: 1})


def test_what_the_user_typed_alone_is_a_companion():
    log = [{"sessionId": "s", "messageId": 0, "type": "user", "message": "hi", "timestamp": "t"}]
    assert READER.companion(json.dumps(log).encode()) == "prompt_log"
    assert not READER.sniff(json.dumps(log).encode())
    assert READER.companion(json.dumps(HEAD).encode()) is None


def test_a_document_beyond_the_size_is_refused_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 100)
    with pytest.raises(TraceError, match="JSON Lines"):
        list(READER.read(FOLDER / "session_replace.json", {}))


@pytest.mark.parametrize("name", ["session_lines.jsonl", "session_replace.json", "checkpoint.json"])
def test_damaged_copies_are_read_and_the_counts_add_up(name, tmp_path):
    assert agent_logs.survives(READER, (FOLDER / name).read_bytes(), tmp_path, range(60)) > 15


def test_every_real_session_agrees_with_its_raw_json():
    for path in agent_logs.corpus("gemini_cli"):
        (trace,), ledger = agent_logs.read(READER, path)
        raw = json.loads(path.read_text())["messages"]
        assert ledger["read"] == len(raw)
        model = [m for m in raw if m["type"] == "gemini"]
        assert len(trace.steps) == len(model)
        calls = [c for m in model for c in m.get("toolCalls", [])]
        assert [c.id for s in trace.steps for c in trace.action_of(s).tool_calls] == [c["id"] for c in calls]
        failed = [c["status"] for c in calls if c["status"] != "success"]
        assert failed == ["cancelled", "error"]


def test_a_sub_agent_names_the_session_whose_folder_its_file_lies_in(tmp_path):
    folder = tmp_path / "chats" / "parent-session"
    folder.mkdir(parents=True)
    rows = [message("1", "user", "part"), message("2", "gemini", "done")]
    (sub,), _ = read_rows(folder, HEAD | {"kind": "subagent"}, *rows)
    (main,), _ = read_rows(folder, HEAD | {"kind": "main"}, *rows)
    assert (sub.parent_id, main.parent_id) == ("parent-session", None)


def test_the_folder_that_a_sub_agents_file_was_copied_to_is_not_its_parent(tmp_path):
    folder = tmp_path / "backup" / "logs"
    folder.mkdir(parents=True)
    rows = [message("1", "user", "part"), message("2", "gemini", "done")]
    (sub,), _ = read_rows(folder, HEAD | {"kind": "subagent"}, *rows)
    assert sub.parent_id is None
