"""Property-based tests take the same examples in every run; HYPOTHESIS_PROFILE=random looks for new ones."""

from __future__ import annotations

import os

try:
    from hypothesis import settings
except ModuleNotFoundError:  # an environment of a host, with fewer development tools
    pass
else:
    settings.register_profile("repeatable", derandomize=True, database=None)
    settings.register_profile("random")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
