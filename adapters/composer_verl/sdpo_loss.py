"""Channel 2 inside verl's actor loss: the hinted tokens of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.sdpo import sdpo_importance_weight, sdpo_term, sdpo_values
from composer_plugins.config import SDPOConfig
from composer_verl.fields import SDPO_DIVERGENCE, SDPO_MASK, SDPO_TEACHER, SDPO_TOKENS, SDPO_VALUES


def hinted_term(
    config: SDPOConfig, model_output: dict[str, Any], data, *, dp_size: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the weighted sdpo loss of one micro-batch and verl `Metric`s.

    Args:
        config: the `sdpo` section.
        model_output: verl's: `log_probs`, nested (rows, tokens of prompt and response), nats at the rollout
            temperature, with gradient; at level topk also what `topk_signal` made of the logits.
        data: the micro-batch that the engine hands to a loss, with the fields of `composer_verl.fields`. Its
            `old_log_probs` give the importance weight of `sdpo.is_clip`; `rollout_is_weights`, verl's engine
            correction, multiply it.
        dp_size: data-parallel ranks; verl averages gradients over them, which this factor undoes.

    Returns:
        (scalar, metrics). The same metrics for every micro-batch (verl wants as many values from every rank); a
        differentiable zero when no token has a self-teacher. verl adds the values of micro-batches up, takes the mean
        over ranks (undone by the factor) and the mean over the optimizer steps of one trainer step.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    student = no_padding_2_padding(model_output["log_probs"], data)
    fields = [SDPO_MASK, SDPO_TEACHER, "old_log_probs"]
    if "rollout_is_weights" in data.keys():  # noqa: SIM118  a TensorDict has no `in`
        fields.append("rollout_is_weights")
    # pair rows among the rollouts carry zeros, so the largest is the count of the mini-batch
    tokens = float(data[SDPO_TOKENS].max())
    padded = data.select(*fields).to_padded_tensor()
    mask = padded[SDPO_MASK].bool()
    logprobs = student[mask]
    if SDPO_VALUES in model_output:  # level topk
        values, divergence = (
            no_padding_2_padding(model_output[name], data)[mask] for name in (SDPO_VALUES, SDPO_DIVERGENCE)
        )
    else:
        values, divergence = sdpo_values(
            config, SignalLevel.SAMPLED, logprobs=logprobs, teacher_logprobs=padded[SDPO_TEACHER][mask]
        )
    weights = sdpo_importance_weight(config, logprobs, padded["old_log_probs"][mask])
    if "rollout_is_weights" in fields:
        engine = padded["rollout_is_weights"][mask]
        weights = engine if weights is None else weights * engine
    return weighted(config, values, divergence, weights, tokens=tokens, dp_size=dp_size)


def weighted(
    config: SDPOConfig,
    values: torch.Tensor,
    divergence: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    tokens: float,
    dp_size: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the weighted loss and metrics of flat hinted tokens; see `hinted_term`.

    Args:
        config: the `sdpo` section.
        values, divergence: (N,) from `sdpo_values`.
        weights: (N,) importance weights, detached; None: none.
        tokens: hinted tokens of the whole mini-batch over all ranks; raised to the floor of the section.
        dp_size: data-parallel ranks.
    """
    from verl.utils.metric import Metric

    term = sdpo_term(config, values, denominator=tokens, divergence=divergence, importance_weights=weights)
    loss = term.loss() * dp_size
    of_all = dp_size / max(tokens, 1.0)
    shares = {
        "sdpo/loss": loss.detach() / config.weight,
        "sdpo/tokens": len(values) * dp_size,
        "sdpo/active_tokens": term.metrics["sdpo/active_tokens"] * dp_size,
        "sdpo/divergence": divergence.sum() * of_all,
    }
    if weights is not None:
        shares["sdpo/is_weight"] = weights.sum() * of_all
    return loss, {name: Metric("sum", float(value)) for name, value in shares.items()}
