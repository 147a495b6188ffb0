"""Reference log-probabilities of pairs on verl: the frozen initial weights score both actions, at temperature 1."""

from __future__ import annotations

from typing import Any

import torch

from composer_plugins.channels.pair_stream import PairStream
from composer_verl.pair_fields import stacked, text_fields
from composer_verl.pair_layout import FILLER_TOKENS

#: Rows that one call scores at most: what the driver holds at once.
ROWS_PER_CALL = 512


def score(trainer, stream: PairStream, pairs: list[int], eos: int) -> dict[int, tuple[list[float], list[float]]]:
    """Return, per pair, the log-probs of the chosen and the rejected action's tokens, nats.

    verl's reference policy scores them when the run has one, else the actor as it is: call this before the first
    update then.

    Args:
        trainer: verl's trainer.
        stream: whose pairs are meant.
        pairs: indices into `stream.pairs`.
        eos: token id for rows that only fill a batch up.
    """
    order = sorted(pairs, key=lambda i: stream.pairs[i].tokens)
    ranks, micro, limit = _shape(trainer)
    block = max(ranks * micro, ROWS_PER_CALL // (ranks * micro) * ranks * micro)
    computed = {}
    for first in range(0, len(order), block // 2 or 1):
        part = order[first : first + (block // 2 or 1)]
        rows = [(stream.pairs[i].context, action) for i in part for action in _actions(stream, i)]
        rows += [([eos], [eos])] * (-len(rows) % (ranks * micro))
        values = _log_probs(trainer, rows, limit)
        for k, index in enumerate(part):
            computed[index] = (values[2 * k], values[2 * k + 1])
    return computed


def _actions(stream: PairStream, index: int) -> tuple[list[int], list[int]]:
    return stream.pairs[index].chosen, stream.pairs[index].rejected


def _shape(trainer) -> tuple[int, int, int | None]:
    """Data-parallel ranks, rows per micro-batch, and (dynamic batch size) tokens per micro-batch of the forward."""
    config = trainer.config.actor_rollout_ref
    group = trainer.ref_policy_wg if trainer.use_reference_policy else trainer.actor_rollout_wg
    separate = trainer.use_reference_policy and not trainer.ref_in_actor
    mesh, options = ("ref", config.ref) if separate else ("actor", config.rollout)
    if mesh not in group._dispatch_info:
        group._dispatch_info[mesh] = group._query_dispatch_info(mesh)
    ranks = max(group._dispatch_info[mesh]) + 1
    if options.log_prob_use_dynamic_bsz:
        return ranks, 1, int(options.log_prob_max_token_len_per_gpu)
    return ranks, int(options.log_prob_micro_batch_size_per_gpu), None


def _log_probs(trainer, rows: list[tuple[list[int], list[int]]], limit: int | None) -> list[list[float]]:
    """The action's log-probs of each row, from verl's own log-prob forward."""
    from verl.utils import tensordict_utils as tu

    data = stacked([text_fields(context, action) for context, action in rows])
    options: dict[str, Any] = dict(temperature=1.0, calculate_entropy=False, compute_loss=False)
    if limit is not None:
        longest = max(len(context) + len(action) for context, action in rows)
        options["max_token_len_per_gpu"] = max(limit, longest + FILLER_TOKENS)
    if trainer.use_reference_policy and trainer.ref_in_actor:
        options["no_lora_adapter"] = True
    tu.assign_non_tensor(data, **options)
    if trainer.use_reference_policy and not trainer.ref_in_actor:
        output = trainer.ref_policy_wg.compute_ref_log_prob(data)
    else:
        output = trainer.actor_rollout_wg.compute_log_prob(data)
    values = output["log_probs"]
    ends = values.offsets().tolist()[1:]
    flat = values.values().to(torch.float32).cpu()
    return [flat[end - len(action) - 1 : end - 1].tolist() for end, (_, action) in zip(ends, rows, strict=True)]
