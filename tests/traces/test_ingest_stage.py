"""Logs to a stage file: formats by content, bad input, copies, nothing half-written taken for whole."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import types

import pytest
from log_lines import Log, call, text

from composer_plugins.errors import TraceError
from composer_plugins.traces.copies import Seen
from composer_plugins.traces.ingest import ingest
from composer_plugins.traces.ledger import Problem
from composer_plugins.traces.schema import Message, SourceRef, Step, Trace
from composer_plugins.traces.store import read_manifest, read_stage


def session(tmp_path, name="a.jsonl", session="s1"):
    log = Log(session)
    log.user("task")
    log.assistant(call("toolu_0123456789abcdef_1", command="ls"), id="m1")
    log.result("toolu_0123456789abcdef_1")
    log.assistant(text("done"), id="m2")
    log.write(tmp_path / name)
    return log


def test_round_trip_and_manifest(tmp_path, sample):
    report = ingest([sample], tmp_path / "out/traces.jsonl")
    (trace,) = read_stage(tmp_path / "out/traces.jsonl", Trace)
    manifest = read_manifest(tmp_path / "out/traces.jsonl")
    assert (manifest.stage, manifest.record, manifest.written) == ("ingest", "Trace", 1)
    assert (manifest.read, manifest.used, manifest.skipped) == (248, 248, {})
    assert list(manifest.inputs) == [str(sample)]
    assert (report.traces, report.steps) == (1, len(trace.steps))
    again = tmp_path / "again.jsonl"
    ingest([sample], again)
    assert again.read_bytes() == (tmp_path / "out/traces.jsonl").read_bytes()


BAD = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "blank": (b"\n\n  \n", "is empty"),
    "binary": (bytes(range(256)) * 50, "binary data"),
    "packed": (b"\x28\xb5\x2f\xfd\x04\x58" + bytes(40), "is compressed. Unpack it first, .*: zstd -d"),
    "parquet": (b"PAR1" + bytes(40) + b"PAR1", "is a Parquet file.*to_json"),
    "other json": (b'{"trajectory": []}\n', "no known log format"),
    "text": (b"hello world\n", "no known log format"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_single_files_are_clear_errors_and_write_nothing(tmp_path, kind):
    content, words = BAD[kind]
    log = tmp_path / "x.jsonl"
    if content is not None:
        log.write_bytes(content)
    with pytest.raises(TraceError, match=words):
        ingest([log], tmp_path / "traces.jsonl")
    assert not list(tmp_path.glob("traces*"))


def test_a_bad_file_does_not_destroy_an_earlier_result(tmp_path, sample):
    out = tmp_path / "traces.jsonl"
    ingest([sample], out)
    before = out.read_bytes()
    (tmp_path / "junk").write_bytes(b"\x00\x01")
    with pytest.raises(TraceError):
        ingest([sample, tmp_path / "junk"], out)
    assert out.read_bytes() == before
    assert read_manifest(out).written == 1


def test_in_a_folder_what_is_no_log_is_listed(tmp_path):
    folder = tmp_path / "logs"
    (folder / "deep").mkdir(parents=True)
    session(folder / "deep")
    (folder / "notes.md").write_text("# notes")
    (folder / "empty.jsonl").touch()
    (folder / ".hidden").write_text("x")
    report = ingest([folder], tmp_path / "t.jsonl")
    assert report.traces == 1
    assert {p.rsplit("/", 1)[1] for p in report.refused} == {"notes.md", "empty.jsonl"}
    assert set(read_manifest(tmp_path / "t.jsonl").options["files_not_read"]) == set(report.refused)


def test_a_folder_without_any_log_is_an_error(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    with pytest.raises(TraceError, match="no files in it"):
        ingest([folder], tmp_path / "t.jsonl")
    (folder / "notes.md").write_text("# notes")
    with pytest.raises(TraceError, match="None of the 1 files could be read"):
        ingest([folder], tmp_path / "t.jsonl")


def test_a_log_without_a_model_step_is_an_error_with_counts(tmp_path):
    log = Log()
    log.user("anyone there?")
    log.write(tmp_path / "x.jsonl")
    with pytest.raises(TraceError, match=r"No model step.*no_model_step"):
        ingest([tmp_path / "x.jsonl"], tmp_path / "t.jsonl")


def test_the_output_must_not_be_an_input(tmp_path):
    session(tmp_path)
    with pytest.raises(TraceError, match="also an input"):
        ingest([tmp_path], tmp_path / "a.jsonl")


def test_copied_prefixes_are_kept_as_context_and_marked(tmp_path):
    log = session(tmp_path, "a.jsonl")
    log.session = "s2"
    log.lines = [json.dumps(json.loads(line) | {"sessionId": "s2"}) for line in log.lines]
    log.user("go on")
    log.assistant(call("toolu_0123456789abcdef_2", command="pwd"), id="m3")
    log.write(tmp_path / "b.jsonl")
    report = ingest([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "t.jsonl")
    first, second = read_stage(tmp_path / "t.jsonl", Trace)
    assert report.copied_steps == 2
    assert [s.trainable for s in first.steps] == [True, True]
    assert [(s.trainable, s.not_trainable_reason) for s in second.steps] == [
        (False, "copied"), (False, "copied"), (True, None),
    ]  # fmt: skip
    assert len(second.messages) == 6


def test_equal_first_words_of_two_sessions_are_no_copy_once_they_part(tmp_path):
    for name, answer in (("a", "yes"), ("b", "no")):
        log = Log(name)
        log.user("task")
        log.assistant(text(answer), id=f"m-{name}")
        log.user("next")
        log.assistant(text("same words"), id=f"n-{name}")
        log.write(tmp_path / f"{name}.jsonl")
    report = ingest([tmp_path], tmp_path / "out.jsonl")
    assert report.copied_steps == 0


def test_one_session_id_in_two_files_gives_two_ids(tmp_path):
    for name in ("a", "b"):
        log = Log("same")
        log.user(f"task {name}")
        log.assistant(text("ok"), id=f"m{name}")
        log.write(tmp_path / f"{name}.jsonl")
    report = ingest([tmp_path], tmp_path / "out.jsonl")
    assert [t.id for t in read_stage(tmp_path / "out.jsonl", Trace)] == ["same", "same#2"]
    assert report.renamed == 1


def test_a_stage_killed_before_the_rename_is_not_taken_for_whole(tmp_path, sample):
    """A real SIGKILL while the .part file is complete but not renamed."""
    out = tmp_path / "traces.jsonl"
    program = textwrap.dedent(f"""
        import os, signal, pathlib
        pathlib.Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
        from composer_plugins.traces.ingest import ingest
        ingest([{str(sample)!r}], {str(out)!r})
    """)
    done = subprocess.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "traces.jsonl.part").stat().st_size > 0
    with pytest.raises(TraceError, match="no such file"):
        list(read_stage(out, Trace))
    ingest([sample], out)
    assert len(list(read_stage(out, Trace))) == 1
    assert not (tmp_path / "traces.jsonl.part").exists()


def test_a_stage_killed_between_data_and_manifest_is_not_taken_for_whole(tmp_path, sample):
    """Also when an earlier, finished run of the same stage left its manifest there."""
    out = tmp_path / "traces.jsonl"
    session(tmp_path)
    ingest([tmp_path / "a.jsonl"], out)
    program = textwrap.dedent(f"""
        import os, signal
        from composer_plugins.traces import store
        store.write_manifest = lambda path, manifest: os.kill(os.getpid(), signal.SIGKILL)
        from composer_plugins.traces.ingest import ingest
        ingest([{str(sample)!r}], {str(out)!r})
    """)
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert out.exists()
    with pytest.raises(TraceError, match="has no manifest"):
        list(read_stage(out, Trace))


def test_an_edited_or_cut_stage_file_names_the_line(tmp_path, sample):
    out = tmp_path / "traces.jsonl"
    ingest([sample], out)
    out.write_bytes(out.read_bytes()[:-100])
    with pytest.raises(TraceError, match="line 1"):
        list(read_stage(out, Trace))


class Scripted:
    """A reader of a package of its own, good or bad."""

    def __init__(self, name, sniff=lambda head: head.startswith(b"mine"), read=None, companion=None):
        self.name, self.sniff, self._read = name, sniff, read
        if companion:
            self.companion = companion

    def read(self, path, counts):
        counts.update(read=2, used=1)
        counts["skipped:odd"] += 1
        if self._read:
            yield from self._read(path, counts)
        ref = SourceRef(file=str(path), line=1)
        yield Trace(
            id=path.name,
            format=self.name,
            messages=[Message(role="assistant", content=path.name)],
            steps=[Step(index=0, action=0, source_ref=ref)],
        )


def managed(*readers):
    entries = [types.SimpleNamespace(name=r.name, load=lambda r=r: r) for r in readers]
    return types.SimpleNamespace(trace_readers=entries)


def fails(path, counts):
    raise KeyError("surprise")
    yield


def fails_at_once(path):
    raise KeyError("surprise")


def miscounts(path, counts):
    counts["read"] += 5
    yield from ()


def notes(path, counts):
    counts.problems.append(Problem(str(path), 1, "result_without_call", "odd, and no damage"))
    yield from ()


@pytest.mark.parametrize(
    ("read", "words"), [(fails, "KeyError.*bug of the reader"), (miscounts, "accounts for 1 used")]
)
def test_a_bad_reader_is_named_and_costs_only_its_own_files(tmp_path, read, words):
    manager = managed(Scripted("bad", lambda head: head.startswith(b"bad"), read=read), Scripted("good"))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a").write_text("bad")
    (tmp_path / "logs/b").write_text("mine")
    with pytest.raises(TraceError, match=words):
        ingest([tmp_path / "logs/a"], tmp_path / "t.jsonl", manager=manager)
    report = ingest([tmp_path / "logs"], tmp_path / "t.jsonl", manager=manager)
    assert list(report.refused) == [str(tmp_path / "logs/a")] and "bug of the reader" in report.refused.popitem()[1]
    assert [(f.path.name, f.format, f.read, f.used, f.skipped) for f in report.read_files] == [
        ("b", "good", 2, 1, {"odd": 1})
    ]
    assert (report.manifest.read, report.manifest.used) == (2, 1)


def test_a_reader_whose_sniff_fails_does_not_keep_others_from_a_file(tmp_path):
    (tmp_path / "a").write_text("mine")
    broken = Scripted("broken", lambda head: {}[head])
    assert ingest([tmp_path / "a"], tmp_path / "t.jsonl", manager=managed(broken, Scripted("good"))).traces == 1
    with pytest.raises(TraceError, match="'broken' failed on it"):
        ingest([tmp_path / "a"], tmp_path / "t.jsonl", manager=managed(broken))


def test_what_is_odd_and_no_damage_is_listed_and_not_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    report = ingest([tmp_path / "a"], tmp_path / "t.jsonl", manager=managed(Scripted("x", read=notes)))
    assert [p.reason for p in report.ledger.problems] == ["result_without_call"]
    assert report.read_files[0].damaged == 0


def test_files_that_belong_to_a_log_are_no_unknown_files(tmp_path):
    (tmp_path / "logs").mkdir()
    for name, content in (("a", "mine"), ("b", "about a"), ("c", "else")):
        (tmp_path / "logs" / name).write_text(content)
    reader = Scripted("x", companion=lambda head: "description" if head.startswith(b"about") else None)
    report = ingest([tmp_path / "logs"], tmp_path / "t.jsonl", manager=managed(reader))
    assert report.companions == {str(tmp_path / "logs/b"): "description"}
    assert list(report.refused) == [str(tmp_path / "logs/c")]
    with pytest.raises(TraceError, match="no known log format"):
        ingest([tmp_path / "logs/b"], tmp_path / "t.jsonl", manager=managed(reader))


def test_the_readers_of_logs_of_several_files_are_asked_before_a_file_is_called_unknown(tmp_path):
    (tmp_path / "logs").mkdir()
    for name, content in (("a", "mine"), ("b", "half of a rec"), ("c", "else")):
        (tmp_path / "logs" / name).write_text(content)
    reader, broken = Scripted("x"), Scripted("broken", lambda head: False)
    reader.part_of = lambda path: path.parent / "a" if path.name in "ab" else None
    broken.part_of = fails_at_once
    report = ingest([tmp_path / "logs"], tmp_path / "t.jsonl", manager=managed(broken, reader))
    assert report.companions == {str(tmp_path / "logs/b"): "part_of_a_log"}
    assert [file.path.name for file in report.read_files] == ["a"]
    assert list(report.refused) == [str(tmp_path / "logs/c")]
    assert set(report.manifest.inputs) == {str(tmp_path / "logs" / name) for name in "ab"}
    with pytest.raises(TraceError, match="one of several files"):
        ingest([tmp_path / "logs/b"], tmp_path / "t.jsonl", manager=managed(broken, reader))


def test_every_trace_passes_through_the_scrubber_last(tmp_path):
    session(tmp_path)

    class Cleaner:
        def scrub_trace(self, trace):
            assert trace.id == "s1"
            trace.messages[0].content = "changed"
            return trace

        def scrub_manifest(self, manifest):
            manifest.scrubbed = "cleaned"

    ingest([tmp_path / "a.jsonl"], tmp_path / "t.jsonl", scrubber=Cleaner())
    assert [t.messages[0].content for t in read_stage(tmp_path / "t.jsonl", Trace)] == ["changed"]
    assert read_manifest(tmp_path / "t.jsonl").scrubbed == "cleaned"


def test_many_keys_are_remembered_in_little_memory():
    seen, rng = Seen(), random.Random(1)
    keys = [rng.getrandbits(64) for _ in range(100_000)]
    for key in keys:
        seen.add(key)
        seen.add(key)
    held = sum(sys.getsizeof(bucket) for bucket in seen._buckets.values())
    assert held < 130 * len(keys)  # nearly all of it is the fixed part, 65,536 buckets of 100 bytes
    assert sum(map(len, seen._buckets.values())) == len(keys)
    assert all(key in seen for key in keys[::100])
    assert not any(rng.getrandbits(64) in seen for _ in range(1000))


def test_the_output_may_be_in_the_folder_that_is_read(tmp_path):
    session(tmp_path)
    for _ in range(3):  # the first time it is not there yet, then it is, with its manifest, and beside another one
        report = ingest([tmp_path], tmp_path / "t.jsonl")
        assert (report.files, report.traces, report.copied_steps, report.refused) == (1, 1, 0, {})
        report = ingest([tmp_path], tmp_path / "other.jsonl")
        assert (report.files, report.traces) == (1, 1)
    assert set(report.companions.values()) == {"file_of_ours"} and len(report.companions) == 3
    with pytest.raises(TraceError, match="also an input"):
        ingest([tmp_path, tmp_path / "t.jsonl"], tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl.manifest.json").unlink()  # then it may be anybody's
    with pytest.raises(TraceError, match="also an input"):
        ingest([tmp_path], tmp_path / "t.jsonl")


def test_an_output_that_cannot_be_written_is_a_clear_error(tmp_path):
    session(tmp_path)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file/t.jsonl", tmp_path):
        with pytest.raises(TraceError, match=r"cannot be written: .*Choose another output"):
            ingest([tmp_path / "a.jsonl"], output)
