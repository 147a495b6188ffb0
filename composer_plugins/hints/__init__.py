"""Hints: who writes them (`templates`), what they contain (`templates.toml`), where they go (`splice`)."""

from composer_plugins.hints.apply import add_hints
from composer_plugins.hints.base import HintGenerator
from composer_plugins.hints.splice import splice_messages

__all__ = ["HintGenerator", "add_hints", "splice_messages"]
