"""Advantage estimators of the menu for verl: `algorithm.adv_estimator: composer_<objective>`.

verl groups rollouts by `uid`, in any order, so groups are found by it.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import torch

from composer_plugins.channels.policy import resolve_objective
from composer_plugins.config import AdvantageConfig
from composer_plugins.errors import ConfigError
from composer_plugins.losses.advantages import group_advantages
from composer_plugins.plugins import get_plugin_manager
from composer_verl.section import PREFIX, advantage_options

Scale = Literal["group", "batch", "none"]
#: Keys by which verl's whole configuration is told from a part of it.
_OF_THE_WHOLE = ("trainer.v1.trainer_mode", "actor_rollout_ref.actor.policy_loss.loss_mode")
_PADDING_UID = re.compile(r"pad[0-9a-f]{32}\Z")


def register_advantages() -> list[str]:
    """Register one estimator per objective of the menu, with the advantage of its paper; return their names."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

    names = [f"{PREFIX}{entry.name}" for entry in get_plugin_manager().objectives]
    for name in names:
        if name not in ADV_ESTIMATOR_REGISTRY:
            register_adv_est(name)(_estimator(name.removeprefix(PREFIX)))
    return names


def _estimator(objective: str):
    def estimate(
        token_level_rewards: torch.Tensor,
        response_mask: torch.Tensor,
        index: np.ndarray | None = None,
        config=None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if index is None:
            raise ConfigError(
                f"{PREFIX}{objective} compares rollouts of one prompt and needs verl's `uid`; found none."
            )
        _refuse_unread(config)
        options = advantage_options(config)
        advantages = outcome_advantages(
            token_level_rewards,
            response_mask,
            index,
            options=options,
            scale=options.scale or resolve_objective(objective).advantage_scale,
        )
        return advantages, advantages

    estimate.__name__ = f"{PREFIX}{objective}"
    return estimate


def _refuse_unread(algorithm: Any) -> None:
    """`preflight.refuse_unread` on the configuration that `algorithm` is a part of, where it is verl's whole one."""
    from omegaconf import DictConfig, OmegaConf

    root = algorithm._get_root() if isinstance(algorithm, DictConfig) else None
    if root is not None and all(OmegaConf.select(root, key) is not None for key in _OF_THE_WHOLE):
        from composer_verl.preflight import refuse_unread

        refuse_unread(root)


def padding_rows(index: np.ndarray, response_mask: torch.Tensor) -> torch.Tensor:
    """Return which rows verl added to fill the batch up before it asks for advantages: (B,) bool.

    They have the reward 0, no response token and one uid of their own, `pad<hex>`. A row without tokens under another
    uid is a rollout that rollout correction rejected: its reward was earned, so it stays in the deviation of the batch
    as it stays in the mean of its group (verl's own `grpo` counts it too).

    Source: verl/trainer/ppo/padding_utils.py `upsample_batch_to_divisible_size`.
    """
    named = torch.tensor([_PADDING_UID.match(str(uid)) is not None for uid in index], dtype=torch.bool)
    return named.to(response_mask.device) & ~response_mask.bool().any(-1)


def outcome_advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    *,
    options: AdvantageConfig,
    scale: Scale,
) -> torch.Tensor:
    """Return group-relative advantages on every response token.

    verl's `grpo` is eps 1e-6 and singleton "reward"; a group of one gets advantage 0 here by default.

    Args:
        token_level_rewards: (B, T), summed over tokens; NaN = not scored.
        response_mask: (B, T), non-zero = counts.
        index: (B,), rollouts of one prompt share a value; any order, any group size.
        options: eps, ddof and singleton.
        scale: "group" or "batch" divides by that standard deviation (the batch's without verl's padding rows), "none"
            does not (Dr.GRPO).

    Returns:
        (B, T), zero outside the mask.

    Source: verl/trainer/ppo/core_algos.py `compute_grpo_outcome_advantage`; Dr.GRPO arXiv:2503.20783.
    """
    mask = response_mask.bool()
    rewards = token_level_rewards.sum(-1)
    advantages = torch.zeros_like(rewards)
    _, groups = np.unique(np.asarray(index).astype(str), return_inverse=True)
    for group in range(groups.max(initial=-1) + 1):
        rows = torch.from_numpy(np.flatnonzero(groups == group)).to(rewards.device)
        advantages[rows] = group_advantages(
            rewards[rows],
            len(rows),
            scale="none" if scale == "batch" else scale,
            eps=options.eps,
            ddof=options.ddof,
            singleton=options.singleton,
        )
    if scale == "batch":
        counted = ~rewards.isnan() & ~padding_rows(index, response_mask)
        values = rewards[counted].double()
        # as in the core: too few values for a deviation are no signal
        deviation = values.std(correction=options.ddof) if len(values) > options.ddof else torch.nan
        advantages = (advantages / (deviation + options.eps)).nan_to_num(nan=0.0)
    return torch.where(mask, advantages[:, None].to(rewards.dtype), 0.0)
