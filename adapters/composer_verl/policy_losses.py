"""The menu of objectives as verl policy losses: `actor_rollout_ref.actor.policy_loss.loss_mode: composer_<name>`.

verl calls the function per micro-batch with padded (sequences, tokens) tensors and adds up what it returns; its
global counts are in `config.global_batch_info`. Our values are divided by those, so micro-batch size, dynamic
batching and data parallelism do not change the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from composer_plugins.channels.base import Term
from composer_plugins.channels.policy import policy_term, resolve_objective
from composer_plugins.config import PolicyConfig
from composer_plugins.errors import ConfigError
from composer_plugins.losses.policy import Objective
from composer_plugins.losses.reduction import Reduction, count_units
from composer_plugins.plugins import get_plugin_manager
from composer_verl import outer
from composer_verl.section import PREFIX, VERL_AGGREGATION, logger, policy_options


def register_policy_losses() -> list[str]:
    """Register every objective of the menu, plugins' included; return the loss modes."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    names = [f"{PREFIX}{entry.name}" for entry in get_plugin_manager().objectives]
    for name in names:
        if name not in POLICY_LOSS_REGISTRY:
            register_policy_loss(name)(_policy_loss(name.removeprefix(PREFIX)))
    return names


def _policy_loss(name: str) -> Callable[..., tuple[torch.Tensor, dict[str, Any]]]:
    def loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = VERL_AGGREGATION,
        config=None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return composer_policy_loss(
            name, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
        )

    loss.__name__ = f"{PREFIX}{name}"
    loss.__doc__ = f"The objective {name!r} of the composer menu, see `composer_policy_loss`."
    return loss


def composer_policy_loss(
    name: str,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str,
    config,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return this micro-batch's share of the loss, and metrics.

    Args:
        name: objective of the menu.
        old_log_prob, log_prob, advantages: (B, T), nats and units of the advantage; `log_prob` receives gradient.
        response_mask: (B, T), non-zero = counts.
        loss_agg_mode: verl's; used with `policy_loss.aggregation: host` only.
        config: verl's `ActorConfig`.
        rollout_is_weights: (B, T), verl's engine correction; multiplies the per-token loss.

    Returns:
        (scalar, metrics); verl sums the scalars over micro-batches and averages gradients over ranks, which the
        factor dp_size undoes. verl reports the mean of each metric over micro-batches and ranks.

    Raises:
        ConfigError: contradictory options, or dr_grpo without a constant length.

    Source: verl/trainer/ppo/core_algos.py `compute_policy_loss_vanilla` and `agg_loss`.
    """
    if config is None:
        raise ConfigError(f"{PREFIX}{name} needs verl's actor configuration, found None.")
    options, aggregation = policy_options(config, name)
    objective, mask = resolve_objective(name), response_mask.bool()
    if options.dual_clip is not None and objective.surrogate != "clip":
        raise ConfigError(
            f"{PREFIX}{name} has no dual clip: leave actor_rollout_ref.actor.clip_ratio_c at 3.0 and take "
            f"composer.policy.dual_clip out (found {options.dual_clip})."
        )
    host = aggregation == "host"
    term = policy_term(
        options,
        replace(objective, reduction=Reduction.GLOBAL_TOKEN_MEAN) if host else objective,  # values as they are
        logprobs=log_prob,
        old_logprobs=old_log_prob,
        advantages=advantages,
        mask=mask,
        denominator=1.0,
        importance_weights=rollout_is_weights,
    )
    if host:
        from verl.trainer.ppo.core_algos import agg_loss

        loss = agg_loss(term.values, response_mask, loss_agg_mode, **config.global_batch_info)
    else:
        _remark_unused_aggregation(name, loss_agg_mode)
        loss = _reduce(objective, term.values, mask, constant_length(name, options), config.global_batch_info)
    if options.weight != 1:
        loss = loss * options.weight
    return loss, _metrics(term, old_log_prob, log_prob, mask)


def constant_length(name: str, options: PolicyConfig) -> int | None:
    """Return the constant length in tokens that an objective divides by, None when it divides by none.

    Raises:
        ConfigError: it needs one and none is set (the tensor's width would change with the batch).
    """
    if resolve_objective(name).reduction is not Reduction.CONSTANT_LENGTH:
        return None
    if options.length_constant is None:
        raise ConfigError(
            f"{PREFIX}{name} divides by a constant length, which verl does not tell a policy loss: set "
            "actor_rollout_ref.actor.loss_scale_factor to the longest response "
            "(loss_scale_factor='${data.max_response_length}'), or composer.policy.length_constant."
        )
    return options.length_constant


def _metrics(term: Term, old_log_prob: torch.Tensor, log_prob: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The channel's own metrics, and those under verl's names."""
    shift = torch.where(mask, (old_log_prob - log_prob.detach()).clamp(-20.0, 20.0), 0.0)  # verl's clamp
    ours = {name: term.metrics[name] for name in ("policy/clip_fraction", "policy/ratio", "policy/active_tokens")}
    return {
        "actor/pg_clipfrac": ours["policy/clip_fraction"],
        "actor/ppo_kl": float(shift.sum() / mask.sum().clamp(min=1)),
        **ours,
        **outer.metrics(),  # the same in every micro-batch, so verl's mean is the value
    }


def _reduce(
    objective: Objective, values: torch.Tensor, mask: torch.Tensor, length_constant: int | None, batch: dict[str, Any]
) -> torch.Tensor:
    """Sum of scaled values / the global count of units, times dp_size (verl averages gradients over ranks)."""
    total = values.sum()
    ranks = batch.get("dp_size") or 1
    sequences = batch.get("global_batch_size")
    match objective.reduction:
        case Reduction.LOCAL_TOKEN_MEAN:
            # By definition a mean over the local micro-batch; verl adds micro-batches up, so each counts by its
            # share of the sequences. Equal micro-batches: the mean of their means, as in TRL.
            total = total / mask.sum().clamp(min=1) * mask.size(0)
            units = sequences
        case Reduction.GLOBAL_TOKEN_MEAN:
            units = batch.get("batch_num_tokens")
        case Reduction.SEQUENCE_MEAN:
            units = sequences
        case _:
            units = None if sequences is None else sequences * length_constant
    if units is None:
        if ranks > 1:
            raise ConfigError(
                f"{PREFIX}{objective.name}: verl gave no global batch counts although dp_size is {ranks}; composer_verl "
                "is tested with verl 0.9.1, where they are always given."
            )
        if objective.reduction is Reduction.LOCAL_TOKEN_MEAN:
            units = mask.size(0)
        else:
            units = count_units(mask, objective.reduction, length_constant=length_constant)
    # An empty micro-batch without global counts: a differentiable zero, not 0/0.
    return total / (units if float(units) > 0 else 1.0) * ranks


@functools.cache
def _remark_unused_aggregation(name: str, mode: str) -> None:
    """Say once that a chosen aggregation mode does not reach our objective."""
    if mode != VERL_AGGREGATION:
        logger.warning(
            "actor.loss_agg_mode %s applies to verl's entropy and KL terms only; %s%s reduces as its paper. Set "
            "policy_loss.aggregation: host (with policy_loss._target_: composer_verl.options.ComposerPolicyLossConfig) "
            "to use it for the policy loss too.",
            mode, PREFIX, name,
        )  # fmt: skip
