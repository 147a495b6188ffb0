"""Conversations of OpenHands that lie in a folder with one file for each event, as both versions write them."""

from __future__ import annotations

import json
import random

import agent_logs
import msgspec
import pytest

from composer_plugins.errors import TraceError
from composer_plugins.traces.ingest import ingest
from composer_plugins.traces.openhands import READER
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import read_manifest, read_stage

FOLDER = agent_logs.DATA / "openhands"


def call(number):
    """Action and observation of one step of V1."""
    return [
        {"kind": "ActionEvent", "id": f"aaaa{number:04}", "source": "agent", "llm_response_id": f"r{number}",
         "tool_name": "terminal", "tool_call_id": f"c{number}", "thought": [{"type": "text", "text": f"step {number}"}],
         "tool_call": {"id": f"c{number}", "name": "terminal", "arguments": json.dumps({"command": f"echo {number}"})}},
        {"kind": "ObservationEvent", "id": f"bbbb{number:04}", "source": "environment", "tool_call_id": f"c{number}",
         "action_id": f"aaaa{number:04}", "observation": {"content": [{"type": "text", "text": f"{number}"}]}},
    ]  # fmt: skip


EVENTS = [
    {"kind": "SystemPromptEvent", "id": "dddd0000", "source": "agent", "system_prompt": {"text": "You are."}, "tools": []},
    {"kind": "MessageEvent", "id": "dddd0001", "source": "user", "llm_message": {"role": "user", "content": "Count."}},
    *[event for number in range(6) for event in call(number)],
]  # fmt: skip


def v1_folder(tmp_path, events=EVENTS):
    folder = tmp_path / "conversations" / "c0ffee" / "events"
    folder.mkdir(parents=True)
    for place, event in enumerate(events):
        (folder / f"event-{place:05}-{event['id']}.json").write_text(json.dumps(event))
    state = {"id": "c0ffee", "agent": {"kind": "Agent", "llm": {"model": "openai/gpt-x"}}, "workspace": {}}
    (folder.parent / "base_state.json").write_text(json.dumps(state | {"execution_status": "finished"}))
    return folder


def traces_of(path, tmp_path, **how):
    output = tmp_path / "traces.jsonl"
    report = ingest([path], output, **how)
    return list(read_stage(output, Trace)), report, read_manifest(output)


def test_a_folder_of_v1_events_is_one_conversation(tmp_path):
    folder = v1_folder(tmp_path)
    (trace,), report, manifest = traces_of(tmp_path / "conversations", tmp_path)
    lines = tmp_path / "stream.jsonl"
    lines.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    (stream,), _ = agent_logs.read(READER, lines)
    assert msgspec.to_builtins(trace.messages) == msgspec.to_builtins(stream.messages)
    assert (trace.id, len(trace.steps), manifest.read) == ("c0ffee", 6, len(EVENTS))
    assert [s.inexact for s in trace.steps] == [s.inexact for s in stream.steps] == [[]] * 6
    assert {s.model for s in trace.steps} == {"openai/gpt-x"}
    names = [f"event-{place:05}-{event['id']}.json" for place, event in enumerate(EVENTS)]
    assert [s.source_ref.file.rsplit("/")[-1] for s in trace.steps] == names[2::2]
    assert [s.results[0].source_ref.file.rsplit("/")[-1] for s in trace.steps] == names[3::2]
    assert {s.source_ref.line for s in trace.steps} == {1}
    assert sorted(report.companions.values()) == ["conversation_state", *["part_of_a_log"] * (len(EVENTS) - 1)]
    assert report.refused == {}
    assert set(manifest.inputs) == {str(folder / name) for name in names}  # a change of any of them is seen


def test_a_folder_of_v0_events_and_its_cache_is_one_conversation(tmp_path):
    (row,) = [json.loads(line) for line in (FOLDER / "v0_flat_2024.jsonl").read_text().splitlines()]
    events = [event | {"id": place} for place, event in enumerate(row["history"])]
    for event in events:  # with ids, an observation names its action
        if "observation" in event:
            event["cause"] = event["id"] - 1
    home = tmp_path / "sessions" / "s1"
    (home / "events").mkdir(parents=True)
    (home / "event_cache").mkdir()
    late = [dict(event, id=place, source="user", action="message", args={"content": f"more {place}"})
            for place, event in enumerate([{}] * 4, len(events))]  # fmt: skip
    for event in [*events, *late]:
        (home / "events" / f"{event['id']}.json").write_text(json.dumps(event))
    (home / "event_cache" / "0-8.json").write_text(json.dumps(events))
    (home / "metadata.json").write_text(json.dumps({"conversation_id": "s1", "selected_repository": None}))
    (trace,), report, manifest = traces_of(tmp_path / "sessions", tmp_path)
    assert (trace.id, manifest.read, len(trace.steps)) == ("s1", 12, 4)
    assert [m.content for m in trace.messages[-4:]] == ["more 8", "more 9", "more 10", "more 11"]  # 10 after 9
    assert sorted(report.companions.values()) == ["conversation_metadata", *["part_of_a_log"] * 12]


def test_a_damaged_event_file_is_named_and_spoils_what_follows(tmp_path):
    folder = v1_folder(tmp_path)
    broken = folder / "event-00005-bbbb0001.json"
    broken.write_text(broken.read_text()[:40])
    (trace,), report, manifest = traces_of(folder.parent, tmp_path)
    assert (manifest.read, manifest.skipped["cut_or_not_json"]) == (len(EVENTS), 1)
    (problem,) = [p for p in report.ledger.problems if p.reason == "cut_or_not_json"]
    assert (problem.file, problem.line) == (str(broken), 1)
    assert ["damaged_line" in s.inexact for s in trace.steps] == [False, False, True, True, True, True]
    # the event that is to come first is gone: the next one stands for the conversation, and nothing is lost silently
    (folder / "event-00000-dddd0000.json").write_text("{")
    (trace,), report, manifest = traces_of(folder.parent, tmp_path)
    assert (manifest.read, len(trace.steps)) == (len(EVENTS), 6)
    assert [path.rsplit("/")[-1] for path in report.refused] == ["event-00000-dddd0000.json"]


def test_one_event_alone_is_refused_with_the_fix(tmp_path):
    folder = v1_folder(tmp_path)
    with pytest.raises(TraceError, match=f"Pass their folder: {folder}"):
        ingest([folder / "event-00003-bbbb0000.json"], tmp_path / "traces.jsonl")
    assert not (tmp_path / "traces.jsonl").exists()


def test_files_with_such_names_that_hold_whole_logs_stay_logs_of_their_own(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_text(json.dumps(EVENTS[: 2 + 2 * number]))
    _, report, manifest = traces_of(tmp_path, tmp_path)
    assert (report.traces, manifest.read, report.companions) == (2, 10, {})


def test_whatever_is_damaged_every_file_and_every_event_is_accounted_for(tmp_path):
    folder = v1_folder(tmp_path)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for seed in range(60):
        rng = random.Random(seed)
        for path in rng.sample(sorted(whole), 3):
            data = bytearray(whole[path])
            place = rng.randrange(len(data))
            if rng.random() < 0.5:
                del data[place:]
            else:
                data[place] = rng.randrange(256)
            path.write_bytes(data)
        traces, report, manifest = traces_of(folder.parent, tmp_path)
        files = [str(file.path) for file in report.read_files] + [*report.companions, *report.refused]
        assert sorted(files) == sorted(str(path) for path in folder.parent.rglob("*.json")), seed
        assert manifest.read >= len(EVENTS) and manifest.read == manifest.used + sum(manifest.skipped.values()), seed
        assert {s.source_ref.file for t in traces for s in t.steps} <= {str(path) for path in whole}
        for path, data in whole.items():
            path.write_bytes(data)


def test_several_processes_read_folders_too(tmp_path):
    folder = v1_folder(tmp_path)
    (one,), _, _ = traces_of(folder.parent, tmp_path)
    (two,), report, _ = traces_of(folder.parent, tmp_path, jobs=2)
    assert msgspec.json.encode(one) == msgspec.json.encode(two)
    assert len(report.companions) == len(EVENTS)
