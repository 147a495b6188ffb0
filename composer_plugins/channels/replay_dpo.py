"""Channel 3: DPO on pairs from trace replay. Our own addition: no part of Cursor's published recipe."""

from __future__ import annotations

import torch

from composer_plugins.channels.base import ChannelSpec, Term
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.config import ReplayDPOConfig
from composer_plugins.losses.dpo import advantage_form_loss, dpo_loss, whole_pairs
from composer_plugins.losses.masking import safe

SPEC = ChannelSpec(
    name="replay_dpo",
    levels=(SignalLevel.SAMPLED, SignalLevel.TOPK, SignalLevel.FULL),
    activity="replay_dpo/pairs",
)


def replay_dpo_term(
    config: ReplayDPOConfig,
    *,
    chosen_logprobs: torch.Tensor,
    chosen_mask: torch.Tensor,
    ref_chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    rejected_mask: torch.Tensor,
    ref_rejected_logprobs: torch.Tensor,
    denominator: torch.Tensor | float,
    pair_weights: torch.Tensor | None = None,
) -> Term:
    """Build the replay_dpo term of one micro-batch.

    `config.form` "direct" gives one value per pair, "advantage" one per token (chosen tokens, then rejected
    ones, flat): another value, the same gradient under `Term.loss`, which divides the plain sum by one
    constant. No clip, engine correction or KL ever touches pair tokens.

    Args:
        config: the `replay_dpo` section. Its weight becomes the term's weight.
        chosen_logprobs: (P, Tc), nats, at temperature 1; receives gradient.
        chosen_mask: (P, Tc) bool, the action's tokens only.
        ref_chosen_logprobs: (P, Tc), nats, of the reference; detached inside.
        rejected_logprobs, rejected_mask, ref_rejected_logprobs: (P, Tr), likewise.
        denominator: pairs of the whole optimizer step, over all micro-batches and ranks.
        pair_weights: (P,), dimensionless; None: 1 each.

    Returns:
        `Term`. Metrics: `replay_dpo/pairs` (with at least one token on each side), and over those the means
        `replay_dpo/accuracy` (margin > 0), `replay_dpo/margin`, `replay_dpo/chosen_shift` and
        `replay_dpo/rejected_shift` (movement of the action's log-probability against the reference, nats, per
        token when length-normalised); 0 without pairs.

    Raises:
        ValueError: shapes do not fit, or a mask is not bool.
    """
    loss = (dpo_loss if config.form == "direct" else advantage_form_loss)(
        chosen_logprobs=chosen_logprobs,
        chosen_mask=chosen_mask,
        ref_chosen_logprobs=ref_chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        rejected_mask=rejected_mask,
        ref_rejected_logprobs=ref_rejected_logprobs,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
        nll_weight=config.nll_weight,
    )
    whole = whole_pairs(chosen_mask, rejected_mask)
    weights = _weights(pair_weights, whole)
    if config.form == "direct":
        values = loss.values * weights
    else:
        sides = (loss.chosen_values, loss.rejected_values)
        values = torch.cat([(side * weights[:, None]).flatten() for side in sides])
    count = whole.sum().clamp(min=1)
    means = {
        "accuracy": (loss.margin.detach() > 0) & whole,
        "margin": loss.margin.detach(),
        "chosen_shift": loss.chosen_shift * whole,
        "rejected_shift": loss.rejected_shift * whole,
    }
    metrics = {f"replay_dpo/{name}": float(value.sum() / count) for name, value in means.items()}
    metrics["replay_dpo/pairs"] = float(whole.sum())
    return Term("replay_dpo", values, denominator, config.weight, metrics)


def _weights(pair_weights: torch.Tensor | None, whole: torch.Tensor) -> torch.Tensor:
    if pair_weights is None:
        return whole.float()
    if pair_weights.shape != whole.shape:
        raise ValueError(f"Expected pair_weights of shape {tuple(whole.shape)}, found {tuple(pair_weights.shape)}.")
    return safe(pair_weights.detach(), whole)
