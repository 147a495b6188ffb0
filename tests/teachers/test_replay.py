"""Replay: store, resume, invalidate, count. The oracle is the log of a real HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from composer_plugins.errors import TeacherError, TraceError
from composer_plugins.teachers.answers import partial_path
from composer_plugins.teachers.config import build_teachers, parse_teachers
from composer_plugins.teachers.replay import replay
from composer_plugins.traces.schema import Replay
from composer_plugins.traces.store import manifest_path, read_manifest, read_stage


def asked(server) -> list[str]:
    """What was asked, e.g. ["0", "1"], in the order of arrival."""
    return [body["messages"][1]["content"].split()[-1][:-1] for body in server.requests]


def teachers_for(server, **options):
    section = {"name": "a", "kind": "openai", "base_url": server.url, "model": "m", "max_retries": 0, "timeout_s": 5}
    return build_teachers(parse_teachers({"teachers": [section | options]}))


def test_all_answers_land_in_order_with_a_manifest(chat_server, states_file, tmp_path, reply):
    server = chat_server(lambda body, n: reply.completion(f"answer {body['messages'][1]['content']}"))
    states, out, seen = states_file(5), tmp_path / "out" / "replays.jsonl", []
    report = replay(
        states,
        [*teachers_for(server, samples=2), *teachers_for(server, name="b", model="n")],
        out,
        progress=lambda *step: seen.append(step),
    )
    found = list(read_stage(out, Replay))
    assert [(r.state_id, r.teacher, r.sample) for r in found] == [
        (f"t:{i}", t, s) for i in range(5) for t, s in (("a", 0), ("a", 1), ("b", 0))
    ]
    assert all(r.action.content == f"answer Show me file {r.state_id[2:]}." for r in found)
    assert report.written == 15 and report.teachers["a"].answered == 10 and not partial_path(out).exists()
    manifest = read_manifest(out)
    assert (manifest.read, manifest.used, manifest.written) == (5, 5, 15)
    assert seen[0] == ("a", 0, 10) and ("a", 10, 10) in seen and seen[-1] == ("b", 5, 5)


def test_a_second_run_asks_nothing_and_a_change_asks_only_what_it_changed(chat_server, states_file, tmp_path, reply):
    server = chat_server(lambda body, n: reply.completion("x"))
    states, out = states_file(3), tmp_path / "r.jsonl"

    def run(states=states, **options):
        before = len(server.requests)
        report = replay(states, [*teachers_for(server), *teachers_for(server, name="b", **options)], out)
        return len(server.requests) - before, report

    assert run()[0] == 6
    first = out.read_bytes()
    assert run()[0] == 0 and out.read_bytes() == first
    assert run(timeout_s=9, max_concurrency=2)[0] == 0
    count, report = run(temperature=0.5)
    assert count == 3 and report.stale == 3 and report.teachers["a"].reused == 3
    assert run(temperature=0.5, samples=2)[0] == 3
    count, report = run(states_file(5, "more.jsonl"), temperature=0.5, samples=2)
    assert count == 2 + 4, "only the two new states are asked"
    assert run(temperature=0.5, samples=2, weights_id="w")[0] == 0
    assert {r.weights_id for r in read_stage(out, Replay)} == {"model:m", "w"}, "a renamed identity takes effect"


def test_a_changed_state_is_asked_again(chat_server, states_file, make_state, tmp_path, reply):
    server = chat_server(lambda body, n: reply.completion("x"))
    out = tmp_path / "r.jsonl"
    replay(states_file(2), teachers_for(server), out)
    changed = make_state(1)
    changed.messages[0].content = "Another system prompt."
    replay(states_file([make_state(0), changed]), teachers_for(server), out)
    assert asked(server)[2:] == ["1"]


def test_failures_are_counted_stored_and_asked_again(chat_server, states_file, tmp_path, reply):
    def script(body, n):
        return reply.Reply(b"junk") if n == 1 else reply.completion("x")

    server = chat_server(script)
    states, out = states_file(3), tmp_path / "r.jsonl"
    report = replay(states, teachers_for(server, max_concurrency=1), out)
    assert report.teachers["a"].failed == {"malformed": 1} and report.teachers["a"].answered == 2
    assert [r.error is None for r in read_stage(out, Replay)] == [True, False, True]
    assert read_manifest(out).skipped == {"no_teacher_answered": 1}
    report = replay(states, teachers_for(server, max_concurrency=1), out)
    assert asked(server)[3:] == ["1"] and report.teachers["a"].reused == 2
    assert all(r.error is None for r in read_stage(out, Replay))


def test_a_teacher_that_fails_on_everything_is_an_error_and_keeps_the_others(chat_server, states_file, tmp_path, reply):
    bad = chat_server(lambda body, n: reply.Reply(b"junk"))
    good = chat_server(lambda body, n: reply.completion("x"))
    states, out = states_file(3), tmp_path / "r.jsonl"
    with pytest.raises(
        TeacherError, match=r"(?s)- bad: all 3 requests failed \(3 malformed\).*3 good answers are kept"
    ):
        replay(states, [*teachers_for(bad, name="bad"), *teachers_for(good, name="good")], out)
    assert not out.exists() and not manifest_path(out).exists()
    replay(states, teachers_for(good, name="good"), out)  # the user removes the bad one
    assert len(good.requests) == 3 and len(list(read_stage(out, Replay))) == 3


def test_a_dead_server_is_given_up_but_unaskable_states_are_not(chat_server, states_file, tmp_path, reply):
    down = chat_server(lambda body, n: reply.Reply(b"{}", 503))
    with pytest.raises(TeacherError, match=r"4 failures in a row, the last: server_error"):
        replay(states_file(40), teachers_for(down, max_concurrency=1), tmp_path / "a.jsonl", give_up_after=4)
    assert len(down.requests) == 4
    picky = chat_server(lambda body, n: reply.completion("x") if n == 39 else reply.Reply(b"{}", 400))
    report = replay(states_file(40), teachers_for(picky, max_concurrency=1), tmp_path / "b.jsonl", give_up_after=4)
    assert report.teachers["a"].failed == {"refused": 39}
    shaky = chat_server(lambda body, n: reply.completion("x") if n % 4 == 3 else reply.Reply(b"{}", 503))
    report = replay(states_file(40), teachers_for(shaky, max_concurrency=1), tmp_path / "c.jsonl", give_up_after=4)
    assert report.teachers["a"].answered == 10, "three failures, then an answer: not given up"


def test_a_refused_key_keeps_what_had_been_answered(chat_server, states_file, tmp_path, reply):
    server = chat_server(lambda body, n: reply.completion("x") if n < 6 else reply.Reply(b"{}", 401))
    states, out = states_file(10), tmp_path / "r.jsonl"
    with pytest.raises(TeacherError, match="6 good answers are kept"):
        replay(states, teachers_for(server, max_concurrency=1), out)
    assert len(server.requests) == 7
    server.script = lambda body, n: reply.completion("x")
    replay(states, teachers_for(server, max_concurrency=1), out)
    assert sorted(map(int, asked(server)[7:])) == [6, 7, 8, 9]


@pytest.mark.parametrize("junk", [b'{"state_id": "t:1", "tea', b"\x00\xff\x00", b'{"state_id": "t:1"}'])
def test_a_half_written_line_is_dropped_and_asked_again(chat_server, states_file, tmp_path, reply, junk):
    server = chat_server(lambda body, n: reply.completion("x") if n < 2 else reply.Reply(b"{}", 401))
    states, out = states_file(4), tmp_path / "r.jsonl"
    with pytest.raises(TeacherError):
        replay(states, teachers_for(server, max_concurrency=1), out)
    with partial_path(out).open("ab") as file:
        file.write(junk)
    server.script = lambda body, n: reply.completion("y") if n == 3 else reply.Reply(b"{}", 401)
    with pytest.raises(TeacherError, match="3 good answers are kept"):  # interrupted again, right after the junk
        replay(states, teachers_for(server, max_concurrency=1), out)
    server.script = lambda body, n: reply.completion("y")
    report = replay(states, teachers_for(server), out)
    assert report.dropped == 0 and asked(server)[3:] == ["2", "3", "3"]
    assert [r.action.content for r in read_stage(out, Replay)] == ["x", "x", "y", "y"]


def test_damage_in_the_middle_costs_only_its_line(chat_server, states_file, tmp_path, reply):
    server = chat_server(lambda body, n: reply.completion("x") if n < 3 else reply.Reply(b"{}", 401))
    states, out = states_file(4), tmp_path / "r.jsonl"
    with pytest.raises(TeacherError):
        replay(states, teachers_for(server, max_concurrency=1), out)
    lines = partial_path(out).read_bytes().splitlines(keepends=True)
    partial_path(out).write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    server.script = lambda body, n: reply.completion("y")
    report = replay(states, teachers_for(server), out)
    assert report.dropped == 1 and sorted(asked(server)[4:]) == ["1", "3"]


def test_wrong_files_are_refused_and_left_alone(chat_server, states_file, make_state, tmp_path, reply):
    server = chat_server(lambda body, n: reply.completion("x"))
    states = states_file(2)
    content = states.read_bytes()
    other = states_file(1, "other.jsonl")
    mine = tmp_path / "notes.jsonl"
    mine.write_text("my notes\n")
    for path in (states, other, mine):
        with pytest.raises(TraceError):
            replay(states, teachers_for(server), path)
    assert states.read_bytes() == content and mine.read_text() == "my notes\n" and not server.requests
    with pytest.raises(TraceError, match="no states"):
        replay(states_file([], "none.jsonl"), teachers_for(server), tmp_path / "r.jsonl")
    with pytest.raises(TraceError, match="more than once"):
        replay(states_file([make_state(1)] * 2, "twice.jsonl"), teachers_for(server), tmp_path / "r.jsonl")


def test_two_runs_on_one_output(chat_server, states_file, tmp_path, reply):
    outer = []

    def script(body, n):
        if n == 0:
            with pytest.raises(TraceError, match="another replay is writing it"):
                replay(states, teachers_for(server), out)
            outer.append(True)
        return reply.completion("x")

    server = chat_server(script)
    states, out = states_file(1), tmp_path / "r.jsonl"
    replay(states, teachers_for(server), out)
    assert outer == [True]


def test_kill_9_in_the_middle_and_resume(chat_server, states_file, tmp_path, reply):
    """A real process is killed while it waits for the server; the next run asks only for what is not stored."""

    def script(body, n):
        answer = reply.completion(f"n{n}")
        answer.delay = 30 if n >= 7 and not resumed else 0
        return answer

    resumed = []
    server = chat_server(script)
    states, out, config = states_file(12), tmp_path / "r.jsonl", tmp_path / "teachers.yaml"
    section = {"name": "a", "kind": "openai", "base_url": server.url, "model": "m", "max_concurrency": 1}
    config.write_text(json.dumps({"teachers": [section | {"api_key_env": "REPLAY_TEST_KEY"}]}))
    key = "sk-kill-test-777"
    command = [sys.executable, "-c", "import typer; from composer_plugins.cli.replay import replay; typer.run(replay)"]
    command += [str(states), "-o", str(out), "--teachers", str(config)]
    environment = os.environ | {"REPLAY_TEST_KEY": key}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(server.requests) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(server.requests) == 8
    assert not out.exists() and not manifest_path(out).exists(), "nothing unfinished may look finished"
    stored = [json.loads(line)["state_id"] for line in partial_path(out).read_text().splitlines()]
    assert stored == ["t:0", "t:1", "t:2", "t:3"], "a batch of 4 was on disk"

    resumed.append(True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in asked(server)[8:]] == list(range(4, 12))
    found = list(read_stage(out, Replay))
    assert [r.action.content for r in found[:4]] == ["n0", "n1", "n2", "n3"] and len(found) == 12
    everything = "".join(p.read_text() for p in Path(tmp_path).rglob("*") if p.is_file())
    assert key not in everything + done.stdout + done.stderr
    assert server.authorizations[-1] == f"Bearer {key}"


def test_errors_first_keeps_the_failed_states_under_a_limit(chat_server, states_file, tmp_path, reply):
    from composer_plugins.traces.schema import State, Status
    from composer_plugins.traces.store import Manifest, write_stage

    server = chat_server(lambda body, n: reply.completion("x"))
    states = list(read_stage(states_file(5), State))
    for i in (3, 4):
        states[i].status = Status.ERROR
    path = tmp_path / "some_failed.jsonl"
    write_stage(path, states, Manifest(stage="hints", record="State", written=0))
    out = tmp_path / "r.jsonl"
    replay(path, teachers_for(server), out, limit=3, errors_first=True)
    assert [r.state_id for r in read_stage(out, Replay)] == ["t:3", "t:4", "t:0"]
    assert sorted(asked(server)) == ["0", "3", "4"]
