"""One log file: its traces, and what became of every record of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from composer_plugins.errors import TraceError
from composer_plugins.plugins import PluginManager
from composer_plugins.traces.base import TraceReader
from composer_plugins.traces.find import find_companion, find_log, stage_file
from composer_plugins.traces.ledger import DAMAGE, Ledger
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import file_sha256

#: What a file is that is read with another one.
PART = "part_of_a_log"


@dataclass
class FileReport:
    """What one log file gave. `skipped` counts the records that led to nothing, by reason."""

    path: Path
    format: str
    read: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    damaged: int = 0
    traces: int = 0
    steps: int = 0


@dataclass
class FileOutcome:
    """How the reading of a file ended. Either `report`, `ledger` and `sha256` are set, or one of the two reasons.

    `refused` says why a file of a folder was not read; `companion`, in one word, what it is when it is no log but
    belongs to one, or was written by us; with `sha256` when it is read, with another file.
    """

    report: FileReport | None = None
    ledger: Ledger | None = None
    sha256: str = ""
    refused: str | None = None
    companion: str | None = None


@dataclass(frozen=True)
class Job:
    """A file to read. One that the user named must be a whole log, unless `allow_damaged`."""

    path: Path
    named: bool
    allow_damaged: bool


def read_file(job: Job, outcome: FileOutcome, manager: PluginManager | None = None) -> Iterator[Trace]:
    """Yield the traces of a file, and fill `outcome` when they are through.

    Raises:
        TraceError: a named file cannot be read, or is damaged.
    """
    if not job.named and stage_file(job.path):
        outcome.companion = "file_of_ours"
        return
    try:
        reader, first = find_log(job.path, manager=manager)
        if first is not None and job.named:
            raise TraceError(
                f"{job.path} is one of several files that hold one conversation, and says nothing alone. "
                f"Pass their folder: {first.parent}"
            )
        if first is not None and first != job.path:
            outcome.companion, outcome.sha256 = PART, file_sha256(job.path)
            return
        yield from _traces(job, reader, outcome)
    except TraceError as error:
        if job.named:
            raise
        outcome.companion = _companion(job.path, manager)
        outcome.refused = None if outcome.companion else str(error)


def _companion(path: Path, manager: PluginManager | None) -> str | None:
    try:
        return find_companion(path, manager=manager)
    except TraceError:
        return None


def _traces(job: Job, reader: TraceReader, outcome: FileOutcome) -> Iterator[Trace]:
    ledger, file = Ledger(read=0, used=0), FileReport(job.path, reader.name)
    for trace in _guarded(reader, job.path, ledger):
        file.traces += 1
        file.steps += len(trace.steps)
        yield trace
    if not ledger.balanced():
        raise TraceError(
            f"{job.path}: the reader {reader.name!r} read {ledger['read']} records but accounts for "
            f"{ledger['used']} used and {ledger.skipped()} set aside. This is a bug of the reader: report it."
        )
    file.read, file.used, file.skipped = ledger["read"], ledger["used"], ledger.skipped()
    file.damaged = ledger.problems.damage
    outcome.ledger = ledger
    if file.damaged and job.named and not job.allow_damaged:
        raise TraceError(_damage_message(job.path, ledger))
    outcome.report, outcome.sha256 = file, file_sha256(job.path)


def _guarded(reader: TraceReader, path: Path, ledger: Ledger) -> Iterator[Trace]:
    """The traces of a file; what a reader (perhaps of a third party) should not raise becomes a clear refusal."""
    try:
        yield from reader.read(path, ledger)
    except (TraceError, GeneratorExit):
        raise
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}. Check the file and its disk.") from error
    except Exception as error:
        raise TraceError(
            f"{path}: the reader {reader.name!r} failed with {type(error).__name__}: {error}. This is a bug of the "
            "reader: report it with the file."
        ) from error


def _damage_message(path: Path, ledger: Ledger) -> str:
    places, total = [p for p in ledger.problems if p.reason in DAMAGE][:5], ledger.problems.damage
    shown = "\n".join(f"- {problem}" for problem in places)
    more = f"\n- ... and {total - len(places)} more" if total > len(places) else ""
    return (
        f"{path} is damaged in {total} place(s), expected one whole record after another:\n{shown}{more}\n"
        "Fix: let the session end if it is still being written, or repair or delete the lines named here; or pass "
        "--allow-damaged to read everything that is whole and list the rest. Nothing was written."
    )
