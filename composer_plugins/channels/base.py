"""What a channel is: a weighted sum of per-element values over an explicit denominator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from composer_plugins.channels.levels import SignalLevel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ChannelSpec:
    """A channel as registered: its config key, and the signal levels it can work at (best first)."""

    name: str
    levels: tuple[SignalLevel, ...]
    #: Metric that is above zero in a step to which the channel contributed.
    activity: str


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
