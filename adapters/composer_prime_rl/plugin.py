"""Registers the prime-rl host; imports no prime-rl."""

from __future__ import annotations

from composer_plugins import hookimpl
from composer_plugins.plugins.registry import Entry


@hookimpl
def register_hosts(register) -> None:
    register(
        Entry("prime_rl", "prime-rl, through its custom loss and verifiers environments", "composer_prime_rl.host:HOST")
    )
