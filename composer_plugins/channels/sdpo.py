"""Channel 2: hint-conditioned self-distillation (replicates Cursor's published recipe as far as it is public)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch

from composer_plugins.channels.base import ChannelSpec, Term
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.config import SDPOConfig, check_sampled_level
from composer_plugins.errors import UnsupportedError
from composer_plugins.losses import divergence as losses
from composer_plugins.losses.log_space import log_softmax
from composer_plugins.losses.masking import check_same_shape, full_precision, masked, safe

logger = logging.getLogger(__name__)

SPEC = ChannelSpec(
    name="sdpo",
    levels=(SignalLevel.FULL, SignalLevel.TOPK, SignalLevel.SAMPLED),
    activity="sdpo/active_tokens",
)

#: A token counts as active when the hint moved the teacher by more nats than rounding in float32 does.
ACTIVE_NATS = 1e-6


def resolve_level(config: SDPOConfig, host_levels: Sequence[SignalLevel]) -> SignalLevel:
    """Return the signal level to work at: what the config names, else the best that host and channel share.

    A host with the whole distribution can also give top-k and sampled log-probs. The choice is logged.

    Args:
        config: the `sdpo` section.
        host_levels: what the host offers.

    Raises:
        UnsupportedError: the host cannot give the level asked for, or an option cannot be had at it. Nothing
            is approximated silently.

    Warns:
        UserWarning: alpha close to, but not at, 0 or 1 (the generalised JSD is discontinuous there).
    """
    if not host_levels:
        raise UnsupportedError("The host offers no signal level, so sdpo cannot run on it; set sdpo.weight: 0.")
    best = min((SignalLevel(level) for level in host_levels), key=SPEC.levels.index)
    level = best if config.level == "auto" else SignalLevel(config.level)
    if SPEC.levels.index(level) < SPEC.levels.index(best):
        raise UnsupportedError(
            f"sdpo.level: {level} was asked for, but the best that this host offers is {best}; "
            f"use level: auto or {best}, or another host."
        )
    _refuse_options(config, level, best)
    if 0 < config.alpha < 0.05 or 0.95 < config.alpha < 1:
        nearest = round(config.alpha)
        warnings.warn(
            f"sdpo.alpha: {config.alpha} is the generalised Jensen-Shannon divergence close to its end, where the "
            f"loss is about {min(config.alpha, 1 - config.alpha):.2g} of that at alpha: {nearest}; "
            f"use {nearest}, or a value from 0.05 to 0.95.",
            stacklevel=2,
        )
    logger.info("sdpo works at signal level %s (host offers %s)", level, ", ".join(host_levels))
    return level


def _refuse_options(config: SDPOConfig, level: SignalLevel, best: SignalLevel) -> None:
    if level is SignalLevel.SAMPLED:
        try:
            check_sampled_level(config)
        except ValueError as error:
            raise UnsupportedError(f"sdpo: {error}") from error
        if config.temperature is not None:
            raise UnsupportedError(
                f"sdpo.temperature: {config.temperature} cannot be given at signal level sampled: the tokens were "
                "drawn at the rollout temperature. Leave it out (the rollout's is used), or use level: full or topk."
            )
    elif best is SignalLevel.TOPK:
        if config.teacher.kind == "trust_region":
            raise UnsupportedError(
                "sdpo.teacher.kind: trust_region needs logits (its normaliser runs over the vocabulary), but this "
                "host offers top-k log-probs; use ema, live or reference."
            )
        if config.temperature is not None:
            raise UnsupportedError(
                f"sdpo.temperature: {config.temperature} needs logits, but this host offers top-k log-probs at the "
                "rollout temperature; leave it out."
            )


def sdpo_values(
    config: SDPOConfig,
    level: SignalLevel,
    *,
    student_logits: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    ref_teacher_logits: torch.Tensor | None = None,
    student_topk_logprobs: torch.Tensor | None = None,
    teacher_topk_logprobs: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    teacher_logprobs: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unreduced loss and the divergence of flat hinted tokens.

    Args:
        config: the `sdpo` section.
        level: from `resolve_level`.
        student_logits: (N, V) raw (not divided by a temperature), receives gradient. At `full`; serves
            `topk` and, with `token_ids`, `sampled` too.
        teacher_logits: (N, V) raw, under the hint; detached inside. For `trust_region` the live weights'.
        ref_teacher_logits: (N, V) raw, under the hint, of the initial weights; `trust_region` only.
        student_topk_logprobs: (N, k), normalised over the vocabulary at the rollout temperature; `topk`.
        teacher_topk_logprobs: (N, k) at the same ids.
        logprobs: (N,) of the sampled tokens at the rollout temperature, receives gradient; `sampled`.
        teacher_logprobs: (N,) of the same tokens under the hint.
        token_ids: (N,) sampled ids, to gather from logits at `sampled`.
        old_logprobs: (N,) of the policy that sampled. Given together with `logprobs` and with
            `config.is_clip` set, the values are multiplied by min(pi/pi_old, is_clip).
        mask: (N,) bool; None: every token.
        temperature: the rollout temperature, divides the logits unless `config.temperature` does.

    Returns:
        `values` (N,) with gradient, and `divergence` (N,) detached, in nats, without importance weight: at
        `sampled` log pi - log pi_T, since the value there is only a surrogate.

    Raises:
        ValueError: a tensor that the level needs is missing, or shapes do not fit.
    """
    temperature = config.temperature or temperature
    if level is SignalLevel.SAMPLED:
        if student_logits is not None and token_ids is not None:
            logprobs = _gather(student_logits, token_ids, temperature, mask)
            teacher_logprobs = _gather(_need(teacher_logits, "teacher_logits", level), token_ids, temperature, mask)
        student = _need(logprobs, "logprobs (or student_logits and token_ids)", level)
        teacher = _need(teacher_logprobs, "teacher_logprobs", level)
        valid = torch.ones_like(student, dtype=torch.bool) if mask is None else mask
        values = losses.sampled_reverse_kl(student, teacher, valid)
        shown = losses.sampled_log_ratio(student, teacher, valid)
    else:
        if student_logits is not None:
            teacher = _teacher_logits(config, teacher_logits, ref_teacher_logits, level)
            values = _from_logits(config, level, student_logits, teacher, mask, temperature)
        elif level is SignalLevel.TOPK:
            values = losses.topk_divergence_from_logprobs(
                _need(student_topk_logprobs, "student_topk_logprobs (or student_logits)", level),
                _need(teacher_topk_logprobs, "teacher_topk_logprobs", level),
                alpha=config.alpha, tail=config.tail, entry_clip=config.entry_clip, mask=mask,
            )  # fmt: skip
        else:
            _need(None, "student_logits", level)
        shown = values.detach()
    weight = sdpo_importance_weight(config, logprobs, old_logprobs, mask)
    return (values if weight is None else values * weight), shown


def sdpo_importance_weight(
    config: SDPOConfig,
    logprobs: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return min(pi / pi_old, is_clip) (N,), detached; None without `is_clip` or without both log-probs."""
    if config.is_clip is None or logprobs is None or old_logprobs is None:
        return None
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    return losses.importance_weight(logprobs, old_logprobs, valid, cap=config.is_clip)


def sdpo_term(
    config: SDPOConfig,
    values: torch.Tensor,
    *,
    denominator: torch.Tensor | float,
    divergence: torch.Tensor,
    importance_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Term:
    """Build the sdpo term of one micro-batch.

    Args:
        config: the `sdpo` section. Its weight becomes the term's weight.
        values: (N,) from `sdpo_values`.
        denominator: tokens that have a self-teacher, over all micro-batches and ranks of the optimizer step;
            raised to `config.denominator_floor` (and to 1) here.
        divergence: (N,) from `sdpo_values`.
        importance_weights: (N,) factors that `sdpo_values` has not applied (the host's engine correction, or
            `sdpo_importance_weight`); multiplied in, detached.
        mask: (N,) bool; None: every token.

    Returns:
        `Term` with (N,) values. Metrics: `sdpo/tokens` (those with a self-teacher), `sdpo/active_tokens` (those
        whose teacher the hint moved by more than 1e-6 nats), `sdpo/divergence` (mean nats per token; 0 without
        tokens) and, when weights were given, `sdpo/is_weight` (their mean).

    Raises:
        ValueError: shapes do not fit.
    """
    shape = check_same_shape(values=values, divergence=divergence, importance_weights=importance_weights, mask=mask)
    if len(shape) != 1:
        raise ValueError(f"Expected flat hinted tokens of shape (N,), found {tuple(shape)}.")
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    values, divergence = masked(values, valid), masked(divergence.detach(), valid)
    tokens = valid.sum().clamp(min=1)
    metrics = {
        "sdpo/tokens": float(valid.sum()),
        "sdpo/active_tokens": float((divergence.abs() > ACTIVE_NATS).sum()),
        "sdpo/divergence": float(divergence.sum() / tokens),
    }
    if importance_weights is not None:
        weights = safe(importance_weights.detach(), valid)
        values = values * weights
        metrics["sdpo/is_weight"] = float(weights.sum() / tokens)
    floor = max(config.denominator_floor, 1)
    bounded = denominator.clamp(min=floor) if isinstance(denominator, torch.Tensor) else max(denominator, floor)
    return Term("sdpo", values, bounded, config.weight, metrics)


def _teacher_logits(config: SDPOConfig, live, reference, level: SignalLevel) -> torch.Tensor:
    live = _need(live, "teacher_logits", level)
    if config.teacher.kind != "trust_region":
        return live
    if reference is None:
        raise ValueError("teacher.kind: trust_region needs ref_teacher_logits (N, V), found None.")
    return losses.trust_region_logits(reference, live, mix=config.teacher.mix)


def _from_logits(config: SDPOConfig, level: SignalLevel, student, teacher, mask, temperature: float) -> torch.Tensor:
    options = {
        "alpha": config.alpha, "temperature": temperature, "entry_clip": config.entry_clip, "mask": mask,
    }  # fmt: skip
    if level is SignalLevel.FULL:
        return losses.full_divergence(student, teacher, **options)
    return losses.topk_divergence(student, teacher, k=config.top_k, of=config.top_k_of, tail=config.tail, **options)


def _gather(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, mask) -> torch.Tensor:
    """Log-probabilities (N,) of `token_ids` (N,) from raw logits (N, V)."""
    logits = full_precision(logits)
    if mask is not None:
        logits, token_ids = safe(logits, mask[:, None]), token_ids.masked_fill(~mask, 0)
    return log_softmax(logits, temperature).gather(-1, token_ids[:, None])[:, 0]


def _need(tensor: torch.Tensor | None, name: str, level: SignalLevel) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"Signal level {level} needs {name}, found None.")
    return tensor
