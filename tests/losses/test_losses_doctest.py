"""The examples in the docstrings are right."""

import doctest
import importlib

import pytest

MODULES = [
    "losses.advantages", "losses.divergence", "losses.dpo", "losses.log_space", "losses.masking", "losses.policy",
    "losses.reduction", "channels.silence",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"composer_plugins.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name == "losses.log_space"
