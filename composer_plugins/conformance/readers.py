"""What every reader of agent logs owes: it knows its own files, loses nothing, ties everything to its place."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from composer_plugins.conformance.base import Conformance, contract
from composer_plugins.errors import TraceError
from composer_plugins.traces.base import TraceReader
from composer_plugins.traces.ledger import Ledger
from composer_plugins.traces.schema import Status, Trace

HEAD = 65536
#: The beginnings of files that no reader of agent logs may claim.
FOREIGN = {
    "nothing": b"",
    "a blank line": b"\n",
    "a number": b"42",
    "an empty object": b"{}",
    "an empty list": b"[]",
    "a list of numbers": b"[1, 2, 3]",
    "prose": b"Dear reader, this is a letter.\n",
    "a table": b"name,age\nada,36\n",
    "settings": b'{"name": "project", "version": "1.0", "scripts": {"test": "true"}}',
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "not UTF-8": b"\xff\xfe\x00{\x00}",
    "deep nesting": b"[" * 5000,
    "a half object": b'{"type": "us',
}


class TraceReaderConformance(Conformance):
    """Contracts of a log reader. Override `reader` and `samples`."""

    #: How many damaged copies of each sample are read.
    mutations: ClassVar[int] = 40

    @abstractmethod
    def reader(self) -> TraceReader:
        """Return the reader."""

    @abstractmethod
    def samples(self) -> list[Path]:
        """Return undamaged files of the format, each with at least one step; small ones."""

    def read(self, path: Path) -> tuple[list[Trace], Ledger]:
        """Return the traces of a file and the account of its records."""
        ledger = Ledger(read=0, used=0)
        return list(self.reader().read(path, ledger)), ledger

    def each(self) -> Iterator[tuple[Path, list[Trace], Ledger]]:
        """Every sample with what was read of it."""
        paths = self.samples()
        assert paths, "samples() returned no file"
        for path in paths:
            yield path, *self.read(path)

    @contract()
    def test_it_knows_its_own_files(self) -> None:
        for path in self.samples():
            assert self.reader().sniff(path.read_bytes()[:HEAD]) is True, path

    @pytest.mark.parametrize("what", sorted(FOREIGN))
    @contract()
    def test_it_claims_no_other_file(self, what: str) -> None:
        assert not self.reader().sniff(FOREIGN[what])

    @contract()
    def test_every_record_is_used_or_set_aside_by_reason(self) -> None:
        for path, traces, ledger in self.each():
            skipped = sum(n for key, n in ledger.items() if key.startswith("skipped:"))
            assert ledger["read"] == ledger["used"] + skipped, (path, dict(ledger))
            assert ledger["used"] > 0 and traces and any(t.steps for t in traces), path

    @contract()
    def test_every_step_and_result_has_its_place(self) -> None:
        for path, traces, _ in self.each():
            lines = path.read_bytes().count(b"\n") + 1
            places = [s.source_ref for t in traces for s in t.steps]
            places += [r.source_ref for t in traces for s in t.steps for r in s.results if r.source_ref]
            assert all(Path(p.file).name == path.name and 0 <= p.line <= lines for p in places), path

    @contract()
    def test_results_belong_to_calls_of_their_step(self) -> None:
        for path, traces, _ in self.each():
            for trace in traces:
                for step in trace.steps:
                    calls = {call.id for call in trace.action_of(step).tool_calls}
                    assert {r.call_id for r in step.results} <= calls, (path, step.index)

    @contract()
    def test_an_action_is_what_the_assistant_said_after_its_state(self) -> None:
        for path, traces, _ in self.each():
            for trace in traces:
                assert [s.index for s in trace.steps] == list(range(len(trace.steps))), path
                for step in trace.steps:
                    assert trace.action_of(step).role == "assistant", (path, step.index)
                    assert 0 <= step.state_start <= step.action < len(trace.messages), (path, step.index)

    @contract()
    def test_inexact_history_says_why(self) -> None:
        for path, traces, _ in self.each():
            for step in (s for t in traces for s in t.steps):
                assert step.history_exact == (not step.inexact), (path, step.index)
                assert step.trainable or step.not_trainable_reason, (path, step.index)

    @contract()
    def test_exit_codes_and_statuses_agree(self) -> None:
        for path, traces, _ in self.each():
            for result in (r for t in traces for s in t.steps for r in s.results):
                if result.exit_code not in (None, 0):
                    assert result.status is not Status.OK or result.error_class is None, (path, result.call_id)

    @contract()
    def test_records_survive_the_stage_file(self) -> None:
        for path, traces, _ in self.each():
            for trace in traces:
                assert msgspec.json.decode(msgspec.json.encode(trace), type=Trace) == trace, path

    @contract()
    def test_reading_again_gives_the_same(self) -> None:
        for path, traces, ledger in self.each():
            assert self.read(path) == (traces, ledger), path

    @contract()
    def test_an_empty_file_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "empty").write_bytes(b"")
        traces, ledger = self.read(tmp_path / "empty")
        assert not [t for t in traces if t.steps] and ledger["read"] == ledger["used"] + _skipped(ledger)

    @contract()
    def test_damage_is_counted_and_never_fatal(self, tmp_path: Path) -> None:
        for path in self.samples():
            for number, data in enumerate(damaged(path.read_bytes(), self.mutations)):
                (tmp_path / path.name).write_bytes(data)
                try:
                    _, ledger = self.read(tmp_path / path.name)
                except TraceError:  # a document that is refused as a whole, with its reason
                    continue
                assert ledger["read"] == ledger["used"] + _skipped(ledger), (path, number, dict(ledger))


def damaged(data: bytes, count: int) -> Iterator[bytes]:
    """Yield `count` damaged copies: cut, bits flipped, lines glued, dropped, doubled or filled with garbage."""
    rng = random.Random(0)
    for number in range(count):
        kind = number % 6
        if not data:
            return
        at = rng.randrange(len(data))
        if kind == 0:
            yield data[:at]
        elif kind == 1:
            yield data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 2:
            yield data.replace(b"\n", b"", rng.randrange(1, 4))
        elif kind == 3:
            yield data[:at] + bytes(rng.randrange(256) for _ in range(20)) + data[at:]
        else:
            lines = data.splitlines(keepends=True)
            row = rng.randrange(len(lines))
            lines[row : row + 1] = [] if kind == 4 else [lines[row], lines[row]]
            yield b"".join(lines)


def _skipped(ledger: Ledger) -> int:
    return sum(n for key, n in ledger.items() if key.startswith("skipped:"))
