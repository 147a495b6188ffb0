"""Where the hint goes, at the level of messages (token-level splicing belongs to each host adapter)."""

from __future__ import annotations

from typing import Any, Literal

from composer_plugins.errors import ConfigError

Placement = Literal["local", "leading_system", "last_user"]


def splice_messages(
    messages: list[dict[str, Any]], hint_text: str, placement: Placement = "local", role: str = "user"
) -> list[dict[str, Any]]:
    """Return a copy of `messages` with the hint in it; the input is not changed.

    Args:
        messages: the context before the hinted turn, as chat dicts. It may end in a tool message.
        hint_text: the hint; blank: the copy is unchanged.
        placement: `local` puts a message of its own right before the turn (Composer 2.5 inserts the hint
            into the local context); `leading_system` adds to the system prompt, or makes one (prime-rl's
            opsd); `last_user` adds to the last user message (SDPO, OPSD), or is `local` when there is none.
        role: role of the message that `local` adds.

    Raises:
        ConfigError: unknown placement.
    """
    spliced = [dict(message) for message in messages]
    if placement not in ("local", "leading_system", "last_user"):
        raise ConfigError(f"Unknown hint placement {placement!r}: use local, leading_system or last_user.")
    if not hint_text.strip():
        return spliced
    if placement == "leading_system":
        if spliced and spliced[0].get("role") == "system":
            spliced[0]["content"] = _append(spliced[0].get("content"), hint_text)
        else:
            spliced.insert(0, {"role": "system", "content": hint_text})
        return spliced
    if placement == "last_user":
        for message in reversed(spliced):
            if message.get("role") == "user":
                message["content"] = _append(message.get("content"), hint_text)
                return spliced
    spliced.append({"role": role, "content": hint_text})
    return spliced


def _append(content: Any, text: str) -> Any:
    """Add `text` after a message's content, be it a string or a list of parts."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}\n\n{text}" if content else text
