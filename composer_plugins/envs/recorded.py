"""The tools of a coding agent over a recorded session: real results and real errors, nothing executed."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from composer_plugins.envs import numbered, search, shell
from composer_plugins.envs.linear_regex import Budget
from composer_plugins.envs.state import WorkspaceState
from composer_plugins.envs.timeline import Recordings
from composer_plugins.envs.tool_errors import (
    EXISTS,
    IS_DIRECTORY,
    MAX_TEXT,
    NOT_FOUND,
    NOT_READ,
    NOT_RECORDED,
    ToolError,
    flag_argument,
    integer_argument,
    invalid_argument,
    text_argument,
)
from composer_plugins.envs.tool_method import tool, tool_names
from composer_plugins.errors import ConfigError
from composer_plugins.traces.schema import Trace

TODOS_DONE = (
    "Todos have been modified successfully. Ensure that you continue to use the todo list to track your progress. "
    "Please proceed with the current tasks if applicable"
)


class RecordedWorkspace(WorkspaceState):
    """An agent's tools over one step of a recorded session, for hosts that take environments.

    `reset` chooses the trace and the step; then each public method is a tool with the name, arguments,
    results and error texts of Claude Code's. Files are strings in memory, so edits are real and each
    instance is on its own. A command is never run: it has a result when the session recorded one.

    Args:
        traces: the recorded sessions; a `Recordings` shares its work between instances.
        max_result_chars: results and errors are shortened to this many characters.

    Tools raise `ToolError`, and `TypeError` for a missing or unknown argument name; nothing else.
    """

    @tool()
    def Read(self, file_path: str, offset: int | None = None, limit: int | None = None) -> str:
        """Read a file. Lines come back with their numbers.

        Args:
            file_path: Absolute path of the file.
            offset: Number of the first line to read.
            limit: How many lines to read.

        Returns:
            The numbered lines.
        """
        path = self._path("Read", "file_path", file_path)
        first = integer_argument("Read", "offset", offset) or 1
        count = integer_argument("Read", "limit", limit, low=1) or numbered.READ_LINES
        if path not in self._files:
            return self._unknown_file(path, {"file_path": file_path, "offset": offset, "limit": limit})
        lines = self._files[path].split("\n")
        shown = lines[first - 1 : first - 1 + count]
        if not shown and lines[-1] != numbered.UNKNOWN_REST:
            self._read.add(path)
            return (
                "<system-reminder>Warning: the file exists but is shorter than the provided offset "
                f"({first}). The file has {len(lines)} lines.</system-reminder>"
            )
        if not set(shown) - {numbered.UNKNOWN, numbered.UNKNOWN_REST}:
            raise ToolError(f"{NOT_RECORDED} these lines of {posixpath.basename(path)}")
        self._read.add(path)
        if lines == [""]:
            return "<system-reminder>Warning: the file exists but the contents are empty.</system-reminder>"
        return numbered.format_numbered(shown, first)

    @tool()
    def Write(self, file_path: str, content: str) -> str:
        """Write a whole file. An existing file must have been read first.

        Args:
            file_path: Absolute path of the file.
            content: The new content of the file.

        Returns:
            What was done.
        """
        path = self._path("Write", "file_path", file_path)
        text = numbered.sanitised(text_argument("Write", "content", content))
        self._refuse_if_rejected("Write", {"file_path": file_path, "content": content})
        if self._is_directory(path):
            raise ToolError(IS_DIRECTORY)
        if path in self._files and path not in self._read:
            raise ToolError(NOT_READ)
        existed = path in self._files
        self._store(path, text)
        if not existed:
            return f"File created successfully at: {path}"
        return self._updated(path, numbered.format_numbered(text.split("\n"), 1))

    @tool()
    def Edit(self, file_path: str, old_string: str, new_string: str, replace_all: bool | None = False) -> str:
        """Replace text in a file that has been read.

        Args:
            file_path: Absolute path of the file.
            old_string: The text to replace, exactly as in the file.
            new_string: The text to put there.
            replace_all: Replace every occurrence instead of the only one.

        Returns:
            The changed lines, numbered.
        """
        path = self._path("Edit", "file_path", file_path)
        old = text_argument("Edit", "old_string", old_string)
        new = text_argument("Edit", "new_string", new_string)
        every = flag_argument("Edit", "replace_all", replace_all)
        arguments = {"file_path": file_path, "old_string": old, "new_string": new, "replace_all": replace_all}
        self._refuse_if_rejected("Edit", arguments)
        if path not in self._files:
            return self._create(path, old, new)
        if old == "" and new != "":
            raise ToolError(EXISTS)
        if path not in self._read:
            raise ToolError(NOT_READ)
        before = self._files[path]
        if every and before.count(old) * len(new) > MAX_TEXT:
            raise ToolError("Error: the file would become too large.")
        after = numbered.replace_text(before, old, new, replace_all=every)
        self._store(path, after)
        if every:
            return (
                f"The file {path} has been updated. All occurrences of '{old}' were successfully replaced with '{new}'."
            )
        return self._updated(path, numbered.snippet_of(before, after, old, new))

    @tool()
    def Glob(self, pattern: str, path: str | None = None) -> str:
        """Find files by name.

        Args:
            pattern: Glob such as **/*.py.
            path: Directory to search; the working directory when left out.

        Returns:
            The matching paths.
        """
        text_argument("Glob", "pattern", pattern)
        root = self._root("Glob", path)
        recorded = self._recorded("Glob", {"pattern": pattern, "path": path}, same_files=True)
        return recorded or search.glob_files(self._files, pattern, root)

    @tool(*search.FLAGS)
    def Grep(
        self,
        pattern: str,
        path: str | None = None,
        glob: str | None = None,
        type: str | None = None,
        output_mode: str | None = None,
        head_limit: int | None = None,
        multiline: bool | None = None,
        *,
        _flags: Mapping[str, object],
    ) -> str:
        """Search file contents with a regular expression. Takes ripgrep's -i, -n, -A, -B and -C too.

        Args:
            pattern: The regular expression.
            path: File or directory to search; the working directory when left out.
            glob: Only files whose names match.
            type: Only files of this type, such as py or js.
            output_mode: Either files_with_matches (default), content or count.
            head_limit: Show only the first entries.
            multiline: Let the pattern span lines.

        Returns:
            The matches.
        """
        text_argument("Grep", "pattern", pattern)
        for name, value in (("glob", glob), ("type", type), ("output_mode", output_mode)):
            if value is not None:
                text_argument("Grep", name, value)
        root = self._root("Grep", path)
        arguments = {"pattern": pattern, "path": path, "glob": glob, "type": type, "output_mode": output_mode}
        arguments |= {"head_limit": head_limit, "multiline": multiline, **_flags}
        recorded = self._recorded("Grep", arguments, same_files=True)
        if recorded is not None:
            return recorded
        options = search.grep_options(pattern, output_mode, _flags, head_limit, multiline)
        budget = Budget()
        chosen = search.select_files(self._files, root, glob, type, budget)
        return search.grep(self._files, chosen, root in self._files, options, budget)

    @tool("ignore")
    def LS(self, path: str, *, _flags: Mapping[str, object]) -> str:
        """List a directory.

        Args:
            path: Absolute path of the directory.

        Returns:
            The names in it.
        """
        root = self._path("LS", "path", path)
        recorded = self._recorded("LS", {"path": path, **_flags}, same_files=True)
        return recorded or search.list_directory(self._files, root)

    @tool("run_in_background")
    def Bash(
        self,
        command: str,
        description: str | None = None,
        timeout: int | None = None,
        *,
        _flags: Mapping[str, object],
    ) -> str:
        """Run a shell command.

        Args:
            command: The command.
            description: What the command does, in a few words.
            timeout: Time limit in milliseconds.

        Returns:
            The command's output.
        """
        text_argument("Bash", "command", command)
        if description is not None:
            text_argument("Bash", "description", description)
        integer_argument("Bash", "timeout", timeout)
        flag_argument("Bash", "run_in_background", _flags.get("run_in_background"))
        arguments = {"command": command}
        recorded = self._recorded("Bash", arguments, same_files=True)
        if recorded is None:
            recorded = shell.answer(command, self._files, self._snapshot.cwd, self._resolve)
        if recorded is None:
            recorded = self._recorded("Bash", arguments, same_files=False)
        if recorded is None:
            raise ToolError(f"{NOT_RECORDED} the command {command[:80]}")
        return recorded

    @tool()
    def TodoWrite(self, todos: list[dict[str, str]]) -> str:
        """Replace the list of tasks.

        Args:
            todos: The tasks, each with content, activeForm and status (pending, in_progress or completed).

        Returns:
            A confirmation.
        """
        if not isinstance(todos, list):
            raise invalid_argument("TodoWrite", "The parameter `todos` type is expected as `array`")
        for number, todo in enumerate(todos):
            if not isinstance(todo, dict) or not isinstance(todo.get("content"), str) or not todo["content"]:
                raise invalid_argument("TodoWrite", f"The parameter `todos[{number}].content` is missing")
            if todo.get("status") not in ("pending", "in_progress", "completed"):
                problem = "must be one of pending, in_progress, completed"
                raise invalid_argument("TodoWrite", f"The parameter `todos[{number}].status` {problem}")
        self.todos = [dict(todo) for todo in todos]
        return TODOS_DONE

    def _create(self, path: str, old: str, new: str) -> str:
        """Edit's way of making a file: an empty `old_string` on a path that does not exist."""
        if self._is_directory(path):
            raise ToolError(IS_DIRECTORY)
        if old:
            raise ToolError(NOT_FOUND)
        self._store(path, numbered.sanitised(new))
        return f"File created successfully at: {path}"

    @staticmethod
    def _updated(path: str, listing: str) -> str:
        shown = "Here's the result of running `cat -n` on a snippet of the edited file:"
        return f"The file {path} has been updated. {shown}\n{listing}"

    def _unknown_file(self, path: str, arguments: dict[str, Any]) -> str:
        """Answer a Read of a file whose content the session never showed as text."""
        if self._is_directory(path):
            raise ToolError(IS_DIRECTORY)
        recorded = self._recorded("Read", arguments, same_files=True)
        if recorded is None:
            raise ToolError(NOT_FOUND)
        return recorded


def environment_factory(
    traces: Recordings | Mapping[str, Trace] | Iterable[Trace],
    *,
    tools: Iterable[str] | None = None,
    max_result_chars: int = 160,
) -> Callable[[], RecordedWorkspace]:
    """Return a callable that makes workspaces, all sharing the work done on `traces`.

    Args:
        traces: the recorded sessions.
        tools: names of the tools to offer; all when None. Fewer tools make shorter prompts.
        max_result_chars: see `RecordedWorkspace`.

    Raises:
        ConfigError: a name in `tools` is no tool.
    """
    recordings = traces if isinstance(traces, Recordings) else Recordings(traces)
    cls, every = RecordedWorkspace, tool_names(RecordedWorkspace)
    if tools is not None:
        wanted = set(tools)
        if not wanted or wanted - set(every):
            raise ConfigError(f"tools is {sorted(wanted)}: expected some of {', '.join(every)}.")
        # None instead of the function: hosts list functions, so the tool is neither shown nor callable.
        cls = type("RecordedWorkspace", (RecordedWorkspace,), {name: None for name in every if name not in wanted})
    return functools.partial(cls, recordings, max_result_chars=max_result_chars)
