"""What a recorded session says about the files and commands at each of its steps.

Read forwards, a trace gives the files as the agent had read, written and edited them. Read backwards, it
gives what was on the disk all along: a file that the agent first reads at step 9 and nobody touched
before was there at step 3. Both make the `Snapshot` of a step; only what had been read *before* the step
counts as read.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from composer_plugins.envs import numbered, shell
from composer_plugins.envs.tool_errors import REJECTED
from composer_plugins.errors import TraceError
from composer_plugins.traces.schema import Status, ToolCall, ToolResult, Trace

EDITORS = ("Edit", "MultiEdit", "Write")
_CACHED_SNAPSHOTS = 256


@dataclass(frozen=True)
class Event:
    """One recorded call with its result. `version` counts the file changes before it."""

    step: int
    action: int
    call: ToolCall
    result: ToolResult
    version: int = 0

    @property
    def path(self) -> str | None:
        """The absolute path that a file tool was called with, or None."""
        path = self.call.arguments.get("file_path")
        return posixpath.normpath(path) if isinstance(path, str) and path.startswith("/") else None

    @property
    def succeeded(self) -> bool:
        """True when the call ended well."""
        return self.result.status is Status.OK

    @property
    def edits(self) -> list[tuple[str, str, bool]]:
        """The (old, new, replace_all) of a recorded Edit or MultiEdit."""
        arguments = self.call.arguments
        entries = arguments.get("edits") if self.call.name == "MultiEdit" else [arguments]
        return [
            (e["old_string"], e["new_string"], bool(e.get("replace_all")))
            for e in (entries if isinstance(entries, list) else [])
            if isinstance(e, dict) and isinstance(e.get("old_string"), str) and isinstance(e.get("new_string"), str)
        ]


@dataclass(frozen=True)
class Snapshot:
    """The workspace just before one step. Copy `files` and `read` before changing them."""

    step: int
    cwd: str
    version: int
    files: Mapping[str, str] = field(repr=False)
    read: frozenset[str] = field(repr=False)


class Recordings:
    """The timelines of many traces, each built when it is first needed and then shared.

    Args:
        traces: by id, or any iterable of traces (their `id` is the key).

    Raises:
        TraceError: two traces with the same id.
    """

    def __init__(self, traces: Mapping[str, Trace] | Iterable[Trace]) -> None:
        self._traces: dict[str, Trace] = dict(traces) if isinstance(traces, Mapping) else {}
        if not isinstance(traces, Mapping):
            for trace in traces:
                if trace.id in self._traces:
                    raise TraceError(f"Expected unique trace ids: {trace.id!r} is there twice. Ingest the logs again.")
                self._traces[trace.id] = trace
        self._timelines: dict[str, Timeline] = {}

    def timeline(self, trace_id: Any) -> Timeline:
        """Return the timeline of one trace. Raises `TraceError` when there is no such trace."""
        if not isinstance(trace_id, str) or trace_id not in self._traces:
            raise TraceError(
                f"Expected the id of one of the {len(self._traces)} traces given to the workspace, found "
                f"{trace_id!r}. The row's `trace_id` must come from the same traces file."
            )
        if trace_id not in self._timelines:
            self._timelines[trace_id] = Timeline(self._traces[trace_id])
        return self._timelines[trace_id]


class Timeline:
    """The recorded calls of one trace in order, and the workspace before any of its steps."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.cwd = session_directory(trace)
        self.events = _events(trace)
        self._actions = {step.index: step.action for step in trace.steps}
        self._by_call: dict[str, list[Event]] = {}
        for event in self.events:
            self._by_call.setdefault(call_key(event.call.name, event.call.arguments), []).append(event)
        self._touched, self._resets = _read_evidence(trace, self.events)
        self._snapshots: dict[int, Snapshot] = {}

    def snapshot(self, step: Any) -> Snapshot:
        """Return the workspace before step `step` (the step's `index`; any integer type).

        Raises:
            TraceError: the trace has no such step.
        """
        try:
            index = step.__index__()
            action = self._actions[index]
        except (AttributeError, KeyError):
            raise TraceError(
                f"Trace {self.trace.id!r} has {len(self._actions)} steps, none with index {step!r}. "
                "The row's `step` must come from the same traces file."
            ) from None
        if index not in self._snapshots:
            if len(self._snapshots) >= _CACHED_SNAPSHOTS:
                self._snapshots.pop(next(iter(self._snapshots)))
            self._snapshots[index] = self._build(index, action)
        return self._snapshots[index]

    def find(self, tool: str, arguments: Mapping[str, Any], at: Snapshot, *, same_files: bool) -> Event | None:
        """Return the recorded run of a call that is nearest to `at`: the next one, else the latest before.

        Args:
            tool: tool name.
            arguments: the call's arguments; optional ones left out or None are the same.
            at: where the workspace was reset to.
            same_files: only a run between which and `at` no recorded call changed a file.
        """
        events = [e for e in self._by_call.get(call_key(tool, arguments), ()) if e.result.status in _ANSWERED]
        if same_files:
            events = [e for e in events if e.version == at.version]
        after = [e for e in events if e.step >= at.step]
        return after[0] if after else events[-1] if events else None

    def _build(self, index: int, action: int) -> Snapshot:
        files: dict[str, str] = {}
        cwd, version, position = self.cwd, 0, 0
        for position, event in enumerate(self.events):  # noqa: B007
            version = event.version
            if event.step >= index:
                break
            cwd = _apply(event, files, cwd)
        else:
            position = len(self.events)
            version = self.events[-1].version + _changes(self.events[-1]) if self.events else 0
        _look_ahead(self.events[position:], files)
        read = {path for path, times in self._touched.items() if self._is_read(times, action)}
        return Snapshot(index, cwd, version, files, frozenset(read & files.keys()))

    def _is_read(self, times: list[float], action: int) -> bool:
        last = max((t for t in times if t < action), default=None)
        return last is not None and not any(last < reset < action for reset in self._resets)


_ANSWERED = (Status.OK, Status.ERROR, Status.INFERRED_ERROR, Status.HUMAN_REJECT)


def call_key(tool: str, arguments: Mapping[str, Any]) -> str:
    """Return what makes two calls the same: tool and arguments, without those that change no result."""
    kept = {k: v for k, v in arguments.items() if v is not None and k not in ("description", "timeout")}
    if tool == "Bash" and isinstance(kept.get("command"), str):
        kept = {"command": shell.normalise(kept["command"])}
    return tool + json.dumps(kept, sort_keys=True, default=str)


def failure_text(event: Event) -> str | None:
    """Return what a failed recorded call showed, recognisable as a failure; None when it succeeded."""
    result = event.result
    text = result.content
    if result.status is Status.HUMAN_REJECT and not text.startswith("The user doesn't want to"):
        return f"{REJECTED} The user said:\n{text}"
    if not result.status.failed:
        return None
    if result.exit_code and "exit code" not in text[:40].lower():
        text = f"Exit code {result.exit_code}\n{text}"
    return text.removeprefix("<tool_use_error>").removesuffix("</tool_use_error>") or "Error: the command failed."


def session_directory(trace: Trace) -> str:
    """Return the session's working directory: as recorded, else the common parent of the paths used."""
    cwd = trace.extra.get("cwd")
    if isinstance(cwd, str) and cwd.startswith("/"):
        return posixpath.normpath(cwd)
    calls = (call for message in trace.messages for call in message.tool_calls)
    paths = [p for c in calls if isinstance(p := c.arguments.get("file_path"), str) and p.startswith("/")]
    return posixpath.commonpath([posixpath.dirname(posixpath.normpath(p)) for p in paths]) if paths else "/"


def _events(trace: Trace) -> list[Event]:
    events, version = [], 0
    for step in trace.steps:
        results = {result.call_id: result for result in step.results}
        for call in trace.action_of(step).tool_calls:
            if call.id in results:
                event = Event(step.index, step.action, call, results[call.id], version)
                events.append(event)
                version += _changes(event)
    return events


def _changes(event: Event) -> bool:
    """True when the call may have changed a file."""
    if event.call.name in EDITORS:
        return event.succeeded
    command = event.call.arguments.get("command")
    return event.call.name == "Bash" and isinstance(command, str) and shell.may_change_files(command)


def _apply(event: Event, files: dict[str, str], cwd: str) -> str:
    """Apply one recorded call to `files`; return the working directory after it."""
    if not event.succeeded:
        return cwd
    name, path, arguments = event.call.name, event.path, event.call.arguments
    if name == "Bash" and isinstance(arguments.get("command"), str):
        return shell.apply_effects(arguments["command"], files, cwd)[0]
    if path is None:
        return cwd
    if name == "Read":
        _apply_read(event, files, path)
    elif name == "Write" and isinstance(arguments.get("content"), str):
        files[path] = numbered.sanitised(arguments["content"])
    elif name in EDITORS:
        for old, new, replace_all in event.edits:
            result = event.result.content if name == "Edit" else ""
            text = numbered.replay_edit(files.get(path), old, new, replace_all=replace_all, result=result)
            if text is not None:
                files[path] = text
    return cwd


def _apply_read(event: Event, files: dict[str, str], path: str, *, only_gaps: bool = False) -> None:
    listing = numbered.parse_numbered(event.result.content)
    if listing is None:
        return
    offset, limit = event.call.arguments.get("offset"), event.call.arguments.get("limit")
    asked = limit if isinstance(limit, int) else numbered.READ_LINES
    to_end = len(listing[1]) < asked
    if to_end and not offset and not only_gaps:
        files.pop(path, None)  # a whole reading replaces all that was known
    files[path] = numbered.overlay(files.get(path), *listing, to_end=to_end, only_gaps=only_gaps)


def _look_ahead(events: list[Event], files: dict[str, str]) -> None:
    """Fill the gaps in `files` with what later calls show of files that nothing has changed by then."""
    closed: set[str] = set()
    commands: list[str] = []
    for event in events:
        path, command = event.path, event.call.arguments.get("command")
        if event.call.name == "Bash" and isinstance(command, str) and shell.may_change_files(command):
            commands.append(command)
        if path is None or path in closed or not event.succeeded:
            continue
        if any(posixpath.basename(path) in command for command in commands):
            closed.add(path)
        elif event.call.name == "Read":
            _apply_read(event, files, path, only_gaps=True)
        elif event.call.name in EDITORS:
            closed.add(path)
            if event.call.name == "Edit":
                _fill_before_edit(event, files, path)
            elif path not in files and "has been updated" in event.result.content:
                files[path] = numbered.UNKNOWN_REST


def _fill_before_edit(event: Event, files: dict[str, str], path: str) -> None:
    for old, new, replace_all in event.edits:
        if path in files and old in files[path]:
            continue
        shown = None if replace_all else numbered.before_edit(old, new, event.result.content)
        if shown is not None:
            files[path] = numbered.overlay(files.get(path), *shown, to_end=False, only_gaps=True)


def _read_evidence(trace: Trace, events: list[Event]) -> tuple[dict[str, list[float]], list[float]]:
    """Return when each file became read, and when the agent program forgot what it had read.

    Times are message indices. Two things happen outside the log and show only in their consequences: a
    file attached by the user counts as read (an edit then succeeds without a Read), and a restarted
    session forgets (an edit then fails with "has not been read yet" although the log has the Read). The
    first is put just before the edit, the second at the last user message before the failure.
    """
    touched: dict[str, list[float]] = {}
    resets: list[float] = []
    prompts = [i for i, message in enumerate(trace.messages) if message.role == "user"]
    created = {e.path for e in events if e.call.name == "Write" and "created successfully" in e.result.content}
    for event in events:
        path, name = event.path, event.call.name
        if path is None or name not in ("Read", *EDITORS):
            continue
        times = touched.setdefault(path, [])
        if event.succeeded:
            if not times and name in EDITORS and path not in created:
                times.append(event.action - 0.5)
            times.append(event.action)
        elif name in EDITORS and times and "has not been read yet" in event.result.content:
            last = max((i for i in prompts if times[-1] < i < event.action), default=event.action - 0.25)
            resets.append(last)
    _confirm_edits(events, touched, resets)
    return touched, resets


def _confirm_edits(events: list[Event], touched: dict[str, list[float]], resets: list[float]) -> None:
    """A file edited with success after a reset, and not read again, must have been read in some way."""
    for event in events:
        path = event.path
        if path is None or event.call.name not in EDITORS or not event.succeeded:
            continue
        before = [t for t in touched[path] if t < event.action]
        if before and any(before[-1] < reset < event.action for reset in resets):
            touched[path].append(event.action - 0.1)
            touched[path].sort()
