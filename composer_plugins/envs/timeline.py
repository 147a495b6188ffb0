"""What a recorded session says about the files and commands at each of its steps.

Read forwards, a trace gives the files as the agent had read, written and edited them. Read backwards, it
gives what was on the disk all along: a file that the agent first reads at step 9 and nobody touched
before was there at step 3. Both make the `Snapshot` of a step; only what had been read *before* the step
counts as read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from composer_plugins.envs.events import Event, call_key, changes_files, recorded_events, session_directory
from composer_plugins.envs.replay import apply_event, look_ahead, read_evidence
from composer_plugins.errors import TraceError
from composer_plugins.traces.schema import Status, Trace

_CACHED_SNAPSHOTS = 256
_ANSWERED = (Status.OK, Status.ERROR, Status.INFERRED_ERROR, Status.HUMAN_REJECT)


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
        self.events = recorded_events(trace, self.cwd)
        self._actions = {step.index: step.action for step in trace.steps}
        self._by_call: dict[str, list[Event]] = {}
        for event in self.events:
            self._by_call.setdefault(call_key(event.call.name, event.call.arguments), []).append(event)
        self._prompts = [i for i, message in enumerate(trace.messages) if message.role == "user"]
        self._touched, self._resets = read_evidence(self._prompts, self.events)
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
        try:
            key = call_key(tool, arguments)
        except (RecursionError, ValueError):  # arguments nested without end: never recorded
            return None
        events = [e for e in self._by_call.get(key, ()) if e.result.status in _ANSWERED]
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
            cwd = apply_event(event, files, cwd)
        else:
            position = len(self.events)
            version = self.events[-1].version + changes_files(self.events[-1]) if self.events else 0
        look_ahead(self.events[position:], files, [p for p in self._prompts if p > action])
        read = {path for path, times in self._touched.items() if self._is_read(times, action)}
        return Snapshot(index, cwd, version, files, frozenset(read & files.keys()))

    def _is_read(self, times: list[float], action: int) -> bool:
        last = max((t for t in times if t < action), default=None)
        return last is not None and not any(last < reset < action for reset in self._resets)
