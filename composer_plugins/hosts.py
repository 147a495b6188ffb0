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
    #: Endings of recipe files that are this host's without a `host:` key in them (optional; e.g. `.toml`).
    recipe_suffixes: tuple[str, ...]
    #: Module with the host's subclass of `composer_plugins.conformance.adapter.AdapterConformance` (optional).
    conformance: str

    def version(self) -> str | None:
        """Return the installed version of the framework, or None when it is not installed."""

    def validate(self, recipe: Path) -> list[str]:
        """Return what is wrong with a recipe file, as sentences with the fix; empty when it is fine."""

    def train(self, recipe: Path, *, output_dir: Path | None = None, overrides: list[str] | None = None) -> Path:
        """Run a recipe and return its run folder. Raises `ComposerError` subclasses on bad input."""


def host_by_suffix(recipe: Path) -> str | None:
    """Return the host whose recipes end like this file; None for YAML, which names its host inside, and for others."""
    from composer_plugins.plugins import get_plugin_manager

    if recipe.suffix in (".yaml", ".yml"):
        return None
    for entry in get_plugin_manager().hosts:
        if recipe.suffix in getattr(entry.load(), "recipe_suffixes", ()):
            return entry.name
    return None
