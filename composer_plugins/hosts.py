"""What a host adapter offers to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from composer_plugins.channels.levels import SignalLevel


class Host(Protocol):
    """One RL framework, registered through `register_hosts`."""

    name: str
    #: The signal levels the host can offer to channels, best first.
    levels: tuple[SignalLevel, ...]

    def version(self) -> str | None:
        """Return the installed version of the framework, or None when it is not installed."""

    def validate(self, recipe: Path) -> list[str]:
        """Return what is wrong with a recipe file, as sentences with the fix; empty when it is fine."""

    def train(self, recipe: Path, *, output_dir: Path | None = None, overrides: list[str] | None = None) -> Path:
        """Run a recipe and return its run folder. Raises `ComposerError` subclasses on bad input."""
