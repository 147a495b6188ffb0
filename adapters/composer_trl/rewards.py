"""The verifiable tool-call reward as a TRL reward function."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from composer_plugins.traces.schema import Message

_TARGETS = msgspec.json.Decoder(list[Message])


def tool_call_reward(reward: Any, tokenizer) -> Callable[..., list[float]]:
    """Return a TRL reward function that scores the first assistant turn of each completion.

    Args:
        reward: an object with `score(action_text, *, tools, targets) -> Reward`.
        tokenizer: decodes the completion; the first turn ends at its end-of-sequence token.

    The function reads the dataset columns `targets` and `state_tools` (JSON), and logs the reward's
    textual feedback so that `feedback` can be a hint source.
    """

    def tool_call(completion_ids, targets, state_tools, log_extra=None, **_: Any) -> list[float]:
        scored = []
        for ids, target, tools in zip(completion_ids, targets, state_tools, strict=True):
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            text = tokenizer.decode(ids[:end], skip_special_tokens=False)
            scored.append(reward.score(text, tools=json.loads(tools), targets=_TARGETS.decode(target)))
        if log_extra is not None:
            log_extra("feedback", [s.feedback for s in scored])
        return [s.value for s in scored]

    return tool_call
