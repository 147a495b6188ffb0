"""Channel 1: the menu of policy objectives as one per-token loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from composer_plugins.losses.masking import check_same_shape, full_precision, masked, safe
from composer_plugins.losses.reduction import Reduction


@dataclass(frozen=True)
class Objective:
    """A policy objective: which ratio, which surrogate, how it is reduced, which advantages it takes.

    Args:
        name: how a config file names it.
        ratio_level: "token", or "sequence" (geometric mean of the token ratios).
        surrogate: "clip", -min(rA, clip(r)A); or "cispo", -sg(clip(r)) A logprobs.
        reduction: see `composer_plugins.losses.reduction`.
        advantage_scale: "group" divides by the group's standard deviation, "none" does not.
        clip_low: lower clip distance, the ratio's bound is 1 - clip_low.
        clip_high: upper clip distance, the ratio's bound is 1 + clip_high.

    To get a host's variant, replace a field: `dataclasses.replace(GSPO, reduction=...)`.
    """

    name: str
    ratio_level: Literal["token", "sequence"]
    surrogate: Literal["clip", "cispo"]
    reduction: Reduction
    advantage_scale: Literal["group", "none"]
    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        allowed = {
            "ratio_level": ("token", "sequence"),
            "surrogate": ("clip", "cispo"),
            "reduction": tuple(Reduction),
            "advantage_scale": ("group", "none"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"Objective {self.name!r}: expected {field} in {', '.join(values)}, found {getattr(self, field)!r}."
                )


GRPO = Objective("grpo", "token", "clip", Reduction.SEQUENCE_MEAN, "group", 0.2, 0.2)
DR_GRPO = Objective("dr_grpo", "token", "clip", Reduction.CONSTANT_LENGTH, "none", 0.2, 0.2)
BNPO = Objective("bnpo", "token", "clip", Reduction.LOCAL_TOKEN_MEAN, "group", 0.2, 0.2)
DAPO = Objective("dapo", "token", "clip", Reduction.GLOBAL_TOKEN_MEAN, "group", 0.2, 0.28)
GSPO = Objective("gspo", "sequence", "clip", Reduction.SEQUENCE_MEAN, "group", 3e-4, 4e-4)
#: No lower bound, as in the paper (clip_low 1 puts it at 0). The paper does not publish its upper bound; a
#: ratio of at most 5 is the value of ScaleRL (arXiv:2510.13786). verl's defaults are 0.2 and 0.2.
CISPO = Objective("cispo", "token", "cispo", Reduction.GLOBAL_TOKEN_MEAN, "group", 1.0, 4.0)


class PolicyLoss(NamedTuple):
    """Per-token result, each (B, T) and zero outside the mask; only `values` carries gradient."""

    values: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def policy_loss(
    objective: Objective,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | tuple[float, float] | None = None,
    cispo_bound: Literal["one_plus", "absolute"] = "one_plus",
) -> PolicyLoss:
    """Per-token policy-gradient loss, to be minimised; masked, not reduced.

    r = exp(logprobs - old_logprobs); at sequence level r = sg[s] pi/sg[pi] with
    s = exp(mean over the sequence's tokens of logprobs - old_logprobs).

    clip:  -min(r A, clip(r, 1 - low, 1 + high) A), and with `dual_clip` c at most -c A where A < 0.
    cispo: -sg(clip(r, 1 - low, 1 + high)) A logprobs, or with bound "absolute" -sg(min(r, high)) A logprobs.

    Args:
        objective: an entry of the menu.
        logprobs: (B, T), nats, of the policy being trained; the only argument that receives gradient.
        old_logprobs: (B, T), nats, the ratio's denominator.
        advantages: (B,) or (B, T), in units of reward or of its standard deviation.
        mask: (B, T) bool, True = counts.
        clip_low: overrides the objective's; dimensionless.
        clip_high: overrides the objective's. With `cispo_bound` "absolute" it is the cap itself.
        dual_clip: c > 1 (verl 3; TRL's `delta` is the same cap); None: off. The clip surrogate only.
        log_ratio_clamp: clamp of the log-ratio before exp, in nats: c for [-c, c], or (lowest, highest)
            (verl 20; for its gspo (-inf, 10)); None: off.
        cispo_bound: "one_plus" as the paper and verl, "absolute" as TRL. With "absolute" and no
            `clip_high`, the cap is 1 + the objective's clip_high.

    Returns:
        `values` (units of the advantages; of cispo, advantage x nats), `ratio` (dimensionless) and `clipped`
        (bool: the bound is active, so the token gives no gradient, or for cispo a reduced one).

    Raises:
        ValueError: shapes do not fit, the mask is not bool, or a hyperparameter is out of range or does not
            apply to the objective's surrogate.

    Source: GRPO arXiv:2402.03300 eq. 3; Dr.GRPO arXiv:2503.20783; DAPO arXiv:2503.14476 eq. 8; GSPO
    arXiv:2507.18071 eq. 5 and 13; CISPO arXiv:2506.13585 eq. 4 and 5; dual clip arXiv:1912.09729.
    trl/trainer/grpo_trainer.py `_compute_loss`; verl/trainer/ppo/core_algos.py `compute_policy_loss_*`.

    >>> zeros, mask = torch.zeros(1, 2), torch.tensor([[True, False]])
    >>> loss = policy_loss(
    ...     GRPO, logprobs=zeros + 0.5, old_logprobs=zeros, advantages=torch.tensor([2.0]), mask=mask
    ... )
    >>> loss.values, loss.clipped  # the ratio exp(0.5) = 1.65 is clipped to 1.2
    (tensor([[-2.4000,  0.0000]]), tensor([[ True, False]]))
    """
    _check_options(objective, clip_low, clip_high, dual_clip, log_ratio_clamp, cispo_bound)
    advantages = _per_token(advantages, logprobs)
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    logprobs = safe(logprobs, mask)
    old_logprobs = safe(old_logprobs.detach(), mask)
    advantages = safe(advantages.detach(), mask)

    log_ratio = logprobs - old_logprobs
    if objective.ratio_level == "sequence":
        mean = log_ratio.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = logprobs - logprobs.detach() + mean
    ratio = torch.exp(_clamp(log_ratio, log_ratio_clamp))

    low, high = _bounds(objective, clip_low, clip_high, cispo_bound)
    bounded = ratio.clamp(low, high)
    if objective.surrogate == "cispo":
        values = -bounded.detach() * advantages * logprobs
        clipped = (ratio < low) | (ratio > high)
    else:
        plain, held = -ratio * advantages, -bounded * advantages
        values, clipped = torch.maximum(plain, held), held > plain
        if dual_clip is not None:
            cap = -dual_clip * advantages
            over = (advantages < 0) & (values > cap)
            values, clipped = torch.where(over, cap, values), clipped | over
    return PolicyLoss(masked(values, mask), masked(ratio.detach(), mask), clipped.detach() & mask)


def reference_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per-token k3 estimate of KL(pi || ref), to be minimised; masked, not reduced.

    exp(d) - d - 1 with d = ref_logprobs - logprobs; never negative. (k1 = -d is not offered as a loss: the
    expected gradient of log pi under pi is zero. It belongs in the reward.)

    Args:
        logprobs: (B, T), nats, receives gradient.
        ref_logprobs: (B, T), nats, detached inside.
        mask: (B, T) bool.

    Returns:
        (B, T), nats.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.

    Source: Schulman, "Approximating KL divergence" (2020); GRPO arXiv:2402.03300 eq. 4;
    trl/trainer/grpo_trainer.py `_compute_loss`.

    >>> zero = torch.zeros(1, 1)
    >>> reference_kl(zero, zero - math.log(2.0), torch.tensor([[True]]))  # 1/2 + log 2 - 1
    tensor([[0.1931]])
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    difference = safe(ref_logprobs.detach(), mask) - safe(logprobs, mask)
    return masked(torch.expm1(difference) - difference, mask)


def _bounds(
    objective: Objective, clip_low: float | None, clip_high: float | None, cispo_bound: str
) -> tuple[float, float]:
    low = objective.clip_low if clip_low is None else clip_low
    high = objective.clip_high if clip_high is None else clip_high
    if objective.surrogate == "cispo" and cispo_bound == "absolute":
        return 0.0, (1 + high if clip_high is None else high)
    return 1 - low, 1 + high


def _clamp(log_ratio: torch.Tensor, clamp: float | tuple[float, float] | None) -> torch.Tensor:
    if clamp is None:
        return log_ratio
    low, high = (-clamp, clamp) if isinstance(clamp, int | float) else clamp
    return log_ratio.clamp(low, high)


def _per_token(advantages: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    if logprobs.dim() != 2:
        raise ValueError(f"Expected logprobs of shape (sequences, tokens), found {tuple(logprobs.shape)}.")
    rows, _ = logprobs.shape
    if advantages.shape not in ((rows,), logprobs.shape):
        raise ValueError(
            f"Expected advantages of shape ({rows},) or {tuple(logprobs.shape)}, found {tuple(advantages.shape)}."
        )
    advantages = full_precision(advantages)
    return advantages[:, None].expand_as(logprobs) if advantages.dim() == 1 else advantages


def _check_options(objective, clip_low, clip_high, dual_clip, log_ratio_clamp, cispo_bound) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if value is not None and not value >= 0:
            raise ValueError(f"Expected {name} >= 0, found {value}.")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"Expected dual_clip > 1 (verl uses 3), found {dual_clip}.")
    if dual_clip is not None and objective.surrogate != "clip":
        raise ValueError(f"dual_clip belongs to the clip surrogate; {objective.name!r} has {objective.surrogate!r}.")
    if isinstance(log_ratio_clamp, int | float) and not 0 < log_ratio_clamp < math.inf:
        raise ValueError(f"Expected log_ratio_clamp > 0 in nats, found {log_ratio_clamp}.")
    if cispo_bound not in ("one_plus", "absolute"):
        raise ValueError(f"Expected cispo_bound 'one_plus' or 'absolute', found {cispo_bound!r}.")
