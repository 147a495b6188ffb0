"""Notices a channel with weight > 0 that contributes nothing, and says why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from composer_plugins.errors import ConfigError, SilentChannelError

logger = logging.getLogger(__name__)


class SilentChannelWarning(UserWarning):
    """A channel with weight > 0 contributed nothing for several optimizer steps in a row."""


@dataclass
class ChannelRecord:
    """What happened to one channel: optimizer steps seen, silent ones, silent ones in a row, the last reason."""

    steps: int = 0
    silent_steps: int = 0
    silent_in_a_row: int = 0
    last_reason: str = ""


class SilenceMonitor:
    """Counts optimizer steps in which a channel was silent.

    Args:
        after: consecutive silent steps until it speaks, and again after every further `after`.
        on_silence: "warn" (a `SilentChannelWarning` and a log record) or "error" (`SilentChannelError`).

    Raises:
        ConfigError: `after` < 1 or an unknown `on_silence`.

    >>> monitor = SilenceMonitor(after=2, on_silence="error")
    >>> monitor.update("sdpo", 12.0, why="no hints")
    False
    >>> monitor.summary()["sdpo"]["steps"]
    1
    """

    def __init__(self, after: int, on_silence: Literal["warn", "error"]) -> None:
        if after < 1:
            raise ConfigError(f"Expected silent_after >= 1 optimizer step, found {after}.")
        if on_silence not in ("warn", "error"):
            raise ConfigError(f"Expected on_silence 'warn' or 'error', found {on_silence!r}.")
        self.after, self.on_silence = after, on_silence
        self._records: dict[str, ChannelRecord] = {}

    def update(self, channel: str, active: float, *, why: str) -> bool:
        """Record one optimizer step of a channel; return whether it spoke up.

        Args:
            channel: name of the channel.
            active: the channel's activity metric over the whole step; 0 (or nan) means silent.
            why: the reason to give if it is silent.

        Raises:
            SilentChannelError: silent for `after` steps, with on_silence "error".
        """
        record = self._records.setdefault(channel, ChannelRecord())
        record.steps += 1
        if active > 0:
            record.silent_in_a_row = 0
            return False
        record.silent_steps += 1
        record.silent_in_a_row += 1
        record.last_reason = why
        if record.silent_in_a_row % self.after:
            return False
        message = (
            f"The channel {channel!r} has a weight above 0 but contributed nothing for {record.silent_in_a_row} "
            f"optimizer steps in a row: {why}. Fix the cause, or set {channel}.weight: 0."
        )
        if self.on_silence == "error":
            raise SilentChannelError(message)
        logger.warning(message)
        warnings.warn(message, SilentChannelWarning, stacklevel=2)
        return True

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return per channel the fields of `ChannelRecord`."""
        return {name: asdict(record) for name, record in self._records.items()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint needs (JSON-serialisable); settings are not part of it."""
        return self.summary()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the counts of a checkpoint."""
        self._records = {name: ChannelRecord(**record) for name, record in state.items()}
