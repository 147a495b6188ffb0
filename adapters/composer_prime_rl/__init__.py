"""prime-rl adapter. Importing this package imports no prime-rl: its trainer loads `composer_prime_rl.loss` by name.

verifiers finds the environment and the taskset of the id `composer-prime-rl` here, by their base classes.
"""

from __future__ import annotations

from typing import Any

_LAZY = {"ComposerEnv": "composer_prime_rl.environment", "PairTaskset": "composer_prime_rl.pair_taskset"}

__all__ = ["ComposerEnv", "PairTaskset"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
