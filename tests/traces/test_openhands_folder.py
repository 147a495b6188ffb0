"""Conversations of OpenHands that lie in a folder with one file for each event, as both versions write them."""

from __future__ import annotations

import json
import os
import random
import signal

import agent_logs
import msgspec
import pytest

from composer_plugins.errors import TraceError
from composer_plugins.traces import openhands_folder
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


def counted_once(report, folder):
    """Every file is read, set aside or refused, once; every record of a file is used or set aside."""
    files = [str(file.path) for file in report.read_files] + [*report.companions, *report.refused]
    assert sorted(files) == sorted(str(path) for path in folder.rglob("*") if path.is_file())
    for file in report.read_files:
        assert file.read == file.used + sum(file.skipped.values())


def as_written(event, **more):
    """An event of V1 in the order in which pydantic writes it: what is computed, its kind, comes last."""
    rest = {key: value for key, value in event.items() if key not in ("id", "source", "kind")}
    start = {"id": event["id"], "timestamp": "2026-01-01T00:00:00", "source": event["source"]}
    return start | rest | more | {"kind": event["kind"]}


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
    assert report.refused == {} and str(broken) in manifest.inputs  # it is part of the log, and of that only
    # the event that is to come first is gone: the next one stands for the conversation, and nothing is lost silently
    for start in ("{", "", "\0" * 40):
        (folder / "event-00000-dddd0000.json").write_text(start)
        (trace,), report, manifest = traces_of(folder.parent, tmp_path)
        assert (manifest.read, len(trace.steps), report.refused) == (len(EVENTS), 6, {})
        assert report.companions[str(folder / "event-00000-dddd0000.json")] == "part_of_a_log"
        assert all("damaged_line" in s.inexact for s in trace.steps)  # what was lost may be the system prompt
        counted_once(report, folder.parent)


@pytest.mark.parametrize(("kind", "place"), [(None, 4), ("SomeNewEvent", 4), ("new", 4), ("new", 0), (None, 0)])
def test_an_event_of_an_unknown_kind_is_set_aside_and_spoils_what_follows(tmp_path, kind, place):
    events = [dict(event) for event in EVENTS]
    events[place:place] = [{"id": "eeee0000", "source": "environment"} | ({"kind": kind} if kind else {})]
    folder = v1_folder(tmp_path, events)
    (trace,), report, manifest = traces_of(folder.parent, tmp_path)
    assert (manifest.read, manifest.skipped, report.refused) == (len(events), {"unknown_record": 1}, {})
    assert [s.inexact for s in trace.steps] == [["damaged_line"] if place == 0 else []] + [["damaged_line"]] * 5
    counted_once(report, folder.parent)


@pytest.mark.parametrize("name", ["event-00003-bbbb0000.json", "event-00000-dddd0000.json"])
def test_one_event_alone_is_refused_with_the_fix(tmp_path, name):
    folder = v1_folder(tmp_path)
    with pytest.raises(TraceError, match=f"Pass their folder: {folder}"):
        ingest([folder / name], tmp_path / "traces.jsonl")
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
        counted_once(report, folder.parent)
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


LARGE = "x" * 100_000  # the kind lies behind the part of a file by which its format is found


@pytest.mark.parametrize("large", [[0], [3], [5, 7], range(len(EVENTS))])
def test_large_events_are_events(tmp_path, large):
    events = [as_written(event, **({"extra": LARGE} if place in large else {})) for place, event in enumerate(EVENTS)]
    folder = v1_folder(tmp_path, events)
    (trace,), report, manifest = traces_of(folder.parent, tmp_path)
    assert (trace.id, len(trace.steps), manifest.read, report.refused) == ("c0ffee", 6, len(EVENTS), {})
    assert [file.path.name for file in report.read_files] == ["event-00000-dddd0000.json"]
    assert set(manifest.inputs) == {str(path) for path in folder.iterdir()}
    assert not any(step.inexact for step in trace.steps)
    counted_once(report, folder.parent)


def test_a_large_event_of_v0_and_one_without_the_usual_start(tmp_path):
    start = {"timestamp": "2026-01-01T00:00:00"}
    said = {"action": "message", "args": {"content": "hi"}}
    for place, source in enumerate(("user", "agent", "user", "agent")):
        event = {"id": place} | start | {"source": source, "message": LARGE if place != 1 else "hi"} | said
        if place == 2:
            event = {"message": LARGE} | event
        (tmp_path / f"{place}.json").write_text(json.dumps(event))
    (trace,), report, manifest = traces_of(tmp_path, tmp_path / "out")
    assert (len(trace.messages), manifest.read, manifest.used, report.refused) == (4, 4, 4, {})
    assert [file.path.name for file in report.read_files] == ["0.json"]


def test_one_large_event_is_known_by_its_start(tmp_path):
    lines = [json.dumps(as_written(event, extra=LARGE)) for event in EVENTS]
    assert READER.sniff(lines[2].encode()[:65536])
    assert READER.sniff("\n".join(lines).encode()[:65536])  # an event stream
    other = {"id": "1", "timestamp": "now", "source": "user"}
    assert not READER.sniff(json.dumps(other | {"text": LARGE} | {"source": "shop"}).encode()[:65536])
    assert not READER.sniff("\n".join([json.dumps(other)] * 2000).encode()[:65536])  # rows that are whole


def test_the_files_of_a_folder_are_looked_at_a_few_times_each(tmp_path, monkeypatch):
    """Each file asks which conversation it belongs to: that must not look at all files again."""
    events = [{"text": LARGE[:70_000], **event} for event in EVENTS[:1] * 40] + EVENTS
    v1_folder(tmp_path, [event | {"id": f"{place:08}"} for place, event in enumerate(events)])
    looked, peek = [], openhands_folder.peek
    monkeypatch.setattr(openhands_folder, "peek", lambda head: looked.append(1) or peek(head))
    (trace,), report, _ = traces_of(tmp_path / "conversations", tmp_path)
    assert len(looked) <= 4 * len(events)
    counted_once(report, tmp_path / "conversations")


def test_only_so_many_folders_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(openhands_folder, "_MOST_FILES", 3 * len(EVENTS))
    for number in range(6):
        v1_folder(tmp_path / str(number))
    assert traces_of(tmp_path, tmp_path / "out")[1].traces == 6
    assert sum(len(folder.stamps) for folder in openhands_folder._known.values()) <= 3 * len(EVENTS)


def test_a_conversation_that_changed_in_place_is_looked_at_again(tmp_path):
    """An event that is written anew leaves the time of its folder as it was."""
    folder = v1_folder(tmp_path)
    first = folder / "event-00000-dddd0000.json"
    whole = first.read_text()
    for text, read_through in ((whole, first.name), ("{", "event-00001-dddd0001.json"), (whole, first.name)):
        first.write_text(text)
        _, report, manifest = traces_of(folder.parent, tmp_path)
        assert [file.path.name for file in report.read_files] == [read_through]
        assert manifest.read == len(EVENTS)
        counted_once(report, folder.parent)


def test_a_first_event_that_is_repaired_in_place_is_read_once(tmp_path):
    """By its name `10.json` is asked before `9.json`, and was the first event until just now."""
    folder = tmp_path / "talk"
    folder.mkdir()
    for place, event in enumerate(EVENTS, 9):
        (folder / f"{place}.json").write_text(json.dumps(event))
    for text, read_through in (("{", "10.json"), (json.dumps(EVENTS[0]), "9.json")):
        (folder / "9.json").write_text(text)
        _, report, manifest = traces_of(folder, tmp_path)
        assert [file.path.name for file in report.read_files] == [read_through]
        assert (manifest.read, report.traces) == (len(EVENTS), 1)
        counted_once(report, folder)


def test_a_pipe_or_a_giant_beside_the_events_is_left_alone(tmp_path):
    folder = v1_folder(tmp_path)
    state = folder.parent / "base_state.json"
    whole = state.read_bytes()
    state.unlink()
    os.mkfifo(state)
    os.mkfifo(folder / "event-00099-ffff.json")

    def waited(*_):
        raise AssertionError("the reader waits for somebody who writes to a pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    try:
        (trace,), report, manifest = traces_of(folder.parent, tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert (len(trace.steps), trace.steps[0].model, manifest.read) == (6, None, len(EVENTS))
    counted_once(report, folder.parent)
    state.unlink()
    with state.open("wb") as file:
        file.write(whole + b" " * 33 * 2**20)
    (trace,), report, _ = traces_of(folder.parent, tmp_path)
    assert trace.steps[0].model is None


def test_logs_of_their_own_between_the_events_are_read_once(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    for place, event in enumerate(EVENTS):
        (folder / f"{place}.json").write_text(json.dumps(event))
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [{"kind": "MessageEvent", "id": f"x{i}", "source": source, "llm_message": {"role": role, "content": "hi"}}
             for i, (source, role) in enumerate([("user", "user"), ("agent", "assistant")])]  # fmt: skip
    (folder / "20.json").write_text(json.dumps(other))  # a list of events
    (folder / "21.json").write_text(json.dumps(chat))  # another format
    (folder / "22.json").write_text(json.dumps({"note": "no log at all"}))
    (folder / "23.json").write_text("\n".join(json.dumps(event) for event in other))  # JSON Lines
    (folder / "24.json").write_text(json.dumps({"messages": chat})[:-1])  # another format, cut
    (folder / "25.json").write_text(json.dumps(EVENTS[-1] | {"kind": "of a plugin"}))  # an event that nobody knows
    (folder / "26.json").write_text('[{"note": "a list that nobody kno')
    _, report, manifest = traces_of(folder, tmp_path)
    found = {file.path.name: (file.format, file.read) for file in report.read_files}
    own = {"20.json": ("openhands", 2), "21.json": ("openai_messages", 2), "23.json": ("openhands", 2)}
    assert {name: found[name] for name in own} == own
    assert found["0.json"] == ("openhands", len(EVENTS) + 1)
    assert found["24.json"][0] == "openai_messages"
    assert [path.rsplit("/")[-1] for path in report.refused] == ["22.json", "26.json"]
    assert set(report.companions) == {str(folder / f"{place}.json") for place in (*range(1, len(EVENTS)), 25)}
    counted_once(report, folder)
    assert manifest.read == sum(file.read for file in report.read_files)


@pytest.mark.parametrize(("inside", "model"), [("metadata.json", "right"), (None, None)])
def test_a_folder_without_events_in_its_name_has_its_description_beside_them(tmp_path, inside, model):
    folder = tmp_path / "above" / "talk"
    folder.mkdir(parents=True)
    for place, event in enumerate(EVENTS):
        (folder / f"{place}.json").write_text(json.dumps(event))
    (folder.parent / "metadata.json").write_text(json.dumps({"llm_model": "of another conversation"}))
    if inside:
        (folder / inside).write_text(json.dumps({"llm_model": "right"}))
    (trace,), _, _ = traces_of(folder, tmp_path)
    assert (trace.id, {step.model for step in trace.steps}) == ("talk", {model})


def test_files_that_only_belong_to_a_log_are_refused_with_a_reason(tmp_path):
    events = [{"id": place, "timestamp": "t", "source": source, "message": "hi", "action": "message", "args": {}}
              for place, source in enumerate(("user", "agent"))]  # fmt: skip
    for name, value in (("events/0", events[0]), ("events/1", events[1]), ("event_cache/0-25", events)):
        (tmp_path / "s1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s1" / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(TraceError, match=r"0-25.json is read with the first file of its log.*pass the folder above"):
        ingest([tmp_path / "s1" / "event_cache"], tmp_path / "traces.jsonl")
    v1_folder(tmp_path)
    for path in (tmp_path / "conversations").rglob("event-*"):
        path.unlink()
    with pytest.raises(TraceError, match=r"base_state.json is no log \(conversation state\)"):
        ingest([tmp_path / "conversations"], tmp_path / "traces.jsonl")


def test_a_damaged_event_alone_is_refused_with_the_fix_too(tmp_path):
    folder = v1_folder(tmp_path)
    (folder / "event-00003-bbbb0000.json").write_text("{")
    with pytest.raises(TraceError, match=f"Pass their folder: {folder}"):
        ingest([folder / "event-00003-bbbb0000.json"], tmp_path / "traces.jsonl")
