"""What the loss and its gradient must be, in float64 NumPy from the formulas; shares no code with the core's losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_plugins.conformance import oracle
from composer_plugins.conformance.problem import Problem, Row

#: name: (ratio level, surrogate, reduction, lowest ratio, highest ratio), from the papers.
MENU = {
    "grpo": ("token", "clip", "sequence_mean", 0.8, 1.2),
    "dr_grpo": ("token", "clip", "constant_length", 0.8, 1.2),
    "bnpo": ("token", "clip", "token_mean", 0.8, 1.2),
    "dapo": ("token", "clip", "token_mean", 0.8, 1.28),
    "gspo": ("sequence", "clip", "sequence_mean", 1 - 3e-4, 1 + 4e-4),
    "cispo": ("token", "cispo", "token_mean", 0.0, 5.0),
}
#: dr_grpo's constant length that the suite sets, tokens.
LENGTH_CONSTANT = 16


@dataclass
class Part:
    """One channel's weighted share: its value and the gradient (V, V) of the table."""

    loss: float
    gradient: np.ndarray


def expected(
    problem: Problem,
    composer: dict[str, Any],
    micro_batches: Sequence[Sequence[int]] = (),
    teacher: np.ndarray | None = None,
) -> dict[str, Part]:
    """Return the share of every channel whose weight is above 0, and their sum as "total".

    Args:
        problem: the step.
        composer: the section as a recipe writes it, with every option that matters spelled out or at its default.
        micro_batches: rows of each micro-batch; only bnpo, local by definition, depends on them.
        teacher: (V, V) table of the self-teacher's weights; None: the problem's own, a live teacher.
    """
    policy, sdpo, pairs = (composer.get(name) or {} for name in ("policy", "sdpo", "replay_dpo"))
    parts: dict[str, Part] = {}
    if policy.get("weight", 1.0) > 0:
        parts["policy"] = _policy(problem, policy, micro_batches)
    if sdpo.get("weight", 0.0) > 0:
        parts["sdpo"] = _sdpo(problem, sdpo, problem.table if teacher is None else teacher)
    if pairs.get("weight", 0.0) > 0:
        parts["replay_dpo"] = _pairs(problem, pairs)
    parts["total"] = Part(sum(p.loss for p in parts.values()), sum(p.gradient for p in parts.values()))
    return parts


def _policy(problem: Problem, config: dict[str, Any], micro_batches: Sequence[Sequence[int]]) -> Part:
    name = config.get("objective", "dr_grpo")
    level, surrogate, reduction, low, high = MENU[name]
    low = 1 - config["clip_low"] if config.get("clip_low") is not None else low
    high = 1 + config["clip_high"] if config.get("clip_high") is not None else high
    masks = [np.array(row.sampled) for row in problem.rows]
    coefficients = _coefficients(name, reduction, masks, config, micro_batches)
    part = Part(0.0, np.zeros_like(problem.table))
    for row, mask, coefficient in zip(problem.rows, masks, coefficients, strict=True):
        logp = _logprobs(problem, row)
        values, slopes = oracle.policy(
            logp[None], np.where(mask, row.old_logprobs, 0.0)[None], np.full((1, len(logp)), row.advantage),
            mask[None], level=level, surrogate=surrogate, low=low, high=high, dual=config.get("dual_clip"),
        )  # fmt: skip
        part.loss += float(values.sum()) * coefficient
        _scatter(
            part.gradient, problem.table, row.previous, row.completion, slopes[0] * coefficient, problem.temperature
        )
    weight = config.get("weight", 1.0)
    return Part(part.loss * weight, part.gradient * weight)


def _coefficients(name, reduction, masks, config, micro_batches) -> list[float]:
    """What the sum over a row's tokens is multiplied by."""
    tokens = [int(mask.sum()) for mask in masks]
    if reduction == "sequence_mean":
        return [1 / (max(n, 1) * len(masks)) for n in tokens]
    if reduction == "constant_length":
        return [1 / (len(masks) * config.get("length_constant", LENGTH_CONSTANT))] * len(masks)
    if name != "bnpo":
        return [1 / max(sum(tokens), 1)] * len(masks)
    batches = micro_batches or [range(len(masks))]
    result = [0.0] * len(masks)
    for batch in batches:
        for number in batch:
            result[number] = 1 / (max(sum(tokens[i] for i in batch), 1) * len(batches))
    return result


def hinted_tokens(problem: Problem) -> list[tuple[Row, int]]:
    """The tokens that have a self-teacher: (row, position), sampled tokens of error turns."""
    return [
        (row, t) for row in problem.rows for turn in row.turns for t in range(turn.start, turn.end) if row.sampled[t]
    ]


def _sdpo(problem: Problem, config: dict[str, Any], table: np.ndarray) -> Part:
    tokens = hinted_tokens(problem)
    denominator = max(len(tokens), config.get("denominator_floor", 0), 1)
    scale = config.get("weight", 0.0) / denominator
    part = Part(0.0, np.zeros_like(problem.table))
    for row, t in tokens:
        previous, token = row.previous[t], row.completion[t]
        value, gradient = _divergence(
            problem.table[previous],
            table[previous] + problem.hinted[previous],
            token,
            config,
            problem.temperature,
        )
        weight = 1.0
        if config.get("is_clip", 2.0) is not None:
            weight = min(math.exp(_logprobs(problem, row)[t] - row.old_logprobs[t]), config.get("is_clip", 2.0))
        part.loss += scale * weight * value
        part.gradient[previous] += scale * weight * gradient
    return part


def _divergence(student: np.ndarray, teacher: np.ndarray, token: int, config: dict[str, Any], temperature: float):
    """Value of one token and its gradient (V,) with respect to the student's logits."""
    level, temperature = config.get("level", "full"), config.get("temperature") or temperature
    if level == "sampled":
        s, t = oracle.softmax(student, temperature), oracle.softmax(teacher, temperature)
        ratio = math.log(s[token]) - math.log(t[token])
        slope = (np.eye(len(s))[token] - s) / temperature
        return ratio * math.log(s[token]), ratio * slope

    def value(logits: np.ndarray) -> float:
        if level == "full":
            return float(
                oracle.full(
                    logits[None], teacher[None], config.get("alpha", 1.0), temperature, config.get("entry_clip")
                )[0]
            )
        return float(
            oracle.topk(
                logits[None], teacher[None], config.get("alpha", 1.0), config.get("top_k", 100),
                config.get("top_k_of", "student"), config.get("tail", True), temperature, config.get("entry_clip"),
            )[0]
        )  # fmt: skip

    return value(student), oracle.central(value, student)


def _pairs(problem: Problem, config: dict[str, Any]) -> Part:
    beta, smoothing, nll = config.get("beta", 0.1), config.get("label_smoothing", 0.0), config.get("nll_weight", 0.0)
    part = Part(0.0, np.zeros_like(problem.table))
    for pair in problem.pairs:
        sides = []
        for action, reference in ((pair.chosen, pair.ref_chosen), (pair.rejected, pair.ref_rejected)):
            previous = (pair.context[-1], *action[:-1])
            logp = oracle.row_logprobs(problem.table, previous, action, 1.0)
            length = len(action) if config.get("length_normalized") else 1
            sides.append((previous, action, logp, float((logp - reference).sum()) / length, length))
        delta = beta * (sides[0][3] - sides[1][3])
        value = (1 - smoothing) * math.log1p(math.exp(-delta)) + smoothing * math.log1p(math.exp(delta))
        slope = beta * (smoothing / (1 + math.exp(-delta)) - (1 - smoothing) / (1 + math.exp(delta)))
        scale = config.get("weight", 0.0) * pair.weight / len(problem.pairs)
        part.loss += scale * (value - nll * sides[0][2].mean())
        for sign, (previous, action, logp, _, length) in zip((1, -1), sides, strict=True):
            slopes = np.full(len(logp), sign * slope / length)
            if sign == 1:
                slopes -= nll / len(logp)
            _scatter(part.gradient, problem.table, previous, action, scale * slopes, 1.0)
    return part


def _logprobs(problem: Problem, row: Row) -> np.ndarray:
    return oracle.row_logprobs(problem.table, row.previous, row.completion, problem.temperature)


def _scatter(gradient, table, previous, ids, slopes, temperature: float) -> None:
    """Add sum over t of slopes[t] * d log p(ids[t] | previous[t]) / d table."""
    for before, token, slope in zip(previous, ids, slopes, strict=True):
        probabilities = oracle.softmax(table[before], temperature)
        gradient[before] -= slope * probabilities / temperature
        gradient[before, token] += slope / temperature


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """|found - wanted| / |wanted|, the distance in which gradients are compared; |found| when wanted is zero."""
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - wanted)) / (norm or 1.0)
