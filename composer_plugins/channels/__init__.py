"""Channels: additive, weighted loss terms built from the pure losses. One file per channel."""
