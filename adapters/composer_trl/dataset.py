"""From the states stage file to the rows that TRL's dataset takes."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

import msgspec
from datasets import Dataset

from composer_plugins.errors import TraceError
from composer_plugins.models.toolcalls import render_action
from composer_plugins.preferences.votes import opinions_of, tally
from composer_plugins.traces.schema import Message, Replay, State, Status
from composer_plugins.traces.store import read_stage
from composer_trl.recipe import DataConfig

#: How many later steps are searched for the call that repaired a failed one.
RECOVERY_WINDOW = 5


def read_rows(config: DataConfig) -> list[dict[str, Any]]:
    """Return one row per selected state: `prompt`, `hint`, `targets`, ... (JSON text for nested values).

    Raises:
        TraceError: nothing is left to train on.
    """
    states = [s for s in read_stage(config.states, State) if s.trainable]
    recoveries = _recoveries(states)
    majorities = _majorities(states, config)
    hinted = [s for s in states if s.hint is not None]
    others = [] if config.only_hinted else [s for s in states if s.hint is None and s.action.tool_calls]
    mixed = [s for pair in itertools.zip_longest(hinted, others) for s in pair if s is not None][: config.limit]
    if not mixed:
        raise TraceError(
            f"{config.states} has no trainable state to prompt with ({len(states)} trainable, {len(hinted)} hinted). "
            "Check `composer-rl stats` on the traces."
        )
    return [_row(s, majorities.get(s.id), recoveries.get(s.id), with_hint=config.hints) for s in mixed]


def build_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Return the rows as a `datasets.Dataset`."""
    return Dataset.from_list(rows)


def _row(state: State, majority: Message | None, recovery: Message | None, *, with_hint: bool) -> dict[str, Any]:
    failed = state.status.failed
    targets = [a for a in (majority, recovery if failed else state.action) if a is not None]
    result = next((r for r in state.results if r.status.failed), None)
    hint = state.hint if with_hint else None
    return {
        # plain text per message: Arrow would give every call the union of all argument names
        "prompt": [{"role": m.role, "content": _text(m)} for m in state.messages],
        "hint": hint.text if hint else None,
        "error": result.content[:2000] if result else None,
        "error_class": hint.error_class if hint else None,
        "state_id": state.id,
        "trace_id": state.trace_id,
        "step": state.step,
        "targets": msgspec.json.encode(targets).decode(),
        "state_tools": json.dumps(state.tools),
        "source_ref": f"{state.source_ref.file}:{state.source_ref.line}",
    }


def _text(message: Message) -> str:
    return render_action(message) if message.role == "assistant" else message.content


def _majorities(states: list[State], config: DataConfig) -> dict[str, Message]:
    """The action that most independent teachers agree on, by state."""
    if config.replays is None:
        return {}
    by_state: dict[str, list[Replay]] = defaultdict(list)
    for replay in read_stage(config.replays, Replay):
        by_state[replay.state_id].append(replay)
    found = {}
    for state in states:
        opinions = opinions_of(state, by_state[state.id])
        winner = tally(opinions).majority(min_votes=2)
        if winner is not None:
            found[state.id] = next(o.replay.action for o in opinions if o.canonical == winner)
    return found


def _recoveries(states: list[State]) -> dict[str, Message]:
    """For each failed state, the next successful action with the same tools in its trace, if it came soon."""
    by_trace: dict[str, list[State]] = defaultdict(list)
    for state in states:
        by_trace[state.trace_id].append(state)
    found = {}
    for trace in by_trace.values():
        trace.sort(key=lambda s: s.step)
        for i, state in enumerate(trace):
            if not state.status.failed:
                continue
            tools = [c.name for c in state.action.tool_calls]
            for later in trace[i + 1 : i + 1 + RECOVERY_WINDOW]:
                if later.status is Status.OK and [c.name for c in later.action.tool_calls] == tools:
                    found[state.id] = later.action
                    break
    return found
