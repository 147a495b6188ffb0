"""Events of OpenHands V1 (the software agent SDK): each names its class in `kind`.

`ActionEvent`s with the same `llm_response_id` are one inference. A result is told by its `tool_call_id`; that
`is_error` is false does not make it good: a terminal says `is_error: false` beside `exit_code: 1`. A
`Condensation` names the events that were forgotten and the summary in their place: the view after it is laid
out anew, and is not called exact. Events may form a tree (`parent_id`): only the branch of the last event is
the conversation.

Format source: OpenHands/software-agent-sdk (MIT), `openhands-sdk/openhands/sdk/event/`,
`openhands-tools/openhands/tools/terminal/definition.py`.
"""

from __future__ import annotations

from typing import Any

from composer_plugins.traces.accounts import Records
from composer_plugins.traces.lines import call_arguments
from composer_plugins.traces.model_fields import (
    content_of,
    declared_tools,
    dict_at,
    dig,
    list_at,
    name_of,
    text_or_none,
    thinking_of,
    whole,
)
from composer_plugins.traces.openhands_v0 import rendered
from composer_plugins.traces.rewrites import RewrittenConversation
from composer_plugins.traces.schema import Status, ToolCall
from composer_plugins.traces.turns import Turn

SOURCES = ("agent", "user", "environment", "hook")
KINDS = frozenset([
    "SystemPromptEvent", "MessageEvent", "ActionEvent", "ObservationEvent", "AgentErrorEvent",
    "UserRejectObservation", "Condensation", "CondensationSummaryEvent", "CondensationRequest",
    "ConversationStateUpdateEvent", "ConversationErrorEvent", "PauseEvent", "InterruptEvent", "TokenEvent",
    "StreamingDeltaEvent", "HookExecutionEvent", "LLMCompletionLogEvent", "ACPToolCallEvent",
])  # fmt: skip
#: The name of no event: "the parent is the start" (`ROOT_PARENT_ID`).
ROOT = "__root__"


def is_event(value: Any) -> bool:
    """True for an event of this version."""
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return False
    return value["kind"] in KINDS or (value["kind"].endswith("Event") and value.get("source") in SOURCES)


#: Stands in the list of events where something was lost.
_GAP: dict[str, Any] = {}


class V1Events:
    """Collects the events of one conversation; the conversation is made when all are there."""

    version = "V1"
    text_action: str | None = None

    def __init__(self, source: str, records: Records, model: str | None = None) -> None:
        self.talk, self.records, self.model = RewrittenConversation(source), records, model
        self.tools: dict[str, dict[str, Any]] = {}
        self.outcome: str | None = None
        self._events: list[tuple[dict[str, Any], int]] = []
        self._parents: dict[str, str | None] = {}
        self._branches = False
        self._before: str | None = None
        self._calls: dict[str, str] = {}
        self._response: str | None = None
        self._system = False

    def feed(self, event: dict[str, Any], line: int) -> None:
        """Take one event."""
        if not isinstance(event.get("kind"), str):
            self.records.damage("unknown_record", line, "expected an event with a kind")
            self.lost()
            return
        key, parent = text_or_none(event.get("id")), text_or_none(event.get("parent_id"))
        if key is not None and key in self._parents:
            self.records.skip("duplicate")
            return
        if key is not None:
            self._branches = self._branches or parent is not None
            self._parents[key] = None if parent == ROOT else parent or self._before
            self._before = key
        self._events.append((event, line))

    def lost(self) -> None:
        """Something before the next event could not be read."""
        self._events.append((_GAP, 0))

    def close(self) -> None:
        """Make the conversation from the events of the last branch."""
        live = self._live() if self._branches else None
        for event, line in self._events:
            if event is _GAP:
                self.talk.inexact("damaged_line")
                continue
            key = text_or_none(event.get("id"))
            if live is not None and key is not None and key not in live:
                self.records.skip("rewound")
                continue
            handler = _HANDLERS.get(event["kind"])
            if handler is None:
                self.records.skip(event["kind"] if event["kind"] in KINDS else "unknown_record")
                if event["kind"] not in KINDS:  # it may have stood before the model
                    self.talk.inexact("damaged_line")
                self._note(event)
            elif handler(self, event, key, line):
                self.records.use()
        self._events = []

    def _live(self) -> set[str]:
        live: set[str] = set()
        key = self._before
        while key is not None and key not in live:
            live.add(key)
            key = self._parents.get(key)
        return live

    def _note(self, event: dict[str, Any]) -> None:
        """What the program's own events say about the run: the model, and how it ended."""
        if event["kind"] == "ConversationErrorEvent":
            self.outcome = text_or_none(event.get("code")) or self.outcome
        elif event.get("key") == "execution_status":
            self.outcome = text_or_none(event.get("value")) or self.outcome
        elif event.get("key") == "stats" and self.model is None:
            self.model = text_or_none(dig(event, "value", "usage_to_metrics", "default", "model_name"))

    def _system_prompt(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        self._system = True
        parts = [event.get("system_prompt"), event.get("dynamic_context")]
        self.talk.say("system", [part for part in parts if part], key)
        self.tools |= declared_tools(event.get("tools"))
        return True

    def _message(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        message = dict_at(event, "llm_message")
        content = _parts(message.get("content")) + _parts(event.get("extended_content"))
        if event.get("source") == "agent" and message.get("role", "assistant") == "assistant":
            thinking = thinking_of(message) or _reasoning(message.get("responses_reasoning_item"))
            turn = self._act(line, content, thinking, None)
            if key is not None:
                turn.records.append(key)
        else:
            role = message.get("role")
            self.talk.say(role if role in ("system", "user") else "user", content, key)
        return True

    def _act(self, line: int, content: Any, thinking: str | None, response: str | None) -> Turn:
        self._response = response
        if not self._system:
            self.talk.inexact("system_prompt")
        return self.talk.turn(line, content=content, thinking=thinking, model=self.model)

    def _action(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        response, turn = text_or_none(event.get("llm_response_id")), self.talk.last_turn()
        if response is None or response != self._response or turn is None:
            thinking = thinking_of(event) or _reasoning(event.get("responses_reasoning_item"))
            turn = self._act(line, event.get("thought"), thinking, response)
        call = dict_at(event, "tool_call")
        function = dict_at(call, "function") or call
        arguments = function.get("arguments")
        if arguments is None and isinstance(event.get("action"), dict):
            arguments = {k: v for k, v in event["action"].items() if k != "kind" and v is not None}
        call_id = text_or_none(event.get("tool_call_id")) or text_or_none(call.get("id"))
        name = text_or_none(function.get("name")) or name_of(event.get("tool_name"))
        values, raw = call_arguments(arguments)
        made = ToolCall(id=call_id or "", name=name, arguments=values, raw_arguments=raw)
        self.talk.call(turn, made)
        if key is not None:
            turn.records.append(key)
            self._calls[key] = made.id
        return True

    def _answer(self, event: dict[str, Any], key: str | None, line: int, content: Any, **how: Any) -> bool:
        named, cause = text_or_none(event.get("tool_call_id")), text_or_none(event.get("action_id"))
        call_id = self._calls.get(cause or "") or named
        if call_id is None or not self.talk.result(call_id, content, line, **how):
            self.talk.inexact("unlinked")
            self.records.damage("result_without_call", line, "an observation that belongs to no open action")
            return False
        if key is not None:
            self.talk.holder_of(call_id).records.append(key)
        return True

    def _observation(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        observation = dict_at(event, "observation")
        metadata = dict_at(observation, "metadata")
        content = observation.get("content", observation.get("output", observation.get("text")))
        code = whole(observation.get("exit_code"))
        code = code if code is not None else whole(metadata.get("exit_code"))
        flagged = observation.get("is_error") is True or observation.get("timeout") is True
        seen = rendered(content_of(content).text, metadata)
        if observation.get("is_error") is True:
            seen = f"[An error occurred during execution.]\n{seen}"
        extended = _parts(event.get("extended_content"))
        return self._answer(
            event, key, line, content, flagged=flagged, exit_code=None if code == -1 else code,
            seen=[seen, *extended],
        )  # fmt: skip

    def _error(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        return self._answer(event, key, line, event.get("error"), flagged=True)

    def _reject(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        reason = content_of(event.get("rejection_reason")).text
        by_hook = event.get("rejection_source") == "hook"
        status = Status.ERROR if by_hook else Status.HUMAN_REJECT
        return self._answer(event, key, line, reason, flagged=by_hook, status=status, seen=f"Action rejected: {reason}")

    def _condense(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        forgotten = [i for i in list_at(event, "forgotten_event_ids") if isinstance(i, str)]
        self.talk.rewrite(forgotten, text_or_none(event.get("summary")), whole(event.get("summary_offset")))
        return True

    def _summary(self, event: dict[str, Any], key: str | None, line: int) -> bool:
        self.talk.inexact("compaction")
        self.talk.say("user", event.get("summary"), key)
        return True


_HANDLERS = {
    "SystemPromptEvent": V1Events._system_prompt,
    "MessageEvent": V1Events._message,
    "ActionEvent": V1Events._action,
    "ObservationEvent": V1Events._observation,
    "AgentErrorEvent": V1Events._error,
    "UserRejectObservation": V1Events._reject,
    "Condensation": V1Events._condense,
    "CondensationSummaryEvent": V1Events._summary,
}


def _parts(content: Any) -> list[Any]:
    if content is None:
        return []
    return content if isinstance(content, list) else [content]


def _reasoning(item: Any) -> str | None:
    """The readable part of a reasoning item of the Responses API."""
    if not isinstance(item, dict):
        return None
    texts = [text for key in ("summary", "content") for text in _parts(item.get(key)) if isinstance(text, str)]
    return "\n\n".join(texts) or None
