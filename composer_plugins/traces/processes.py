"""Many log files read by several processes, in the order in which they were given.

Each process reads a file, cleans and encodes its traces and puts them into a part file beside the output; only what
the other files must know of a trace (its id, the keys of its steps) is read back with it. So the memory is that of one
file a process, whatever the number and size of the files, and nothing depends on how a process was started (spawned
processes are used everywhere, as macOS and Windows know no others).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec

from composer_plugins.errors import ComposerError, TraceError
from composer_plugins.traces.copies import StepKeys, step_keys
from composer_plugins.traces.read_file import FileOutcome, Job, read_file

_encode = msgspec.json.Encoder().encode
_header = msgspec.json.Decoder(tuple[str, list[StepKeys], int])


@dataclass
class FileResult:
    """What a process made of one file. `cleaned` is the report of the cleaner, `error` why there is nothing."""

    part: Path
    outcome: FileOutcome
    cleaned: Any = None
    error: ComposerError | None = None

    def traces(self) -> Iterator[tuple[str, list[StepKeys], bytes]]:
        """Yield (id, keys of the steps, JSON) of every trace; the part file is gone afterwards."""
        with self.part.open("rb") as file:
            while head := file.readline():
                trace_id, keys, size = _header.decode(head)
                yield trace_id, keys, file.read(size)
        self.part.unlink()


def _read(job: Job, part: Path, cleaner: Any) -> FileResult:
    """Read one file into a part file."""
    result = FileResult(part, FileOutcome())
    try:
        with part.open("wb") as file:
            for trace in read_file(job, result.outcome):
                trace_id, keys = trace.id, step_keys(trace)
                line = _encode(trace if cleaner is None else cleaner.scrub_trace(trace))
                file.write(_encode((trace_id, keys, len(line))) + b"\n" + line)
    except ComposerError as error:
        result.error = error
    except OSError as error:
        result.error = TraceError(f"{error.filename or part}: {error.strerror or error}. Check the file and its disk.")
    except Exception as error:
        result.error = TraceError(f"{job.path} failed with {type(error).__name__}: {error}. This is a bug: report it.")
    if cleaner is not None:
        result.cleaned = cleaner.take_report()
    return result


def _work(pipe: Connection, cleaner: Any) -> None:
    """The life of a process: jobs come in, results go out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that we work for
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(_read(*pipe.recv(), cleaner))


class _Pool:
    """Processes and the jobs that they have."""

    def __init__(self, jobs: list[Job], folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        # The largest files come first, so that none is left to one process at the end.
        self.waiting = sorted(range(len(jobs)), key=lambda number: jobs[number].path.stat().st_size)
        self.done: dict[int, FileResult] = {}
        self.processes: dict[Connection, Any] = {}
        self.at_work: dict[Connection, int] = {}

    def start(self, count: int, cleaner: Any) -> None:
        """Start the processes; each gets its first job."""
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, cleaner), daemon=True)
            process.start()
            theirs.close()
            self.processes[ours] = process
            self._give(ours)

    def _give(self, pipe: Connection) -> None:
        if self.waiting:
            number = self.at_work[pipe] = self.waiting.pop()
            with contextlib.suppress(BrokenPipeError):  # a dead process is noticed when its answer is waited for
                pipe.send((self.jobs[number], self.folder / f"{number}.part"))

    def result(self, number: int) -> FileResult:
        """Wait for the result of one job; meanwhile the processes get the jobs that follow."""
        while number not in self.done:
            for pipe in wait(list(self.at_work)):
                job = self.at_work.pop(pipe)
                try:
                    self.done[job] = pipe.recv()
                except (EOFError, ConnectionError):
                    raise self._crash(pipe, job) from None
                self._give(pipe)
        return self.done.pop(number)

    def _crash(self, pipe: Connection, job: int) -> TraceError:
        process = self.processes[pipe]
        process.join(5)
        return TraceError(
            f"A process that read {self.jobs[job].path} ended without an answer (exit code {process.exitcode}; a "
            "negative one is the signal that killed it, -9 often for want of memory). Nothing was written. Run it "
            "again with a smaller --jobs, or with --jobs 1 to see what happens; leave the file out if it is the cause."
        )

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        for pipe in self.processes:
            pipe.close()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.join(5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def read_files(jobs: list[Job], count: int, cleaner: Any, beside: Path) -> Iterator[Iterator[FileResult]]:
    """Read files with `count` processes; yields an iterator over their results, in order.

    Args:
        cleaner: changes each trace before it is encoded, or None; it is sent to every process.
        beside: folder in which the part files are kept meanwhile; they are removed in any case.

    Raises:
        TraceError: when the result of a named file is an error, or a process ended without one.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".ingest-") as folder:
        pool = _Pool(jobs, Path(folder))
        try:
            pool.start(min(count, len(jobs)), cleaner)
            yield _in_order(pool)
        finally:
            pool.stop()


def _in_order(pool: _Pool) -> Iterator[FileResult]:
    for number in range(len(pool.jobs)):
        result = pool.result(number)
        if result.error is not None:
            raise result.error
        yield result
