"""The graded tool-call reward: parses, known tool, valid arguments, agrees with a target. Needs no sandbox."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from typing import Any

from composer_plugins.errors import ConfigError
from composer_plugins.models.toolcalls import OPEN, canonical_call, parse_action, problems
from composer_plugins.rewards.base import Reward
from composer_plugins.traces.schema import Message, State, ToolCall

#: Share of `parse` for a call that was begun but cannot be read, without and with a readable name.
BEGUN, NAMED = 0.25, 0.5
#: Weight of an optional argument in the agreement; a required one has 1 (descriptions matter less than commands).
OPTIONAL = 0.25
#: The comparison is quadratic, so of what lies between the common beginning and end at most this is matched.
MAX_TOKENS = 400

_TOKEN = re.compile(r"^[ \t]+|\w+|[^\w\s]", re.MULTILINE)  # indentation counts: in code it has a meaning
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "array": list, "object": dict, "null": type(None),
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """What each part contributes to the value; non-negative, divided by their sum."""

    parse: float = 0.2
    known_tool: float = 0.1
    arguments: float = 0.2
    same_tool: float = 0.2
    agreement: float = 0.3


class ToolCallReward:
    """Graded reward in [0, 1] for an assistant turn that should call a tool.

    value = sum of weight · part over the parts, each in [0, 1]:

    - `parse`: 1 when every call in the text can be read; 0.5 begun and named, 0.25 begun, 0 without any call;
    - `known_tool`: share of the calls whose tool exists;
    - `arguments`: per call, the share of its required and given arguments that are present, known and of
      the right type;
    - `same_tool`: matched calls with the target's tool, over the larger number of calls;
    - `agreement`: over the same matches, the similarity of the arguments (1 for equal in canonical form,
      token-level edit similarity for text), optional arguments at a quarter of the weight.

    The last two are taken from the target that gives the highest value, so a further target never lowers it.
    A target without calls (a final answer) asks for text: an action without calls then gets 1 for the first
    four parts and text similarity for the last.

    Args:
        weights: keyword arguments of `Weights`, to change single ones.

    Raises:
        ConfigError: an unknown part, a weight that is no number >= 0, or all weights zero.
    """

    def __init__(self, **weights: float) -> None:
        known = [f.name for f in fields(Weights)]
        unknown = sorted(set(weights) - set(known))
        if unknown:
            raise ConfigError(f"Unknown part {unknown[0]!r} of the tool_call reward; parts: {', '.join(known)}.")
        chosen = vars(Weights(**weights))
        usable = all(isinstance(value, int | float) and math.isfinite(value) for value in chosen.values())
        if not usable or min(chosen.values()) < 0 or sum(chosen.values()) <= 0:
            raise ConfigError(f"Weights of the tool_call reward must be numbers >= 0 and not all 0; found {chosen}.")
        self.weights = {name: value / sum(chosen.values()) for name, value in chosen.items()}

    def __call__(self, action_text: str, state: State) -> Reward:
        """Score against the action that the state's trace recorded."""
        return self.score(action_text, tools=state.tools, targets=[state.action])

    def score(self, action_text: str, *, tools: Mapping[str, Mapping[str, Any]], targets: Sequence[Message]) -> Reward:
        """Return the reward of `action_text`; see `RewardFunction.score`. No target: the last two parts are 0."""
        action = parse_action(action_text)
        calls = [call for call in action.tool_calls if call.raw_arguments is None]
        answers = [target for target in targets if not target.tool_calls]
        if answers and not action.tool_calls:
            return self._answer(action, answers)
        parts = {
            "parse": _parse_score(action),
            "known_tool": _mean([float(call.name in tools) for call in calls]) * _readable(action),
            "arguments": _mean([_argument_score(call, tools) for call in calls]) * _readable(action),
        }
        matches = [_match(action.tool_calls, target.tool_calls, tools) for target in targets]
        same, agreement = max(matches, key=self._worth, default=(0.0, 0.0))
        parts |= {"same_tool": same, "agreement": agreement}
        return Reward(self._value(parts), parts, _feedback(action, parts, tools, targets))

    def _answer(self, action: Message, targets: Sequence[Message]) -> Reward:
        similarity = max(text_similarity(action.content, target.content) for target in targets)
        parts = dict.fromkeys(self.weights, 1.0) | {"agreement": similarity}
        feedback = None if similarity == 1.0 else "The answer differs from the expected one."
        return Reward(self._value(parts), parts, feedback)

    def _worth(self, match: tuple[float, float]) -> float:
        return self.weights["same_tool"] * match[0] + self.weights["agreement"] * match[1]

    def _value(self, parts: Mapping[str, float]) -> float:
        # Rounded so that a perfect action has exactly 1: thresholds compare with it.
        return min(1.0, round(math.fsum(self.weights[name] * parts[name] for name in self.weights), 12))


def text_similarity(a: str, b: str) -> float:
    """Return 2·matches / (tokens of a + tokens of b) over words, signs and indentation, in [0, 1]; 1 for equal ones.

    Between the common beginning and the common end only `MAX_TOKENS` tokens of each are matched; the rest counts
    as different.

    >>> text_similarity("git push origin main", "git push origin dev")
    0.75
    """
    if a == b:
        return 1.0
    left, right = _TOKEN.findall(a), _TOKEN.findall(b)
    size = len(left) + len(right)
    if not size:
        return 1.0
    shorter = min(len(left), len(right))
    start = next((i for i in range(shorter) if left[i] != right[i]), shorter)
    end = next((i for i in range(shorter - start) if left[-1 - i] != right[-1 - i]), shorter - start)
    middle = [tokens[start : len(tokens) - end][:MAX_TOKENS] for tokens in (left, right)]
    found = sum(block.size for block in SequenceMatcher(None, *middle, autojunk=False).get_matching_blocks())
    return 2 * (start + end + found) / size


def argument_problems(call: ToolCall, schema: Mapping[str, Any]) -> list[str]:
    """Return one sentence per argument of `call` that `schema` does not allow, or requires and misses."""
    parameters = _parameters(schema)
    known, required = parameters.get("properties") or {}, dict.fromkeys(parameters.get("required") or [])
    found = [f"{call.name} needs the argument {key!r}." for key in required if key not in call.arguments]
    for key, value in call.arguments.items():
        if known and key not in known:
            found.append(f"{call.name} has no argument {key!r}; it takes {', '.join(known)}.")
        elif not _has_type(value, known.get(key) or {}):
            kind = known[key]["type"]
            found.append(f"Argument {key!r} of {call.name} must be {kind}, found {type(value).__name__}.")
    return found


def _argument_score(call: ToolCall, tools: Mapping[str, Mapping[str, Any]]) -> float:
    if call.name not in tools:
        return 0.0
    required = _parameters(tools[call.name]).get("required") or []
    checked = len(set(required) | set(call.arguments))
    return 1.0 - len(argument_problems(call, tools[call.name])) / checked if checked else 1.0


def _parameters(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON schema of the arguments: of a function schema, or the schema itself."""
    return schema["parameters"] if isinstance(schema.get("parameters"), Mapping) else schema


def _has_type(value: Any, schema: Mapping[str, Any] | bool) -> bool:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None  # `true` is a schema as well
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not kinds or any(kind not in _TYPES for kind in kinds):
        return True
    if isinstance(value, bool):  # bool is an int in Python, but not in JSON
        return "boolean" in kinds
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)


def _parse_score(action: Message) -> float:
    if not action.tool_calls:
        return 0.0
    broken = [call for call in action.tool_calls if call.raw_arguments is not None]
    return 1.0 if not broken else NAMED if any(call.name for call in broken) else BEGUN


def _readable(action: Message) -> float:
    return sum(call.raw_arguments is None for call in action.tool_calls) / max(1, len(action.tool_calls))


def _match(
    calls: Sequence[ToolCall], expected: Sequence[ToolCall], tools: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float]:
    """Pair calls with expected calls of the same tool, most alike first; return (same_tool, agreement)."""
    candidates = [
        (_call_similarity(call, other, tools), i, j)
        for i, call in enumerate(calls)
        for j, other in enumerate(expected)
        if call.name == other.name and call.raw_arguments is None
    ]
    used_i: set[int] = set()
    used_j: set[int] = set()
    total = 0.0
    for similarity, i, j in sorted(candidates, key=lambda c: (-c[0], c[1], c[2])):
        if i not in used_i and j not in used_j:
            used_i.add(i)
            used_j.add(j)
            total += similarity
    size = max(len(calls), len(expected), 1)
    return len(used_i) / size, total / size


def _call_similarity(call: ToolCall, other: ToolCall, tools: Mapping[str, Mapping[str, Any]]) -> float:
    if canonical_call(call) == canonical_call(other):
        return 1.0
    required = _parameters(tools.get(call.name) or {}).get("required") or other.arguments.keys()
    total = weight_sum = 0.0
    for key in call.arguments.keys() | other.arguments.keys():
        weight = 1.0 if key in required else OPTIONAL
        weight_sum += weight
        if key in call.arguments and key in other.arguments:
            total += weight * _value_similarity(call.arguments[key], other.arguments[key])
    return total / weight_sum if weight_sum else 1.0


def _value_similarity(a: Any, b: Any) -> float:
    if isinstance(a, str) and isinstance(b, str):
        return text_similarity(a, b)
    if isinstance(a, list | dict) and type(a) is type(b):
        return text_similarity(json.dumps(a, sort_keys=True), json.dumps(b, sort_keys=True))
    return float(a == b and isinstance(a, bool) == isinstance(b, bool))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _feedback(
    action: Message, parts: Mapping[str, float], tools: Mapping[str, Mapping[str, Any]], targets: Sequence[Message]
) -> str | None:
    """Return the first thing that is wrong, in the order in which it has to be repaired."""
    if not action.tool_calls:
        return f'The reply holds no tool call. Call a tool with {OPEN}{{"name": ..., "arguments": {{...}}}}.'
    if broken := problems(action):
        return f"The tool call cannot be read: {broken[0]}."
    for call in action.tool_calls:
        if call.name not in tools:
            return f"There is no tool {call.name!r}; the tools are {', '.join(sorted(tools)) or 'none'}."
        if wrong := argument_problems(call, tools[call.name]):
            return wrong[0]
    if not targets or parts["agreement"] == 1.0:
        return None
    if not any(target.tool_calls for target in targets):
        return "The call is valid, but a final answer without a tool call was expected."
    if parts["same_tool"] < 1.0:
        return "The call is valid, but not what was expected here: use another tool, or another number of calls."
    return "The tool is right, but its arguments are not what was expected here."
