"""The real session replayed against itself: the log is the oracle."""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import socket
import subprocess

import pytest

from composer_plugins.envs import RecordedWorkspace, Recordings, ToolError
from composer_plugins.envs.tool_method import tool_names
from composer_plugins.traces.schema import Status

#: Recorded calls of the shipped session by (tool, succeeded); counted in the log by hand.
EXPECTED = {
    ("Bash", True): 32, ("Bash", False): 3, ("Edit", True): 16, ("Edit", False): 7, ("Glob", True): 1,
    ("Grep", True): 3, ("Read", True): 21, ("TodoWrite", True): 8, ("Write", True): 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(real_trace):
    return RecordedWorkspace(Recordings([real_trace]), max_result_chars=1_000_000)


def recorded_calls(trace):
    for step in trace.steps:
        results = {result.call_id: result for result in step.results}
        for call in trace.action_of(step).tool_calls:
            yield step, call, results[call.id]


def replay(workspace, trace):
    """Yield (call, result, shown text, succeeded); the calls of one step run one after the other."""
    current = None
    for step, call, result in recorded_calls(trace):
        if step.index != current:
            workspace.reset(trace_id=trace.id, step=step.index)
            current = step.index
        try:
            shown, succeeded = getattr(workspace, call.name)(**call.arguments), True
        except ToolError as error:
            shown, succeeded = str(error), False
        yield call, result, shown, succeeded


def plain(recorded: str) -> str:
    """A recorded result without what the agent program wraps around it."""
    text = recorded.partition("\n\n<system-reminder>\nWhenever you read a file")[0]
    return re.sub(r"</?tool_use_error>", "", text).rstrip("\n")


def test_every_recorded_call_ends_as_recorded_with_the_same_text(workspace, real_trace):
    counted: dict = {}
    for call, result, shown, succeeded in replay(workspace, real_trace):
        assert succeeded == (result.status is Status.OK), (call, shown)
        assert plain(result.content) in shown, (call, shown)
        if succeeded:
            assert shown.rstrip("\n") == plain(result.content), call
        counted[call.name, succeeded] = counted.get((call.name, succeeded), 0) + 1
    assert counted == EXPECTED


def test_failed_edits_come_from_the_files_and_not_from_the_record(workspace, real_trace, monkeypatch):
    monkeypatch.setattr(RecordedWorkspace, "_find", lambda *_, **__: None)
    failures = [
        (plain(result.content).split("\n")[0], shown.split("\n")[0])
        for call, result, shown, succeeded in replay(workspace, real_trace)
        if call.name in ("Edit", "Write") and not succeeded
    ]
    assert len(failures) == 7
    assert all(recorded == shown for recorded, shown in failures)
    assert {recorded for recorded, _ in failures} == {
        "String to replace not found in file.",
        "File has not been read yet. Read it first before writing to it.",
    }


def test_searches_in_memory_agree_with_the_recorded_ones(workspace, real_trace):
    compared = 0
    for step, call, result in recorded_calls(real_trace):
        if call.name == "Grep":
            workspace.reset(trace_id=real_trace.id, step=step.index)
            workspace.Write("/somewhere/else.txt", "")  # from here on recorded searches are not trusted
            assert workspace.Grep(**call.arguments) == result.content
            compared += 1
    assert compared == 3


def test_another_action_than_the_recorded_one_gets_a_real_answer(workspace, real_trace):
    step, call, _ = next((s, c, r) for s, c, r in recorded_calls(real_trace) if "not been read" in r.content)
    path = call.arguments["file_path"]
    workspace.reset(trace_id=real_trace.id, step=step.index)
    with pytest.raises(ToolError, match="has not been read yet"):
        workspace.Edit(path, '"permanent": true', '"permanent": false')
    assert '"redirects"' in workspace.Read(path)
    with pytest.raises(ToolError, match=r"Found \d+ matches"):
        workspace.Edit(path, '"permanent": true', '"permanent": false')
    workspace.Edit(path, '"permanent": true', '"permanent": false', replace_all=True)
    assert '"permanent": true' not in workspace.files[path]


def test_nothing_touches_disk_network_or_processes(real_trace, monkeypatch):
    def refuse(*args, **_):
        raise AssertionError(f"outside access: {args}")

    with monkeypatch.context() as patch:
        for module, name in (
            (builtins, "open"), (os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir"), (os, "system"),
            (subprocess, "Popen"), (socket, "socket"),
        ):  # fmt: skip
            patch.setattr(module, name, refuse)
        workspace = RecordedWorkspace([real_trace])
        answered = sum(1 for _ in replay(workspace, real_trace))
        for name in tool_names(RecordedWorkspace):
            with contextlib.suppress(ToolError, TypeError):
                assert "root:" not in getattr(workspace, name)("/etc/passwd")
    assert answered == sum(EXPECTED.values())
