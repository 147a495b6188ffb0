"""Logs to traces: find each file's format by its content, read it, write the traces stage file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.plugins import PluginManager
from composer_plugins.traces.copies import CopyDetector, StepKeys, mark_copies, step_keys
from composer_plugins.traces.find import HEAD, find_companion, find_log, find_logs, find_reader, stage_file
from composer_plugins.traces.ledger import Ledger
from composer_plugins.traces.read_file import PART, FileOutcome, FileReport, Job, read_file
from composer_plugins.traces.schema import Step, Trace
from composer_plugins.traces.store import Manifest, write_stage

__all__ = [
    "HEAD",
    "Cleaner",
    "FileReport",
    "Report",
    "find_companion",
    "find_logs",
    "find_reader",
    "ingest",
    "read_logs",
]


class Cleaner(Protocol):
    """Last change to every trace and to the manifest, such as the removal of secrets.

    With several processes each has a copy (it must pickle); what the copies report comes back file by file.
    """

    def scrub_trace(self, trace: Trace) -> Trace:
        """Return the trace as it is to be written. It depends on nothing but the trace."""

    def scrub_manifest(self, manifest: Manifest) -> None:
        """Change the manifest, when all traces are through."""

    def take_report(self) -> Any:
        """Return what was changed since the last call, and begin a new report."""

    def add_report(self, report: Any) -> None:
        """Add what a copy's `take_report` gave for the next file."""


@dataclass
class Report:
    """What an ingest did.

    `refused` maps each file of a folder that was not read to the reason; `companions` maps each file that is
    no log but belongs to one to one word that says what it is.
    """

    manifest: Manifest
    ledger: Ledger
    read_files: list[FileReport] = field(default_factory=list)
    traces: int = 0
    steps: int = 0
    copied_steps: int = 0
    renamed: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """How many files were read as logs."""
        return len(self.read_files)

    def add(self, path: Path, outcome: FileOutcome) -> None:
        """Take over how the reading of a file ended."""
        if outcome.companion:
            self.companions[str(path)] = outcome.companion
            if outcome.sha256:
                self.manifest.inputs[str(path)] = outcome.sha256
        elif outcome.refused:
            self.refused[str(path)] = outcome.refused
        else:
            self.ledger.add(outcome.ledger)
            self.read_files.append(outcome.report)
            self.traces += outcome.report.traces
            self.steps += outcome.report.steps
            self.manifest.inputs[str(path)] = outcome.sha256


class _Finish:
    """What the traces of one file need to know of the files before it: ids are made unique, and copies marked."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._copies, self._names = CopyDetector(), set()

    def trace(self, trace: Trace) -> None:
        """Finish a trace in place."""
        trace.id = self._unique(trace.id)
        mark_copies(trace.steps, self._copied(step_keys(trace)))

    def line(self, trace_id: str, keys: list[StepKeys], line: bytes) -> msgspec.Raw:
        """Finish a trace that another process has encoded: only what changes is decoded."""
        new_id, copied = self._unique(trace_id), self._copied(keys)
        if new_id == trace_id and not copied:
            return msgspec.Raw(line)
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        fields["id"] = msgspec.Raw(msgspec.json.encode(new_id))
        if copied:
            steps = msgspec.json.decode(fields["steps"], type=list[Step])
            mark_copies(steps, copied)
            fields["steps"] = msgspec.Raw(msgspec.json.encode(steps))
        return msgspec.Raw(msgspec.json.encode(fields))

    def _copied(self, keys: list[StepKeys]) -> list[int]:
        copied = self._copies.copied(keys)
        self.report.copied_steps += len(copied)
        return copied

    def _unique(self, base: str) -> str:
        """Number a trace id that another file has used (one session can be spread over files)."""
        name, number = base, 2
        while name in self._names:
            name = f"{base}#{number}"
            number += 1
        self._names.add(name)
        self.report.renamed += name != base
        return name


def read_logs(
    paths: Iterable[str | Path],
    report: Report,
    *,
    manager: PluginManager | None = None,
    progress: Callable[[Path, int], None] | None = None,
    allow_damaged: bool = False,
    scrubber: Cleaner | None = None,
) -> Iterator[Trace]:
    """Yield the traces of files and folders, and fill `report` (see `ingest` for the arguments).

    A file of a folder that cannot be read is listed in `report.refused`; a file that was named is an error.

    Raises:
        TraceError: see `find_logs` and `find_reader`; a named file is damaged.
    """
    yield from _read(find_logs([Path(p) for p in paths]), report, manager, progress, allow_damaged, scrubber)


def _read(
    logs: list[tuple[Path, bool]], report: Report, manager: PluginManager | None,
    progress: Callable[[Path, int], None] | None, allow_damaged: bool, scrubber: Cleaner | None,
) -> Iterator[Trace]:  # fmt: skip
    finish = _Finish(report)
    for path, named in logs:
        outcome = FileOutcome()
        for trace in read_file(Job(path, named, allow_damaged), outcome, manager):
            finish.trace(trace)
            yield trace if scrubber is None else scrubber.scrub_trace(trace)
        report.add(path, outcome)
        if progress is not None:
            progress(path, path.stat().st_size)


def _read_in_processes(
    logs: list[tuple[Path, bool]], report: Report, output: Path, jobs: int, allow_damaged: bool,
    scrubber: Cleaner | None, progress: Callable[[Path, int], None] | None,
) -> Iterator[msgspec.Raw]:  # fmt: skip
    """The same as `read_logs`, with the files read by several processes; the traces come encoded."""
    from composer_plugins.traces.processes import read_files

    finish = _Finish(report)
    with read_files(
        [Job(path, named, allow_damaged) for path, named in logs], jobs, scrubber, output.parent
    ) as results:
        for (path, _), result in zip(logs, results, strict=True):
            for trace_id, keys, line in result.traces():
                yield finish.line(trace_id, keys, line)
            if scrubber is not None:
                scrubber.add_report(result.cleaned)
            report.add(path, result.outcome)
            if progress is not None:
                progress(path, path.stat().st_size)


def ingest(
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    manager: PluginManager | None = None,
    progress: Callable[[Path, int], None] | None = None,
    allow_damaged: bool = False,
    scrubber: Cleaner | None = None,
    jobs: int = 1,
) -> Report:
    """Read logs into the traces stage file `output`.

    Args:
        paths: log files and folders of logs.
        output: the stage file to write; its manifest is written beside it.
        manager: the readers; default: the installed ones, and the only choice with `jobs` > 1.
        progress: called with (file, its size in bytes) after each file.
        allow_damaged: accept damage in files that were named: what is whole is read, the rest listed.
        scrubber: last change to every trace before it is written, and to the manifest.
        jobs: processes that read and scrub; the result is the same, byte for byte, whatever their number.

    Returns:
        What was read, used and set aside, file by file, and which places are damaged.

    Raises:
        TraceError: a named file cannot be read or is damaged, or nothing in the folders could be read; the
            output is then left as it was before.
        ConfigError: `jobs` is below 1, or above 1 with a `manager`.
    """
    if jobs < 1 or (jobs > 1 and manager is not None):
        raise ConfigError(f"Expected jobs of 1 or more (1 with a plugin manager of your own), found {jobs}.")
    output = Path(output)
    ledger = Ledger(read=0, used=0)
    report = Report(Manifest(stage="ingest", record=Trace.__name__, written=0), ledger)
    logs = []
    for path, named in find_logs([Path(p) for p in paths]):  # before anything is written
        if named:
            find_log(path, manager=manager)
        if path.resolve() != output.resolve():
            logs.append((path, named))
        elif named or not stage_file(path):
            raise TraceError(f"The output {output} is also an input: choose another output file.")
    if jobs == 1:
        traces = _read(logs, report, manager, progress, allow_damaged, scrubber)
    else:
        traces = _read_in_processes(logs, report, output, jobs, allow_damaged, scrubber, progress)
    write_stage(output, _at_least_one(traces, report, scrubber), report.manifest, counts=ledger, keep_earlier=True)
    return report


def _at_least_one(traces: Iterator[Any], report: Report, scrubber: Cleaner | None) -> Iterator[Any]:
    count = 0
    for count, trace in enumerate(traces, 1):  # noqa: B007
        yield trace
    report.manifest.options |= _options(report)
    if scrubber is not None:
        scrubber.scrub_manifest(report.manifest)
    if count:
        return
    if not report.files:
        reasons = [*report.refused.values(), *(_aside(path, word) for path, word in report.companions.items())]
        some = "\n".join(f"- {text}" for text in reasons[:5])
        raise TraceError(f"None of the {len(report.refused) + len(report.companions)} files could be read:\n{some}")
    lost = "\n".join(f"- {problem}" for problem in report.ledger.problems[:5])
    raise TraceError(
        f"No model step found in {report.files} file(s): of {report.ledger['read']} records, "
        f"{report.ledger.skipped()} were set aside. Pass a session in which the agent answered.\n{lost}".rstrip()
    )


def _aside(path: str, word: str) -> str:
    """Why a file that was set aside gave nothing."""
    if word == PART:
        return f"{path} is read with the first file of its log, which is not among these: pass the folder above."
    return f"{path} is no log ({word.replace('_', ' ')}): pass the log that it belongs to."


def _options(report: Report) -> dict[str, Any]:
    files = {
        str(f.path): {"format": f.format, "read": f.read, "used": f.used, "skipped": f.skipped, "damaged": f.damaged}
        for f in report.read_files
    }
    return {"files": files, "files_not_read": report.refused, "files_set_aside": report.companions}
