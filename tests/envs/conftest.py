"""Sessions for the tests: a builder of small ones, and the shipped real one through the real reader."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from itertools import count

import pytest

from composer_plugins.envs import RecordedWorkspace
from composer_plugins.traces.schema import Message, SourceRef, Status, Step, ToolCall, ToolResult, Trace

CWD = "/home/dev/app"
SESSION = files("composer_plugins") / "data" / "samples" / "claude_code_session.jsonl"


class Session:
    """Builds a trace turn by turn: `call(tool, result, **arguments)`, one step each."""

    def __init__(self, name: str = "t") -> None:
        self.trace = Trace(id=name, format="test", messages=[], steps=[], extra={"cwd": CWD})
        self._ids = count()

    def user(self, text: str) -> None:
        self.trace.messages.append(Message(role="user", content=text))

    def call(self, tool: str, result: str, *, status: Status = Status.OK, exit_code=None, **arguments) -> int:
        """Record one step; return its index."""
        identity = f"c{next(self._ids)}"
        call = ToolCall(id=identity, name=tool, arguments=arguments)
        messages, index = self.trace.messages, len(self.trace.steps)
        messages.append(Message(role="assistant", tool_calls=[call]))
        messages.append(Message(role="tool", content=result, tool_call_id=identity))
        outcome = ToolResult(call_id=identity, content=result, status=status, exit_code=exit_code)
        place = SourceRef(file="test.jsonl", line=index + 1)
        self.trace.steps.append(Step(index=index, action=len(messages) - 2, results=[outcome], source_ref=place))
        return index

    def at(self, step: int, **options) -> RecordedWorkspace:
        """Return a workspace reset to `step`."""
        workspace = RecordedWorkspace([self.trace], **{"max_result_chars": 10_000, **options})
        workspace.reset(trace_id=self.trace.id, step=step)
        return workspace


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def other_session() -> Session:
    return Session("other")


@pytest.fixture(scope="session")
def real_trace() -> Trace:
    """The shipped Claude Code session, through the project's own reader."""
    from composer_plugins.traces.claude_code import READER

    (trace,) = READER.read(SESSION, Counter())
    return trace


def numbered(text: str, first: int = 1) -> str:
    """An independent `cat -n` in Claude Code's format, with the reminder that follows a Read."""
    listing = "\n".join(f"{n:6d}→{line}" for n, line in enumerate(text.split("\n"), first))
    return listing + "\n\n<system-reminder>\n     9→not a line of the file\n</system-reminder>\n"


@pytest.fixture
def cat_n():
    return numbered
