"""The Codex reader: real and hand-written rollouts with expectations read off the files, and generated cases."""

from __future__ import annotations

import json
import os
from functools import partial

import agent_logs
import pytest

from composer_plugins.traces import codex_lineage
from composer_plugins.traces.codex import READER
from composer_plugins.traces.codex_output import read_output
from composer_plugins.traces.schema import Status

read_rows = partial(agent_logs.read_lines, READER)
FOLDER = agent_logs.DATA / "codex"


def item(**payload):
    return {"timestamp": "2026-01-01T00:00:00Z", "type": "response_item", "payload": payload}


def said(role, text):
    kind = "output_text" if role == "assistant" else "input_text"
    return item(type="message", role=role, content=[{"type": kind, "text": text}])


def call(call_id, arguments="{}", **more):
    return item(type="function_call", name="shell", arguments=arguments, call_id=call_id, **more)


def output(call_id, value):
    return item(type="function_call_output", call_id=call_id, output=value)


def event(kind, **payload):
    return {"timestamp": "2026-01-01T00:00:00Z", "type": "event_msg", "payload": {"type": kind, **payload}}


META = {"timestamp": "t", "type": "session_meta", "payload": {"id": "s", "base_instructions": {"text": "Be brief."}}}


def test_a_real_rollout():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "exec_minimal_0.135.jsonl")
    assert (trace.id, trace.agent, trace.extra["version"]) == (
        "019e9625-802f-7e91-840a-cfe88d14117a",
        "codex",
        "0.135.0",
    )
    assert [m.role for m in trace.messages] == ["system", "system", "user", "user", "assistant"]
    assert trace.extra["injected"] == [[2, "environment_context"]]
    (step,) = trace.steps
    assert (step.source_ref.line, step.model, step.history_exact) == (9, "gpt-5.5", True)
    assert ledger.skipped() == {"mirror": 4}


def test_what_a_rollout_can_hold():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "features.jsonl")
    assert (ledger["read"], ledger["used"]) == (40, 24)
    assert ledger.skipped() == {"mirror": 3, "token_count": 7, "rewound": 5, "world_state": 1}
    assert [s.source_ref.line for s in trace.steps] == [7, 16, 19, 22, 34, 39]
    first, patch, rejected, search, explained, last = trace.steps
    action = trace.action_of(first)
    assert (action.content, action.thinking) == ("I look at the code and run the tests.", "**Looking around**")
    assert [(c.name, c.arguments) for c in action.tool_calls] == [
        ("exec_command", {"cmd": "cat app.py"}), ("exec_command", {"cmd": "pytest -q"}),
    ]  # fmt: skip
    assert [(r.status, r.exit_code, r.source_ref.line) for r in first.results] == [
        (Status.OK, 0, 15), (Status.INFERRED_ERROR, 1, 14),
    ]  # fmt: skip
    assert trace.action_of(patch).tool_calls[0].arguments["input"].startswith("*** Begin Patch")
    assert patch.results[0].status is Status.ERROR
    assert trace.action_of(rejected).tool_calls[0].raw_arguments == '{"command": ["rm", "-rf", "build"'
    assert (rejected.results[0].status, rejected.results[0].error_class) == (Status.HUMAN_REJECT, "user_rejected")
    assert [c.name for c in trace.action_of(search).tool_calls] == ["web_search"]
    assert [s.inexact for s in trace.steps] == [
        [], ["encrypted_reasoning"], ["encrypted_reasoning"], ["encrypted_reasoning"],
        ["encrypted_reasoning", "missing_result"], ["encrypted_reasoning", "missing_result", "compaction"],
    ]  # fmt: skip
    assert [s.model for s in (search, explained)] == ["gpt-5.2-codex", "gpt-5.2-codex-mini"]
    assert [m.content for m in trace.state_of(last)] == [
        "You are a coding agent.", "Fix the failing test.", "Another model started this: the test adds numbers.",
        "[a summary that only the server can read]", "Thanks. Anything else?",
    ]  # fmt: skip
    assert not any("undo it" in m.content for m in trace.messages)
    assert trace.extra["injected"][0] == [2, "user_instructions"]
    assert trace.parent_id == "0199feed-0000-7000-8000-000000000000"
    assert trace.tools["deploy"]["parameters"]["required"] == ["target"]
    assert trace.extra["usage"]["output_tokens"] == 35


def test_lines_without_an_envelope():
    (trace,), ledger = agent_logs.read(READER, FOLDER / "bare_items.jsonl")
    assert ledger.skipped() == {"state": 2}
    assert [m.role for m in trace.messages] == ["system", "user", "user", "assistant", "tool", "assistant"]
    (call_made,) = trace.action_of(trace.steps[0]).tool_calls
    assert (call_made.name, call_made.arguments) == (
        "local_shell",
        {"command": ["bash", "-lc", "grep -c def test_ tests.py"]},
    )
    assert (trace.steps[0].results[0].exit_code, trace.steps[0].results[0].status) == (0, Status.OK)
    assert all(s.inexact == ["system_prompt"] for s in trace.steps)


def test_compaction_without_a_replacement_keeps_what_the_user_said():
    (trace,), _ = agent_logs.read(READER, FOLDER / "synthetic_compaction.jsonl")
    assert [s.state_start for s in trace.steps] == [0, 0, 0, 0, 8, 8]
    state = [m.content for m in trace.state_of(trace.steps[4])]
    assert state[:3] == ["Help me build the API endpoints", "Add the user CRUD endpoints", "Now add product endpoints"]
    assert state[3].startswith("**Progress + Plan Status**") and len(state) == 5


def test_a_call_without_a_result_and_an_aborted_turn():
    (trace,), _ = agent_logs.read(READER, FOLDER / "synthetic_escalation.jsonl")
    assert [s.results[0].status for s in trace.steps if s.results] == [
        Status.OK, Status.MISSING, Status.OK, Status.INTERRUPTED,
    ]  # fmt: skip
    assert [s.not_trainable_reason for s in trace.steps] == [None] * 6 + ["interrupted"]
    assert ["missing_result" in s.inexact for s in trace.steps] == [False] * 3 + [True] * 4


SCRIPT = "Script completed\nWall time 0.3 seconds\nOutput:\n"
JSON_OUTPUT = json.dumps({"output": "bash: foo: command not found\n", "metadata": {"exit_code": 127}})


@pytest.mark.parametrize(
    ("value", "code", "judged"),
    [
        (JSON_OUTPUT, 127, "bash: foo: command not found\n"),
        ("Exit code: 2\nWall time: 0 seconds\nOutput:\nno", 2, "no"),
        ("Chunk ID: a\nWall time: 1.0 seconds\nProcess exited with code -1\nOutput:\n", -1, ""),
        ("Wall time: 1.0 seconds\nProcess running with session ID 7\nOutput:\nready", None, None),
        ("plain text, Exit code: 3 in the middle", None, None),
        ('{"output": 1, "metadata": {"exit_code": true}}', None, None),
        ("Exit code: 99999999999999999999999\nOutput:\nx", None, "x"),
        ([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "data:"}], None, "a\n[image]"),
        ({"content": "bad", "success": False}, None, "bad"),
        (None, None, ""),
        (SCRIPT + "a.ts\n", None, "a.ts\n"),
        ([{"type": "input_text", "text": SCRIPT}, {"type": "input_text", "text": "a.ts"}], None, "a.ts"),
        ([SCRIPT, json.dumps({"chunk_id": "c", "exit_code": 2, "output": "no such file"})], 2, "no such file"),
        (SCRIPT + json.dumps({"exit_code": True, "output": "x"}), None, '{"exit_code": true, "output": "x"}'),
        ("Script running with cell ID 28\nWall time 10.0 seconds\nOutput:\n", None, ""),
    ],
)  # fmt: skip
def test_the_encodings_of_an_exit_code(value, code, judged):
    found = read_output(value)
    assert found.exit_code == code
    assert found.judged == (value if judged is None else judged)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("exec command rejected by user", Status.HUMAN_REJECT),
        ("patch rejected by user", Status.HUMAN_REJECT),
        ('exec_command failed for `rm x`: Rejected("rejected by user")', Status.HUMAN_REJECT),
        ("aborted by user after 3.1s", Status.INTERRUPTED),
        ("Wall time: 2.0 seconds\naborted by user", Status.INTERRUPTED),
        ("aborted", Status.INTERRUPTED),
        ("the proposal was rejected by user groups", None),
        ("aborted by users in 3 cases, says the report", None),
    ],
)
def test_what_the_human_did_is_no_error(text, status):
    assert read_output(text).status is status


def test_a_script_that_failed_is_an_error_and_its_header_is_shown_to_the_model(tmp_path):
    head = {"type": "input_text", "text": "Script failed\nWall time 0.1 seconds\nOutput:\n"}
    made = item(type="custom_tool_call", name="exec", call_id="c1", input='text(await tools.exec_command({cmd: "x"}))')
    answer = [head, {"type": "input_text", "text": "Script error:\nboom"}]
    rows = [META, said("user", "go"), made, item(type="custom_tool_call_output", call_id="c1", output=answer)]
    (trace,), _ = read_rows(tmp_path, *rows)
    (result,) = trace.steps[0].results
    assert (result.status, result.error_class) == (Status.ERROR, "tool_error")
    assert trace.messages[-1].content.startswith("Script failed\nWall time 0.1 seconds\nOutput:\n")


def rollout(folder, name, rows, base=None):
    """Write a rollout as a paginated thread is: with ordinals, and a header that may name what comes before."""
    header = META["payload"] | {"id": name, "history_mode": "paginated"} | ({"history_base": base} if base else {})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollout-2026-09-11T08-00-00-{name}.jsonl"
    lines = [json.dumps(row | {"ordinal": place}) for place, row in enumerate([META | {"payload": header}, *rows])]
    path.write_text("\n".join(lines) + "\n")
    return path


def upto(path, lines, **more):
    """How a fork names the first `lines` of another rollout."""
    name = path.stem.removeprefix("rollout-2026-09-11T08-00-00-")
    size = sum(len(line) for line in path.read_bytes().splitlines(keepends=True)[:lines])
    return {"thread_id": name, "end_ordinal_exclusive": lines, "end_byte_offset": size} | more


@pytest.mark.parametrize("by_ordinal", [False, True])
def test_what_stands_before_a_fork_is_read_from_the_rollouts_that_it_names(tmp_path, by_ordinal):
    """Since version 0.154 a fork repeats nothing of its origin: `history_base` names the file and the place."""
    more = {"end_byte_offset": None} if by_ordinal else {}
    day = tmp_path / "2026" / "09"
    first = [said("user", "go"), call("c1"), output("c1", "one"), event("token_count"), said("assistant", "not taken")]
    origin = rollout(day / "10", "aaaa-1", first)
    fork = rollout(
        day / "11",
        "bbbb-2",
        [said("user", "again"), said("assistant", "b"), said("user", "no")],
        upto(origin, 5, **more),
    )
    last = rollout(day / "11", "cccc-3", [said("user", "more"), said("assistant", "c")], upto(fork, 3, **more))
    (trace,), ledger = agent_logs.read(READER, last)
    assert [m.content or m.tool_calls[0].id for m in trace.messages] == [
        "Be brief.", "go", "c1", "one", "again", "b", "more", "c",
    ]  # fmt: skip
    assert [(s.source_ref.line, s.inexact) for s in trace.steps] == [(3, [])]
    assert (ledger["read"], ledger["used"]) == (3, 3)
    assert (trace.id, trace.extra["continues"]) == ("cccc-3", "bbbb-2")


def test_damage_before_a_fork_spoils_its_history_and_not_the_fork(tmp_path):
    origin = rollout(tmp_path, "aaaa-1", [said("user", "go"), item(type=7), said("assistant", "a")])
    fork = rollout(tmp_path, "bbbb-2", [said("user", "again"), said("assistant", "b")], upto(origin, 4))
    (trace,), ledger = agent_logs.read(READER, fork)
    assert [s.inexact for s in trace.steps] == [["damaged_line"]]
    assert (ledger.problems, trace.extra.get("problems")) == ([], None)


def test_a_rollback_in_a_fork_can_take_back_what_stands_before_it(tmp_path):
    origin = rollout(
        tmp_path, "aaaa-1", [said("user", "go"), said("assistant", "a"), said("user", "x"), said("assistant", "y")]
    )
    rows = [event("thread_rolled_back", num_turns=1), said("user", "again"), said("assistant", "b")]
    (trace,), ledger = agent_logs.read(READER, rollout(tmp_path, "bbbb-2", rows, upto(origin, 5)))
    assert [m.content for m in trace.messages] == ["Be brief.", "go", "a", "again", "b"]
    assert ledger.balanced() and ledger["used"] == 4


@pytest.mark.parametrize("case", ["missing", "twice", "itself", "odd name"])
def test_a_fork_whose_origin_is_not_there_says_so(tmp_path, case):
    names = {"missing": "gone", "twice": "aaaa-1", "itself": "bbbb-2", "odd name": "../*"}
    rows = [said("user", "go"), said("assistant", "a")]
    rollout(tmp_path / "2026" / "09" / "10", "aaaa-1", rows)
    rollout(tmp_path / "2026" / "09" / "12", "aaaa-1", rows)
    base = {"thread_id": names[case], "end_ordinal_exclusive": 4, "end_byte_offset": 900}
    (trace,), _ = agent_logs.read(READER, rollout(tmp_path / "2026" / "09" / "11", "bbbb-2", rows, base))
    assert [s.inexact for s in trace.steps] == [["unlinked"]]
    assert [m.content for m in trace.messages] == ["Be brief.", "go", "a"]


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def unlinked(fork):
    """A fork whose past cannot be told shows its own messages only, and says so on every step."""
    (trace,), ledger = agent_logs.read(READER, fork)
    assert [s.inexact for s in trace.steps] == [["unlinked"]]
    assert [m.content for m in trace.messages] == ["Be brief.", "again", "b"]
    assert ledger.balanced()


AGAIN = [said("user", "again"), said("assistant", "b")]
PAST = [said("user", "go"), said("assistant", "a"), said("user", "after"), said("assistant", "x")]


@pytest.mark.parametrize("cut", [30, "a record that is no object", "header"])
def test_one_damaged_line_before_a_fork_makes_its_past_unknown(tmp_path, cut):
    origin = rollout(tmp_path, "aaaa-1", PAST)
    rows, base = lines_of(origin), upto(origin, 3)
    place = 0 if cut == "header" else 1
    rows[place] = b"[" + b" " * (len(rows[1]) - 3) + b"]\n" if isinstance(cut, str) and place else (
        rows[place][:-30] + b" " * 29 + b"\n"
    )  # fmt: skip
    origin.write_bytes(b"".join(rows))
    unlinked(rollout(tmp_path, "bbbb-2", AGAIN, base))


def test_a_damaged_header_does_not_end_the_chain_of_rollouts_silently(tmp_path):
    """The middle one's own header names what comes before it: without it, nobody knows that something does."""
    first = rollout(tmp_path, "aaaa-1", PAST)
    middle = rollout(tmp_path, "mmmm-2", PAST, upto(first, 3))
    base = upto(middle, 3)
    rows = lines_of(middle)
    middle.write_bytes(b"".join([b"{}".ljust(len(rows[0]) - 1) + b"\n", *rows[1:]]))
    unlinked(rollout(tmp_path, "bbbb-2", AGAIN, base))


@pytest.mark.parametrize("bounds", [
    {"end_byte_offset": 10**6}, {"end_byte_offset": -1}, {"end_byte_offset": 0}, {"end_byte_offset": "300"},
    {"end_byte_offset": 300.0}, {"end_byte_offset": True}, {"end_byte_offset": 2**70},
    {"end_byte_offset": None, "end_ordinal_exclusive": None}, {"end_byte_offset": None, "end_ordinal_exclusive": "3"},
    {"end_byte_offset": None, "end_ordinal_exclusive": 99}, {"end_byte_offset": None, "end_ordinal_exclusive": 0},
])  # fmt: skip
def test_a_fork_that_does_not_say_where_its_past_ends_or_says_more_than_there_is(tmp_path, bounds):
    origin = rollout(tmp_path, "aaaa-1", PAST)
    unlinked(rollout(tmp_path, "bbbb-2", AGAIN, upto(origin, 3, **bounds)))


@pytest.mark.parametrize("step", [-1, -20, 1, 20])
def test_a_fork_whose_past_ends_inside_a_line(tmp_path, step):
    origin = rollout(tmp_path, "aaaa-1", PAST)
    base = upto(origin, 3)
    base["end_byte_offset"] += step - (step == -1)  # one byte less is the line end only: all records are whole
    unlinked(rollout(tmp_path, "bbbb-2", AGAIN, base))


def test_an_ordinal_needs_ordinals(tmp_path):
    """Without them nobody knows which records came before the fork: none is shown."""
    origin = rollout(tmp_path, "aaaa-1", PAST)
    base = upto(origin, 3, end_byte_offset=None)
    origin.write_bytes(origin.read_bytes().replace(b'"ordinal"', b'"other"'))
    unlinked(rollout(tmp_path, "bbbb-2", AGAIN, base))


@pytest.mark.parametrize("base", ["aaaa-1", [], 3, {}])
def test_a_past_that_is_named_in_no_known_way(tmp_path, base):
    origin = rollout(tmp_path, "aaaa-1", PAST)
    header = META["payload"] | {"history_base": base}
    path = tmp_path / "log"
    path.write_text("".join(json.dumps(row) + "\n" for row in [META | {"payload": header}, *AGAIN]))
    unlinked(path)
    assert origin.is_file()


def test_the_past_is_at_most_so_large_over_all_its_files(tmp_path, monkeypatch):
    first = rollout(tmp_path, "aaaa-1", PAST)
    middle = rollout(tmp_path, "mmmm-2", PAST, upto(first, 3))
    base = upto(middle, 3)
    fork = rollout(tmp_path, "bbbb-2", AGAIN, base)
    needed = base["end_byte_offset"] + upto(first, 3)["end_byte_offset"]
    monkeypatch.setattr(codex_lineage, "MOST_BYTES", needed)
    (trace,), _ = agent_logs.read(READER, fork)
    assert [m.content for m in trace.messages] == ["Be brief.", "go", "a", "go", "a", "again", "b"]
    monkeypatch.setattr(codex_lineage, "MOST_BYTES", needed - 1)
    unlinked(fork)


@pytest.mark.parametrize("round_trip", [False, True])
def test_rollouts_that_name_each_other_are_not_followed_in_a_circle(tmp_path, monkeypatch, round_trip):
    opened = []
    read = codex_lineage.read_beside
    monkeypatch.setattr(codex_lineage, "read_beside", lambda *a, **k: opened.append(a[0]) or read(*a, **k))
    names = {"thread_id": "bbbb-2", "end_byte_offset": 300}
    fork = rollout(tmp_path, "bbbb-2", AGAIN, names)
    if round_trip:
        other = rollout(tmp_path, "aaaa-1", PAST, names | {"end_byte_offset": len(lines_of(fork)[0])})
        fork = rollout(tmp_path, "bbbb-2", AGAIN, upto(other, 3))
    unlinked(fork)
    assert len(opened) == round_trip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_under_the_name_of_a_rollout_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "rollout-2026-09-11T08-00-00-aaaa-1.jsonl")
    unlinked(rollout(tmp_path, "bbbb-2", AGAIN, {"thread_id": "aaaa-1", "end_byte_offset": 300}))


def test_only_a_file_can_be_a_second_rollout_of_that_name(tmp_path):
    origin = rollout(tmp_path / "2026" / "09" / "10", "aaaa-1", PAST)
    fork = rollout(tmp_path / "2026" / "09" / "11", "bbbb-2", AGAIN, upto(origin, 3))
    (fork.parent / origin.name).mkdir()
    (trace,), _ = agent_logs.read(READER, fork)
    assert [m.content for m in trace.messages] == ["Be brief.", "go", "a", "again", "b"]


def test_a_usage_record_ends_an_inference(tmp_path):
    usage = {"type": "token_usage_record", "payload": {"response_id": "r1", "usage": {"input_tokens": 9}}}
    rows = [META, said("user", "go"), call("c1"), usage, call("c2"), output("c1", "a"), output("c2", "b")]
    (trace,), ledger = read_rows(tmp_path, *rows)
    assert [[c.id for c in trace.action_of(s).tool_calls] for s in trace.steps] == [["c1"], ["c2"]]
    assert ledger.skipped() == {"token_usage_record": 1}


def test_items_of_unknown_types_make_later_histories_inexact(tmp_path):
    rows = [said("assistant", "a"), item(type="hologram"), said("user", "?"), said("assistant", "b")]
    (trace,), _ = read_rows(tmp_path, META, *rows)
    assert [s.inexact for s in trace.steps] == [[], ["attachment"]]


def test_parallel_calls_are_one_inference_and_sequential_calls_are_not(tmp_path):
    (trace,), _ = read_rows(
        tmp_path, META, said("user", "go"), call("a"), call("b"), output("b", "1"), output("a", "2"), call("c"),
        output("c", "3"), said("assistant", "done"), event("token_count", info=None), said("assistant", "more"),
    )  # fmt: skip
    assert [[c.id for c in trace.action_of(s).tool_calls] for s in trace.steps] == [["a", "b"], ["c"], [], []]
    assert [r.content for r in trace.steps[0].results] == ["2", "1"]


def test_a_logged_result_replaces_what_an_abort_stood_in_for(tmp_path):
    (trace,), _ = read_rows(
        tmp_path, META, call("a"), event("turn_aborted", reason="interrupted"), output("a", "aborted by user after 1s"),
        said("user", "again"), said("assistant", "ok"),
    )  # fmt: skip
    (result,) = trace.steps[0].results
    assert (result.content, result.status, result.source_ref.line) == (
        "aborted by user after 1s",
        Status.INTERRUPTED,
        4,
    )


def test_the_same_call_id_twice_and_results_of_nothing(tmp_path):
    (trace,), ledger = read_rows(
        tmp_path, META, output("z", "?"), call("a"), output("a", "1"), said("user", "x"), call("a"), output("a", "2"),
        output("a", "3"),
    )  # fmt: skip
    assert [r.content for s in trace.steps for r in s.results] == ["1", "2"]
    assert len({c.id for s in trace.steps for c in trace.action_of(s).tool_calls}) == 2
    assert ledger.skipped() == {"orphan_result": 2}


def test_a_result_that_comes_after_a_compaction_reaches_the_step_and_its_copy(tmp_path):
    replaced = [said("user", "go")["payload"], call("a")["payload"]]
    compacted = {"timestamp": "t", "type": "compacted", "payload": {"message": "", "replacement_history": replaced}}
    (trace,), _ = read_rows(
        tmp_path, META, said("user", "go"), call("a"), compacted, output("a", "late"), said("assistant", "done")
    )  # fmt: skip
    assert [r.content for r in trace.steps[0].results] == ["late"]
    assert [m.content for m in trace.state_of(trace.steps[1])] == ["Be brief.", "go", "", "late"]
    assert trace.steps[1].inexact == ["compaction"]


def test_unknown_types_are_counted_by_type(tmp_path):
    rows = [
        {"type": "brand_new", "payload": {}},
        item(type="hologram"),
        item(type=3),
        {"type": 4, "payload": {}},
        {"a": 1},
    ]
    (trace,), ledger = read_rows(tmp_path, META, said("assistant", "hi"), *rows, raw=b'{"type":"compac\n\n')
    assert ledger.skipped() == {
        "brand_new": 1, "hologram": 1, "malformed_record": 3, "cut_or_not_json": 1, "blank_line": 1,
    }  # fmt: skip
    assert [p.line for p in ledger.problems] == [5, 6, 7, 8]
    assert trace.extra["problems"][0]["line"] == 5


def test_steps_after_a_lost_line_are_not_exact(tmp_path):
    rest = b'{"type": "respo\n' + b"".join(
        json.dumps(row).encode() + b"\n" for row in (said("user", "?"), said("assistant", "b"))
    )
    (trace,), _ = read_rows(tmp_path, META, said("assistant", "a"), raw=rest)
    assert [s.inexact for s in trace.steps] == [[], ["damaged_line"]]


@pytest.mark.parametrize("name", ["features.jsonl", "bare_items.jsonl", "synthetic_escalation.jsonl"])
def test_damaged_copies_are_read_and_the_counts_add_up(name, tmp_path):
    assert agent_logs.survives(READER, (FOLDER / name).read_bytes(), tmp_path, range(60)) > 20


def test_every_real_rollout_has_one_step_per_token_count():
    """Codex writes a token_count with `info` when a response is complete: an independent count of inferences."""
    for path in agent_logs.corpus("codex"):
        (trace,), _ = agent_logs.read(READER, path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        payloads = [row["payload"] for row in rows if row["type"] == "response_item"]
        calls = [p for p in payloads if p["type"] == "function_call"]
        assert [c.id for s in trace.steps for c in trace.action_of(s).tool_calls] == [p["call_id"] for p in calls]
        spoken = [p for p in payloads if p["type"] == "message" and p["role"] == "assistant"]
        texts = [trace.action_of(s).content for s in trace.steps]
        assert [t for t in texts if t] == [p["content"][0]["text"] for p in spoken]
