"""`composer-rl replay`, `pairs` and `validate` from the outside: files in, tables and exit codes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from composer_plugins.cli.pairs import pairs
from composer_plugins.cli.replay import replay
from composer_plugins.cli.validate import validate
from composer_plugins.errors import ComposerError, ConfigError, TeacherError, TraceError
from composer_plugins.traces.schema import Message, Pair, Replay, SourceRef, State, Status, ToolCall
from composer_plugins.traces.store import Manifest, read_manifest, read_stage, write_stage

app = typer.Typer()
for command in (replay, pairs, validate):
    app.command()(command)


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if isinstance(result.exception, ComposerError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def call(command: str) -> Message:
    return Message(role="assistant", tool_calls=[ToolCall(id="1", name="Bash", arguments={"command": command})])


@pytest.fixture
def files(tmp_path: Path):
    """Two states (one worked, one failed) and the answers of two independent teachers and one that differs."""
    source = SourceRef(file="log.jsonl", line=3)
    common = {"trace_id": "t", "messages": [Message(role="user", content="go")], "source_ref": source}
    states = [
        State(id="s0", step=0, action=call("ls"), **common),
        State(id="s1", step=1, action=call("cat nothing"), status=Status.ERROR, **common),
        State(id="s2", step=2, action=Message(role="assistant", content="Done."), **common),
    ]
    said = {"s0": ("ls", "ls", "git status"), "s1": ("find .", "find .", "cat nothing"), "s2": ("ls",) * 3}
    replays = [
        Replay(state_id=s, teacher=t, model="m", weights_id=w, action=call(what), demonstration=True)
        for s, whats in said.items()
        for t, w, what in zip("abc", ("x", "y", "x"), whats, strict=True)
    ]
    paths = tmp_path / "states.jsonl", tmp_path / "replays.jsonl"
    write_stage(paths[0], states, Manifest(stage="hints", record="State", written=0))
    write_stage(paths[1], replays, Manifest(stage="replay", record="Replay", written=0))
    return paths


def test_pairs_counts_votes_and_what_was_left_out(files, tmp_path):
    out = tmp_path / "pairs.jsonl"
    text = run("pairs", *files, "-o", out)
    assert "0 pairs from 0 of 3 states" in text and "recorded_has_no_call" in text  # x ties with itself: 1 of 2
    text = run("pairs", *files, "-o", out, "--count-samples-as-votes")
    assert "2 pairs from 2 of 3 states" in text and "They are not independent" in text
    found = list(read_stage(out, Pair))
    assert [p.provenance.rule for p in found] == ["agreement", "disagreement"]
    assert all(p.provenance.demonstration for p in found)
    manifest = read_manifest(out)
    assert (manifest.read, manifest.used, manifest.skipped) == (3, 2, {"recorded_has_no_call": 1})
    assert manifest.options["pairs"]["count_samples_as_votes"] is True and len(manifest.inputs) == 2
    assert "ok" in run("validate", out)


def test_pairs_refuses_what_cannot_be_right(files, tmp_path):
    states, replays = files
    with pytest.raises(ConfigError, match="one of the inputs"):
        run("pairs", states, replays, "-o", replays)
    with pytest.raises(TraceError, match="holds Replay records, expected State"):
        run("pairs", replays, states)
    with pytest.raises(ConfigError, match="--model"):
        run("pairs", states, replays, "-o", tmp_path / "p", "--max-action-tokens", 5)
    strangers = [Replay(state_id="zz", teacher="a", model="m", action=call("ls"))]
    write_stage(replays, strangers, Manifest(stage="replay", record="Replay", written=0))
    with pytest.raises(TraceError, match="None of the 1 replays"):
        run("pairs", states, replays, "-o", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_replay_refuses_before_it_sends(files, tmp_path):
    config = tmp_path / "teachers.yaml"
    section = {"name": "a", "kind": "openai", "base_url": "https://api.example.com/v1", "model": "m"}
    config.write_text(json.dumps({"teachers": [section]}))
    with pytest.raises(TeacherError, match="allow_unscrubbed"):
        run("replay", files[0], "-o", tmp_path / "r.jsonl", "--teachers", config)
    assert not list(tmp_path.glob("r.jsonl*"))


def test_replay_says_which_teachers_are_no_independent_votes():
    from composer_plugins.cli.replay import independence
    from composer_plugins.teachers.replay import ReplayReport, TeacherCount

    def report(**weights):
        return ReplayReport({n: TeacherCount("m", w, False, "f") for n, w in weights.items()}, states=1)

    assert independence(report(a="x", b="y")) == []
    [line] = independence(report(a="x", b="x", c="y"))
    assert line.startswith("a, b have the same weights (x): they are not independent votes")
    assert "--count-samples-as-votes" in independence(report(a="x"))[-1]


def test_validate_names_every_problem_and_exits_with_2(files, tmp_path, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    good = tmp_path / "good.yaml"
    section = {"name": "a", "kind": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    good.write_text(json.dumps({"teachers": [section | {"api_key_env": "SOME_KEY"}]}))
    text = run("validate", good, files[0])
    assert "teachers file: a (openai): ok" in text and "SOME_KEY is not set" in text
    assert "hints stage file, 3 State records: ok" in text

    far = tmp_path / "far.yaml"
    far.write_text(json.dumps({"teachers": [section | {"base_url": "https://x.example.com/v1"}]}))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("composer: {sdpo: {wieght: 1}, policy: {weight: -1}}\n")
    neither, broken = tmp_path / "neither.yaml", tmp_path / "broken.yaml"
    neither.write_text("a: 1\n")
    broken.write_text("a: [\n")
    text = run("validate", far, wrong, neither, broken, tmp_path / "none.yaml", tmp_path, code=2)
    for expected in (
        "no scrubber", "composer.sdpo.wieght", "composer.policy.weight", "found: a", "not valid YAML", "There is no file",
    ):  # fmt: skip
        assert expected in text
    assert ": ok" not in text


def test_validate_reads_every_record_of_a_stage_file(files, tmp_path):
    states, _ = files
    whole = states.read_bytes()
    for damaged, expected in (
        (whole.splitlines(keepends=True)[0], "has 1 records, but its manifest says 3"),
        (whole[:-9], "line 3: not a State record"),
        (whole.replace(b"cat nothing", b"cat notices"), "SHA-256 differs"),
    ):
        states.write_bytes(damaged)
        assert expected in run("validate", states, code=2)
    states.write_bytes(whole)
    (tmp_path / "states.jsonl.manifest.json").unlink()
    assert "did not finish" in run("validate", states, code=2)


def test_validate_asks_the_host_that_the_recipe_names(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("host: martian\ncomposer: {}\n")
    assert "Unknown host 'martian'" in run("validate", recipe, code=2)
    recipe.write_text("host: [trl]\n")
    assert "`host` must be a name" in run("validate", recipe, code=2)
    recipe.write_text("composer: {}\n")
    assert "no `host:` key" in run("validate", recipe)


def test_validate_passes_on_what_the_trl_host_finds(tmp_path):
    pytest.importorskip("trl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("host: trl\nmodel: m\noutput_dir: o\ndata: {states: missing.jsonl}\nmodle: x\n")
    assert "modle" in run("validate", recipe, code=2)


def test_the_installed_program_exits_with_the_errors_own_code(tmp_path):
    """No traceback, the message on stderr, exit code of the error type."""
    command = [sys.executable, "-m", "composer_plugins.cli", "replay", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == TraceError.exit_code and "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_help_and_listing_load_no_torch():
    code = (
        "import sys\nfrom composer_plugins.cli import replay, pairs, validate\n"
        "import composer_plugins.cli.replay, composer_plugins.cli.pairs, composer_plugins.cli.validate\n"
        "import composer_plugins.teachers.config, composer_plugins.teachers.local, composer_plugins.preferences\n"
        "bad = {'torch', 'transformers', 'trl', 'openai'} & set(sys.modules)\nsys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
