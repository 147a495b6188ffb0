"""What is in a set of traces: steps, calls, outcomes, error classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from composer_plugins.traces.schema import Status, Trace

#: The outcomes as the words of the docs name them.
OUTCOMES = {
    Status.OK: "ok",
    Status.ERROR: "flagged error",
    Status.INFERRED_ERROR: "inferred error",
    Status.HUMAN_REJECT: "human",
    Status.INTERRUPTED: "interrupted",
    Status.MISSING: "missing",
}


@dataclass
class ToolStats:
    """Calls of one tool and how they ended."""

    calls: int = 0
    statuses: Counter[Status] = field(default_factory=Counter)


@dataclass
class TraceStats:
    """Counts over traces. `inexact` counts steps by the reason why their history is not exact."""

    traces: int = 0
    sub_agents: int = 0
    messages: int = 0
    steps: int = 0
    steps_with_calls: int = 0
    error_turns: int = 0
    exact: int = 0
    calls: int = 0
    inexact: Counter[str] = field(default_factory=Counter)
    not_trainable: Counter[str] = field(default_factory=Counter)
    statuses: Counter[Status] = field(default_factory=Counter)
    error_classes: Counter[tuple[str, Status]] = field(default_factory=Counter)
    tools: dict[str, ToolStats] = field(default_factory=dict)
    models: Counter[str] = field(default_factory=Counter)

    def add(self, trace: Trace) -> None:
        """Count one trace."""
        self.traces += 1
        self.sub_agents += trace.parent_id is not None
        self.messages += len(trace.messages)
        for step in trace.steps:
            self.steps += 1
            self.steps_with_calls += bool(trace.action_of(step).tool_calls)
            self.error_turns += step.status.failed
            self.exact += step.history_exact
            self.inexact.update(step.inexact)
            self.models[step.model or "unknown"] += 1
            if not step.trainable:
                self.not_trainable[step.not_trainable_reason or "unknown"] += 1
            self._results(trace, step)

    def _results(self, trace: Trace, step) -> None:
        names = {call.id: call.name for call in trace.action_of(step).tool_calls}
        for name in names.values():
            self.tools.setdefault(name, ToolStats()).calls += 1
            self.calls += 1
        for result in step.results:
            self.statuses[result.status] += 1
            self.tools.setdefault(names.get(result.call_id, "?"), ToolStats()).statuses[result.status] += 1
            if result.error_class is not None:
                self.error_classes[result.error_class, result.status] += 1


def collect(traces: Iterable[Trace]) -> TraceStats:
    """Return the counts over `traces`."""
    stats = TraceStats()
    for trace in traces:
        stats.add(trace)
    return stats
