"""What a reward is, and what a reward function must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from composer_plugins.traces.schema import Message


@dataclass(frozen=True)
class Reward:
    """The reward of one action.

    Args:
        value: in [0, 1].
        parts: each part's own score in [0, 1], before weighting; for curves and debugging.
        feedback: why it is not 1, in words that can be spliced in as a hint; None when nothing is wrong.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    feedback: str | None = None


class RewardFunction(Protocol):
    """Scores an action without running it. Registered through `register_rewards` as a factory."""

    def score(self, action_text: str, *, tools: Mapping[str, Mapping[str, Any]], targets: Sequence[Message]) -> Reward:
        """Return the reward of `action_text`.

        Args:
            action_text: the completion as generated.
            tools: name -> JSON schema, as in `State.tools`.
            targets: actions that count as right: the recorded one, or the teachers' majority.
        """
