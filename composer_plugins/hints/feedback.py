"""Environment feedback as the hint: the error text itself, trimmed."""

from __future__ import annotations

from typing import Any

from composer_plugins.hints.options import at_least, no_more
from composer_plugins.hints.slots import Failure, FailureHints, body_of, shorten
from composer_plugins.traces.schema import Hint, Status

ENVIRONMENT = "An attempt at this step was answered with an error:\n{error}"
PERSON = "An attempt at this step was stopped by the user, with this answer:\n{error}"


class FeedbackHints(FailureHints):
    """The `feedback` hint generator: what the environment (or the user) said, as it said it.

    The text can quote the failed call (an editor repeats the text that it did not find). It never holds anything
    from after the failure.

    Args:
        max_chars: longest feedback; the middle of a longer one is left out.
    """

    name = "feedback"

    def __init__(self, max_chars: int = 1000, **unknown: Any) -> None:
        no_more("feedback", unknown, "max_chars")
        self.max_chars = at_least("max_chars", max_chars, 20, "characters")

    def _hint(self, failure: Failure) -> Hint:
        said = shorten(body_of(failure.text), self.max_chars)
        if not said:
            code = f" (exit code {failure.exit_code})" if failure.exit_code else ""
            said = f"the call failed without a message{code}"
        frame = PERSON if failure.status is Status.HUMAN_REJECT else ENVIRONMENT
        return Hint(
            text=frame.format(error=said), error_class=failure.error_class or "default", status=failure.status,
            generator=self.name, evidence=shorten(said, 200),
        )  # fmt: skip
