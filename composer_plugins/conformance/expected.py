"""What the loss and its gradient must be, in float64 NumPy from the formulas; shares no code with the core's losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_plugins.conformance import oracle
from composer_plugins.conformance.problem import Problem, Row, Turn

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


class TableScores:
    """Log-probabilities of a problem's table, and the gradient (V, V) of slopes with respect to them."""

    def __init__(self, problem: Problem, teacher: np.ndarray) -> None:
        self.problem, self.table, self.teacher = problem, problem.table, teacher
        self.gradient = np.zeros_like(problem.table)

    def logprobs(self, context: Sequence[int], ids: Sequence[int], temperature: float) -> np.ndarray:
        """Of `ids` after `context`, (T,) float64."""
        return oracle.row_logprobs(self.table, (context[-1], *ids[:-1]), ids, temperature)

    def taught(self, row: Row, turn: Turn) -> np.ndarray:
        """Of a turn under the hint, by the teacher's weights, (T,) float64."""
        ids, before = row.completion[turn.start : turn.end], row.previous[turn.start : turn.end]
        return oracle.row_logprobs(self.teacher + self.problem.hinted, before, ids, self.problem.temperature)

    def add(self, context: Sequence[int], ids: Sequence[int], slopes: np.ndarray, temperature: float) -> None:
        """Add sum over t of slopes[t] * d log p(ids[t]) / d table to the gradient."""
        _scatter(self.gradient, self.table, (context[-1], *ids[:-1]), ids, slopes, temperature)

    def take(self) -> np.ndarray:
        """Return the gradient of what was added, and begin anew."""
        found, self.gradient = self.gradient, np.zeros_like(self.table)
        return found


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
    scores: Any = None,
) -> dict[str, Part]:
    """Return the share of every channel whose weight is above 0, and their sum as "total".

    Args:
        problem: the step.
        composer: the section as a recipe writes it, with every option that matters spelled out or at its default.
        micro_batches: rows of each micro-batch; only bnpo, local by definition, depends on them.
        teacher: (V, V) table of the self-teacher's weights; None: the problem's own, a live teacher.
        scores: what gives log-probs and takes slopes in the place of `TableScores`; sdpo then at level sampled.
    """
    scores = scores or TableScores(problem, problem.table if teacher is None else teacher)
    policy, sdpo, pairs = (composer.get(name) or {} for name in ("policy", "sdpo", "replay_dpo"))
    parts: dict[str, Part] = {}
    if policy.get("weight", 1.0) > 0:
        parts["policy"] = _policy(problem, policy, micro_batches, scores)
    if sdpo.get("weight", 0.0) > 0:
        parts["sdpo"] = _sdpo(problem, sdpo, scores)
    if pairs.get("weight", 0.0) > 0:
        parts["replay_dpo"] = _pairs(problem, pairs, scores)
    parts["total"] = Part(sum(p.loss for p in parts.values()), sum(p.gradient for p in parts.values()))
    return parts


def _policy(problem: Problem, config: dict[str, Any], micro_batches: Sequence[Sequence[int]], scores) -> Part:
    name = config.get("objective", "dr_grpo")
    level, surrogate, reduction, low, high = MENU[name]
    low = 1 - config["clip_low"] if config.get("clip_low") is not None else low
    high = 1 + config["clip_high"] if config.get("clip_high") is not None else high
    if surrogate == "cispo" and config.get("cispo_bound") == "absolute":  # TRL's reading: the cap itself, no lower one
        low, high = 0.0, high - 1
    masks, weight = [np.array(row.sampled) for row in problem.rows], config.get("weight", 1.0)
    coefficients = [weight * c for c in _coefficients(name, reduction, masks, config, micro_batches)]
    loss = 0.0
    for row, mask, coefficient in zip(problem.rows, masks, coefficients, strict=True):
        logp = scores.logprobs(row.prompt, row.completion, problem.temperature)
        values, slopes = oracle.policy(
            logp[None], np.where(mask, row.old_logprobs, 0.0)[None], np.full((1, len(logp)), row.advantage),
            mask[None], level=level, surrogate=surrogate, low=low, high=high, dual=config.get("dual_clip"),
        )  # fmt: skip
        loss += float(values.sum()) * coefficient
        scores.add(row.prompt, row.completion, slopes[0] * coefficient, problem.temperature)
    return Part(loss, scores.take())


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


def _sdpo(problem: Problem, config: dict[str, Any], scores) -> Part:
    denominator = max(len(hinted_tokens(problem)), config.get("denominator_floor", 0), 1)
    scale = config.get("weight", 0.0) / denominator
    loss, gradient = 0.0, np.zeros_like(problem.table)
    for row in problem.rows:
        logp = scores.logprobs(row.prompt, row.completion, problem.temperature)
        slopes = np.zeros(len(logp))
        for turn in row.turns:
            taught = scores.taught(row, turn)
            for t in (t for t in range(turn.start, turn.end) if row.sampled[t]):
                weight = scale
                if config.get("is_clip", 2.0) is not None:
                    weight *= min(math.exp(logp[t] - row.old_logprobs[t]), config.get("is_clip", 2.0))
                if config.get("level", "full") == "sampled":  # sg(log s - log t) * log s
                    slopes[t] = weight * (logp[t] - taught[t - turn.start])
                    loss += slopes[t] * logp[t]
                    continue
                before = row.previous[t]
                teacher = scores.teacher[before] + problem.hinted[before]
                value, slope = _divergence(problem.table[before], teacher, config, problem.temperature)
                loss += weight * value
                gradient[before] += weight * slope
        scores.add(row.prompt, row.completion, slopes, problem.temperature)
    return Part(loss, scores.take() + gradient if gradient.size else scores.take())


def _divergence(student: np.ndarray, teacher: np.ndarray, config: dict[str, Any], temperature: float):
    """Value of one token and its gradient (V,) with respect to the student's logits."""
    level, temperature = config.get("level", "full"), config.get("temperature") or temperature

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


def _pairs(problem: Problem, config: dict[str, Any], scores) -> Part:
    beta, smoothing, nll = config.get("beta", 0.1), config.get("label_smoothing", 0.0), config.get("nll_weight", 0.0)
    loss = 0.0
    for pair in problem.pairs:
        sides = []
        for action, reference in ((pair.chosen, pair.ref_chosen), (pair.rejected, pair.ref_rejected)):
            logp = scores.logprobs(pair.context, action, 1.0)
            length = len(action) if config.get("length_normalized") else 1
            sides.append((action, logp, float((logp - reference).sum()) / length, length))
        delta = beta * (sides[0][2] - sides[1][2])
        value = (1 - smoothing) * math.log1p(math.exp(-delta)) + smoothing * math.log1p(math.exp(delta))
        slope = beta * (smoothing / (1 + math.exp(-delta)) - (1 - smoothing) / (1 + math.exp(delta)))
        scale = config.get("weight", 0.0) * pair.weight / len(problem.pairs)
        loss += scale * (value - nll * sides[0][1].mean())
        for sign, (action, logp, _, length) in zip((1, -1), sides, strict=True):
            slopes = np.full(len(logp), sign * slope / length)
            if sign == 1:
                slopes -= nll / len(logp)
            scores.add(pair.context, action, scale * slopes, 1.0)
    return Part(loss, scores.take())


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
