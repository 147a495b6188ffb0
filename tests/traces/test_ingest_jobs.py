"""`ingest` with several processes: the same bytes as with one, and clear ends when something goes wrong."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from log_lines import Log, call, text

from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.scrub import Scrubber
from composer_plugins.traces.ingest import ingest
from composer_plugins.traces.ledger import MAX_PROBLEMS, Ledger, Problem
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import manifest_path, read_stage

DATA = Path(__file__).parent / "data"
SALT = b"a salt for tests only"


@pytest.fixture
def mixed(tmp_path):
    """Formats, damage, files that are no log, copies, one session id twice, secrets in several files."""
    folder = tmp_path / "logs"
    folder.mkdir()
    for source in (
        DATA / "v2.1.17_headless.jsonl",
        DATA / "task_non_sdk.jsonl",
        *sorted((DATA / "codex").glob("*.jsonl")),
    ):
        (folder / f"a-{source.name}").write_bytes(source.read_bytes())
        (folder / f"z-{source.name}").write_bytes(source.read_bytes())  # every step of it is a copy
    whole = (DATA / "v1.0.35_inline_sidechain.jsonl").read_bytes()
    (folder / "cut.jsonl").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.jsonl").write_bytes(whole.replace(b'"type"', b'"ty\xffpe"', 3))
    (folder / "notes.txt").write_text("no log")
    (folder / "empty.jsonl").write_text("")
    for number in range(3):
        log = Log("one-session")  # the same id in three files
        log.user(f"PASSWORD=hunter2hunter{number % 2} mail jane@corp.dev in /home/jane/x")
        log.assistant(call(f"toolu_0123456789abcdef_{number}", command="ls"), id=f"m{number}")
        log.result(f"toolu_0123456789abcdef_{number}", "/home/jane/x")
        log.assistant(text("done"), id=f"n{number}")
        log.write(folder / f"s{number}.jsonl")
    fork = Log("forked")  # another id, the same calls: a copy that keeps its name
    fork.user("go on")
    fork.assistant(call("toolu_0123456789abcdef_0", command="ls"), id="m0")
    fork.result("toolu_0123456789abcdef_0", "/home/jane/x")
    fork.write(folder / "t.jsonl")
    return folder


def run(folder, output, jobs):
    seen = []
    report = ingest([folder], output, jobs=jobs, scrubber=Scrubber(salt=SALT), progress=lambda *args: seen.append(args))
    return output.read_bytes(), manifest_path(output).read_bytes(), report, seen


@pytest.mark.parametrize("jobs", [2, 5])
def test_the_number_of_processes_changes_nothing(mixed, tmp_path, jobs):
    data, manifest, one, seen = run(mixed, tmp_path / "one/t.jsonl", 1)
    assert one.copied_steps > 5 and one.renamed > 3 and one.refused and one.ledger.problems.damage > 1
    assert b"[SECRET:password:" in data and b"jane" not in data
    more_data, more_manifest, more, more_seen = run(mixed, tmp_path / "more/t.jsonl", jobs)
    assert more_data == data
    assert more_manifest == manifest
    assert (more, more_seen) == (one, seen)
    assert list(more.ledger.problems) == list(one.ledger.problems)
    assert more.ledger.problems.total == one.ledger.problems.total
    assert sorted(p.name for p in (tmp_path / "more").iterdir()) == ["t.jsonl", "t.jsonl.manifest.json"]
    assert all(trace.id for trace in read_stage(tmp_path / "more/t.jsonl", Trace))


def test_without_a_scrubber_too(mixed, tmp_path):
    for jobs in (1, 2):
        ingest([mixed], tmp_path / f"{jobs}.jsonl", jobs=jobs)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_named_file_that_is_damaged_is_the_same_error(mixed, tmp_path):
    messages = []
    for jobs in (1, 2):
        with pytest.raises(TraceError) as error:
            ingest([mixed / "s0.jsonl", mixed / "cut.jsonl"], tmp_path / "t.jsonl", jobs=jobs)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "is damaged in 1 place" in messages[0]
    assert not [p for p in tmp_path.iterdir() if p != mixed]


def test_jobs_below_one_and_readers_of_ones_own_are_refused(mixed, tmp_path):
    with pytest.raises(ConfigError, match="jobs of 1 or more"):
        ingest([mixed], tmp_path / "t.jsonl", jobs=0)


def test_the_places_of_a_ledger_are_sent_with_it():
    ledger = Ledger(read=2, used=1, **{"skipped:glued": 1})
    for number in range(MAX_PROBLEMS + 3):
        ledger.problems.append(Problem("f", number, "glued" if number % 2 else "odd", "x"))
    again = pickle.loads(pickle.dumps(ledger))
    assert (again, list(again.problems)) == (ledger, list(ledger.problems))
    assert (again.problems.total, again.problems.damage) == (ledger.problems.total, ledger.problems.damage)


SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    from composer_plugins.errors import TraceError
    from composer_plugins.traces.ingest import ingest

    class Cleaner:
        def scrub_trace(self, trace):
            {body}
            return trace
        def scrub_manifest(self, manifest): pass
        def take_report(self): return None
        def add_report(self, report): pass

    if __name__ == "__main__":
        try:
            ingest([sys.argv[1]], sys.argv[2], jobs=2, scrubber=Cleaner())
        except TraceError as error:
            print("ERROR", error)
"""


def start(tmp_path, folder, body) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(body=body)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/t.jsonl").write_text("earlier")
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out/t.jsonl")]
    # A test run in the background of a script ignores Ctrl-C, and its children would inherit that.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def left_behind(tmp_path) -> list[str]:
    assert (tmp_path / "out/t.jsonl").read_text() == "earlier"
    return [p.name for p in (tmp_path / "out").iterdir() if p.name != "t.jsonl"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("if trace.session_id == 'one-session': os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        ("if trace.session_id == 'one-session': os._exit(7)", "exit code 7"),
        ("if trace.session_id == 'one-session': {}['x']", "failed with KeyError"),
    ],
)
def test_a_process_that_dies_is_a_clear_error(mixed, tmp_path, body, words):
    process = start(tmp_path, mixed, body)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith("ERROR"), err
    assert words in out and ".jsonl" in out and "Traceback" not in err
    assert left_behind(tmp_path) == []


def test_ctrl_c_ends_everything_at_once(mixed, tmp_path):
    process = start(tmp_path, mixed, f"Path({str(tmp_path)!r}, f'pid{{os.getpid()}}').touch(); time.sleep(120)")
    deadline = time.monotonic() + 50
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(p.name[3:]) for p in tmp_path.glob("pid*")]
    assert len(pids) == 2, process.poll()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    begun = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - begun < 8 and process.returncode != 0
    assert err.count("Traceback") <= 1 and "KeyboardInterrupt" in err  # of the main process only
    assert left_behind(tmp_path) == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
