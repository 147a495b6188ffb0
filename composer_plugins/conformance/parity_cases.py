"""The rows of the parity report: which channels with which options, on which problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.expected import MENU
from composer_plugins.conformance.problem import Problem, make_problem
from composer_plugins.conformance.sections import pairs, policy, sdpo


@dataclass(frozen=True)
class Case:
    """One row of the report: which channels, on which problem, and what a host must be able to do."""

    name: str
    problem: Problem
    composer: dict[str, Any]
    needs: tuple[Can, ...] = ()
    objective: str | None = None


def cases(batch: Problem | None = None) -> Iterator[Case]:
    """Objectives, every level of sdpo, pairs in both forms, all channels together; last those of `batch`, if any."""
    yield from _policies()
    yield from _divergences()
    for form, need in (("direct", Can.PAIRWISE), ("advantage", Can.ADVANTAGE_FORM)):
        section = {"policy": policy(weight=0.0), "replay_dpo": pairs(form=form)}
        yield Case(f"replay_dpo {form}", make_problem(103), section, (need,))
    everything = {"policy": policy("dapo"), "sdpo": sdpo("sampled"), "replay_dpo": pairs(form="advantage")}
    needs = (Can.SAMPLED, Can.ADVANTAGE_FORM)
    yield Case("all three, ratio 1", make_problem(104, off_policy=0.0), everything, needs, "dapo")
    if batch is not None:
        name = batch.model
        yield Case(f"{name}: policy dapo", batch, {"policy": policy("dapo")}, (), "dapo")
        section = {"policy": policy(weight=0.0), "sdpo": sdpo("sampled", weight=1.0)}
        yield Case(f"{name}: sdpo sampled", batch, section, (Can.SAMPLED,))
        section = {"policy": policy(weight=0.0), "replay_dpo": pairs(form="advantage")}
        yield Case(f"{name}: replay_dpo advantage", batch, section, (Can.ADVANTAGE_FORM,))
        yield Case(f"{name}: all three", batch, everything, needs, "dapo")


def _policies() -> Iterator[Case]:
    for name in sorted(MENU):
        for spread, words in ((0.0, "ratio 1"), (0.3, "off-policy")):
            problem = make_problem(101, off_policy=spread)
            yield Case(f"policy {name}, {words}", problem, {"policy": policy(name)}, (), name)
    far = make_problem(105, off_policy=1.5)  # ratios beyond 3 and below every clip
    yield Case("policy dapo, far off-policy", far, {"policy": policy("dapo")}, (), "dapo")
    for name in ("dapo", "grpo", "dr_grpo"):
        yield Case(f"policy {name}, dual_clip 3", far, {"policy": policy(name, dual_clip=3.0)}, (), name)
    clips = policy("cispo", clip_low=0.2, clip_high=0.2)
    yield Case("policy cispo, clips 0.2", far, {"policy": clips}, (), "cispo")
    absolute = policy("cispo", cispo_bound="absolute", clip_high=0.2)
    yield Case("policy cispo, absolute 0.2", make_problem(101), {"policy": absolute}, (), "cispo")


def _divergences() -> Iterator[Case]:
    def case(name: str, level: str, *needs: Can, spread: float = 0.0, temperature: float = 1.0, **options: Any) -> Case:
        problem = make_problem(102, off_policy=spread, temperature=temperature)
        section = {"policy": policy(weight=0.0), "sdpo": sdpo(level, weight=1.0, **options)}
        return Case(name, problem, section, (Can(level), *needs))

    for level in ("sampled", "topk", "full"):
        for temperature in (1.0, 0.7):
            yield case(f"sdpo {level}, T = {temperature}", level, temperature=temperature)
    yield case("sdpo full, alpha 0", "full", alpha=0.0)
    yield case("sdpo full, alpha 0.5", "full", alpha=0.5)
    yield case("sdpo topk, tail false", "topk", tail=False)
    yield case(
        "sdpo topk of the teacher, T = 1.1", "topk", temperature=1.1, tail=False, top_k_of="teacher", alpha=0.5, is_clip=None
    )  # fmt: skip
    for level in ("sampled", "full"):
        yield case(f"sdpo {level}, off-policy", level, Can.OFF_POLICY_SDPO, spread=0.8)
