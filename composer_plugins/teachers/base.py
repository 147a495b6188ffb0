"""What a teacher is: someone else's model that answers the recorded states again."""

from __future__ import annotations

from typing import Protocol

from composer_plugins.errors import TeacherError
from composer_plugins.traces.schema import Message, Replay, State

#: Why a request failed; `Replay.error` is "<reason>: <detail>".
REASONS = (
    "timeout", "connection", "rate_limited", "server_error", "refused", "auth", "malformed", "too_long", "internal",
)  # fmt: skip
#: Those that say something about the server and not about the state.
TRANSPORT = ("timeout", "connection", "rate_limited", "server_error")


class Teacher(Protocol):
    """One teacher, built from its section of the teachers file by a factory registered with
    `register_teachers`.

    The factory takes one argument, the validated section: an instance of its own `Config` attribute (a
    subclass of `composer_plugins.teachers.config.TeacherConfig`).
    """

    #: Unique name in the teachers file.
    name: str
    #: What the teacher calls its model.
    model: str
    #: Teachers with the same one are not independent votes.
    weights_id: str
    #: True for a teacher that shows the mechanism and is no expert.
    demonstration: bool
    #: Hash of everything that can change an answer; another one invalidates the stored answers.
    fingerprint: str
    #: How many states one `ask` should get: what a kill between two calls can lose.
    batch_size: int
    #: Answers wanted per state.
    samples: int

    def ask(self, states: list[State], *, sample: int = 0) -> list[Replay]:
        """Answer each state once.

        Args:
            states: the batch; the recorded action and the hint of a state are never shown.
            sample: which of the `samples` answers this is, from 0.

        Returns:
            One `Replay` per state, in order. A failure of one state is a `Replay` with `error`.

        Raises:
            TeacherStopped: no further request can work (e.g. the key was refused); carries the answers
                that had arrived.
        """

    def close(self) -> None:
        """Release connections or weights. Asking again afterwards is an error."""


class TeacherStopped(TeacherError):
    """A teacher that cannot go on. `replays` holds what the interrupted batch had answered."""

    def __init__(self, message: str, replays: list[Replay] | None = None) -> None:
        super().__init__(message)
        self.replays = replays or []


def answer(
    teacher: Teacher,
    state: State,
    sample: int,
    *,
    action: Message | None = None,
    error: str | None = None,
    finish_reason: str | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    seconds: float | None = None,
) -> Replay:
    """Return the `Replay` of one teacher for one state, with the teacher's identity filled in."""
    return Replay(
        state_id=state.id,
        teacher=teacher.name,
        model=teacher.model,
        weights_id=teacher.weights_id,
        demonstration=teacher.demonstration,
        sample=sample,
        action=action,
        error=error,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=None if seconds is None else round(seconds, 4),
    )


def reason_of(error: str) -> str:
    """Return the reason part of `Replay.error`; `other` when it is none of `REASONS`."""
    reason = error.split(":", 1)[0]
    return reason if reason in REASONS else "other"
