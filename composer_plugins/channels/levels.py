"""How much of the model's distribution a host lets a channel see."""

from __future__ import annotations

from enum import StrEnum


class SignalLevel(StrEnum):
    """`sampled`: log-probs of sampled tokens. `topk`: those of k ids. `full`: logits or hidden states."""

    SAMPLED = "sampled"
    TOPK = "topk"
    FULL = "full"
