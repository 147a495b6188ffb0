"""Registers the TRL host; imports no TRL."""

from __future__ import annotations

from composer_plugins import hookimpl
from composer_plugins.plugins.registry import Entry


@hookimpl
def register_hosts(register) -> None:
    register(Entry("trl", "TRL's GRPOTrainer, subclassed", "composer_trl.host:HOST"))
