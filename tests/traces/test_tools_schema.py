"""Inferred tool schemas: every recorded call satisfies them."""

from __future__ import annotations

from composer_plugins.traces.schema import Message, ToolCall
from composer_plugins.traces.tools import infer_tools

TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}


def satisfies(value, schema) -> bool:
    """A small validator of its own: type, properties, required, items."""
    if "type" not in schema:
        return True
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    ok = any(value is None if n == "null" else isinstance(value, TYPES[n]) for n in names)
    if isinstance(value, dict) and "properties" in schema:
        ok &= all(key in value for key in schema.get("required", []))
        ok &= all(satisfies(item, schema["properties"][key]) for key, item in value.items())
    if isinstance(value, list) and "items" in schema:
        ok &= all(satisfies(item, schema["items"]) for item in value)
    return ok


def test_every_call_of_the_real_logs_satisfies_its_schema(data, sample, read_log):
    calls = 0
    for path in [sample, *data.rglob("*.jsonl")]:
        for trace in read_log(path)[0]:
            for message in trace.messages:
                for call in message.tool_calls:
                    calls += 1
                    schema = trace.tools[call.name]
                    assert schema["name"] == call.name
                    assert satisfies(call.arguments, schema["parameters"]), (call, schema)
    assert calls > 250


def test_required_means_present_in_every_call():
    messages = [
        Message(role="assistant", tool_calls=[ToolCall(id="1", name="Edit", arguments={"path": "a", "n": 1})]),
        Message(role="assistant", tool_calls=[ToolCall(id="2", name="Edit", arguments={"path": "b", "n": 1.5})]),
        Message(role="assistant", tool_calls=[ToolCall(id="3", name="Edit", arguments={"path": "c", "all": True})]),
        Message(role="assistant", tool_calls=[ToolCall(id="4", name="Broken", raw_arguments="{")]),
    ]
    tools = infer_tools(messages)
    assert tools["Edit"]["parameters"] == {
        "type": "object",
        "properties": {"all": {"type": "boolean"}, "n": {"type": "number"}, "path": {"type": "string"}},
        "required": ["path"],
    }
    assert tools["Broken"] == {"name": "Broken", "parameters": {"type": "object", "properties": {}}}


def test_the_schema_does_not_depend_on_how_calls_are_counted():
    """Calls with the same keys and types are looked at once; with a list in them, one by one."""
    flat = [{"path": "a", "n": None}, {"path": "b", "n": None}, {"path": "c"}, {}]
    for arguments in (flat[:3], flat):
        calls = [ToolCall(id=str(k), name="T", arguments=a) for k, a in enumerate(arguments)]
        nested = [ToolCall(id=c.id, name="T", arguments={**c.arguments, "list": [1]}) for c in calls]
        quick = infer_tools([Message(role="assistant", tool_calls=calls)])["T"]["parameters"]
        slow = infer_tools([Message(role="assistant", tool_calls=nested)])["T"]["parameters"]
        assert slow["properties"].pop("list") == {"type": "array", "items": {"type": "integer"}}
        slow["required"].remove("list")
        assert quick.get("required", []) == slow["required"] == (["path"] if len(arguments) == 3 else [])
        assert quick["properties"] == slow["properties"] == {"n": {"type": "null"}, "path": {"type": "string"}}
