"""TRL's adapter under the suite that any adapter runs (`composer-rl conformance trl`)."""

import pytest

pytest.importorskip("trl")

from composer_trl.conformance import TestTRL

__all__ = ["TestTRL"]
