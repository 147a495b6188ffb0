"""Preference pairs from replayed states: agreement, disagreement, calls that cannot work, recoveries.

This is channel 3's data. Channel 3 (replay_dpo) is our own addition: it is no part of Cursor's published
recipe. A pair says that one parsed action is better than another at one state, and why.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from composer_plugins.errors import ConfigError
from composer_plugins.models.toolcalls import CLOSE, OPEN, render_call
from composer_plugins.preferences.canonical import Kind, kind_of, similarity
from composer_plugins.preferences.rules import Candidate, PairOptions, candidates_of, cut_off
from composer_plugins.preferences.votes import opinions_of
from composer_plugins.traces.schema import Message, Pair, Provenance, Replay, State, Status


@dataclass
class PairStats:
    """What became of the input. `read == used + sum(skipped)` counts states; the rest counts candidates."""

    read: int = 0
    used: int = 0
    skipped: Counter = field(default_factory=Counter)
    #: Pairs by rule.
    rules: Counter = field(default_factory=Counter)
    #: Candidate pairs that a filter took out, by reason.
    filtered: Counter = field(default_factory=Counter)
    #: Teacher answers by kind: calls, text, empty, unparsed, unknown_tool, cut_off, failed.
    answers: Counter = field(default_factory=Counter)
    #: Replays of states that are in the states file, and of those that are not.
    matched: int = 0
    orphans: int = 0
    #: Pairs that rest on demonstration teachers, or on samples counted as votes.
    demonstration: int = 0

    def counts(self) -> Counter:
        """Return the counts in the form that `write_stage` takes."""
        return Counter({"read": self.read, "used": self.used, **{f"skipped:{k}": v for k, v in self.skipped.items()}})


def build_pairs(
    states: Iterable[State],
    replays: Iterable[Replay],
    options: PairOptions | None = None,
    *,
    stats: PairStats | None = None,
    count_tokens: Callable[[Message], int] | None = None,
) -> Iterator[Pair]:
    """Yield preference pairs, in the order of the states.

    Args:
        states: read whole (a recovery is looked up in later states of the same trace).
        replays: read whole; order does not matter.
        options: rules and filters.
        stats: filled while pairs are drawn; complete when the iterator ends.
        count_tokens: tokens of one action, for `max_action_tokens`.

    Raises:
        ConfigError: `max_action_tokens` without `count_tokens`.
    """
    options, stats = options or PairOptions(), stats if stats is not None else PairStats()
    if options.max_action_tokens is not None and count_tokens is None:
        raise ConfigError("max_action_tokens counts tokens, which needs a model: pass --model.")
    states = list(states)
    answers = _by_state(states, replays, stats)
    later = _by_trace(states)
    for state in states:
        stats.read += 1
        if reason := _unusable(state, answers.get(state.id), options):
            stats.skipped[reason] += 1
            continue
        opinions = opinions_of(state, answers.get(state.id, []))
        for opinion in opinions:
            stats.answers["cut_off" if cut_off(opinion) else opinion.kind.value] += 1
        found = list(candidates_of(state, opinions, later.get(state.trace_id, []), options))
        pairs, reasons = _filtered(state, found, options, count_tokens)
        stats.filtered.update(reasons)
        for pair in pairs:
            stats.rules[pair.provenance.rule] += 1
            stats.demonstration += pair.provenance.demonstration
            yield pair
        if pairs:
            stats.used += 1
        else:
            stats.skipped["all_filtered" if found else "no_preference"] += 1


def _by_state(states: list[State], replays: Iterable[Replay], stats: PairStats) -> dict[str, list[Replay]]:
    known = {state.id for state in states}
    found: dict[str, list[Replay]] = {}
    for replay in replays:
        if replay.state_id not in known:
            stats.orphans += 1
            continue
        stats.matched += 1
        found.setdefault(replay.state_id, []).append(replay)
        stats.answers["failed"] += replay.error is not None or replay.action is None
    return found


def _by_trace(states: list[State]) -> dict[str, list[State]]:
    traces: dict[str, list[State]] = {}
    for state in states:
        traces.setdefault(state.trace_id, []).append(state)
    return {trace: sorted(group, key=lambda s: s.step) for trace, group in traces.items()}


def _unusable(state: State, replays: list[Replay] | None, options: PairOptions) -> str | None:
    """Return why no pair can come from a state, or None."""
    if not state.trainable:
        return "untrainable"
    recorded = kind_of(state.action, state.tools)
    if recorded is Kind.EMPTY:
        return "recorded_empty"
    if recorded is Kind.TEXT:
        return "recorded_has_no_call"
    if recorded is Kind.UNKNOWN_TOOL:
        return "recorded_unknown_tool"
    if recorded is Kind.UNPARSED and not state.status.failed:
        return "recorded_unparsed"
    if state.status in (Status.INTERRUPTED, Status.MISSING):
        return "recorded_outcome_unknown"
    if not replays and "recovered_error" not in options.rules:
        return "not_replayed"
    if replays and all(r.error is not None for r in replays) and "recovered_error" not in options.rules:
        return "no_teacher_answered"
    return None


def _filtered(state, candidates, options, count_tokens) -> tuple[list[Pair], Counter]:
    """Return the pairs that pass, and how many candidates each filter took out."""
    pairs, reasons, seen = [], Counter(), set()
    for candidate in candidates:
        left, right = candidate.chosen[1], candidate.rejected[1]
        chosen, rejected = (_trainable(side[0], options) for side in (candidate.chosen, candidate.rejected))
        alike = similarity(left, right)
        if left == right:
            reason = "identical"
        elif (left, right) in seen:
            reason = "duplicate"
        elif alike > options.max_similarity:
            reason = "near_identical"
        elif options.max_action_tokens is not None and (
            max(count_tokens(chosen), count_tokens(rejected)) > options.max_action_tokens
        ):
            reason = "action_too_long"
        else:
            reason = None
        if reason:
            reasons[reason] += 1
            continue
        seen.add((left, right))
        pairs.append(_pair(state, candidate, chosen, rejected, alike))
    return pairs, reasons


def _pair(state: State, candidate: Candidate, chosen: Message, rejected: Message, alike: float) -> Pair:
    digest = hashlib.sha256(msgspec.json.encode([candidate.chosen[1], candidate.rejected[1]])).hexdigest()[:12]
    return Pair(
        id=f"{state.id}:{candidate.rule}:{digest}",
        state_id=state.id,
        messages=state.messages,  # the state as it was: a hint is never part of a pair
        chosen=chosen,
        rejected=rejected,
        provenance=Provenance(
            rule=candidate.rule,
            chosen_by=candidate.chosen[2],
            rejected_by=candidate.rejected[2],
            source_ref=state.source_ref,
            votes=candidate.votes,
            voters=candidate.voters,
            demonstration=candidate.demonstration,
        ),
        tools=state.tools,
        similarity=round(alike, 4),
    )


def _trainable(action: Message, options: PairOptions) -> Message:
    """Return the action as it is trained on.

    A call that could not be read becomes text, as it was written: a chat template has no way to render it, and
    rendering it with empty arguments would prefer against an action that nobody took.
    """
    if options.calls_only:
        action = Message(role=action.role, tool_calls=action.tool_calls)
    if all(call.raw_arguments is None for call in action.tool_calls):
        return action
    parts = [action.content] if action.content else []
    for call in action.tool_calls:
        nameless = call.raw_arguments is not None and not call.name
        parts.append(f"{OPEN}\n{call.raw_arguments}\n{CLOSE}" if nameless else render_call(call))
    return Message(role=action.role, content="\n".join(parts), thinking=action.thinking)
