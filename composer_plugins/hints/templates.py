"""Template hints: one readable text per error class, in `templates.toml`."""

from __future__ import annotations

import re
import string
import tomllib
from pathlib import Path
from typing import Any

from composer_plugins.errors import ConfigError
from composer_plugins.traces.schema import Hint, State, Status, ToolResult

BUILTIN = Path(__file__).with_name("templates.toml")
FIELDS = frozenset({"tool", "error", "path"})

_PATH_KEYS = ("file_path", "path", "notebook_path", "filename", "file")
_PATH_IN_TEXT = re.compile(
    r"(?<![\w:/.<])(?:(?:~|\.{1,2})?/(?:[\w@.+-]+/)*[\w@.+-]+|(?:[\w@.+-]+/)+[\w@.+-]+)(?<![.:,])"
)


class TemplateHints:
    """The `template` hint generator.

    Args:
        path: a TOML file of your own; its `[classes]` override or add to the built-in ones.
        max_error: longest quotation of the error, in characters; the middle of a longer one is left out.

    Raises:
        ConfigError: the file is missing, is not TOML, or a template is not text or names an unknown field.
    """

    name = "template"

    def __init__(self, path: str | Path | None = None, max_error: int = 200, **unknown: Any) -> None:
        if unknown:
            raise ConfigError(f"Unknown option of the template hints: {', '.join(unknown)}. Options: path, max_error.")
        if not isinstance(max_error, int) or max_error < 20:
            raise ConfigError(f"max_error must be a number of characters of at least 20, found {max_error!r}.")
        self.max_error = max_error
        self.templates = read_templates(BUILTIN)
        if path is not None:
            self.templates |= read_templates(Path(path))

    def generate(self, state: State) -> Hint | None:
        """Return the hint for the first result of the worst outcome of the state's step."""
        order = (Status.HUMAN_REJECT, Status.ERROR, Status.INFERRED_ERROR)
        failed = sorted((r for r in state.results if r.status.failed), key=lambda r: order.index(r.status))
        if not failed:
            return None
        return self._hint_of(state, failed[0])

    def _hint_of(self, state: State, result: ToolResult) -> Hint | None:
        call = next((c for c in state.action.tool_calls if c.id == result.call_id), None)
        path = None
        if call is not None:
            path = next((v for k in _PATH_KEYS if isinstance(v := call.arguments.get(k), str) and v), None)
        tool = call.name if call is not None else None
        return self._fill(tool, result.content, result.status, result.error_class, path)

    def generate_for(self, tool: str | None, result_text: str, status: Status, error_class: str | None) -> Hint | None:
        """Return the hint for a live tool result; None when `status` is not a failure."""
        if not status.failed:
            return None
        return self._fill(tool, result_text, status, error_class, None)

    def _fill(self, tool, text: str, status: Status, error_class: str | None, path: str | None) -> Hint:
        known = error_class if error_class in self.templates else "default"
        error = shorten(clean(text), self.max_error).rstrip(".")
        if path is None:
            found = _PATH_IN_TEXT.search(error)
            path = found.group(0) if found else None
        values = {"tool": tool or "the tool", "error": error or "no message", "path": path or "the file"}
        filled = self.templates[known].format(**values)
        return Hint(
            text=filled, error_class=error_class or "default", status=status, generator=self.name, evidence=error
        )


def read_templates(path: Path) -> dict[str, str]:
    """Return error class → template of a TOML file with a `[classes]` table. Raises `ConfigError`."""
    if not path.is_file():
        raise ConfigError(f"Expected a hint template file at {path}: there is no such file.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    classes = data.get("classes")
    if not isinstance(classes, dict) or set(data) != {"classes"}:
        raise ConfigError(f'{path} must hold one table, [classes], of error class = "text"; found {sorted(data)}.')
    for name, template in classes.items():
        _check_template(path, name, template)
    return {name: " ".join(template.split()) for name, template in classes.items()}


def _check_template(path: Path, name: str, template: Any) -> None:
    if not isinstance(template, str) or not template.strip():
        raise ConfigError(f"{path}: the template of `{name}` must be a text, found {template!r}.")
    try:
        fields = {f for _, f, spec, conversion in string.Formatter().parse(template) if f is not None}
        plain = all(not spec and not conv for _, f, spec, conv in string.Formatter().parse(template) if f is not None)
    except ValueError as error:
        raise ConfigError(
            f"{path}: the template of `{name}` has an unbalanced brace ({error}); write {{{{ for {{."
        ) from error
    if fields - FIELDS or not plain:
        raise ConfigError(
            f"{path}: the template of `{name}` uses {sorted(fields - FIELDS) or 'a format specification'}; "
            "the fields are {tool}, {error} and {path}."
        )


def clean(text: str) -> str:
    """Strip error tags, terminal colours and surplus white space."""
    text = re.sub(r"</?tool_use_error>|\x1b\[[0-9;]*[A-Za-z]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def shorten(text: str, limit: int) -> str:
    """Return `text` with its middle left out when longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head].rstrip()} ... {text[len(text) - (limit - 5 - head) :].lstrip()}"
