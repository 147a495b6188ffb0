"""Tool schemas inferred from the calls that a log contains (most logs do not record the real ones)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from composer_plugins.traces.schema import Message

_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
_MAX_DEPTH = 3


class _Shape:
    """What was seen at one place: the types, the keys of objects, the items of lists."""

    __slots__ = ("items", "keys", "objects", "types")

    def __init__(self) -> None:
        self.types: set[str] = set()
        self.objects = 0
        self.keys: dict[str, tuple[_Shape, list[int]]] = {}
        self.items: _Shape | None = None

    def see(self, value: Any, depth: int = 0) -> None:
        if value is None:
            self.types.add("null")
            return
        self.types.add(_TYPES.get(type(value), "string"))
        if depth >= _MAX_DEPTH:
            return
        if isinstance(value, dict):
            self.objects += 1
            for key, item in value.items():
                shape, seen = self.keys.setdefault(str(key), (_Shape(), [0]))
                shape.see(item, depth + 1)
                seen[0] += 1
        elif isinstance(value, list):
            self.items = self.items or _Shape()
            for item in value[:50]:
                self.items.see(item, depth + 1)

    def schema(self) -> dict[str, Any]:
        types = sorted(self.types - {"integer"} if "number" in self.types else self.types)
        found: dict[str, Any] = {}
        if types:
            found["type"] = types[0] if len(types) == 1 else types
        if "object" in types and self.keys:
            found["properties"] = {key: shape.schema() for key, (shape, _) in sorted(self.keys.items())}
            required = sorted(key for key, (_, seen) in self.keys.items() if seen[0] == self.objects)
            if required:
                found["required"] = required
        if "array" in types and self.items is not None and self.items.types:
            found["items"] = self.items.schema()
        return found


def infer_tools(messages: Iterable[Message]) -> dict[str, dict[str, Any]]:
    """Return tool name → {"name", "parameters"}, a JSON schema that every call seen satisfies.

    A property is required when every call gave it. Calls whose arguments could not be parsed add the name
    only.
    """
    shapes: dict[str, _Shape] = {}
    for message in messages:
        for call in message.tool_calls:
            shape = shapes.setdefault(call.name, _Shape())
            if call.raw_arguments is None:
                shape.see(call.arguments)
    tools = {}
    for name, shape in sorted(shapes.items()):
        parameters = {"type": "object", "properties": {}} | shape.schema()
        tools[name] = {"name": name, "parameters": parameters}
    return tools
