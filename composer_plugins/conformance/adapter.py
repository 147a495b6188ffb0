"""What every host adapter owes: the same loss and gradient as the formulas, however the host lays the batch out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from composer_plugins.conformance.base import Conformance, contract
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.expected import MENU, Part, expected, hinted_tokens, relative_l2
from composer_plugins.conformance.problem import HINT, Layout, Outcome, Problem, make_problem
from composer_plugins.conformance.sections import METRICS, pairs, policy, sdpo
from composer_plugins.conformance.steps import StepContracts

if TYPE_CHECKING:
    from composer_plugins.conformance.references import Reference

OBJECTIVES = pytest.mark.parametrize("objective", sorted(MENU))
LEVELS = pytest.mark.parametrize("level", ["sampled", "topk", "full"])
GARBAGE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])


class AdapterConformance(StepContracts, Conformance):
    """Contracts of a host adapter. Override `evaluate`, declare `capabilities` and `objectives`."""

    #: Objectives whose reduction the host can give exactly; the others must be refused or declared as deviations.
    objectives: ClassVar[tuple[str, ...]] = tuple(MENU)
    #: The host's own components report another value with the same gradient: only gradients are compared.
    loss_is_a_surrogate: ClassVar[bool] = False
    #: Which component and option report that other value.
    surrogate: ClassVar[str] = ""
    #: Largest relative L2 distance of gradients in the host's float32.
    tolerance: ClassVar[float] = 1e-5

    @abstractmethod
    def evaluate(self, problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
        """Run one optimizer step's losses and backward passes through the host's own entry point.

        Args:
            problem: rows, turns and pairs of the whole step; advantages, hints and references are given, not computed.
            composer: the section as in a recipe. `replay_dpo` has no `pairs` file: the pairs are `problem.pairs`.
            layout: how the rows are split, padded, packed and spread over ranks.

        Returns:
            Loss and gradient of the step as the optimizer would see it.
        """

    def references(self) -> Iterable[Reference]:
        """Losses of the host itself on the same tensors, for the parity report; none by default."""
        return ()

    # Value and gradient

    @contract()
    @OBJECTIVES
    def test_policy_value_and_gradient(self, objective: str) -> None:
        self._offers(objective)
        self._agrees(make_problem(1), {"policy": policy(objective)})

    @contract()
    @pytest.mark.parametrize("temperature", [0.7, 1.3])
    def test_rollout_temperature(self, temperature: float) -> None:
        self._agrees(make_problem(2, temperature=temperature), {"policy": policy("dapo")})

    @contract()
    def test_ratio_one_gives_the_plain_policy_gradient(self) -> None:
        self._agrees(make_problem(3, off_policy=0.0), {"policy": policy(self.objectives[0])})

    @LEVELS
    @contract()
    def test_sdpo_value_and_gradient(self, level: str) -> None:
        self._has_level(level)
        self._agrees(make_problem(4, off_policy=0.0), {"policy": policy(weight=0.0), "sdpo": sdpo(level)})

    @LEVELS
    @contract(Can.OFF_POLICY_SDPO)
    def test_sdpo_off_policy(self, level: str) -> None:
        self._has_level(level)
        self._agrees(make_problem(4, off_policy=0.8), {"policy": policy(weight=0.0), "sdpo": sdpo(level)})

    @LEVELS
    @contract()
    def test_sdpo_at_a_temperature(self, level: str) -> None:
        self._has_level(level)
        problem = make_problem(5, temperature=0.7, off_policy=0.0)
        self._agrees(problem, {"policy": policy(weight=0.0), "sdpo": sdpo(level)})

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    @contract(Can.FULL)
    def test_direction_of_the_divergence(self, alpha: float) -> None:
        section = {"policy": policy(weight=0.0), "sdpo": sdpo("full", alpha=alpha)}
        self._agrees(make_problem(6), section)

    @contract(Can.PAIRWISE)
    @pytest.mark.parametrize("length_normalized", [False, True])
    def test_replay_dpo_value_and_gradient(self, length_normalized: bool) -> None:
        section = {"policy": policy(weight=0.0), "replay_dpo": pairs(length_normalized=length_normalized)}
        self._agrees(make_problem(7, temperature=0.7), section)

    @contract(Can.ADVANTAGE_FORM)
    def test_advantage_form_equals_pairwise_dpo(self) -> None:
        problem = make_problem(8)
        section = {"policy": policy(weight=0.0), "replay_dpo": pairs(form="advantage")}
        found = self.evaluate(problem, section, self._whole(problem))
        wanted = expected(problem, section)["total"].gradient
        assert relative_l2(found.gradient, wanted) <= self.tolerance

    @contract(Can.ADVANTAGE_FORM)
    def test_channels_add(self) -> None:
        self._agrees(self._all_channels(9), self._everything())

    # Layout

    @contract(Can.ACCUMULATION)
    @OBJECTIVES
    def test_micro_batches_change_nothing(self, objective: str) -> None:
        self._offers(objective)
        problem = make_problem(10)
        split = Layout(((0, 1), (2, 3), (4, 5)))
        self._agrees(problem, {"policy": policy(objective)}, split)

    @contract(Can.ACCUMULATION, Can.ADVANTAGE_FORM)
    def test_micro_batches_change_no_channel(self) -> None:
        problem = self._all_channels(11)
        for split in (((0, 1, 2), (3, 4, 5)), ((0,), (1,), (2,), (3,), (4,), (5,))):
            self._agrees(problem, self._everything(), Layout(split))

    @contract(Can.PADDED)
    def test_padding_changes_nothing(self) -> None:
        problem = self._all_channels(12)
        self._agrees(problem, self._everything(), Layout((tuple(range(6)),), padding=9))

    @contract(Can.PACKED)
    def test_packing_changes_nothing(self) -> None:
        problem = self._all_channels(13)
        self._agrees(problem, self._everything(), Layout((tuple(range(6)),), packed=True))

    @contract(Can.MULTI_RANK)
    def test_two_ranks_change_nothing(self) -> None:
        problem = self._all_channels(14)
        self._agrees(problem, self._everything(), Layout(((0, 1, 2), (3, 4, 5)), ranks=2))

    # Masks

    @GARBAGE
    @contract()
    def test_garbage_under_the_mask_reaches_nothing(self, value: float) -> None:
        problem, section = self._all_channels(15), self._everything()
        layout = self._whole(problem, fill=value)
        found = self.evaluate(problem.with_garbage(value), section, layout)
        self._compare(found, expected(problem, section)["total"], section)

    @contract()
    def test_an_empty_mask_backpropagates_zeros(self) -> None:
        problem = make_problem(16, pairs=()).without_tokens()
        found = self.evaluate(problem, {"policy": policy("dapo")}, self._whole(problem))
        assert found.loss == 0 and not np.any(found.gradient)

    @LEVELS
    @contract()
    def test_hint_gradient_stays_inside_the_error_turn(self, level: str) -> None:
        self._has_level(level)
        problem = make_problem(17)
        section = {"policy": policy(weight=0.0), "sdpo": sdpo(level)}
        found = self.evaluate(problem, section, self._whole(problem))
        inside = sorted({row.previous[t] for row, t in hinted_tokens(problem)})
        outside = np.delete(found.gradient, inside, axis=0)
        assert np.any(found.gradient[inside]) and not np.any(outside)

    @LEVELS
    @contract()
    def test_a_hint_that_changes_nothing_gives_nothing(self, level: str) -> None:
        self._has_level(level)
        problem = self._all_channels(18).without_hints()
        section = {"policy": policy(weight=0.0), "sdpo": sdpo(level)}
        found = self.evaluate(problem, section, self._whole(problem))
        assert np.abs(found.gradient).max() <= 1e-6

    @contract()
    def test_the_teacher_carries_no_gradient(self) -> None:
        problem = make_problem(19)
        for level in self._levels():
            section = {"policy": policy(weight=0.0), "sdpo": sdpo(level)}
            found = self.evaluate(problem, section, self._whole(problem))
            assert found.hinted_gradient is None or not np.any(found.hinted_gradient), level

    @contract(Can.FORWARDS)
    def test_the_teacher_reads_the_same_ids_after_the_hint(self) -> None:
        problem = make_problem(20)
        section = {"policy": policy(weight=0.0), "sdpo": sdpo(self._levels()[0])}
        found = self.evaluate(problem, section, self._whole(problem))
        turns = [(row, turn) for row in problem.rows for turn in row.turns]
        wanted = {(row.hinted_context(turn), row.completion[turn.start : turn.end]) for row, turn in turns}
        assert set(found.teacher_ids) == wanted and all(HINT in context for context, _ in wanted)

    # Weights

    @contract(Can.FORWARDS)
    def test_weight_zero_costs_no_forward(self) -> None:
        problem = make_problem(21)
        section = {"policy": policy(), "sdpo": sdpo(self._levels()[0], weight=0.0), "replay_dpo": pairs(weight=0.0)}
        found = self.evaluate(problem, section, self._whole(problem))
        assert found.forwards.get("student", 0) > 0
        assert found.forwards.get("teacher", 0) == 0 and found.forwards.get("pairs", 0) == 0

    @contract()
    def test_weights_scale_their_channel_alone(self) -> None:
        problem = self._all_channels(22)
        for weight in (0.3, 2.0):
            self._agrees(problem, self._everything(sdpo_weight=weight))

    @contract(Can.BF16)
    def test_bfloat16_stays_within_its_rounding(self) -> None:
        """Three significant digits: the gradient's relative L2 distance stays below 3 %."""
        problem, section = make_problem(23, off_policy=0.0), {"policy": policy("dapo")}
        layout = Layout((tuple(range(6)),), dtype="bfloat16")
        found = self.evaluate(problem, section, layout)
        assert relative_l2(found.gradient, expected(problem, section)["total"].gradient) <= 0.03

    # What is reported

    @contract()
    def test_metrics_have_the_neutral_names(self) -> None:
        problem, section = self._all_channels(24), self._everything()
        metrics = self.evaluate(problem, section, self._whole(problem)).metrics
        wanted = [name for channel in expected(problem, section) if channel != "total" for name in METRICS[channel]]
        assert not [name for name in wanted if name not in metrics], sorted(metrics)

    @contract()
    def test_counts_are_the_steps_counts(self) -> None:
        problem, section = self._all_channels(25), self._everything()
        metrics = self.evaluate(problem, section, self._whole(problem)).metrics
        assert metrics["policy/active_tokens"] == sum(sum(row.sampled) for row in problem.rows)
        assert metrics["sdpo/tokens"] == len(hinted_tokens(problem))
        if section.get("replay_dpo"):
            assert metrics["replay_dpo/pairs"] == len(problem.pairs)

    # Helpers

    def _offers(self, objective: str) -> None:
        if objective not in self.objectives:
            pytest.skip(f"not offered: {self.why_not(f'objective {objective}')}")

    def _levels(self) -> list[str]:
        return [level for level in ("sampled", "topk", "full") if Can(level) in self.capabilities]

    def _has_level(self, level: str) -> None:
        if level not in self._levels():
            pytest.skip(f"not offered: {self.why_not(level)}")

    def _everything(self, sdpo_weight: float = 0.7) -> dict[str, Any]:
        objective = "dapo" if "dapo" in self.objectives else self.objectives[0]
        section = {"policy": policy(objective), "sdpo": sdpo(self._levels()[0], weight=sdpo_weight)}
        if Can.ADVANTAGE_FORM in self.capabilities:
            section["replay_dpo"] = pairs(form="direct" if Can.PAIRWISE in self.capabilities else "advantage")
        return section

    def _all_channels(self, seed: int) -> Problem:
        """A problem for `_everything`: off-policy where sdpo's importance weight is the core's."""
        return make_problem(seed, off_policy=0.3 if Can.OFF_POLICY_SDPO in self.capabilities else 0.0)

    def _whole(self, problem: Problem, **options: Any) -> Layout:
        return Layout((tuple(range(len(problem.rows))),), **options)

    def _agrees(self, problem: Problem, composer: dict[str, Any], layout: Layout | None = None) -> None:
        layout = layout or self._whole(problem)
        found = self.evaluate(problem, composer, layout)
        self._compare(found, expected(problem, composer, layout.micro_batches)["total"], composer)

    def _compare(self, found: Outcome, wanted: Part, composer: dict[str, Any]) -> None:
        distance = relative_l2(found.gradient, wanted.gradient)
        assert distance <= self.tolerance, f"relative L2 distance of the gradients: {distance:.3g}"
        surrogate = self.loss_is_a_surrogate or composer.get("replay_dpo", {}).get("form") == "advantage"
        assert surrogate or found.loss == pytest.approx(wanted.loss, rel=1e-4, abs=1e-5)
