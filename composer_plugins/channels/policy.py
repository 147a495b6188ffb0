"""Channel 1: the policy-gradient term (replicates Cursor's published recipe as far as it is public)."""

from __future__ import annotations

import torch

from composer_plugins.channels.base import ChannelSpec, Term
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.config import PolicyConfig
from composer_plugins.errors import ConfigError
from composer_plugins.losses.masking import check_mask, check_same_shape, masked, safe
from composer_plugins.losses.policy import Objective, policy_loss, reference_kl
from composer_plugins.losses.reduction import scale_elements

SPEC = ChannelSpec(
    name="policy",
    levels=(SignalLevel.FULL, SignalLevel.TOPK, SignalLevel.SAMPLED),
    activity="policy/active_tokens",
)


def resolve_objective(name: str) -> Objective:
    """Return the objective registered as `name`, a built-in's or a plugin's.

    Raises:
        ConfigError: unknown name (the message lists what there is), the name is "host" (the framework's own
            loss is no entry of the menu), or a plugin registered something that is no `Objective`.
    """
    from composer_plugins.plugins import get_plugin_manager

    if name == "host":
        raise ConfigError("objective: host keeps the framework's own loss; there is no core objective to resolve.")
    objective = get_plugin_manager().objectives.get(name).load()
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"The objective {name!r} must be a composer_plugins.losses.policy.Objective, "
            f"found {type(objective).__name__}: fix the plugin that registered it."
        )
    return objective


def policy_term(
    config: PolicyConfig,
    objective: Objective,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    importance_weights: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
) -> Term:
    """Build the policy term of one micro-batch.

    values = scale_elements(w * policy_loss + kl.coef * k3), the KL part with `kl.placement: loss` only. As
    in TRL the engine correction w multiplies the policy loss and not the KL.

    Args:
        config: the `policy` section. Its weight becomes the term's weight.
        objective: from `resolve_objective(config.objective)`.
        logprobs: (B, T), nats, at the rollout temperature; receives gradient.
        old_logprobs: (B, T), nats, the ratio's denominator (`logprobs.detach()` when on-policy).
        advantages: (B,) or (B, T).
        mask: (B, T) bool, tokens that the policy sampled.
        denominator: sum of `count_units` over all micro-batches and ranks of the optimizer step.
        importance_weights: (B, T) or (B, 1), the host's correction for sampling_logprobs that differ from
            its trainer's; detached inside. None: no correction.
        ref_logprobs: (B, T), nats, of the KL anchor; needed when a KL is part of the loss.

    Returns:
        `Term` with (B, T) values. Metrics: `policy/active_tokens` (tokens with non-zero advantage),
        `policy/tokens`, `policy/clip_fraction`, `policy/ratio`, and with a KL in the loss `policy/kl` (nats
        per token); means are 0 when the mask is empty.

    Raises:
        ValueError: shapes do not fit, or ref_logprobs is missing.
    """
    loss = policy_loss(
        objective,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        log_ratio_clamp=config.log_ratio_clamp,
        cispo_bound=config.cispo_bound,
    )
    values = loss.values
    if importance_weights is not None:
        values = values * _per_token_weights(importance_weights, mask)
    tokens = mask.sum().clamp(min=1)
    spread = advantages[:, None] if advantages.dim() == 1 else advantages
    metrics = {
        "policy/active_tokens": float(((spread != 0) & mask).sum()),
        "policy/tokens": float(mask.sum()),
        "policy/clip_fraction": float(loss.clipped.sum() / tokens),
        "policy/ratio": float(loss.ratio.sum() / tokens),
    }
    if config.kl.coef > 0 and config.kl.placement == "loss":
        if ref_logprobs is None:
            raise ValueError("kl.placement: loss needs ref_logprobs (B, T), found None: run the reference forward.")
        kl = reference_kl(logprobs, ref_logprobs, mask)
        values = values + config.kl.coef * kl
        metrics["policy/kl"] = float(kl.detach().sum() / tokens)
    return Term("policy", scale_elements(values, mask, objective.reduction), denominator, config.weight, metrics)


def reference_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the k1 estimate of each sequence's KL to the reference, to be subtracted from its reward.

    sum over the sequence's tokens of logprobs - ref_logprobs; multiply by `kl.coef`. (Composer 2 reports k1;
    where it enters is not published.)

    Args:
        logprobs: (B, T), nats, of the policy that sampled. ref_logprobs: (B, T). mask: (B, T) bool.

    Returns:
        (B,), nats, detached; may be negative.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.

    Source: Composer 2 report arXiv:2603.24477; Schulman, "Approximating KL divergence" (2020).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return masked(safe(logprobs.detach(), mask) - safe(ref_logprobs.detach(), mask), mask).sum(-1)


def _per_token_weights(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if weights.shape not in (mask.shape, (mask.size(0), 1)):
        raise ValueError(
            f"Expected importance_weights of shape {tuple(mask.shape)} or ({mask.size(0)}, 1), "
            f"found {tuple(weights.shape)}."
        )
    check_mask(mask, mask.shape)
    return safe(weights.detach().expand(mask.shape), mask, 1.0)
