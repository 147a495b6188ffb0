"""The turns of a verl rollout, recovered from its tokens.

verl keeps a rollout as prompt ids, response ids and a mask (1: the model sampled it, 0: tools or the chat template put
it in) and drops the messages of its agent loop. The actions are the runs of 1, exact by construction. What stands
between two of them is read back as messages and checked with verl's own `ContinuousTokenBuilder`: messages from which
it makes those very ids are what the agent loop had; all others are marked as inexact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from composer_plugins.models.toolcalls import parse_action

#: How verl's `ToolAgentLoop._call_tool` begins the result of a call that it could not run.
HOST_ERRORS = ("Error executing tool '", "Unknown function '", "Invalid JSON in arguments for '")

_FIRST, _SECOND = "FIRST7331RESULT", "SECOND7331RESULT"


@dataclass(frozen=True)
class Span:
    """Response tokens [start, end) that the model sampled, or that were put in."""

    start: int
    end: int
    sampled: bool


def spans(mask: list[int]) -> list[Span]:
    """Return the runs of a response mask, in order.

    >>> [(s.start, s.end, s.sampled) for s in spans([1, 1, 0, 1])]
    [(0, 2, True), (2, 3, False), (3, 4, True)]
    """
    edges = [0, *(i for i in range(1, len(mask)) if bool(mask[i]) != bool(mask[i - 1])), len(mask)]
    return [Span(a, b, bool(mask[a])) for a, b in pairwise(edges) if a < b]


def host_error(text: str) -> bool:
    """True for a tool result in which verl itself says that the call failed (its texts show no other trait)."""
    return text.startswith(HOST_ERRORS)


@dataclass
class Turns:
    """One rollout as chat messages.

    Args:
        messages: prompt and response, in the OpenAI chat vocabulary; calls and results are tied by id.
        actions: (index into messages, token span in the response) of each action.
        prompt_messages: how many of `messages` are the prompt.
        inexact: index into messages → why what stands there is not exactly what the model read.
    """

    messages: list[dict[str, Any]]
    actions: list[tuple[int, Span]] = field(default_factory=list)
    prompt_messages: int = 0
    inexact: dict[int, str] = field(default_factory=dict)


class TurnReader:
    """Reads rollouts of one model and tool set back into messages.

    Args:
        builder: verl's `ContinuousTokenBuilder` of the model (`create_continuous_token_builder`), with its tokenizer.
        tools: the tool schemas that the agent loop renders (OpenAI format), or None.
        parse: sampled ids without end-of-turn token → (assistant message, its calls); default: the `<tool_call>`
            format that verl calls `hermes`, read by the core so that a call that cannot be read is kept.
    """

    def __init__(
        self, builder: Any, *, tools: list[dict[str, Any]] | None = None,
        parse: Callable[[list[int]], tuple[dict[str, Any], list[dict[str, Any]]]] | None = None,
    ) -> None:  # fmt: skip
        self.builder, self.tokenizer = builder, builder.tokenizer
        self.tools = tools or None
        self.parse = parse or self._parse_tags
        self._special = set(self.tokenizer.all_special_ids)
        self._frames: dict[str, tuple[str, str, str] | None] = {}

    def read(
        self, prompt: list[dict[str, Any]], prompt_ids: list[int], response_ids: list[int], mask: list[int], *,
        kept: Any = None,
    ) -> Turns:  # fmt: skip
        """Return the messages of one rollout.

        Args:
            prompt: verl's `raw_prompt`, the messages that the agent loop started from.
            prompt_ids, response_ids: token ids; `mask` as long as `response_ids`.
            kept: all messages as an agent loop of the user's kept them, prompt included; what stands between the
                actions is then taken from there. Ignored when it has another number of actions.
        """
        turns = Turns([dict(message) for message in prompt], prompt_messages=len(prompt))
        if self._render(prompt) != list(prompt_ids):
            turns.inexact[0] = "prompt_differs"
        parts = spans(mask)
        between = _between(kept, len(prompt), sum(part.sampled for part in parts))
        calls: list[dict[str, Any]] = []
        for span in parts:
            ids = list(response_ids[span.start : span.end])
            if span.sampled:
                turns.actions.append((len(turns.messages), span))
                message = self.action(ids, len(turns.actions) - 1)
                calls = message.get("tool_calls", [])
                turns.messages.append(message)
            else:
                before = len(turns.messages)
                if between is None:
                    found, exact = self.context(ids, calls, turns.messages)
                else:
                    found, exact = _answers(between[len(turns.actions)], calls), True
                turns.messages += found
                if not exact:
                    turns.inexact[before] = "context_from_text"
        return turns

    def action(self, ids: list[int], number: int) -> dict[str, Any]:
        """Return sampled ids as an assistant message; ids of its calls are made of `number` and their order."""
        end = len(ids)
        while end and ids[end - 1] in self._special:
            end -= 1
        message, calls = self.parse(ids[:end])
        if calls:
            message["tool_calls"] = [{**call, "id": f"call_{number}_{k}"} for k, call in enumerate(calls)]
        return message

    def context(
        self, ids: list[int], calls: list[dict[str, Any]], before: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return what was put between two actions as messages, and whether verl makes the same ids of them.

        Args:
            ids: the tokens between the actions.
            calls: those of the action before; the results are theirs, in order, as verl runs them.
            before: the messages before the ids.
        """
        text = self.tokenizer.decode(ids)
        for role in ("tool", "user") if calls else ("user", "tool"):
            contents = self._contents(text, role, len(_runnable(calls)) or 1 if role == "tool" else 1)
            if contents is None:
                continue
            if not contents:
                break
            found = [{"role": role, "content": content} for content in contents]
            if self._same(found, ids, before):
                return (_answers(found, calls) if role == "tool" else found), True
        shown = self.tokenizer.decode([i for i in ids if i not in self._special]).strip()
        if not shown:  # the end of a turn and the next generation prompt: no message
            return [], True
        role = "tool" if calls else "user"
        found = [{"role": role, "content": shown}]
        return (_answers(found, calls) if role == "tool" else found), False

    def _contents(self, text: str, role: str, most: int) -> list[str] | None:
        """The contents of up to `most` messages of a role in the text between two actions, by the template's frame.

        None: another frame; empty: a result quotes the frame, so that more than one reading fits.
        """
        if role not in self._frames:
            self._frames[role] = self._frame(role)
        frame = self._frames[role]
        if frame is None:
            return None
        head, between, tail = frame
        start = text.find(head)
        if start < 0 or not text.endswith(tail) or len(text) - len(tail) < start + len(head):
            return None
        body = text[start + len(head) : len(text) - len(tail)]
        found = body.split(between) if between and most > 1 else [body]
        return found if len(found) <= most else []

    def _frame(self, role: str) -> tuple[str, str, str] | None:
        """What the template writes before, between and after messages of a role, generation prompt included."""
        first, second = {"role": role, "content": _FIRST}, {"role": role, "content": _SECOND}
        both = [first, second] if role == "tool" else [first]
        ids = self._increment(both, [])
        if ids is None:
            return None
        text = self.tokenizer.decode(ids)
        if text.count(_FIRST) != 1 or (role == "tool" and text.count(_SECOND) != 1):
            return None
        head, rest = text.split(_FIRST)
        between, tail = rest.split(_SECOND) if role == "tool" else ("", rest)
        return (head, between, tail) if head.strip() else None

    def _same(self, found: list[dict[str, Any]], ids: list[int], before: list[dict[str, Any]]) -> bool:
        """True when verl makes exactly `ids` of the messages; it may put the end of the turn before them."""
        made = self._increment(found, before)
        if made is None or not made or ids[-len(made) :] != made:
            return False
        rest = [i for i in ids[: -len(made)] if i not in self._special]
        return not rest or not self.tokenizer.decode(rest).strip()

    def _increment(self, messages: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[int] | None:
        try:
            return list(
                self.builder.tokenize_context_incremental_messages(before, [*before, *messages], tools=self.tools)
            )
        except Exception:  # a template without this role: whatever it raises, the text is not read by a frame
            return None

    def _render(self, prompt: list[dict[str, Any]]) -> list[int] | None:
        try:
            return list(self.builder.build_initial_tokens(prompt, tools=self.tools))
        except Exception:
            return None

    def _parse_tags(self, ids: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        found = parse_action(self.tokenizer.decode(ids))
        message: dict[str, Any] = {"role": "assistant", "content": found.content}
        if found.thinking is not None:
            message["reasoning_content"] = found.thinking
        return message, [
            _call(call.name, call.arguments if call.raw_arguments is None else call.raw_arguments)
            for call in found.tool_calls
        ]


def verl_parser(name: str, tokenizer: Any) -> Callable[[list[int]], tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return `TurnReader.parse` made of verl's own parser for `rollout.multi_turn.format: name`.

    Raises:
        ValueError: verl has no such format.
    """
    import asyncio
    import json
    from concurrent.futures import ThreadPoolExecutor

    from verl.experimental.agent_loop.tool_parser import ToolParser

    parser, thread = ToolParser.get_tool_parser(name, tokenizer), ThreadPoolExecutor(1)

    def parse(ids: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        # in a thread of its own: the caller may be inside an event loop
        content, found = thread.submit(lambda: asyncio.run(parser.extract_tool_calls(ids))).result()
        calls = []
        for call in found:
            try:
                arguments = json.loads(call.arguments)
            except ValueError:
                arguments = call.arguments
            calls.append(_call(call.name, arguments))
        return {"role": "assistant", "content": content or ""}, calls

    return parse


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _between(kept: Any, prompt: int, actions: int) -> list[list[dict[str, Any]]] | None:
    """The messages before the first action, between the actions and behind the last; None when they do not fit."""
    if not isinstance(kept, list) or not all(isinstance(message, dict) for message in kept):
        return None
    parts: list[list[dict[str, Any]]] = [[]]
    for message in kept[prompt:]:
        if message.get("role") == "assistant":
            parts.append([])
        else:
            parts[-1].append(message)
    # verl's own loop does not add the action with which it stops for a limit
    return parts + [[]] * (actions + 1 - len(parts)) if len(parts) in (actions, actions + 1) else None


def _runnable(calls: list[dict[str, Any]]) -> list[str]:
    """The ids of the calls that verl's parsers can read."""
    return [call["id"] for call in calls if isinstance(call["function"]["arguments"], dict)]


def _answers(results: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tie results to the calls that verl could run, in order, and flag those in which verl says that one failed."""
    run = _runnable(calls)
    tied, position = [], 0
    for result in results:
        if result.get("role") == "tool":
            more = {"tool_call_id": run[position]} if position < len(run) else {}
            text = result.get("content")
            failed = {"is_error": True} if isinstance(text, str) and host_error(text) else {}
            result, position = {**result, **more, **failed}, position + 1
        tied.append(result)
    return tied
