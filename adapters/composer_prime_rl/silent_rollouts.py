"""Says so, with the reason, when a run of rollouts gave channel 2 nothing."""

from __future__ import annotations

import logging
import warnings
from collections import Counter

from composer_plugins.channels.silence import SilentChannelWarning

logger = logging.getLogger(__name__)


class SilentRollouts:
    """Counts rollouts of one environment worker in which no turn was stamped.

    Args:
        after: rollouts in a row without a stamp until it speaks, and again after every further `after`.
    """

    def __init__(self, after: int) -> None:
        self.after, self.silent, self.seen = after, 0, Counter[str]()

    def update(self, counts: Counter[str]) -> bool:
        """Take in one rollout's counts; return whether it warned."""
        if counts["active_tokens"]:
            self.silent, self.seen = 0, Counter()
            return False
        self.silent += 1
        self.seen.update(counts)
        if self.silent % self.after:
            return False
        message = (
            f"sdpo.weight is above 0, but {self.silent} rollouts in a row gave it nothing: {self.why()}. Fix the cause, or "
            "set sdpo.weight: 0."
        )
        logger.warning(message)
        warnings.warn(message, SilentChannelWarning, stacklevel=2)
        return True

    def why(self) -> str:
        """Return the first step of the way from rollout to stamp at which nothing was left."""
        seen = self.seen
        failures = {name.removeprefix("failed/"): n for name, n in seen.items() if name.startswith("failed/")}
        if seen["temperature"]:
            return (
                "the sampling temperature is not 1, and the inference server scores at temperature 1 only, so the teacher "
                "would be another distribution; set orchestrator.train.sampling.temperature to 1"
            )
        if not seen["turns"]:
            return "the rollouts have no sampled turn (all of them failed, or their agents are not trainable)"
        if not seen["hinted_turns"] and not seen["tool_results"]:
            return "no tool result in any rollout, so no tool error (and no recorded hint or feedback)"
        if not seen["hinted_turns"] and not seen["error_turns"]:
            return f"none of the {seen['tool_results']} tool results was an error"
        if seen["unplaced"]:
            return (
                f"in {seen['unplaced']} error turns the context does not end in the renderer's generation prompt; set "
                "sdpo.hint.placement: leading_system"
            )
        if seen["no_tokens"]:
            return f"{seen['no_tokens']} error turns came without token ids: rollouts need prime-rl's renderer client"
        if not seen["hinted_turns"]:
            return f"the hint generator had no hint for any of the {seen['error_turns']} error turns"
        if not seen["scored_turns"]:
            return f"the inference server scored none of the {seen['hinted_turns']} hinted turns ({failures})"
        return f"the hint moved none of the {seen['tokens']} tokens of {seen['scored_turns']} turns"
