"""Channel 3 (our addition) on a host that sees one token at a time: DPO's gradient as signed weights of log-probs.

With s = beta (sigmoid(-Delta) - e), minus the sum of A log pi over the tokens of both actions has exactly the gradient of
the DPO loss when A = +s on chosen and -s on rejected tokens and Delta belongs to the weights that are trained
(composer_plugins/losses/dpo.py `advantage_form`). prime-rl's ce component computes just that sum: no ratio, no clip, no KL.
"""

from __future__ import annotations

from dataclasses import dataclass

from composer_plugins.config import ReplayDPOConfig


@dataclass(frozen=True)
class PairWeights:
    """Weight of every token of the two actions, before the channel's weight; and what to log.

    Args:
        chosen, rejected: the advantage A of each token, dimensionless.
        margin: Delta.
        chosen_shift, rejected_shift: movement of an action's log-prob against the reference, nats (per token when
            length-normalised).
    """

    chosen: float
    rejected: float
    margin: float
    chosen_shift: float
    rejected_shift: float


def pair_weights(
    config: ReplayDPOConfig,
    chosen_logprobs: list[float],
    rejected_logprobs: list[float],
    ref_chosen_logprobs: list[float],
    ref_rejected_logprobs: list[float],
) -> PairWeights:
    """Return the token weights of one pair.

    Args:
        config: the `replay_dpo` section: beta, label_smoothing, length_normalized, nll_weight.
        chosen_logprobs, rejected_logprobs: of the action's tokens under the policy being trained, nats, temperature 1.
        ref_chosen_logprobs, ref_rejected_logprobs: the same tokens under the reference.

    Raises:
        ValueError: an action has no tokens, or the lengths differ.

    Source: DPO arXiv:2305.18290 eq. 7 and section 4.

    >>> w = pair_weights(ReplayDPOConfig(beta=0.1), [-1.0], [-1.0], [-1.0], [-1.0])
    >>> (w.chosen, w.rejected)
    (0.05, -0.05)
    """
    import torch

    from composer_plugins.losses.dpo import advantage_form, dpo_margin

    if not chosen_logprobs or not rejected_logprobs:
        raise ValueError("Expected at least one token in each action of a pair.")
    rows = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
    }
    tensors = {name: torch.tensor([row], dtype=torch.float64) for name, row in rows.items()}
    margin, chosen, rejected = dpo_margin(
        **tensors,
        chosen_mask=torch.ones_like(tensors["chosen_logprobs"], dtype=torch.bool),
        rejected_mask=torch.ones_like(tensors["rejected_logprobs"], dtype=torch.bool),
        beta=config.beta,
        length_normalized=config.length_normalized,
    )
    s = advantage_form(margin, beta=config.beta, label_smoothing=config.label_smoothing).item()
    lengths = (len(chosen_logprobs), len(rejected_logprobs))
    per_token = lengths if config.length_normalized else (1, 1)
    up = s / per_token[0] + config.nll_weight / lengths[0]
    return PairWeights(up, -s / per_token[1], margin.item(), chosen.item(), rejected.item())
