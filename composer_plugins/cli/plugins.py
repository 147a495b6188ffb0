"""`composer-rl plugins`: what is registered, and by whom."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from composer_plugins.plugins import get_plugin_manager


def plugins() -> None:
    """List every registered objective, channel, reader, hint generator, teacher, reward and host.

    Nothing is imported beyond the plugins' own registration, so this is quick even with many hosts.
    """
    manager = get_plugin_manager()
    table = Table("kind", "name", "what it is", "registered by")
    for registry in (
        manager.objectives, manager.channels, manager.trace_readers, manager.hint_generators,
        manager.teachers, manager.rewards, manager.hosts,
    ):  # fmt: skip
        for entry in registry:
            table.add_row(registry.kind, entry.name, entry.summary, registry.provenance(entry.name))
    Console().print(table)
