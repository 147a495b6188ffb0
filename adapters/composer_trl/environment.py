"""The recorded workspace as a TRL environment factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from composer_plugins.envs.recorded import RecordedWorkspace
from composer_plugins.traces.schema import Trace


def recorded_workspace_factory(traces: list[Trace]) -> Callable[[], RecordedWorkspace]:
    """Return a factory of workspaces that offer just the tools used in `traces` (a shorter prompt)."""
    used = {name for trace in traces for name in trace.tools}
    hidden = {
        name: None
        for name, _ in inspect.getmembers(RecordedWorkspace, predicate=inspect.isfunction)
        if not name.startswith("_") and name not in ("reset", "get_reward") and name not in used
    }
    workspace = type("RecordedWorkspace", (RecordedWorkspace,), hidden)
    return lambda: workspace(traces)
