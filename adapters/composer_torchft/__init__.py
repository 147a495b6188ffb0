"""DiLoCo outer loop on torchft: islands that train by themselves and exchange parameters every N steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composer_torchft import quiet  # noqa: F401  (before torchft is imported anywhere)

if TYPE_CHECKING:
    from composer_plugins.first_step import attach_at_first_step
    from composer_torchft.loop import DiLoCoLoop, attach

__all__ = ["DiLoCoLoop", "attach", "attach_at_first_step"]


def __getattr__(name: str) -> Any:
    if name == "attach_at_first_step":
        from composer_plugins.first_step import attach_at_first_step

        return attach_at_first_step
    if name in __all__:
        from composer_torchft import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
