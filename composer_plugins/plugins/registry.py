"""Named entries with provenance: what a hook registers, and where it came from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from composer_plugins.errors import ConfigError, PluginError


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    Args:
        name: how a config file names it.
        summary: one line for `composer-rl plugins`.
        target: the object, or "package.module:attribute", imported on first use so that listing
            plugins never imports torch or a host.
    """

    name: str
    summary: str
    target: Any

    def load(self) -> Any:
        """Return the object itself. Raises `PluginError` when the target cannot be imported."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"{self.name!r} is registered as {self.target!r}, which cannot be loaded: {error}. "
                "Install the extra that provides it, or fix the plugin that registered it."
            ) from error


class Registry:
    """Entries of one kind. A name that two plugins register is an error that names both."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[Entry, str]] = {}

    def add(self, entry: Entry, *, plugin: str) -> None:
        """Register `entry` on behalf of `plugin`. Raises `PluginError` on a duplicate name."""
        if entry.name in self._entries:
            other = self._entries[entry.name][1]
            raise PluginError(
                f"The {self.kind} {entry.name!r} is registered by {other!r} and again by {plugin!r}. "
                "Names are global: rename one, or uninstall one of the two plugins."
            )
        self._entries[entry.name] = (entry, plugin)

    def get(self, name: str) -> Entry:
        """Return the entry called `name`. Raises `ConfigError` that lists what there is."""
        if name not in self._entries:
            raise ConfigError(
                f"Unknown {self.kind} {name!r}. Registered: {', '.join(sorted(self._entries)) or 'none'}. "
                "`composer-rl plugins` shows where each one comes from."
            )
        return self._entries[name][0]

    def provenance(self, name: str) -> str:
        """Return the plugin that registered `name`."""
        self.get(name)
        return self._entries[name][1]

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)
