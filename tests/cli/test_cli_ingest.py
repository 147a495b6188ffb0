"""ingest, stats and hints at the command line: what a user sees, and the exit codes."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from composer_plugins.errors import ComposerError
from composer_plugins.traces.schema import State, Trace
from composer_plugins.traces.store import read_manifest, read_stage

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "composer_plugins/data/samples/claude_code_session.jsonl"
DATA = ROOT / "tests/traces/data"


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False)
    for name in ("ingest", "stats", "hints"):
        app.command(name)(getattr(importlib.import_module(f"composer_plugins.cli.{name}"), name))

    def invoke(*arguments) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        if isinstance(result.exception, ComposerError):  # what `composer_plugins.cli.main` does
            return result.exception.exit_code, result.output + str(result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return invoke


@pytest.fixture
def traces(tmp_path, run):
    assert run("ingest", SAMPLE, "-o", tmp_path / "traces.jsonl")[0] == 0
    return tmp_path / "traces.jsonl"


@pytest.fixture
def folder(tmp_path):
    """A folder with whole and damaged logs, a sub-agent with its description, and files that are no logs."""
    logs = tmp_path / "logs"
    shutil.copytree(DATA / "subagents_v2.1.114", logs / "project")
    agent = next((logs / "project").rglob("agent-*.jsonl"))
    agent.with_suffix(".meta.json").write_text('{"agentType": "general-purpose", "description": "count files"}')
    for name in ("edge_cases.jsonl", "dag_within_fork.jsonl", "SOURCES.md"):
        shutil.copy(DATA / name, logs / name)
    (logs / "empty.jsonl").touch()
    return logs


def test_a_folder_is_one_command_that_accounts_for_every_file(tmp_path, run, folder):
    code, output = run("ingest", folder, "-o", tmp_path / "t.jsonl")
    assert code == 0
    assert "edge_cases.jsonl, line 10: malformed record" in output
    assert "SOURCES.md is of no known log format" in output and "empty.jsonl is empty" in output
    assert "Formats that can be read" not in output  # in every line it would bury the names
    assert "belong to a log and are none: 1 sub agent description" in output
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    rows = {row[0].split("/")[-1]: row[1:] for row in cells if row[1] == "claude_code"}
    assert rows["dag_within_fork.jsonl"] == ["claude_code", "8", "5", "3: rewound 3", "", "2"]
    assert rows["edge_cases.jsonl"][4] == "7"
    manifest = read_manifest(tmp_path / "t.jsonl")
    assert manifest.read == manifest.used + sum(manifest.skipped.values()) > 300
    files = manifest.options["files"]
    assert len(files) == 9 and sum(f["read"] for f in files.values()) == manifest.read
    assert all(f["read"] == f["used"] + sum(f["skipped"].values()) for f in files.values())
    total = next(row for row in cells if row[0] == "total")
    assert total[2:4] == [str(manifest.read), str(manifest.used)]
    assert manifest.options["files_set_aside"].popitem()[1] == "sub_agent_description"


def test_jobs_change_nothing_but_the_time(tmp_path, run, folder, monkeypatch):
    monkeypatch.setattr("composer_plugins.cli.ingest._A_PROCESS", 1)  # as if it were worth while
    for name, options in (("one", ["--jobs", "1"]), ("two", ["-j", "2"]), ("default", [])):
        code, output = run("ingest", folder, "-o", tmp_path / name / "t.jsonl", *options)
        assert code == 0 and "traces with" in output
    written = {(tmp_path / name / "t.jsonl").read_bytes() for name in ("one", "two", "default")}
    assert len(written) == 1
    code, output = run("ingest", folder, "-o", tmp_path / "t.jsonl", "--jobs", "0")
    assert code == 2 and "--jobs" in output


def test_a_sub_agent_knows_its_session_and_its_description(tmp_path, run, folder):
    run("ingest", folder, "-o", tmp_path / "t.jsonl")
    traces = {trace.id: trace for trace in read_stage(tmp_path / "t.jsonl", Trace)}
    described = [t for t in traces.values() if "description" in t.extra]
    assert [t.extra["description"]["description"] for t in described] == ["count files"]
    children = [t for t in traces.values() if t.parent_id == described[0].parent_id]
    assert len(children) == 6 and described[0].parent_id in traces


def test_more_damage_than_fits_is_counted(tmp_path, run):
    (tmp_path / "logs").mkdir()
    good = (DATA / "v2.1.17_headless.jsonl").read_bytes()
    (tmp_path / "logs/x.jsonl").write_bytes(good + b"{broken\n" * 1500)
    code, output = run("ingest", tmp_path / "logs", "-o", tmp_path / "t.jsonl")
    assert code == 0 and "... and 1480 more places" in output
    assert read_manifest(tmp_path / "t.jsonl").skipped["cut_or_not_json"] == 1500


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\x00junk", b"hello\n", b'{"a": 1}\n'])
def test_bad_logs_exit_with_3_and_one_message(tmp_path, run, content):
    log = tmp_path / "x.jsonl"
    if content is not None:
        log.write_bytes(content)
    code, output = run("ingest", log, "-o", tmp_path / "t.jsonl")
    assert code == 3
    assert str(log) in output and "Traceback" not in output
    assert not list(tmp_path.glob("t.jsonl*"))


def test_stats_shows_the_three_classes(run, traces):
    code, output = run("stats", traces)
    assert code == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if "│" in line}
    assert rows["steps"] == "101 (90 with tool calls)"
    assert rows["error turns"] == "10"
    assert rows["user_feedback"] == "human" and rows["file_not_read"] == "flagged error"
    assert rows["all"] == "92"


def test_hints_writes_states_that_read_back(run, traces, tmp_path):
    out = tmp_path / "states.jsonl"
    code, output = run("hints", traces, "-o", out, "--budget", 1000)
    assert code == 0 and "with a hint" in output
    manifest = read_manifest(out)
    states = list(read_stage(out, State))
    assert manifest.written == len(states) == manifest.used
    assert manifest.read == 101 == manifest.used + sum(manifest.skipped.values())
    assert manifest.options["budget"] == 1000
    assert sum(s.hint is not None for s in states) == sum(s.status.failed for s in states) > 5
    assert max(s.cut.messages_dropped for s in states) > 100


def test_hints_options(run, traces, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('[classes]\nfile_not_read = "MINE {path}"\n')
    out = tmp_path / "s.jsonl"
    assert run("hints", traces, "-o", out, "--only-failed", "--option", f"path={mine}")[0] == 0
    texts = [s.hint.text for s in read_stage(out, State)]
    assert len(texts) == 10 and sum(t.startswith("MINE /") for t in texts) == 5
    assert run("hints", traces, "-o", out, "--exact", "uncompacted")[0] == 0
    code, output = run("hints", traces, "-o", out, "--exact", "full")
    assert code == 3 and "inexact_history" in output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--generator", "oracle"], 2, "Unknown hint generator 'oracle'"),
        (["--option", "nonsense"], 2, "key=value"),
        (["--option", "path=/no/such/file.toml"], 2, "no such file"),
        (["--option", "colour=red"], 2, "colour"),
        (["--budget", "20"], 3, "No state was written"),
    ],
)
def test_hints_refuses_bad_options_with_the_fix(run, traces, tmp_path, arguments, code, words):
    found, output = run("hints", traces, "-o", tmp_path / "s.jsonl", *arguments)
    assert found == code
    assert words in output


def test_an_unfinished_traces_file_is_refused(run, traces, tmp_path):
    Path(f"{traces}.manifest.json").unlink()
    for command in (["stats", traces], ["hints", traces, "-o", tmp_path / "s.jsonl"]):
        code, output = run(*command)
        assert code == 3 and "did not finish" in output


def test_a_states_file_is_no_traces_file(run, traces, tmp_path):
    run("hints", traces, "-o", tmp_path / "s.jsonl")
    code, output = run("stats", tmp_path / "s.jsonl")
    assert code == 3 and "State records, expected Trace" in output


@pytest.mark.parametrize("command", ["ingest", "stats", "hints"])
def test_help_teaches_by_example_and_loads_no_torch(command, run):
    code, output = run(command, "--help")
    assert code == 0 and f"composer-rl {command} " in output and "Example" in output
    probe = (
        f"import sys, composer_plugins.cli.{command}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


@pytest.mark.model
def test_a_real_tokenizer_counts_with_the_tool_template(run, traces, tmp_path):
    from composer_plugins.cli.hints import counter_of

    out = tmp_path / "s.jsonl"
    arguments = ["--budget", 512, "--tokenizer", "smollm2-135m-instruct", "--max-tools", 4]
    assert run("hints", traces, "-o", out, *arguments)[0] == 0
    count = counter_of("smollm2-135m-instruct")
    states = list(read_stage(out, State))
    costs = [count([m.to_chat() for m in s.messages], s.tool_schemas()) for s in states]
    assert len(states) > 60 and max(costs) <= 512 and max(costs) > 400
    with_tools = count([{"role": "user", "content": "x"}], states[0].tool_schemas())
    assert with_tools > count([{"role": "user", "content": "x"}], [])
