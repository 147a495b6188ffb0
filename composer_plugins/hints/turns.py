"""What every host needs to hint at the turns of a rollout: turn spans, splicing at token level, texts for whole attempts.

A host that samples tokens keeps the token ids of its rollouts; they are never rendered again, so that student and
self-teacher score the same ids.
"""

from __future__ import annotations

from typing import Any

from composer_plugins.errors import ModelError

#: Hints at a whole attempt: what a reward function said, and an attempt of the same group that succeeded (SDPO paper).
FEEDBACK_HINT = "Feedback on an earlier attempt at this task:\n{feedback}"
SIBLING_HINT = "A previous attempt at this task succeeded:\n{solution}\nSolve the task yourself."


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
