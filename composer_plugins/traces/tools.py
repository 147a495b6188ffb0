"""Tool schemas inferred from the calls that a log contains (most logs do not record the real ones)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from composer_plugins.traces.schema import Message

_TYPES = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null",
}  # fmt: skip
_MAX_DEPTH = 3


class _Shape:
    """What was seen at one place: the types, the keys of objects, the items of lists."""

    __slots__ = ("items", "keys", "objects", "seen", "types")

    def __init__(self) -> None:
        self.types: set[str] = set()
        self.objects = self.seen = 0
        self.keys: dict[str, _Shape] = {}
        self.items: _Shape | None = None

    def see(self, value: Any, depth: int = 0) -> None:
        """Take one value."""
        name = _TYPES.get(type(value), "string")
        self.types.add(name)
        if depth >= _MAX_DEPTH:
            return
        if name == "object":
            self.objects += 1
            for key, item in value.items():
                found = self.keys.get(key)
                if found is None:
                    found = self.keys.setdefault(str(key), _Shape())
                found.seen += 1
                found.see(item, depth + 1)
        elif name == "array":
            self.items = self.items or _Shape()
            for item in value[:50]:
                self.items.see(item, depth + 1)

    def see_flat(self, keys: tuple[str, ...], types: tuple[type, ...], number: int) -> None:
        """Take objects without parts, `number` of them with these keys and types of values."""
        self.types.add("object")
        self.objects += number
        for key, kind in zip(keys, types, strict=True):
            found = self.keys.setdefault(key, _Shape())
            found.seen += number
            found.types.add(_TYPES.get(kind, "string"))

    def schema(self) -> dict[str, Any]:
        types = sorted(self.types - {"integer"} if "number" in self.types else self.types)
        found: dict[str, Any] = {}
        if types:
            found["type"] = types[0] if len(types) == 1 else types
        if "object" in types and self.keys:
            found["properties"] = {key: shape.schema() for key, shape in sorted(self.keys.items())}
            required = sorted(key for key, shape in self.keys.items() if shape.seen == self.objects)
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
    alike: Counter[tuple] = Counter()
    for message in messages:
        for call in message.tool_calls:
            shape = shapes.get(call.name)
            if shape is None:
                shape = shapes[call.name] = _Shape()
            if call.raw_arguments is None:
                types = tuple(map(type, call.arguments.values()))
                if dict in types or list in types:
                    shape.see(call.arguments)
                else:  # most calls: those with the same keys and types are looked at once
                    alike[call.name, tuple(call.arguments), types] += 1
    for (name, keys, types), number in alike.items():
        shapes[name].see_flat(keys, types, number)
    tools = {}
    for name, shape in sorted(shapes.items()):
        parameters = {"type": "object", "properties": {}} | shape.schema()
        tools[name] = {"name": name, "parameters": parameters}
    return tools
