"""Where the hint goes in a TRL rollout: which turns are error turns, and what the self-teacher reads.

One `HintedTurn` = a span of sampled tokens plus the context that the self-teacher reads before it. The
span's token ids are never rendered again, so student and teacher score the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from composer_plugins.hints.turns import HintSplicer, turns_of

__all__ = ["HintSplicer", "HintedTurn", "tool_results", "turns_of"]

Kind = Literal["recorded", "rollout", "feedback", "sibling"]


@dataclass
class HintedTurn:
    """A span that has a self-teacher.

    Args:
        start, end: token range in the completion.
        mask: which tokens of the span the model sampled (False: tool results), length end - start.
        prefix_ids: what the self-teacher reads before the span, hint included.
        hint: the text spliced in.
        kind: where the hint came from.
        error: the result that made it an error turn, if any.
        messages, row, token_ids, label: context, dataset row, sampled ids and name of the turn, for the report.
    """

    start: int
    end: int
    mask: list[bool]
    prefix_ids: list[int]
    hint: str
    kind: Kind
    error: str | None = None
    error_class: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    label: str = ""


def tool_results(completion: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any], str]]:
    """Return (turn number, tool message, its text) of every tool result of a completion.

    Args:
        completion: assistant and tool messages in order; the n-th assistant message is turn n.
    """
    results, turn = [], -1
    for message in completion:
        if message.get("role") == "assistant":
            turn += 1
        elif message.get("role") == "tool" and turn >= 0:
            content = message["content"]
            results.append((turn, message, content if isinstance(content, str) else str(content)))
    return results
