"""Tokenizers: loading one by reference, and counting what a state costs in tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from composer_plugins.models.resolve import ResolvedModel


def load_tokenizer(model: str | ResolvedModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model reference, as `load_model` would (special tokens repaired for GGUF).

    Raises:
        ModelError: the reference cannot be resolved, or there is no tokenizer or chat template with it.
    """
    from composer_plugins.models.checks import check_chat_template
    from composer_plugins.models.loading import read_tokenizer
    from composer_plugins.models.resolve import resolve_model

    resolved = resolve_model(model) if isinstance(model, str) else model
    tokenizer = read_tokenizer(resolved)
    check_chat_template(tokenizer, resolved.ref)
    return tokenizer


def token_counter(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[dict[str, Any]], list[dict[str, Any]]], int]:
    """Return `count(messages, tools)`: tokens of the rendered prompt, assistant header included.

    `messages` and `tools` are what chat templates take (`Message.to_chat()`, `State.tool_schemas()`).
    """

    def count(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> int:
        ids = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return len(ids)

    return count


def tokenizer_fingerprint(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, *, template: bool = True
) -> str:
    """Return a SHA-256 over the vocabulary and (by default) the special tokens and the chat template.

    Args:
        chat_template: used in place of the tokenizer's own.
        template: False: the vocabulary only (which ids a text has, not how a conversation is written).
    """
    parts = [sorted(tokenizer.get_vocab().items())]
    if template:
        parts += [sorted(set(tokenizer.all_special_tokens)), chat_template or tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
