"""Composer 2.5's post-training recipe as plugins for the RL frameworks people already run.

Importing this package is cheap on purpose: it loads neither torch nor any host.
"""

import pluggy

__version__ = "0.1.0"

#: Decorator for hook implementations, see `composer_plugins.plugins.hookspecs`.
hookimpl = pluggy.HookimplMarker("composer_plugins")

__all__ = ["__version__", "hookimpl"]
