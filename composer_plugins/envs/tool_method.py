"""What makes a method a tool: shortened results, hidden arguments, and the list of an environment's tools."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from composer_plugins.envs.tool_errors import ToolError

SMALLEST_RESULT = 40


def shorten(text: str, limit: int) -> str:
    """Return `text` in at most `limit` characters, ending in a marker that says how much is missing."""
    if len(text) <= limit:
        return text
    marker = f"… [{len(text)} characters]"
    return text[: max(0, limit - len(marker))] + marker


def tool(*hidden: str) -> Callable:
    """Make a method a tool: shorten what it returns or raises, and take `hidden` arguments.

    Hidden arguments are those whose names are no Python names (Grep's `-n`) or that change nothing; they
    stay out of the schema.
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self, *args: Any, **arguments: Any) -> str:
            flags = {name: arguments.pop(name) for name in hidden if name in arguments}
            try:
                bound = {"_flags": flags} if hidden else {}
                return shorten(method(self, *args, **bound, **arguments), self._limit)
            except ToolError as error:
                raise ToolError(shorten(str(error), self._limit)) from None

        signature = inspect.signature(method)
        public = [p for name, p in signature.parameters.items() if name != "_flags"]
        wrapper.__signature__ = signature.replace(parameters=public)
        wrapper.__annotations__ = {k: v for k, v in method.__annotations__.items() if k != "_flags"}
        del wrapper.__wrapped__  # schema makers would look through it and see the hidden argument
        return wrapper

    return decorate


_NOT_TOOLS = ("reset",)


def tool_names(cls: type) -> list[str]:
    """Return the names of the tools of an environment class: its public methods except `reset`."""
    members = inspect.getmembers(cls, predicate=inspect.isfunction)
    return [name for name, _ in members if not name.startswith("_") and name not in (*_NOT_TOOLS, "get_reward")]
