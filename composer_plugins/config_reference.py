"""Writes docs/reference/config.md from the schema: `python -m composer_plugins.config_reference > docs/reference/config.md`."""

from __future__ import annotations

import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from composer_plugins.config import ComposerConfig

HEAD = """# The `composer` section

The same on every host. Unknown keys are refused. Generated from `composer_plugins/config.py` with
`python -m composer_plugins.config_reference > docs/reference/config.md`; a test keeps the two equal.
"""


def markdown() -> str:
    """Return the reference page: one table per section, defaults and meaning."""
    return HEAD + "".join(_section("composer", ComposerConfig))


def _section(path: str, model: type[BaseModel]):
    nested, rows = [], []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested.append((f"{path}.{name}", field.annotation))
        else:
            rows.append(f"| `{name}` | {_type(field)} | `{_default(field)}` | {_text(field.description)} |\n")
    if rows:
        yield f"\n## `{path}`\n\n{_text(model.__doc__)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        yield from rows
    for child, annotation in nested:
        yield from _section(child, annotation)


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{o}`" for o in options)
    if options and type(None) in typing.get_args(annotation):
        inner = options[0]
        names = typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else ()
        return (
            ", ".join(f"`{n}`" for n in names) + " or null" if names else f"{getattr(inner, '__name__', inner)} or null"
        )
    if typing.get_origin(annotation) is list:
        inner = options[0]
        names = typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else ()
        return "list of " + (", ".join(f"`{n}`" for n in names) if names else inner.__name__)
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
