"""Preference pairs for channel 3 (our addition): tokenised, ordered, with real reference log-probabilities.

The order is a seeded permutation and the position follows from the optimizer step alone, so a resumed
run, or one with other ranks and accumulation, draws the same pairs at the same step.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.traces.schema import Message, Pair
from composer_plugins.traces.store import file_sha256, read_stage
from composer_trl.model_access import ModelAccess, eval_mode

REFERENCE_FILE = "composer_pair_reference.json"


@dataclass
class TokenizedPair:
    """One pair as ids; only the two actions carry loss."""

    id: str
    context: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float = 1.0


@dataclass
class PairBatch:
    """Padded pairs: rows 0..P-1 chosen, P..2P-1 rejected; `action_mask` (2P, L) marks the predicted action tokens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor
    weights: torch.Tensor
    indices: list[int]


class PairStream:
    """Reads, filters and deals out the pairs of a run.

    Args:
        config: the `replay_dpo` section.
        tokenizer: with the chat template that the policy is prompted with.
        seed: of the order.
        chat_template, template_kwargs: as the trainer renders prompts.

    Raises:
        TraceError: no usable pair; the message counts the reasons.
    """

    def __init__(
        self,
        config: ReplayDPOConfig,
        tokenizer,
        *,
        seed: int,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> None:
        self.config, self.skipped = config, Counter()
        self.sha256 = file_sha256(config.pairs)
        self.pad_id = tokenizer.pad_token_id
        self.pairs: list[TokenizedPair] = []
        for pair in read_stage(Path(config.pairs), Pair):
            tokenized = self._tokenize(pair, tokenizer, chat_template, template_kwargs)
            if tokenized is not None:
                self.pairs.append(tokenized)
        if not self.pairs:
            raise TraceError(
                f"replay_dpo.weight is above 0 but no pair of {config.pairs} can be trained on "
                f"(left out: {dict(self.skipped) or 'the file is empty'}). Raise max_length / max_similarity, or make pairs."
            )
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(self.pairs), generator=generator).tolist()
        self.reference: dict[int, tuple[list[float], list[float]]] = {}

    def _tokenize(self, pair: Pair, tokenizer, chat_template, kwargs) -> TokenizedPair | None:
        if pair.similarity > self.config.max_similarity:
            self.skipped["too similar"] += 1
            return None
        messages = [m.to_chat() for m in pair.messages]
        # `or None`: some templates print tool boilerplate for an empty list
        render = dict(tools=pair.tool_schemas() or None, tokenize=True, return_dict=False, **kwargs)
        context = list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, chat_template=chat_template, **render)
        )
        actions = []
        for action in (pair.chosen, pair.rejected):
            ids = _action_ids(action, messages, context, tokenizer, chat_template, render)
            if ids is None:
                self.skipped["chat template rewrites the context after an action"] += 1
                return None
            if len(context) + len(ids) > self.config.max_length:
                self.skipped["longer than max_length"] += 1
                return None
            actions.append(ids)
        if actions[0] == actions[1]:
            self.skipped["same tokens on both sides"] += 1
            return None
        return TokenizedPair(pair.id, context, actions[0], actions[1], pair.weight)

    def indices(self, step: int, *, slot: int, slots: int) -> list[int]:
        """Return the pair indices of one micro-batch: slot `slot` of `slots` (ranks x accumulation) of `step`."""
        first = step * self.config.pairs_per_step
        return [self.order[(first + j) % len(self.order)] for j in range(slot, self.config.pairs_per_step, slots)]

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

    def save(self, folder: Path) -> None:
        """Write the reference log-probabilities into a checkpoint folder."""
        payload = {
            "pairs_sha256": self.sha256,
            "reference": {str(k): v for k, v in sorted(self.reference.items())},
        }
        temporary = folder / (REFERENCE_FILE + ".part")
        temporary.write_text(json.dumps(payload))
        temporary.replace(folder / REFERENCE_FILE)

    def load(self, folder: Path) -> None:
        """Restore the reference log-probabilities of the run's initial weights. Raises `ConfigError`."""
        path = folder / REFERENCE_FILE
        if not path.exists():
            raise ConfigError(
                f"{folder} has no {REFERENCE_FILE}: the reference log-probabilities of the initial weights are lost, "
                "and those of the resumed weights would be wrong. Resume with the recipe that made the checkpoint."
            )
        payload = json.loads(path.read_text())
        if payload["pairs_sha256"] != self.sha256:
            raise ConfigError(
                f"{self.config.pairs} is not the pairs file that {folder} was trained on (SHA-256 differs)."
            )
        self.reference = {int(k): (v[0], v[1]) for k, v in payload["reference"].items()}


def _action_ids(action: Message, messages, context: list[int], tokenizer, chat_template, render) -> list[int] | None:
    """Ids of an action as the policy would sample them: after the generation prompt, up to the end-of-turn token."""
    full = list(tokenizer.apply_chat_template([*messages, action.to_chat()], chat_template=chat_template, **render))
    if full[: len(context)] != context:
        return None
    ids = full[len(context) :]
    if tokenizer.eos_token_id in ids:  # templates print a newline after the end of a turn; sampling stops before it
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    return ids
