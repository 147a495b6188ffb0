"""The loss function of `ComposerTrainer`: verl's own loss over the rollouts, plus the hinted tokens, plus the pairs."""

from __future__ import annotations

from typing import Any

import torch

from composer_plugins.config import ComposerConfig
from composer_verl import outer
from composer_verl.fields import TOPK
from composer_verl.section import PREFIX


def composer_loss(
    config, section: ComposerConfig, model_output: dict[str, Any] | None = None, data=None, dp_group=None,
    student_logits: torch.Tensor | None = None, data_format: str | None = None,
) -> tuple[torch.Tensor, dict[str, Any]] | dict[str, torch.Tensor]:  # fmt: skip
    """Return policy + alpha * sdpo + beta * replay_dpo of one micro-batch, and metrics.

    verl calls it like its own loss: the scalars of micro-batches add up, gradients are averaged over ranks. Channels
    of weight 0 are not computed.

    Args:
        config: verl's `ActorConfig`; the policy term is verl's own `ppo_loss` with the loss mode set there.
        section: the `composer` section.
        model_output: `log_probs` (and `entropy`), nested (rows, tokens of prompt and response).
        data: the micro-batch, a TensorDict.
        dp_group: verl's group of data-parallel ranks.
        student_logits: at level `topk` the engine first calls with these and `data` only, and keeps what it gets
            (`topk_signal.on_logits`). data_format: of verl's Megatron engine; not used.
    """
    if student_logits is not None:
        from composer_verl.topk_signal import on_logits

        return on_logits(section.sdpo, student_logits, data)
    if TOPK in data.keys():  # noqa: SIM118  scored, not trained on; a TensorDict has no `in`
        return model_output["log_probs"].values().sum() * 0.0, {}
    log_probs, ranks = model_output["log_probs"], data["dp_size"]
    loss, metrics = policy_loss(config, section, model_output, data, dp_group)
    if section.sdpo.weight > 0:
        from composer_verl.sdpo_loss import hinted_term

        term, own = hinted_term(section.sdpo, model_output, data, dp_size=ranks)
        loss, metrics = loss + term, {**metrics, **own}
    if section.replay_dpo.weight > 0:
        from composer_verl.pair_loss import pair_term

        term, own = pair_term(section.replay_dpo, log_probs, data, dp_size=ranks)
        loss, metrics = loss + term, {**metrics, **own}
    return loss, {**metrics, **_outer_metrics()}


def _outer_metrics() -> dict[str, Any]:
    """The last round's figures; also where the policy loss, which gives them too, is not ours or has weight 0."""
    from verl.utils.metric import Metric

    return Metric.from_dict(outer.metrics(), "mean")


def policy_loss(
    config, section: ComposerConfig, model_output: dict[str, Any], data, dp_group=None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return verl's own loss of the rollouts of a micro-batch; a differentiable zero when the policy's weight is 0.

    The weight itself is the policy loss's own (`composer_policy_loss`), so that it counts on verl's stock trainer too;
    for verl's own loss modes it multiplies here.
    """
    from verl.workers.utils.losses import ppo_loss

    if section.policy.weight == 0:
        return model_output["log_probs"].values().sum() * 0.0, {}
    rollouts, rows = rollouts_of(section, model_output, data)
    loss, metrics = ppo_loss(config, rollouts, rows, dp_group)
    if section.replay_dpo.weight > 0:
        from composer_verl.pair_loss import weigh_by_tokens

        metrics = weigh_by_tokens(metrics, rows, data)
    if section.policy.weight != 1 and not config.policy_loss.loss_mode.startswith(PREFIX):
        loss = loss * section.policy.weight
    return loss, metrics


def rollouts_of(section: ComposerConfig, model_output: dict[str, Any], data) -> tuple[dict[str, Any], Any]:
    """Return (model output, micro-batch) without pair rows.

    A micro-batch of pairs only keeps one of their rows, whose response mask is zero: the policy term is then a
    differentiable zero, with the same metrics as everywhere.
    """
    if section.replay_dpo.weight == 0:
        return model_output, data
    from verl.utils import tensordict_utils as tu

    from composer_verl.pair_loss import rollout_rows

    rows = rollout_rows(data)
    if rows is None:
        return model_output, data
    rows = rows or [0]
    chosen = {}
    for name, tensor in model_output.items():
        parts = tensor.unbind()
        chosen[name] = torch.nested.as_nested_tensor([parts[row] for row in rows], layout=torch.jagged)
    return chosen, tu.index_select_tensor_dict(data, rows)
