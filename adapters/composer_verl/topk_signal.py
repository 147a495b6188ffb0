"""Level `topk` on verl: what our loss function does when the engine shows it the logits.

With `distillation_use_topk` verl's engine calls the loss function a first time with `student_logits` (1, tokens, V),
divided by the temperature, and keeps what it returns, one value per token and name. On a batch to score that gives the
k most likely entries of each span token, or the log-probabilities of given ones; in the update it gives the divergence
of each hinted token, with its gradient. The logits of other tokens are not touched.
"""

from __future__ import annotations

import torch

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.sdpo import sdpo_values
from composer_plugins.config import SDPOConfig
from composer_verl.fields import (
    SDPO_DIVERGENCE,
    SDPO_MASK,
    SDPO_TOPK_IDS,
    SDPO_TOPK_TEACHER,
    SDPO_VALUES,
    TOPK,
    TOPK_ASKED,
    TOPK_ID,
    TOPK_VALUE,
)


def on_logits(config: SDPOConfig, student_logits: torch.Tensor, data) -> dict[str, torch.Tensor]:
    """Return what the engine keeps of the logits of one micro-batch: (1, tokens) for each name.

    Args:
        config: the `sdpo` section.
        student_logits: (1, tokens of prompts and responses, V), at the rollout temperature.
        data: the micro-batch.
    """
    if is_scoring(data):
        return entries(student_logits[0], data)
    return divergences(config, student_logits[0], data)


def is_scoring(data) -> bool:
    """True for a batch whose entries are asked for, False for one to train on."""
    return TOPK in data.keys()  # noqa: SIM118  a TensorDict has no `in`


def predictors(data) -> torch.Tensor:
    """Return the positions (response tokens,) of the logits that predict each response token of a micro-batch."""
    prompts, responses = data["prompts"].offsets().diff(), data["responses"].offsets()
    lengths = responses.diff()
    first = (prompts + lengths).cumsum(0) - lengths - 1
    return torch.repeat_interleave(first - responses[:-1], lengths) + torch.arange(
        int(responses[-1]), device=lengths.device
    )


@torch.no_grad()
def entries(logits: torch.Tensor, data) -> dict[str, torch.Tensor]:
    """Return the k most likely entries (`TOPK_ID`) and log-probs (`TOPK_VALUE`) per response token, or those asked for."""
    from verl.utils import tensordict_utils as tu

    where = predictors(data)
    log_probs = torch.log_softmax(logits[where].float(), dim=-1)
    if TOPK_ASKED in data.keys():  # noqa: SIM118
        ids = data[TOPK_ASKED].values().long()
        values = log_probs.gather(-1, ids)
    else:
        values, ids = log_probs.topk(min(int(tu.get(data, TOPK)), log_probs.size(-1)), dim=-1)
    found = {}
    for number in range(ids.size(-1)):
        for name, column in ((TOPK_ID, ids), (TOPK_VALUE, values)):
            row = column.new_zeros(len(logits))
            row[where] = column[:, number]
            found[name.format(number)] = row[None]
    return found


def divergences(config: SDPOConfig, logits: torch.Tensor, data) -> dict[str, torch.Tensor]:
    """Return the loss value (with gradient) and the divergence of every hinted token, zero elsewhere."""
    mask = data[SDPO_MASK].values().bool()
    where = predictors(data)[mask]
    # a copy of these rows: verl computes its log-probs' gradient in place of the logits
    log_probs = torch.log_softmax(logits[where].float(), dim=-1)
    values, divergence = sdpo_values(
        config,
        SignalLevel.TOPK,
        student_topk_logprobs=log_probs.gather(-1, data[SDPO_TOPK_IDS].values()[mask].long()),
        teacher_topk_logprobs=data[SDPO_TOPK_TEACHER].values()[mask],
    )
    empty = values.new_zeros(len(logits))
    return {
        SDPO_VALUES: empty.index_put((where,), values)[None],
        SDPO_DIVERGENCE: empty.index_put((where,), divergence)[None],
    }
