"""The rules that propose pairs. Each is one function: what it needs, and who stands on which side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from composer_plugins.errors import ConfigError
from composer_plugins.preferences.canonical import Canonical, Kind, canonical_action, kind_of
from composer_plugins.preferences.votes import Opinion, Tally, tally
from composer_plugins.traces.schema import Message, State, Status

RULES = ("agreement", "disagreement", "invalid_call", "recovered_error")
RECORDED = "recorded"


class PairOptions(msgspec.Struct, kw_only=True, frozen=True):
    """How pairs are made. The defaults need independent teachers; see docs/reference/teachers.md."""

    #: Rules that are on, in the order in which they are tried.
    rules: tuple[str, ...] = ("agreement", "disagreement", "invalid_call")
    #: Fewest votes that can be a majority.
    min_votes: int = 2
    #: Count every sample as a vote, also several of the same weights: for demonstrations.
    count_samples_as_votes: bool = False
    #: Let the teachers' majority also overrule a recorded action that did not fail.
    overrule_success: bool = False
    #: Pairs whose calls are more alike than this (edit similarity of the canonical calls) are left out.
    max_similarity: float = 0.95
    #: Longest action in tokens; needs `count_tokens`. A longer one is left out, never cut.
    max_action_tokens: int | None = None
    #: Prefer the calls alone: prose and thinking are taken off both actions.
    calls_only: bool = False
    #: recovered_error: how many steps after the error the recovery may be.
    recovery_window: int = 3

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.rules) - set(RULES)):
            raise ConfigError(f"Unknown pair rule {unknown[0]!r}. Rules: {', '.join(RULES)}.")
        if self.min_votes < 2 and not self.count_samples_as_votes:
            raise ConfigError("min_votes must be at least 2: one voter is no majority.")
        if not 0 < self.max_similarity <= 1:
            raise ConfigError(f"max_similarity must be in (0, 1], found {self.max_similarity}.")


@dataclass
class Candidate:
    """A possible pair; each side is (action, canonical, who)."""

    rule: str
    chosen: tuple[Message, Canonical, list[str]]
    rejected: tuple[Message, Canonical, list[str]]
    votes: int = 0
    voters: int = 0
    demonstration: bool = False


def candidates_of(
    state: State, opinions: list[Opinion], later: list[State], options: PairOptions
) -> Iterator[Candidate]:
    counted = tally(opinions, count_samples=options.count_samples_as_votes)
    recorded = (state.action, canonical_action(state.action), [RECORDED])
    rules = {
        "agreement": lambda: _agreement(state, recorded, opinions, counted, options),
        "disagreement": lambda: _disagreement(state, recorded, opinions, counted, options),
        "invalid_call": lambda: _invalid_call(state, recorded, opinions, counted),
        "recovered_error": lambda: _recovered_error(state, recorded, later, options),
    }
    for rule in options.rules:
        yield from rules[rule]()


def _agreement(state, recorded, opinions, counted: Tally, options) -> Iterator[Candidate]:
    """The recorded action worked and the majority would have done the same: dissenting actions lose to it."""
    if state.status.failed or counted.majority(min_votes=options.min_votes) != recorded[1]:
        return
    agreeing = _names(o for o in opinions if o.kind is Kind.CALLS and o.canonical == recorded[1])
    chosen = (recorded[0], recorded[1], [RECORDED, *agreeing])
    for dissent in _distinct(o for o in opinions if o.kind is Kind.CALLS and o.canonical != recorded[1]):
        yield _vote("agreement", chosen, _side(dissent), counted, recorded[1], options, opinions)


def _disagreement(state, recorded, opinions, counted: Tally, options) -> Iterator[Candidate]:
    """The recorded action failed and the majority agrees on another one: it wins over the recorded one."""
    if not (state.status.failed or options.overrule_success):
        return
    winner = counted.majority(min_votes=options.min_votes)
    if winner is None or winner == recorded[1]:
        return
    side = [o for o in opinions if o.kind is Kind.CALLS and o.canonical == winner]
    yield _vote("disagreement", _side(side), recorded, counted, winner, options, opinions)


def _invalid_call(state, recorded, opinions, counted: Tally) -> Iterator[Candidate]:
    """The recorded action worked; a teacher's cannot: it does not parse, or no such tool exists. No vote needed."""
    if state.status.failed:
        return
    bad = (o for o in opinions if o.kind in (Kind.UNPARSED, Kind.UNKNOWN_TOOL) and not cut_off(o))
    for group in _distinct(bad):
        demonstration = any(o.replay.demonstration for o in group)
        yield Candidate("invalid_call", recorded, _side(group), 0, counted.voters, demonstration)


def _recovered_error(state, recorded, later: list[State], options) -> Iterator[Candidate]:
    """The recorded call failed, and within a few steps the agent made the same tool work another way.

    Hindsight: the recovery may use what only the error revealed, which is why this rule is off by default.
    A human's rejection is no such error: what came next need not be what the human wanted.
    """
    if state.status not in (Status.ERROR, Status.INFERRED_ERROR) or len(state.action.tool_calls) != 1:
        return
    name = state.action.tool_calls[0].name
    for other in later:
        if not state.step < other.step <= state.step + options.recovery_window:
            continue
        same_tool = len(other.action.tool_calls) == 1 and other.action.tool_calls[0].name == name
        if not (same_tool and other.trainable and other.status is Status.OK):
            continue
        if kind_of(other.action, state.tools) is Kind.CALLS:
            yield Candidate("recovered_error", (other.action, canonical_action(other.action), [RECORDED]), recorded)
        return


def _vote(rule, chosen, rejected, counted: Tally, winner: Canonical, options, opinions) -> Candidate:
    who = {*chosen[2], *rejected[2]}
    demonstration = options.count_samples_as_votes or any(
        o.replay.demonstration for o in opinions if o.replay.teacher in who
    )
    return Candidate(rule, chosen, rejected, counted.votes[winner], counted.voters, demonstration)


def _distinct(opinions: Iterable[Opinion]) -> list[list[Opinion]]:
    """Group answers that do the same, in order of first appearance."""
    groups: dict[Canonical, list[Opinion]] = {}
    for opinion in opinions:
        groups.setdefault(opinion.canonical, []).append(opinion)
    return list(groups.values())


def _side(group: list[Opinion]) -> tuple[Message, Canonical, list[str]]:
    return group[0].replay.action, group[0].canonical, _names(group)


def _names(opinions: Iterable[Opinion]) -> list[str]:
    return sorted({opinion.replay.teacher for opinion in opinions})


def cut_off(opinion: Opinion) -> bool:
    """True for a call that is unreadable because the answer hit its token limit: not the model's mistake."""
    return opinion.kind is Kind.UNPARSED and opinion.replay.finish_reason == "length"
