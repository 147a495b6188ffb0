"""Models: references, loading with checks, tool-call template and parser, warm start.

Nothing here imports torch or transformers until a function is called.
"""

from composer_plugins.models.loading import load_model
from composer_plugins.models.resolve import ResolvedModel, resolve_model
from composer_plugins.models.tokenizer import load_tokenizer, token_counter
from composer_plugins.models.toolcalls import (
    canonical_call,
    install_tool_template,
    parse_action,
    problems,
    render_action,
)

__all__ = [
    "ResolvedModel",
    "canonical_call",
    "install_tool_template",
    "load_model",
    "load_tokenizer",
    "parse_action",
    "problems",
    "render_action",
    "resolve_model",
    "token_counter",
]
