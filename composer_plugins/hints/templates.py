"""Template hints: one readable text per error class, in `templates.toml`."""

from __future__ import annotations

import string
import tomllib
from pathlib import Path
from typing import Any

from composer_plugins.errors import ConfigError
from composer_plugins.hints.options import at_least, no_more
from composer_plugins.hints.slots import FIELDS, Failure, FailureHints, clean, fill, shorten
from composer_plugins.traces.schema import Hint

__all__ = ["BUILTIN", "FIELDS", "TemplateHints", "clean", "read_templates", "shorten"]

BUILTIN = Path(__file__).with_name("templates.toml")


class TemplateHints(FailureHints):
    """The `template` hint generator.

    Args:
        path: a TOML file of your own; its `[classes]` override or add to the built-in ones.
        max_error: longest quotation of the error, in characters; the middle of a longer one is left out.

    Raises:
        ConfigError: the file is missing, is not TOML, or a template is not text or names an unknown field.
    """

    name = "template"

    def __init__(self, path: str | Path | None = None, max_error: int = 200, **unknown: Any) -> None:
        no_more("template", unknown, "path, max_error")
        self.max_error = at_least("max_error", max_error, 20, "characters")
        self.templates = read_templates(BUILTIN)
        if path is not None:
            self.templates |= read_templates(Path(path))

    def _hint(self, failure: Failure) -> Hint:
        known = failure.error_class if failure.error_class in self.templates else "default"
        values = fill(failure, self.max_error)
        return Hint(
            text=_sentence(self.templates[known].format(**values)), error_class=failure.error_class or "default",
            status=failure.status, generator=self.name, evidence=values["error"],
        )  # fmt: skip


def _sentence(text: str) -> str:
    """A quoted question keeps its mark, and what a field put first begins with a capital."""
    return text[0].upper() + text[1:].replace("?. ", "? ").replace("!. ", "! ")


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
            f"the fields are {', '.join('{' + field + '}' for field in sorted(FIELDS))}."
        )
