"""Where the hint goes in a TRL rollout: which turns are error turns, and what the self-teacher reads.

One `HintedTurn` = a span of sampled tokens plus the context that the self-teacher reads before it. The
span's token ids are never rendered again, so student and teacher score the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from composer_plugins.errors import ModelError

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


def turns_of(tool_mask: list[int] | None, length: int) -> list[tuple[int, int]]:
    """Return the (start, end) token ranges of the assistant turns of a completion of `length` tokens.

    >>> turns_of([1, 1, 0, 0, 1], 5)
    [(0, 2), (4, 5)]
    """
    if tool_mask is None:
        return [(0, length)] if length else []
    turns, start = [], None
    for position, sampled in enumerate([*tool_mask[:length], 0]):
        if sampled and start is None:
            start = position
        elif not sampled and start is not None:
            turns.append((start, position))
            start = None
    return turns


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


class HintSplicer:
    """Splices a hint into token ids right before an assistant turn (placement `local`).

    The hint becomes a message rendered by the tokenizer's own chat template, put between the context and
    the generation prompt; every other id stays what it was. It works when the context ends in a tool
    message, and with templates that add a thinking block to the generation prompt.

    Raises:
        ModelError: the template cannot render a message after another one, or has no generation prompt.
    """

    def __init__(self, tokenizer, *, role: str, chat_template: str | None = None, **kwargs: Any) -> None:
        self._render = lambda messages, generate: list(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=generate, tokenize=True, return_dict=False,
                chat_template=chat_template, **kwargs,
            )
        )  # fmt: skip
        self._tokenizer, self._role = tokenizer, role
        user = [{"role": "user", "content": "x"}]
        without, with_prompt = self._render(user, False), self._render(user, True)
        if with_prompt[: len(without)] != without or len(with_prompt) == len(without):
            raise ModelError(
                "The chat template has no generation prompt that can be told apart from the messages before it, so a "
                "hint cannot be placed before the turn. Use hint.placement: leading_system or last_user."
            )
        self.generation_prompt = with_prompt[len(without) :]

    def block(self, hint: str) -> list[int]:
        """Return the ids of the hint's message followed by the generation prompt."""
        message = {"role": self._role, "content": hint}
        for before in ([_USER], [_USER, _ASSISTANT]):  # some templates insist that roles alternate
            try:
                prefix, full = self._render(before, False), self._render([*before, message], True)
            except Exception:
                continue
            if full[: len(prefix)] == prefix:
                return full[len(prefix) :]
        raise ModelError(
            f"The chat template cannot render a {self._role!r} message after a user or assistant message. Set "
            "hint.role: user, or hint.placement: last_user."
        )

    def splice(self, prefix_ids: list[int], hint: str) -> list[int]:
        """Return `prefix_ids` (ending in the generation prompt) with the hint's message put before that prompt.

        An empty hint returns the ids unchanged.
        """
        if not hint:
            return list(prefix_ids)
        size = len(self.generation_prompt)
        if prefix_ids[-size:] != self.generation_prompt:
            raise ModelError(
                "The context before the error turn does not end in the chat template's generation prompt, so the "
                "hint would land inside a message. Pass conversational prompts, or use hint.placement: last_user."
            )
        return [*prefix_ids[:-size], *self.block(hint)]


_USER = {"role": "user", "content": "x"}
_ASSISTANT = {"role": "assistant", "content": "y"}
