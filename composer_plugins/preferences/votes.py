"""Votes: who is for which action, one vote per independent set of weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from composer_plugins.preferences.canonical import Canonical, Kind, canonical_action, kind_of
from composer_plugins.traces.schema import Replay, State


@dataclass
class Opinion:
    """One answer: what it is, and in canonical form when it is comparable."""

    replay: Replay
    kind: Kind
    canonical: Canonical


@dataclass
class Tally:
    """The votes on one state: `votes` per action, out of `voters` (those that answered, whatever it was).

    A voter whose own answers tie, or that did not answer with calls, is counted and votes for nothing.
    """

    votes: Counter[Canonical]
    voters: int

    def majority(self, *, min_votes: int) -> Canonical | None:
        """Return the action with more than half of the voters and at least `min_votes`, else None."""
        for action, votes in self.votes.most_common(1):
            if votes >= min_votes and 2 * votes > self.voters:
                return action
        return None


def opinions_of(state: State, replays: list[Replay]) -> list[Opinion]:
    """Return the answers that arrived, in a fixed order (teacher, sample)."""
    ordered = sorted(replays, key=lambda r: (r.teacher, r.sample, r.request or ""))
    return [
        Opinion(r, kind_of(r.action, state.tools), canonical_action(r.action))
        for r in ordered
        if r.error is None and r.action is not None
    ]


def tally(opinions: list[Opinion], *, count_samples: bool = False) -> Tally:
    """Count the votes of one state.

    Args:
        opinions: the answers for one state.
        count_samples: every answer is a vote, also several of one set of weights: a demonstration of the
            mechanism, not evidence. Default: one vote per `weights_id`, for its most frequent answer.
    """
    ballots: dict[object, Counter] = {}
    for number, opinion in enumerate(opinions):
        weights = opinion.replay.weights_id or f"teacher:{opinion.replay.teacher}"
        voter = number if count_samples else weights
        choice = opinion.canonical if opinion.kind is Kind.CALLS else None
        ballots.setdefault(voter, Counter())[choice] += 1
    votes: Counter[Canonical] = Counter()
    for ballot in ballots.values():
        ranked = ballot.most_common(2)
        tied = len(ranked) > 1 and ranked[0][1] == ranked[1][1]
        if not tied and ranked[0][0] is not None:
            votes[ranked[0][0]] += 1
    return Tally(votes, len(ballots))
