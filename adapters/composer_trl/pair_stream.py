"""Preference pairs for channel 3 (our addition) on TRL: padded batches of a core `PairStream` and their log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from composer_plugins.channels.pair_stream import PairStream
from composer_plugins.config import ReplayDPOConfig
from composer_trl.model_access import ModelAccess, eval_mode


@dataclass
class PairBatch:
    """Padded pairs: rows 0..P-1 chosen, P..2P-1 rejected; `action_mask` (2P, L) marks the predicted action tokens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor
    weights: torch.Tensor
    indices: list[int]


class PaddedPairs(PairStream):
    """A `PairStream` that pads pairs into batches and scores them with the trainer's model. Args: as `PairStream`."""

    def __init__(self, config: ReplayDPOConfig, tokenizer, **options: Any) -> None:
        self.pad_id = tokenizer.pad_token_id
        super().__init__(config, tokenizer, **options)

    def batch(self, indices: list[int], device: torch.device) -> PairBatch:
        """Pad the pairs `indices` into one batch, on the right."""
        rows = [(self.pairs[i].context, self.pairs[i].chosen) for i in indices]
        rows += [(self.pairs[i].context, self.pairs[i].rejected) for i in indices]
        width = max(len(c) + len(a) for c, a in rows)
        input_ids = torch.full((len(rows), width), self.pad_id)
        attention_mask, action_mask = (
            torch.zeros((len(rows), width), dtype=torch.long),
            torch.zeros(len(rows), width),
        )
        for row, (context, action) in enumerate(rows):
            end = len(context) + len(action)
            input_ids[row, :end] = torch.tensor(context + action)
            attention_mask[row, :end] = 1
            action_mask[row, len(context) : end] = 1
        weights = torch.tensor([self.pairs[i].weight for i in indices])
        return PairBatch(
            input_ids.to(device),
            attention_mask.to(device),
            action_mask.bool().to(device),
            weights.to(device),
            indices,
        )

    def logprobs(self, access: ModelAccess, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the action tokens' log-probabilities (2P, L) at temperature 1, zero elsewhere, and their mask."""
        hidden = access.hidden(batch.input_ids, batch.attention_mask)
        mask = batch.action_mask[:, 1:]
        flat = access.token_logprobs(hidden[:, :-1][mask], batch.input_ids[:, 1:][mask])
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask

    @torch.no_grad()
    def compute_reference(self, access: ModelAccess, indices: list[int], device, progress=iter) -> dict[int, Any]:
        """Return the log-probabilities of both actions of `indices` under the model's present weights."""
        computed = {}
        with eval_mode(access.model):
            for index in progress(indices):
                values, mask = self.logprobs(access, self.batch([index], device))
                computed[index] = tuple(values[row][mask[row]].tolist() for row in (0, 1))
        return computed

    def reference_logprobs(self, batch: PairBatch, mask: torch.Tensor) -> torch.Tensor:
        """Lay the stored reference log-probabilities out like `mask` (2P, L)."""
        sides = [self.reference[i][side] for side in (0, 1) for i in batch.indices]
        flat = torch.tensor([x for side in sides for x in side], device=mask.device)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)
