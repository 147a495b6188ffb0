"""The recorded tool calls of a session, in order, with what they did and what they said."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_plugins.envs import shell
from composer_plugins.envs.tool_errors import REJECTED
from composer_plugins.traces.schema import Status, ToolCall, ToolResult, Trace

#: Tools that change files.
EDITORS = ("Edit", "MultiEdit", "Write")


def absolute(cwd: str, path: str) -> str:
    """Return `path` as an absolute, normal path."""
    return "/" + posixpath.normpath(posixpath.join(cwd, path)).lstrip("/")


@dataclass(frozen=True)
class Event:
    """One recorded call with its result.

    `version` counts the file changes before it; `path` is the absolute path of a file tool's file.
    """

    step: int
    action: int
    call: ToolCall
    result: ToolResult
    version: int = 0
    path: str | None = None

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
        return f"{REJECTED}\n{text}"
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


def recorded_events(trace: Trace, cwd: str) -> list[Event]:
    """Return the calls of `trace` that have a result, in order; relative paths are taken from `cwd`."""
    events, version = [], 0
    for step in trace.steps:
        results = {result.call_id: result for result in step.results}
        for call in trace.action_of(step).tool_calls:
            if call.id in results:
                path = call.arguments.get("file_path")
                path = absolute(cwd, path) if isinstance(path, str) else None
                event = Event(step.index, step.action, call, results[call.id], version, path)
                events.append(event)
                version += changes_files(event)
    return events


def changes_files(event: Event) -> bool:
    """True when the call may have changed a file."""
    if event.call.name in EDITORS:
        return event.succeeded
    command = event.call.arguments.get("command")
    return event.call.name == "Bash" and isinstance(command, str) and shell.may_change_files(command)
