"""TRL adapter: `from composer_trl import ComposerGRPOTrainer, ComposerGRPOConfig`.

The names load TRL on first use, so that listing plugins does not.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ComposerGRPOConfig", "ComposerGRPOTrainer"]


def __getattr__(name: str) -> Any:
    if name == "ComposerGRPOTrainer":
        from composer_trl.trainer import ComposerGRPOTrainer

        return ComposerGRPOTrainer
    if name == "ComposerGRPOConfig":
        from composer_trl.config import ComposerGRPOConfig

        return ComposerGRPOConfig
    raise AttributeError(f"module 'composer_trl' has no attribute {name!r}")
