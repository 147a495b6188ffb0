"""What every hint generator owes: it speaks at error turns only, from the error alone, and never gives the answer."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator

import pytest

from composer_plugins.conformance.base import Conformance, contract
from composer_plugins.hints.base import HintGenerator
from composer_plugins.traces.schema import Hint, Message, SourceRef, State, Status, ToolCall, ToolResult

#: Longest hint, characters: it is put into the context of every error turn.
LONGEST = 8000
#: An error of every family: tool, arguments, what came back, class.
ERRORS = {
    "a command that is not there": ("Bash", {"command": "pytst -q"}, "bash: pytst: command not found", "command_not_found"),
    "an edit that does not match": (
        "Edit", {"file_path": "a.py", "old_string": "x = 1", "new_string": "x = 2"},
        "String to replace not found in file.", "edit_no_match",
    ),
    "a file that is not there": ("Read", {"file_path": "missing.py"}, "File does not exist.", "file_not_found"),
    "tests that fail": ("Bash", {"command": "pytest"}, "1 failed, 3 passed in 0.1s", "test_failure"),
    "a syntax error": ("Bash", {"command": "python a.py"}, "SyntaxError: invalid syntax", "syntax_error"),
    "a time-out": ("Bash", {"command": "sleep 999"}, "Command timed out after 120 s", "timeout"),
    "a permission": ("Bash", {"command": "rm /etc/x"}, "rm: cannot remove '/etc/x': Permission denied", "os_permission"),
}  # fmt: skip
SECRET = "kestrel-4471-answer"


def failed_state(what: str, *, text: str | None = None, answer: str = SECRET) -> State:
    """A state whose action failed; the action's own arguments hold `answer`, which no hint may repeat."""
    tool, arguments, result, error_class = ERRORS[what]
    call = ToolCall(id="c1", name=tool, arguments={**arguments, "note": answer})
    return State(
        id="s1", trace_id="t1", step=3, source_ref=SourceRef(file="session.jsonl", line=9),
        messages=[Message(role="system", content="You are an agent."), Message(role="user", content="Fix the bug.")],
        action=Message(role="assistant", content="", tool_calls=[call]), status=Status.ERROR,
        results=[
            ToolResult(call_id="c1", content=result if text is None else text, status=Status.ERROR, error_class=error_class)
        ],
    )  # fmt: skip


class HintGeneratorConformance(Conformance):
    """Contracts of a hint generator. Override `generator`; `states` when it needs more than the states here."""

    @abstractmethod
    def generator(self) -> HintGenerator:
        """Return a new generator."""

    def states(self) -> Iterator[tuple[str, State]]:
        """Failed states for which hints are asked, by what failed."""
        for what in ERRORS:
            yield what, failed_state(what)

    @contract()
    def test_it_has_something_to_say_about_some_error(self) -> None:
        generator = self.generator()
        hints = [generator.generate(state) for _, state in self.states()]
        assert any(hints), "no failed state got a hint"
        for hint in hints:
            assert hint is None or (isinstance(hint, Hint) and hint.text.strip() and hint.generator == generator.name)

    @contract()
    def test_it_is_silent_where_nothing_failed(self) -> None:
        state = failed_state("tests that fail")
        state.status = Status.OK
        state.results = [ToolResult(call_id="c1", content="4 passed", status=Status.OK)]
        generator = self.generator()
        assert generator.generate(state) is None
        assert generator.generate_for("Bash", "4 passed", Status.OK, None) is None

    @contract()
    def test_it_never_gives_the_recorded_answer(self) -> None:
        generator = self.generator()
        for what, state in self.states():
            hint = generator.generate(state)
            assert hint is None or SECRET not in hint.text, what

    @contract()
    def test_the_same_error_gets_the_same_hint(self) -> None:
        for what, state in self.states():
            assert self.generator().generate(state) == self.generator().generate(state), what

    @contract()
    def test_a_live_rollout_gets_hints_too(self) -> None:
        generator = self.generator()
        for what, (tool, _, result, error_class) in ERRORS.items():
            hint = generator.generate_for(tool, result, Status.ERROR, error_class)
            assert hint is None or (hint.text.strip() and len(hint.text) <= LONGEST), what

    @pytest.mark.parametrize(
        "text", ["", "\x00\x1b[31m", "🐍" * 10, "x" * 1_000_000, "{{ 7 * 7 }} {% raw %}", "%s %n {0}"],
        ids=["empty", "control characters", "emoji", "a megabyte", "template code", "format codes"],
    )  # fmt: skip
    @contract()
    def test_any_text_can_come_back(self, text: str) -> None:
        generator = self.generator()
        for what in ERRORS:
            hint = generator.generate(failed_state(what, text=text))
            assert hint is None or len(hint.text) <= LONGEST, what
            assert hint is None or "49" not in hint.text or "7 * 7" not in text, (
                "the error's text was run as a template"
            )

    @contract()
    def test_a_hint_can_be_stored(self) -> None:
        import msgspec

        generator = self.generator()
        for what, state in self.states():
            hint = generator.generate(state)
            if hint is not None:
                assert msgspec.json.decode(msgspec.json.encode(hint), type=Hint) == hint, what
                assert json.loads(msgspec.json.encode(hint))["error_class"], what
