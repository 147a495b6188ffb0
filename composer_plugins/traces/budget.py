"""Fitting the messages before a step into a token budget, without lying about what was cut.

Order of cuts: long tool results and user texts are shortened in the middle, then the oldest whole messages
go (an action always together with the results of its calls), then what remains is shortened further. The
system prompt, the model's own messages and the recorded action are never cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from composer_plugins.traces.schema import Cut, Message

#: `count(messages, tools)`: tokens of the rendered prompt.
CountTokens = Callable[[list[dict[str, Any]], list[dict[str, Any]]], int]

MARKER = "\n[... {} characters left out ...]\n"
#: A shortened text keeps at least this many tokens, so that it still says something.
FLOOR = 24
#: A text may hold this share of the budget before others are dropped to make room for it.
SHARE = 0.25
_ROUNDS = 12


def characters_over_four(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> int:
    """Estimate tokens without a tokenizer: a quarter of the characters, and 4 tokens a message."""
    characters = sum(len(m.get("content") or "") for m in messages)
    characters += sum(len(json.dumps(m["tool_calls"])) for m in messages if m.get("tool_calls"))
    characters += len(json.dumps(tools)) if tools else 0
    return -(-characters // 4) + 4 * len(messages)


class Costs:
    """Token costs of single messages of one trace, each counted once.

    A chat template adds more or less the same tokens around every message, so the costs of the parts
    guide the cuts and one count of the whole decides. That keeps a trace of n steps linear in its length.
    """

    def __init__(self, count_tokens: CountTokens) -> None:
        self.count = count_tokens
        self._by_id: dict[int, tuple[Message, int]] = {}
        self._tools: dict[tuple[str, ...], int] = {}
        self.base = count_tokens([{"role": "user", "content": ""}], [])

    def of(self, message: Message) -> int:
        """Return the estimated cost of one message of the trace; counted on first use."""
        known = self._by_id.get(id(message))
        if known is None:
            known = self._by_id[id(message)] = (message, self.text(plain_text(message)))
        return known[1]

    def tools(self, tools: list[dict[str, Any]]) -> int:
        """Return what showing `tools` costs; counted once for each set of names."""
        names = tuple(tool["function"]["name"] for tool in tools)
        if names not in self._tools:
            self._tools[names] = self.count([{"role": "user", "content": ""}], tools) - self.base
        return self._tools[names]

    def text(self, text: str) -> int:
        """Return the cost of a text of its own message: the text and the template's frame."""
        return max(1, self.count([{"role": "user", "content": text}], []) - self.base) + 5


def plain_text(message: Message) -> str:
    """Everything of a message that a template renders, as one text."""
    calls = [json.dumps({"name": c.name, "arguments": c.arguments}) for c in message.tool_calls]
    return "\n".join([message.content, *calls]) if calls else message.content


def units_of(messages: list[Message]) -> list[list[int]]:
    """Group positions that may only be dropped together: an action and the results of its calls."""
    units: list[list[int]] = []
    for position, message in enumerate(messages):
        if message.role == "tool" and units and messages[units[-1][0]].tool_calls:
            units[-1].append(position)
        else:
            units.append([position])
    return units


def shorten_middle(text: str, keep: int) -> str:
    """Return `text` with about `keep` characters left, two thirds of them from the start.

    The marker says how many characters are gone; a text that would not get shorter is returned whole.
    """
    if len(text) <= keep:
        return text
    head = max(keep, 0) * 2 // 3
    tail = max(keep, 0) - head
    cut = text[:head] + MARKER.format(len(text) - head - tail) + (text[len(text) - tail :] if tail else "")
    return cut if len(cut) < len(text) else text


class Fit:
    """One state on its way into the budget.

    Args:
        messages: the whole state; nothing in it is changed.
        task: position of the user message that states the task, or None.
        tools: schemas that are rendered with the state.
        budget: tokens of the rendered prompt (messages, tools and the assistant header).
        costs: of the trace's messages.
    """

    def __init__(
        self, messages: list[Message], task: int | None, tools: list[dict[str, Any]], budget: int, costs: Costs
    ) -> None:
        self.messages, self.task, self.tools, self.budget, self.costs = messages, task, tools, budget, costs
        self.units = units_of(messages)
        self.fixed = [u for u in self.units if messages[u[0]].role == "system"]
        self.kept: list[list[int]] = list(self.units)
        self.limits: dict[int, int] = {}
        self.cost = {p: costs.of(m) for p, m in enumerate(messages)}
        self.overhead = costs.base + costs.tools(tools)

    def run(self) -> tuple[list[Message], Cut] | None:
        """Return the messages that fit and what was cut; None when the rest cannot be made to fit."""
        if not self.units:
            return None
        allowance = self.budget
        for _ in range(_ROUNDS):
            if not self._plan(allowance):
                return None
            result = self._render()
            tokens = self.costs.count([m.to_chat() for m in result], self.tools)
            if tokens <= self.budget:
                return result, self._cut(result, tokens)
            allowance -= max(tokens - self.budget, allowance // 50, 1)
        return None

    def _plan(self, allowance: int) -> bool:
        """Choose what is kept and how long each text may be, by estimated costs; False when nothing fits."""
        self.kept, self.limits = list(self.units), {}
        if self._estimate() <= allowance:
            return True
        self._limit(max(FLOOR, int(allowance * SHARE)))
        while self._estimate() > allowance and (unit := self._oldest()) is not None:
            self.kept.remove(unit)
        share = int(allowance * SHARE)
        while self._estimate() > allowance and share > FLOOR:
            share = max(FLOOR, share * 2 // 3)
            self._limit(share)
        if self._estimate() > allowance and self._drop_task():
            return self._estimate() <= allowance
        return self._estimate() <= allowance

    def _limit(self, tokens: int) -> None:
        """Let no kept tool result or user text cost more than `tokens`."""
        for unit in self.kept:
            for position in unit:
                if self.messages[position].role in ("tool", "user") and self.cost[position] > tokens:
                    self.limits[position] = tokens

    def _estimate(self) -> int:
        parts = (min(self.cost[p], self.limits.get(p, self.cost[p])) for unit in self.kept for p in unit)
        return self.overhead + sum(parts)

    def _oldest(self) -> list[int] | None:
        """The oldest unit that may go: not a system prompt, not the task, not the newest one."""
        for unit in self.kept[:-1]:
            if unit not in self.fixed and self.task not in unit:
                return unit
        return None

    def _drop_task(self) -> bool:
        unit = next((u for u in self.kept[:-1] if self.task in u), None)
        if unit is not None:
            self.kept.remove(unit)
        return unit is not None

    def _render(self) -> list[Message]:
        result = []
        for position in (p for unit in self.kept for p in unit):
            message, limit = self.messages[position], self.limits.get(position)
            if limit is not None and limit < self.cost[position]:
                message = self._shortened(message, limit, self.cost[position])
            result.append(message)
        return result

    @staticmethod
    def _shortened(message: Message, limit: int, cost: int) -> Message:
        keep = int(len(message.content) * limit / cost) - len(MARKER) - 6
        content = shorten_middle(message.content, max(keep, FLOOR))
        return message if content == message.content else msgspec.structs.replace(message, content=content)

    def _cut(self, result: list[Message], tokens: int) -> Cut:
        kept = [p for unit in self.kept for p in unit]
        shortened = sum(r is not self.messages[p] for r, p in zip(result, kept, strict=True))
        dropped = len(self.messages) - len(result)
        removed = self.overhead + sum(self.cost.values()) - tokens if dropped or shortened else 0
        return Cut(messages_dropped=dropped, messages_shortened=shortened, tokens_removed=max(removed, 0))
