"""What every outer loop owes: islands that follow the published arithmetic, agree bit for bit and end as one model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from composer_plugins.conformance import oracle
from composer_plugins.conformance.base import Conformance, contract

#: theta starts at 1, two islands move by 0.4 and 0.8 in every round, outer learning rate 0.7, Nesterov momentum 0.9.
#: By hand: g = 0.6; b = 0.9 b + g; theta -= 0.7 (g + 0.9 b). With the sign flipped the first round gives 1.798, islands
#: that never exchange 0.468 and -0.064, without Nesterov 0.58.
PREDICTED = (0.202, -0.9362, -2.38058)


@dataclass(frozen=True)
class Plan:
    """What the islands are to do, float32.

    Args:
        start: (islands, size) parameters before the islands meet.
        moves: (rounds, islands, size) what the inner steps of a round take off the parameters, theta_0 - theta_i, in
            equal parts per inner step.
        sync_every, lr, momentum, nesterov: as in `OuterConfig`; plain DiLoCo, one fragment, no delay.
        unsynced: inner steps after the last sync, each as long as one of the last round.
        resume_after: after this many rounds every island saves what its checkpoint holds and ends; new processes go on
            from the checkpoints. None: straight through.
    """

    start: np.ndarray
    moves: np.ndarray
    sync_every: int = 2
    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    unsynced: int = 0
    resume_after: int | None = None

    @property
    def islands(self) -> int:
        """Number of islands."""
        return len(self.start)

    def inner_steps(self, island: int, first: int, last: int) -> np.ndarray:
        """What each inner step of rounds `first` to `last` (not included) takes off, (steps, size)."""
        steps = np.repeat(self.moves[first:last, island] / self.sync_every, self.sync_every, axis=0)
        if last < len(self.moves) or not self.unsynced:
            return steps
        return np.concatenate([steps, np.repeat(self.moves[-1:, island] / self.sync_every, self.unsynced, axis=0)])


@dataclass
class IslandResult:
    """What one island saw.

    Args:
        process: its process id (the last one, of a run that was resumed).
        before, after: (rounds, size) parameters just before and just after each sync, of all rounds of the plan.
        hashes: of the parameters after each sync, as the outer loop itself compares them.
        exported: (size,) parameters when the island has left: what is saved as the model.
        error: message of the outer loop's refusal; empty when there was none.
    """

    process: int = 0
    before: list[np.ndarray] = field(default_factory=list)
    after: list[np.ndarray] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    exported: np.ndarray | None = None
    error: str = ""


def make_plan(seed: int, islands: int = 2, rounds: int = 4, size: int = 7, **options) -> Plan:
    """Draw a plan: one start for all, moves of every island and round of their own."""
    rng = np.random.default_rng(seed)
    start = np.repeat(rng.normal(size=(1, size)), islands, axis=0).astype(np.float32)
    moves = (0.3 * rng.normal(size=(rounds, islands, size))).astype(np.float32)
    return Plan(start, moves, **options)


class OuterLoopConformance(Conformance):
    """Contracts of an outer loop. Override `islands`."""

    #: Largest absolute distance from the float64 reference, parameters of order 1.
    tolerance = 1e-6

    @abstractmethod
    def islands(self, plan: Plan) -> list[IslandResult]:
        """Run the plan, every island in a process of its own, through the outer loop's own entry point.

        Returns:
            One result per island, in the plan's order. An island that the outer loop refuses returns the message.
        """

    @contract()
    def test_two_islands_follow_the_prediction(self) -> None:
        """Pins the sign, the mean, the outer learning rate, the momentum and Nesterov's step at once."""
        moves = np.tile(np.array([0.4, 0.8], dtype=np.float32)[None, :, None], (len(PREDICTED), 1, 3))
        for result in self._run(Plan(np.ones((2, 3), dtype=np.float32), moves)):
            found = np.array(result.after)
            assert found == pytest.approx(np.array(PREDICTED)[:, None] * np.ones((1, 3)), abs=1e-5)

    @contract()
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"islands": 3, "sync_every": 3},
            {"nesterov": False},
            {"momentum": 0.0, "nesterov": False, "lr": 1.0},
        ],
        ids=["two islands", "three islands", "heavy ball", "plain averaging"],
    )
    def test_it_equals_float64_on_the_recorded_parameters(self, options: dict) -> None:
        """The reference consumes theta_i as recorded just before each sync, whatever the inner steps did."""
        plan = make_plan(1, **options)
        results = self._run(plan)
        recorded = np.stack([np.array(result.before) for result in results], axis=1)
        wanted = oracle.outer(
            recorded, plan.start[0], lr=plan.lr, momentum=plan.momentum, nesterov=plan.nesterov
        )  # fmt: skip
        for result in results:
            assert np.abs(np.array(result.after) - wanted).max() <= self.tolerance

    @contract()
    def test_islands_are_equal_after_every_sync(self) -> None:
        plan = make_plan(2)
        results = self._run(plan)
        assert len({result.process for result in results}) == plan.islands, "every island is a process of its own"
        for befores in zip(*(result.before for result in results), strict=True):
            assert not np.array_equal(befores[0], befores[1]), "every island has gone its own way before the sync"
        for afters in zip(*(result.after for result in results), strict=True):
            assert all(np.array_equal(afters[0], other) for other in afters[1:])
        hashes = {tuple(result.hashes) for result in results}
        assert len(hashes) == 1 and len(set(hashes.pop())) == len(plan.moves), "equal hashes, another one each round"

    @contract()
    def test_unequal_initial_parameters_are_refused(self) -> None:
        """Islands that start apart would stay apart by what they started with, silently."""
        plan = make_plan(3)
        apart = plan.start.copy()
        apart[1, 0] += 1e-6
        for result in self.islands(replace(plan, start=apart)):
            assert result.error and not result.after, "no exchange may take place"

    @contract()
    def test_a_resumed_run_keeps_its_momentum(self) -> None:
        plan, after = make_plan(4), 2
        whole, resumed = self._run(plan), self._run(replace(plan, resume_after=after))
        for one, other in zip(whole, resumed, strict=True):
            assert one.process != other.process and len(other.after) == len(plan.moves)
            assert np.array_equal(one.after, other.after), "bit for bit the run that was not interrupted"

    @contract()
    def test_what_is_exported_is_the_global_model(self) -> None:
        """A run may end between two syncs; no island's own steps since the last one may get into the model."""
        results = self._run(make_plan(5, unsynced=1))
        for result in results:
            assert np.array_equal(result.exported, result.after[-1])
        assert np.array_equal(results[0].exported, results[1].exported)

    def _run(self, plan: Plan) -> list[IslandResult]:
        """The results of a plan that no island may refuse."""
        results = self.islands(plan)
        assert len(results) == plan.islands
        for number, result in enumerate(results):
            assert not result.error, f"island {number}: {result.error}"
            assert len(result.before) == len(result.after) == len(result.hashes) == len(plan.moves)
        return results
