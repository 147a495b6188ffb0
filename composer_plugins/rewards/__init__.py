"""Verifiable rewards: numbers with named parts and a reason in words."""

from composer_plugins.rewards.base import Reward, RewardFunction

__all__ = ["Reward", "RewardFunction"]
