"""JSON schemas of tools from their signatures, without transformers.

The result equals `transformers.utils.get_json_schema(method)["function"]` for the type hints and the
docstring form that tools use here; anything else is refused rather than guessed.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any

from composer_plugins.envs.tool_method import tool_names
from composer_plugins.errors import UnsupportedError

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_SECTION = re.compile(r"\n\s*(Args|Returns):\n")
_ARGUMENT = re.compile(r"^(\w+):\s*", re.MULTILINE)


def tool_schemas(cls: type) -> dict[str, dict[str, Any]]:
    """Return tool name -> {"name", "description", "parameters", "return"} for an environment class.

    Raises:
        UnsupportedError: a type hint that this small generator does not know.
    """
    return {name: _schema(name, getattr(cls, name)) for name in tool_names(cls)}


def _schema(name: str, method: Any) -> dict[str, Any]:
    description, *sections = _SECTION.split(inspect.getdoc(method) or "")
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    described = _argument_descriptions(texts.get("Args", ""))
    hints = typing.get_type_hints(method)
    properties, required = {}, []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.name not in described or parameter.name not in hints:
            raise UnsupportedError(f"{name}: argument {parameter.name!r} needs a type hint and a description.")
        properties[parameter.name] = {**_type(hints[parameter.name]), "description": described[parameter.name]}
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    schema = {"name": name, "description": description.strip(), "parameters": parameters}
    if "return" in hints:
        schema["return"] = {**_type(hints["return"]), "description": texts.get("Returns", "").strip()}
    return schema


def _argument_descriptions(section: str) -> dict[str, str]:
    _, *parts = _ARGUMENT.split(inspect.cleandoc(section))
    return {key: " ".join(text.split()) for key, text in zip(parts[::2], parts[1::2], strict=True)}


def _type(hint: Any) -> dict[str, Any]:
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        return {**_type(next(a for a in arguments if a is not type(None))), "nullable": True}
    if origin is list and arguments:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is dict and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    raise UnsupportedError(f"Type hint {hint} has no JSON schema here: use str, int, float, bool, list, dict or None.")
