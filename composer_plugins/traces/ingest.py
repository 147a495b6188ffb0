"""Logs to traces: find each file's format by its content, read it, write the traces stage file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from composer_plugins.errors import TraceError
from composer_plugins.plugins import PluginManager, get_plugin_manager
from composer_plugins.traces.base import TraceReader
from composer_plugins.traces.ledger import Ledger
from composer_plugins.traces.schema import Message, Trace
from composer_plugins.traces.store import Manifest, file_sha256, write_stage

HEAD = 64 * 1024

#: Provider call ids at least this long are unique everywhere; shorter ones ("call_1") are not.
_UNIQUE_ID = 20


@dataclass
class Report:
    """What an ingest did. `refused` maps each file of a folder that was not read to the reason."""

    manifest: Manifest
    ledger: Ledger
    files: int = 0
    traces: int = 0
    steps: int = 0
    copied_steps: int = 0
    renamed: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def find_reader(path: Path, *, manager: PluginManager | None = None) -> TraceReader:
    """Return the reader whose format the file has.

    Raises:
        TraceError: the file is missing, empty, binary or of a format that no reader knows.
    """
    head = _head(path)
    registry = (manager or get_plugin_manager()).trace_readers
    for entry in registry:
        reader = entry.load()
        if reader.sniff(head):
            return reader
    kind = "binary data" if _is_binary(head) else f"a file that starts with {head[:40]!r}"
    raise TraceError(
        f"{path} is of no known log format: found {kind}. Formats that can be read: "
        f"{', '.join(sorted(entry.name for entry in registry))}. Pass the agent's own session log "
        "(Claude Code: ~/.claude/projects/<project>/<session>.jsonl), or install a plugin that reads this format."
    )


def _head(path: Path) -> bytes:
    if not path.exists():
        raise TraceError(f"Expected an agent log at {path}: there is no such file. Check the path.")
    if not path.is_file():
        raise TraceError(f"Expected an agent log at {path}: it is not a regular file.")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    if not head.strip():
        raise TraceError(f"{path} is empty: expected an agent log with at least one record.")
    return head


def _is_binary(head: bytes) -> bool:
    if b"\x00" in head:
        return True
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(head) - 4  # a character cut by the end of the head is fine
    return False


def find_logs(paths: Iterable[Path]) -> list[tuple[Path, bool]]:
    """Return (file, named by the user) for every file in `paths`; folders are searched, hidden files skipped.

    Raises:
        TraceError: a path does not exist, or a folder has no files.
    """
    found: dict[Path, bool] = {}
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
            if not inside:
                raise TraceError(f"The folder {path} has no files in it: pass a log or a folder of logs.")
            for file in inside:
                found.setdefault(file, False)
        elif path.exists():
            found[path] = True
        else:
            raise TraceError(f"Expected an agent log at {path}: there is no such file or folder. Check the path.")
    return list(found.items())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


class CopyDetector:
    """Finds steps that an earlier file has already: resumed, forked and checkpointed sessions copy them.

    A step is a copy when everything up to and including it was seen before, or when its call ids were (if
    they are long enough to be unique everywhere).
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._encoder = msgspec.json.Encoder()

    def mark(self, trace: Trace) -> int:
        """Set `trainable` to false on copied steps; return how many there were."""
        digests, chain = [], hashlib.blake2b(digest_size=16)
        for message in trace.messages:
            chain.update(self._encoder.encode(message))
            digests.append(chain.digest())
        copied, keys = 0, []
        for step in trace.steps:
            mine = [digests[step.action], *self._call_keys(trace.action_of(step))]
            if any(key in self._seen for key in mine):
                copied += 1
                step.trainable, step.not_trainable_reason = False, step.not_trainable_reason or "copied"
            keys.extend(mine)
        self._seen.update(keys)
        return copied

    @staticmethod
    def _call_keys(action: Message) -> list[bytes]:
        return [call.id.encode() for call in action.tool_calls if len(call.id) >= _UNIQUE_ID]


def read_logs(
    paths: Iterable[str | Path],
    report: Report,
    *,
    manager: PluginManager | None = None,
    progress: Callable[[Path, int], None] | None = None,
) -> Iterator[Trace]:
    """Yield the traces of files and folders, and fill `report`.

    A file of a folder that cannot be read is listed in `report.refused`; a file that was named is an error.

    Args:
        progress: called with (file, its size in bytes) after each file.

    Raises:
        TraceError: see `find_logs` and `find_reader`.
    """
    copies, names = CopyDetector(), set()
    for path, named in find_logs([Path(p) for p in paths]):
        try:
            reader = find_reader(path, manager=manager)
        except TraceError as error:
            if named:
                raise
            report.refused[str(path)] = str(error)
            reader = None
        if reader is not None:
            report.manifest.inputs[str(path)] = file_sha256(path)
            report.files += 1
            for trace in reader.read(path, report.ledger):
                report.renamed += _make_unique(trace, names)
                report.copied_steps += copies.mark(trace)
                report.traces += 1
                report.steps += len(trace.steps)
                yield trace
        if progress is not None:
            progress(path, path.stat().st_size)


def _make_unique(trace: Trace, names: set[str]) -> bool:
    """Number a trace id that another file has used (one session can be spread over files)."""
    base, number = trace.id, 2
    while trace.id in names:
        trace.id = f"{base}#{number}"
        number += 1
    names.add(trace.id)
    return trace.id != base


def ingest(
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    manager: PluginManager | None = None,
    progress: Callable[[Path, int], None] | None = None,
) -> Report:
    """Read logs into the traces stage file `output`.

    Args:
        paths: log files and folders of logs.
        output: the stage file to write; its manifest is written beside it.

    Returns:
        What was read, used and skipped, and which places are damaged.

    Raises:
        TraceError: a named file cannot be read, or nothing in the folders could; the output is then left
            as it was before.
    """
    output = Path(output)
    ledger = Ledger(read=0, used=0)
    report = Report(Manifest(stage="ingest", record=Trace.__name__, written=0), ledger)
    for path, named in find_logs([Path(p) for p in paths]):  # before anything is written
        if named:
            find_reader(path, manager=manager)
        if path.resolve() == output.resolve():
            raise TraceError(f"The output {output} is also an input: choose another output file.")
    report.manifest.options["files_not_read"] = report.refused
    traces = _at_least_one(read_logs(paths, report, manager=manager, progress=progress), report)
    first = next(traces)
    write_stage(output, _chain(first, traces), report.manifest, counts=ledger)
    return report


def _at_least_one(traces: Iterator[Trace], report: Report) -> Iterator[Trace]:
    count = 0
    for trace in traces:
        count += 1
        yield trace
    if count:
        return
    if not report.files:
        some = "\n".join(f"- {text}" for text in list(report.refused.values())[:5])
        raise TraceError(f"None of the {len(report.refused)} files could be read:\n{some}")
    lost = "\n".join(f"- {problem}" for problem in report.ledger.problems[:5])
    raise TraceError(
        f"No model step found in {report.files} file(s): of {report.ledger['read']} lines, "
        f"{report.ledger.skipped()} were skipped. Pass a session in which the agent answered.\n{lost}".rstrip()
    )


def _chain(first: Trace, rest: Iterator[Trace]) -> Iterator[Trace]:
    yield first
    yield from rest
