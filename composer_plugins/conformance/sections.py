"""The `composer` sections that the contracts use, and the host-neutral names of what a step reports."""

from __future__ import annotations

from typing import Any

from composer_plugins.conformance.expected import LENGTH_CONSTANT

#: The host-neutral names of what a step reports.
METRICS = {
    "policy": ("policy/active_tokens", "policy/clip_fraction", "policy/ratio"),
    "sdpo": ("sdpo/tokens", "sdpo/active_tokens", "sdpo/divergence"),
    "replay_dpo": ("replay_dpo/pairs", "replay_dpo/accuracy", "replay_dpo/margin"),
}


def policy(objective: str = "dapo", weight: float = 1.0, **options: Any) -> dict[str, Any]:
    """A policy section with dr_grpo's constant set."""
    return {"objective": objective, "weight": weight, "length_constant": LENGTH_CONSTANT, **options}


def sdpo(level: str, weight: float = 0.7, kind: str = "live", **options: Any) -> dict[str, Any]:
    """An sdpo section."""
    options = {"top_k": 5, **options} if level == "topk" else options
    return {"weight": weight, "level": level, "teacher": {"kind": kind}, **options}


def pairs(weight: float = 0.5, **options: Any) -> dict[str, Any]:
    """A replay_dpo section; the pairs themselves are the problem's."""
    return {"weight": weight, **options}
