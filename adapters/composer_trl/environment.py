"""The recorded workspace as a TRL environment factory."""

from __future__ import annotations

from collections.abc import Callable

from composer_plugins.envs import RecordedWorkspace, environment_factory, tool_schemas
from composer_plugins.errors import ConfigError
from composer_plugins.traces.schema import Trace


def recorded_workspace_factory(traces: list[Trace]) -> Callable[[], RecordedWorkspace]:
    """Return a factory of workspaces that offer just the tools used in `traces` (a shorter prompt).

    Raises:
        ConfigError: the traces use none of the tools that a workspace can answer.
    """
    known = tool_schemas(RecordedWorkspace)
    used = sorted({name for trace in traces for name in trace.tools} & set(known))
    if not used:
        raise ConfigError(
            f"environment: recorded_workspace can answer {', '.join(known)}, and the traces use none of them. Use "
            "`environment: null` for single-turn rollouts."
        )
    return environment_factory(traces, tools=used)
