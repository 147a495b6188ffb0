"""Channel 3 (our addition) inside verl's actor loss: DPO on the pair rows of a micro-batch.

Pair rows lie in the actor update beside the rollouts (`pair_rows`): a chosen row, then its rejected one. Their response
is the action, their response mask is zero, so that no count of the policy's sees them.
"""

from __future__ import annotations

from typing import Any

import torch

from composer_plugins.channels.replay_dpo import replay_dpo_term
from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ComposerError

#: Per row: 2p for the chosen and 2p + 1 for the rejected action of the p-th pair of the step, -1 for a rollout, -2 for
#: a filler row.
PAIR_ROW = "pair_row"
#: Per response token: log-probabilities of the reference at temperature 1; zero on rollouts.
PAIR_REFERENCE = "pair_ref_log_prob"
#: Per row: the pair's weight; zero on rollouts.
PAIR_WEIGHT = "pair_weight"
ROLLOUT, FILLER = -1, -2
MEANS = ("replay_dpo/accuracy", "replay_dpo/margin", "replay_dpo/chosen_shift", "replay_dpo/rejected_shift")


def rollout_rows(data) -> list[int] | None:
    """Return the rows of a micro-batch that are rollouts; None: all of them are (no pair rows were added).

    An empty list is possible: a micro-batch may hold pairs only. Pass the policy's metrics through `weigh_by_tokens`.
    """
    if PAIR_ROW not in data:
        return None
    found = (data[PAIR_ROW] == ROLLOUT).nonzero().flatten().tolist()
    return None if len(found) == len(data) else found


def weigh_by_tokens(metrics: dict[str, Any], rows, data) -> dict[str, Any]:
    """Turn verl's means over micro-batches into means over response tokens, which pair rows do not change.

    verl takes the plain mean over micro-batches and wants as many values from every rank, so a micro-batch of pairs
    only would count as one with the value 0. Tokens are those of `loss_mask`, which verl's own total counts; rollout
    correction takes rejected tokens out of `response_mask` alone.

    Args:
        metrics: of `ppo_loss` over `rows`.
        rows: the rollouts of the micro-batch, a TensorDict.
        data: the whole micro-batch, with verl's `batch_num_tokens` and `dp_size`.
    """
    from verl.utils.metric import AggregationType, Metric

    share = float(rows["loss_mask"].values().sum()) / max(data["batch_num_tokens"], 1) * data["dp_size"]
    weighed = {}
    for name, metric in metrics.items():
        if isinstance(metric, Metric) and metric.aggregation is AggregationType.MEAN:
            metric = Metric(AggregationType.SUM, metric.aggregate() * share)
        weighed[name] = metric
    return weighed


def pair_term(
    config: ReplayDPOConfig, log_probs: torch.Tensor, data, *, dp_size: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the weighted replay_dpo loss of one micro-batch and verl `Metric`s.

    Args:
        config: the `replay_dpo` section.
        log_probs: verl's `model_output["log_probs"]`, nested (rows, tokens of prompt and response), nats; gradient.
        data: the micro-batch that the engine hands to a loss.
        dp_size: data-parallel ranks; verl averages gradients over them, which this factor undoes.

    Returns:
        (scalar, metrics): every micro-batch gives the same metrics, zero when it holds no pair (verl wants the same
        number of values from every rank). The scalar is a differentiable zero then.

    Raises:
        ComposerError: a pair was torn apart.
    """
    from verl.utils.metric import AggregationType, Metric

    chosen, rejected = _pair_rows(data)
    logprobs, mask = _actions(log_probs, data, chosen + rejected)
    reference = _padded(data[PAIR_REFERENCE].unbind(), chosen + rejected, logprobs)
    count = len(chosen)
    term = replay_dpo_term(
        config,
        chosen_logprobs=logprobs[:count],
        chosen_mask=mask[:count],
        ref_chosen_logprobs=reference[:count],
        rejected_logprobs=logprobs[count:],
        rejected_mask=mask[count:],
        ref_rejected_logprobs=reference[count:],
        denominator=float(config.pairs_per_step),
        pair_weights=data[PAIR_WEIGHT][chosen].to(logprobs),
    )
    # verl adds the losses of micro-batches up and averages over ranks. The zero ties an empty term to the forward.
    loss = term.loss() * dp_size + log_probs.values().sum() * 0.0
    pairs = term.metrics["replay_dpo/pairs"]
    totals = {"replay_dpo/loss": float(loss.detach()) / config.weight, "replay_dpo/pairs": pairs * dp_size}
    for name in MEANS:
        totals[name] = term.metrics[name] * pairs / config.pairs_per_step * dp_size
    return loss, {name: Metric(AggregationType.SUM, value) for name, value in totals.items()}


def _pair_rows(data) -> tuple[list[int], list[int]]:
    """Rows of the chosen and of the rejected actions, the k-th of each a pair."""
    numbers = data[PAIR_ROW].tolist()
    chosen = [row for row, number in enumerate(numbers) if number >= 0 and number % 2 == 0]
    rejected = [row + 1 for row in chosen]
    actions = sum(number >= 0 for number in numbers)
    if actions != 2 * len(chosen) or any(
        b >= len(numbers) or numbers[b] != numbers[a] + 1 for a, b in zip(chosen, rejected, strict=True)
    ):
        raise ComposerError(
            f"The rows of a preference pair were torn apart: a micro-batch holds the pair rows {numbers}, expected every "
            "even number right before its successor. composer_verl is tested with verl 0.9.1; set actor.shuffle=false."
        )
    return chosen, rejected


def _actions(log_probs: torch.Tensor, data, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The action tokens' log-probs (rows, T), zero beyond an action's end, and their mask.

    A response token's log-prob stands one place before it (verl shifts to the left), so the action of length n ends
    one place before the row's end.
    """
    lengths = data["responses"].offsets().diff().tolist()
    flat_values, ends = log_probs.values(), log_probs.offsets().tolist()[1:]
    parts = {row: flat_values[ends[row] - lengths[row] - 1 : ends[row] - 1] for row in rows}
    width = max((len(part) for part in parts.values()), default=0)
    padded = [torch.nn.functional.pad(parts[row], (0, width - len(parts[row]))) for row in rows]
    values = torch.stack(padded) if padded else flat_values.new_zeros(0, 0)
    positions = torch.arange(width, device=values.device)[None]
    return values, positions < torch.tensor([lengths[row] for row in rows], device=values.device).long()[:, None]


def _padded(parts, rows: list[int], like: torch.Tensor) -> torch.Tensor:
    """Lay per-row values out like `like` (rows, T)."""
    values = torch.zeros_like(like)
    for i, row in enumerate(rows):
        values[i, : len(parts[row])] = parts[row].to(values)
    return values.detach()
