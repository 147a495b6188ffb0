"""Tool environments made from recorded sessions: multi-turn rollouts without a sandbox.

`RecordedWorkspace` answers an agent's tool calls from the in-memory state of one recorded session. It
never runs a command and never touches the disk or the network.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "Recordings": "composer_plugins.envs.timeline",
    "RecordedWorkspace": "composer_plugins.envs.recorded",
    "ToolError": "composer_plugins.envs.tool_errors",
    "environment_factory": "composer_plugins.envs.recorded",
    "tool_schemas": "composer_plugins.envs.schemas",
}

__all__ = ["RecordedWorkspace", "Recordings", "ToolError", "environment_factory", "tool_schemas"]


def __getattr__(name: str) -> Any:
    """Import an export when it is first used, so that importing the package stays free."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
