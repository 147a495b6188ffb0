"""The policy's tokenizer with the renderer that prime-rl prompts it with."""

from __future__ import annotations

from typing import Any


class RenderedTokenizer:
    """A tokenizer whose `apply_chat_template` is prime-rl's renderer.

    Args:
        renderer: from `renderers.create_renderer`.
        tokenizer: what the renderer was made with; everything else is asked of it.
    """

    def __init__(self, renderer, tokenizer) -> None:
        self.renderer, self._tokenizer = renderer, tokenizer

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, tools=None, **_: Any
    ) -> list[int]:
        """Return the token ids of `messages`, in the renderer's own layout."""
        functions = [tool.get("function", tool) for tool in tools or []]
        ids = self.renderer.render_ids(messages, tools=functions or None, add_generation_prompt=add_generation_prompt)
        return list(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def rendered_tokenizer(model: str, config: Any = None) -> RenderedTokenizer:
    """Return the tokenizer of `model` with the renderer that verifiers' train client would use for it.

    Args:
        model: name or directory.
        config: a `renderers.RendererConfig`; None: found by the model's name.
    """
    from renderers import create_renderer
    from renderers.base import load_tokenizer

    tokenizer = load_tokenizer(model)
    return RenderedTokenizer(create_renderer(tokenizer, config), tokenizer)
