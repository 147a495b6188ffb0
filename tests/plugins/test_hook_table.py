"""The hooks' table in the reference is what the hookspecs and the registries say today."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_plugins.plugins import PluginManager
from composer_plugins.plugins.hook_table import hooks, table, written

PAGE = Path(__file__).parents[2] / "docs/reference/plugins.md"


def test_the_page_holds_the_table_of_today():
    page = PAGE.read_text()
    assert written(page, PluginManager()) == page, (
        "python -m composer_plugins.plugins.hook_table docs/reference/plugins.md"
    )


def test_every_hook_is_a_row_and_ours_are_in_it():
    text = table(PluginManager())
    for signature in hooks().values():
        assert text.count(f"| `{signature}` |") == 1
    for name in ("grpo", "sdpo", "claude_code", "template", "openai", "tool_call", "trl", "diloco"):
        assert f"`{name}`" in text


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError):
        written("no markers", PluginManager())
