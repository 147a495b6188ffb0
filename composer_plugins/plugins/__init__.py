"""Hooks and registries: how channels, readers, hints, teachers and hosts get in."""

from composer_plugins.plugins.manager import PluginManager, get_plugin_manager
from composer_plugins.plugins.registry import Entry, Registry

__all__ = ["Entry", "PluginManager", "Registry", "get_plugin_manager"]
