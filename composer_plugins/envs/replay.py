"""What recorded calls show about the files: forwards, backwards, and about what had been read."""

from __future__ import annotations

import posixpath

from composer_plugins.envs import numbered, shell
from composer_plugins.envs.events import EDITORS, Event


def apply_event(event: Event, files: dict[str, str], cwd: str) -> str:
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


def _listing(event: Event) -> tuple[int, list[str], bool] | None:
    """Return (first line number, lines, whether they reach the end) of a successful Read, or None."""
    listing = numbered.parse_numbered(event.result.content)
    limit = event.call.arguments.get("limit")
    asked = limit if isinstance(limit, int) else numbered.READ_LINES
    return None if listing is None else (*listing, len(listing[1]) < asked)


def _apply_read(event: Event, files: dict[str, str], path: str) -> None:
    found = _listing(event)
    if found is None:
        return
    first, lines, to_end = found
    known = None if first == 1 and to_end else files.get(path)
    files[path] = numbered.overlay(known, first, lines, to_end=to_end)


def _foresee_read(event: Event, files: dict[str, str], path: str, prompts: list[int]) -> bool:
    """Fill gaps of `path` with what a later Read shows; return False when it shows another file.

    A contradiction means that someone else changed the file, most likely while the user had the turn. If
    no user message lies between the step and the Read, that was before the step, and the Read is right.
    """
    found = _listing(event)
    if found is None:
        return True
    first, lines, to_end = found
    known = files.get(path)
    changed = known is not None and numbered.contradicts(known, first, lines, to_end=to_end)
    if changed and any(prompt < event.action for prompt in prompts):
        return False
    if changed and first == 1 and to_end:
        known = None
    files[path] = numbered.overlay(known, first, lines, to_end=to_end, only_gaps=not changed)
    return True


def look_ahead(events: list[Event], files: dict[str, str], prompts: list[int]) -> None:
    """Fill the gaps in `files` with what later calls show of files that nothing has changed by then.

    `prompts` are the positions of the user messages after the step.
    """
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
            if not _foresee_read(event, files, path, prompts):
                closed.add(path)
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


def read_evidence(prompts: list[int], events: list[Event]) -> tuple[dict[str, list[float]], list[float]]:
    """Return when each file became read, and when the agent program forgot what it had read.

    Times are message indices. Two things happen outside the log and show only in their consequences: a
    file attached by the user counts as read (an edit then succeeds without a Read), and a restarted
    session forgets (an edit then fails with "has not been read yet" although the log has the Read). The
    first is put just before the edit, the second at the last user message before the failure.
    """
    touched: dict[str, list[float]] = {}
    resets: list[float] = []
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
