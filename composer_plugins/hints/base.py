"""What a hint generator is."""

from __future__ import annotations

from typing import Protocol

from composer_plugins.traces.schema import Hint, State, Status


class HintGenerator(Protocol):
    """Writes the text that helps the model at an error turn. Registered through `register_hint_generators`.

    A hint says what went wrong and what to do instead. It never contains the recorded answer: the
    self-teacher is to be better informed, not to copy.
    """

    name: str

    def generate(self, state: State) -> Hint | None:
        """Return the hint for a recorded state whose action failed (from that step's own results).

        None when nothing in the step failed.
        """

    def generate_for(self, tool: str | None, result_text: str, status: Status, error_class: str | None) -> Hint | None:
        """Return the hint for a tool result of a live rollout; None when `status` is not a failure."""
