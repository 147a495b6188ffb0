"""verl's adapter under the suite that any adapter runs (`composer-rl conformance verl`)."""

import importlib.util

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_verl.conformance import TestVerl

__all__ = ["TestVerl"]
