"""Contracts over several optimizer steps: teachers that move or stand still, resume, a channel that stays silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from composer_plugins.channels.silence import SilentChannelWarning
from composer_plugins.conformance.base import contract
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.expected import expected, relative_l2
from composer_plugins.conformance.problem import Layout, Outcome, Problem, make_problem
from composer_plugins.conformance.sections import policy, sdpo


class StepContracts:
    """Part of `AdapterConformance`: what needs its `run`."""

    def run(
        self,
        problem: Problem,
        composer: dict[str, Any],
        layout: Layout,
        *,
        steps: int,
        learning_rate: float,
        resume_after: int | None = None,
    ) -> list[Outcome]:
        """Take several optimizer steps of plain SGD on the same rows; needed for EMA_TEACHER, REFERENCE_TEACHER,
        RESUME and MONITOR.

        Args:
            problem, composer, layout: as for `evaluate`; the table moves, all else stays.
            steps: optimizer steps. learning_rate: of SGD without momentum.
            resume_after: after this many steps, save what the host's checkpoints hold, build everything anew from
                the checkpoint, and go on. None: straight through.

        Returns:
            One outcome per step; the gradient is the one that the step was taken with.
        """
        raise NotImplementedError(f"{type(self).__name__} declares capabilities that need `run`: override it.")

    # The rows stay while the policy moves, so every step but the first is off-policy.

    @contract(Can.EMA_TEACHER, Can.OFF_POLICY_SDPO)
    def test_the_ema_teacher_follows_at_its_rate(self) -> None:
        self._follows("ema", rate=0.3)

    @contract(Can.REFERENCE_TEACHER, Can.OFF_POLICY_SDPO)
    def test_the_reference_teacher_stands_still(self) -> None:
        self._follows("reference", rate=0.0)

    @contract(Can.LIVE_TEACHER, Can.OFF_POLICY_SDPO, Can.MONITOR)
    def test_the_live_teacher_moves_along(self) -> None:
        self._follows("live", rate=1.0)

    @contract(Can.RESUME)
    def test_a_resumed_run_takes_the_same_next_step(self) -> None:
        problem, section = self._all_channels(26), self._everything()
        section["sdpo"]["teacher"] = {"kind": "ema" if Can.EMA_TEACHER in self.capabilities else "live"}
        whole, resumed = (
            self.run(problem, section, self._whole(problem), steps=3, learning_rate=5.0, resume_after=after)
            for after in (None, 2)
        )
        assert relative_l2(resumed[-1].gradient, whole[-1].gradient) <= 1e-6

    @contract(Can.MONITOR)
    def test_a_silent_channel_is_reported(self) -> None:
        problem = self._all_channels(27).without_turns()
        section = {**self._everything(), "monitor": {"silent_after": 2}}
        with pytest.warns(SilentChannelWarning, match="sdpo"):
            self.run(problem, section, self._whole(problem), steps=2, learning_rate=0.1)

    def _follows(self, kind: str, rate: float) -> None:
        """Compare three steps with the formulas, the teacher's table moving by `rate` towards the policy's."""
        problem = make_problem(28)
        section = {"policy": policy(weight=0.0), "sdpo": sdpo(self._levels()[0], kind=kind)}
        if kind == "ema":
            section["sdpo"]["teacher"]["ema_rate"] = rate
        found = self.run(problem, section, self._whole(problem), steps=3, learning_rate=5.0)
        teacher = problem.table
        for outcome in found:
            wanted = expected(problem, section, teacher=teacher)["total"].gradient
            assert relative_l2(outcome.gradient, wanted) <= self.tolerance
            assert outcome.hinted_gradient is None or not np.any(outcome.hinted_gradient), (
                "the teacher carries gradient"
            )
            problem = replace(problem, table=problem.table - 5.0 * wanted)
            teacher = teacher + rate * (problem.table - teacher)
