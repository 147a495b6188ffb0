"""Group-relative advantages."""

from __future__ import annotations

from typing import Literal

import torch


def group_advantages(
    rewards: torch.Tensor,
    group_size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    singleton: Literal["zero", "reward"] = "zero",
) -> torch.Tensor:
    """Turn rewards into advantages within groups of rollouts of one prompt.

    A_i = (R_i - mean(group)) / (std + eps), the division left out with scale "none". NaN marks a rollout
    that nobody could score: it is left out of mean and standard deviation, and its advantage is 0. A group
    whose scored rewards are all equal gets exact zeros (rounding of the mean divided by eps would not).

    Args:
        rewards: (N,), reward units, groups contiguous; NaN = not scored.
        group_size: rollouts per prompt; divides N.
        scale: standard deviation of the "group", of the whole "batch" of rewards, or "none".
        eps: added to the standard deviation (TRL 1e-4, verl 1e-6).
        ddof: degrees of freedom of the standard deviation (TRL and verl: 1).
        singleton: a group with one scored rollout gets advantage 0, or as verl does its reward, taken with
            mean 0 and group standard deviation 1.

    Returns:
        (N,) detached; standard deviations with scale "group" or "batch", reward units with "none".

    Raises:
        ValueError: `rewards` is not (N,), holds an infinity, or N is not a multiple of `group_size`; an
            option is unknown.

    Source: GRPO arXiv:2402.03300 section 4.1.2; Dr.GRPO arXiv:2503.20783 (no std);
    trl/trainer/grpo_trainer.py `_generate_and_score_completions`;
    verl/trainer/ppo/core_algos.py `compute_grpo_outcome_advantage`.

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2, scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    _check(rewards, group_size, scale, singleton)
    groups = rewards.detach().double().view(-1, group_size)
    scored = ~groups.isnan()
    count = scored.sum(1, keepdim=True)
    mean = groups.nanmean(1, keepdim=True)
    alone = count == 1
    if singleton == "reward":
        mean = torch.where(alone, 0.0, mean)
    advantages = groups - mean
    if scale == "group":
        std = _nan_std(groups, ddof=ddof)
        advantages = advantages / (torch.where(alone, 1.0, std) + eps)
    elif scale == "batch":
        advantages = advantages / (_nan_std(groups.reshape(1, -1), ddof=ddof) + eps)
    highest = torch.where(scored, groups, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(scored, groups, torch.inf).amin(1, keepdim=True)
    equal = (highest <= lowest) & ~(alone & (singleton == "reward"))
    advantages = torch.where(equal | ~scored, 0.0, advantages)
    return advantages.nan_to_num(nan=0.0).view(-1).to(rewards.dtype)


def _nan_std(x: torch.Tensor, *, ddof: int) -> torch.Tensor:
    """Standard deviation of each row without its NaNs; NaN when there are not more values than `ddof`."""
    count = (~x.isnan()).sum(1, keepdim=True)
    square = (x - x.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return torch.where(count > ddof, square / (count - ddof).clamp(min=1), torch.nan).sqrt()


def _check(rewards: torch.Tensor, group_size: int, scale: str, singleton: str) -> None:
    if rewards.dim() != 1:
        raise ValueError(f"Expected rewards of shape (N,), found {tuple(rewards.shape)}.")
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"Expected whole groups: {rewards.numel()} rewards cannot be split into groups of {group_size}."
        )
    if not rewards.dtype.is_floating_point:
        raise ValueError(f"Expected floating-point rewards, found {rewards.dtype}: pass rewards.float().")
    if rewards.isinf().any():
        raise ValueError("Expected finite rewards (or NaN for a rollout that was not scored), found an infinity.")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"Expected scale 'group', 'batch' or 'none', found {scale!r}.")
    if singleton not in ("zero", "reward"):
        raise ValueError(f"Expected singleton 'zero' or 'reward', found {singleton!r}.")
