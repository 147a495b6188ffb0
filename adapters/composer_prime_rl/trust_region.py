"""prime-rl's own two policy losses as objectives of ours, `dppo` (its default since 0.6) and `ipo`.

Written from the paper and compared with prime-rl's functions in the tests; `objective: host` calls those instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from composer_plugins.losses.masking import check_same_shape, masked, safe
from composer_plugins.losses.policy import PolicyLoss


@dataclass(frozen=True)
class TrustRegion:
    """A policy gradient -r A that drops tokens outside a region of |pi - pi_old|, plus kl_tau log(r)^2 on every token.

    Args:
        name: how a config file names it.
        low, high: largest fall and rise of the token's probability (dimensionless).
        signed: a rise drops the token only where A > 0, and a fall only where A <= 0 (DPPO); False: either, always (IPO).
        kl_tau: weight of the squared log-ratio.
    """

    name: Literal["dppo", "ipo"]
    low: float
    high: float
    signed: bool
    kl_tau: float = 1e-3


#: prime-rl's `DefaultLossConfig` and `IPOLossConfig` as they come.
TRUST_REGIONS = {
    "dppo": TrustRegion("dppo", low=0.2, high=0.2, signed=True),
    "ipo": TrustRegion("ipo", low=0.1, high=0.1, signed=False),
}


def trust_region_loss(
    region: TrustRegion,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> PolicyLoss:
    """Per-token loss, to be minimised; masked, not reduced.

    Args:
        region: an entry of `TRUST_REGIONS`.
        logprobs: any shape, nats, receives gradient.
        old_logprobs, advantages, mask: of the same shape; mask bool, True = counts.

    Returns:
        `values`, `ratio` and `clipped` (bool: dropped by the region), each of that shape.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.

    Source: DPPO arXiv:2602.04879 (binary total variation); the squared log-ratio: Kimi K2.5 arXiv:2602.02276;
    src/prime_rl/trainer/rl/loss.py `default_loss_fn`, `ipo_loss_fn` (0.6 and later).
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    logprobs = safe(logprobs, mask)
    old_logprobs, advantages = safe(old_logprobs.detach(), mask), safe(advantages.detach(), mask)
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    moved = (logprobs.exp() - old_logprobs.exp()).detach()
    risen, fallen = moved > region.high, moved < -region.low
    dropped = torch.where(advantages > 0, risen, fallen) if region.signed else risen | fallen
    values = torch.where(dropped, 0.0, -ratio * advantages) + region.kl_tau * log_ratio.square()
    return PolicyLoss(masked(values, mask), masked(ratio.detach(), mask), dropped & mask)
