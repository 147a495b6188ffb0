"""Preference pairs for channel 3 (replay_dpo), which is our own addition to the recipe."""

from composer_plugins.preferences.pairs import PairOptions, PairStats, build_pairs

__all__ = ["PairOptions", "PairStats", "build_pairs"]
