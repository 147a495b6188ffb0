"""What a channel is: a weighted sum of per-element values over an explicit denominator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from composer_plugins.channels.levels import SignalLevel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenBatch:
    """What a plugin's channel sees of a micro-batch, every tensor of shape (B, T).

    Args:
        logprobs: nats, of the policy being trained at the rollout temperature; the only one that carries gradient.
        old_logprobs: nats, of the policy that sampled. advantages: of the policy objective.
        mask: bool, True on tokens that the model sampled. What lies elsewhere is arbitrary.
        token_ids: the sampled ids.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    token_ids: torch.Tensor


class TokenChannel(Protocol):
    """A channel that a plugin adds, built once per run."""

    def values(self, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Return the unreduced loss (B, T) with gradient, and detached metrics, named without the channel's name."""


@dataclass(frozen=True)
class ChannelSpec:
    """A channel as registered: its config key, and the signal levels it can work at (best first).

    Args:
        activity: metric that is above zero in a step to which the channel contributed.
        reduction: a name of `composer_plugins.losses.reduction.Reduction`; plugins' channels only.
        build: `(**options)` of `composer.channels.<name>.options` to a `TokenChannel`; plugins' channels only.
    """

    name: str
    levels: tuple[SignalLevel, ...]
    activity: str
    reduction: str | None = None
    build: Callable[..., TokenChannel] | None = None


@dataclass(frozen=True)
class Term:
    """One channel's share of one micro-batch's loss.

    Args:
        values: unreduced, masked elements, any shape; carries the gradient.
        denominator: what the sum of `values` over **all** micro-batches and ranks of the optimizer step
            is divided by (tokens, sequences, pairs or a constant), so that splitting changes nothing.
        weight: the channel's weight in the total loss.
        metrics: detached scalars of this micro-batch, already named `<channel>/<metric>`.
    """

    name: str
    values: torch.Tensor
    denominator: torch.Tensor | float
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def loss(self) -> torch.Tensor:
        """Return the weighted scalar; a differentiable zero when `values` is empty."""
        return self.weight * (self.values.sum() / self.denominator)
