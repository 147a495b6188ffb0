"""The state behind the tools: files in memory, what has been read, and the recorded results."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

from composer_plugins.envs import shell
from composer_plugins.envs.events import Event, absolute, failure_text
from composer_plugins.envs.timeline import Recordings, Snapshot, Timeline
from composer_plugins.envs.tool_errors import MAX_TEXT, ToolError, text_argument
from composer_plugins.envs.tool_method import SMALLEST_RESULT
from composer_plugins.errors import ConfigError
from composer_plugins.traces.schema import Status, Trace


class WorkspaceState:
    """One step of a recorded session, restored by `reset`. `RecordedWorkspace` adds the tools."""

    def __init__(
        self, traces: Recordings | Mapping[str, Trace] | Iterable[Trace], *, max_result_chars: int = 160
    ) -> None:
        if max_result_chars < SMALLEST_RESULT:
            raise ConfigError(f"max_result_chars is {max_result_chars}: expected at least {SMALLEST_RESULT}.")
        self._recordings = traces if isinstance(traces, Recordings) else Recordings(traces)
        self._limit = max_result_chars
        self._timeline: Timeline | None = None
        self._snapshot = Snapshot(0, "/", 0, {}, frozenset())
        self._clear()

    def reset(self, *, trace_id: str | None = None, step: int | None = None, **_: Any) -> None:
        """Restore the workspace as it was just before one recorded step.

        Args:
            trace_id: id of one of the traces given to the constructor.
            step: index of the step.

        Raises:
            TraceError: no such trace or step. It is the data set that is wrong, so this is not a tool error.
        """
        timeline = self._recordings.timeline(trace_id)
        self._snapshot, self._timeline = timeline.snapshot(step), timeline
        self._clear()

    def _clear(self) -> None:
        self._files: dict[str, str] = dict(self._snapshot.files)
        self._read: set[str] = set(self._snapshot.read)
        self._changed = False
        self.todos: list[dict[str, Any]] = []

    @property
    def files(self) -> dict[str, str]:
        """A copy of the files by absolute path; gaps are marked as in `composer_plugins.envs.numbered`."""
        return dict(self._files)

    @property
    def files_read(self) -> frozenset[str]:
        """The files that may be edited because they have been read."""
        return frozenset(self._read)

    def _path(self, tool: str, name: str, value: Any) -> str:
        return self._resolve(text_argument(tool, name, value))

    def _root(self, tool: str, path: Any) -> str:
        return self._snapshot.cwd if path is None else self._path(tool, "path", path)

    def _resolve(self, path: str) -> str:
        """Return the absolute path meant by `path`. Raises `ToolError` when several known files fit."""
        joined = absolute(self._snapshot.cwd, path)
        if path.startswith("/") or joined in self._files or self._is_directory(joined):
            return joined
        ending = "/" + posixpath.normpath(path)
        fitting = [file for file in self._files if file.endswith(ending)]
        if len(fitting) > 1:
            raise ToolError(f"Error: {path} could be {len(fitting)} files. Use an absolute path.")
        return fitting[0] if fitting else joined

    def _is_directory(self, path: str) -> bool:
        return bool(shell.children(self._files, path))

    def _store(self, path: str, text: str) -> None:
        if len(text) > MAX_TEXT:
            raise ToolError("Error: the file would become too large.")
        self._files[path] = text
        self._read.add(path)
        self._changed = True

    def _find(self, tool: str, arguments: dict[str, Any], *, same_files: bool) -> Event | None:
        if self._timeline is None or (same_files and self._changed):
            return None
        return self._timeline.find(tool, arguments, self._snapshot, same_files=same_files)

    def _recorded(self, tool: str, arguments: dict[str, Any], *, same_files: bool) -> str | None:
        """Return a recorded result, raise a recorded failure, or return None when nothing is recorded."""
        event = self._find(tool, arguments, same_files=same_files)
        if event is None:
            return None
        failure = failure_text(event)
        if failure is not None:
            raise ToolError(failure)
        return event.result.content

    def _refuse_if_rejected(self, tool: str, arguments: dict[str, Any]) -> None:
        """A person's refusal is not in the files: repeat it for the very call that was refused."""
        event = self._find(tool, arguments, same_files=True)
        if event is not None and event.result.status is Status.HUMAN_REJECT:
            raise ToolError(failure_text(event) or "")
