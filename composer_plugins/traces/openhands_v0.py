"""Events of OpenHands V0: an `action` or an `observation` each.

An observation belongs to the action whose id is its `cause`, or to the call of its `tool_call_metadata`; the
flat events of 2024 have neither ids nor sources, and there it belongs to the action before it. Actions whose
`model_response` is the same are one inference with several calls.

With `tool_call_metadata` a call has the name and arguments that the model gave. Without it the model wrote
text that the log does not keep: the call then has the name of the action (`run`, `run_ipython`, `edit`, ...)
and its fields, and the content is the recorded thought.

Format source: All-Hands-AI/OpenHands 0.x (MIT), `openhands/events/serialization/event.py`,
`openhands/events/tool.py`, `openhands/memory/conversation_memory.py`.
"""

from __future__ import annotations

from typing import Any

from composer_plugins.traces.accounts import Records
from composer_plugins.traces.lines import call_arguments, json_text
from composer_plugins.traces.model_fields import (
    answer_of,
    declared_tools,
    dict_at,
    list_at,
    name_of,
    text_or_none,
    thinking_of,
    whole,
)
from composer_plugins.traces.rewrites import RewrittenConversation
from composer_plugins.traces.schema import Status, ToolCall
from composer_plugins.traces.turns import Turn

TEXT_ACTION = "the kind and the fields of the recorded action -> call (the model's own text is not recorded)"

#: Actions that the model takes.
DEEDS = frozenset([
    "run", "run_ipython", "read", "write", "edit", "browse", "browse_interactive", "call_tool_mcp", "delegate",
    "think", "finish", "reject", "task_tracking", "push", "send_pr",
])  # fmt: skip
#: What happens around the conversation: counted, not part of it.
AROUND = frozenset([
    "recall", "change_agent_state", "null", "pause", "resume", "stop", "start", "condensation_request",
    "loop_recovery", "agent_state_changed", "condense", "loop_detection", "chat", "download", "success",
])  # fmt: skip
ACTIONS = DEEDS | {"message", "system", "condensation"} | AROUND
OBSERVATIONS = DEEDS | AROUND | {"error", "user_rejected", "mcp", "message"}

#: Fields of an action that are about the program and not an argument of the call.
_INTERNAL = frozenset([
    "thought", "action", "is_confirmed", "confirmation_state", "action_risk", "security_risk", "keep_prompt",
    "kernel_init_code", "include_extra", "blocking", "hidden", "wait_for_response", "timeout", "id", "source",
    "timestamp", "message", "cause", "args", "tool_call_metadata", "llm_metrics",
])  # fmt: skip


def is_event(value: Any) -> bool:
    """True for an event of this version."""
    if not isinstance(value, dict) or "role" in value:
        return False
    action, observation = value.get("action"), value.get("observation")
    if isinstance(action, str):
        return action in ACTIONS and bool({"args", "source", "thought", "content", "id"} & set(value))
    return isinstance(observation, str) and observation in OBSERVATIONS and "content" in value


class V0Events:
    """Collects the events of one conversation."""

    version = "V0"

    def __init__(self, source: str, records: Records, model: str | None = None) -> None:
        self.talk, self.records, self.model = RewrittenConversation(source), records, model
        self.tools: dict[str, dict[str, Any]] = {}
        self.outcome: str | None = None
        self.text_action: str | None = None
        self._calls: dict[str, str] = {}
        self._of_user: set[str] = set()
        self._response: str | None = None
        self._system = False

    def feed(self, event: dict[str, Any], line: int) -> None:
        """Take one event; it is counted as used or set aside."""
        key = None if event.get("id") is None else str(event["id"])
        if isinstance(event.get("action"), str):
            used = self._action(event, event["action"], key, line)
        elif isinstance(event.get("observation"), str):
            used = self._observation(event, event["observation"], key, line)
        else:
            self.records.damage("unknown_record", line, "expected an event with an action or an observation")
            self.lost()
            return
        if used:
            self.records.use()

    def lost(self) -> None:
        """Something before the next event could not be read."""
        self.talk.inexact("damaged_line")

    def close(self) -> None:
        """Nothing follows (see `V1Events`)."""

    # Actions.

    def _action(self, event: dict[str, Any], kind: str, key: str | None, line: int) -> bool:
        args = event["args"] if isinstance(event.get("args"), dict) else event
        source = event.get("source")
        if kind == "system":
            self._system = True
            self.talk.say("system", args.get("content"), key)
            self.tools |= declared_tools(args.get("tools"))
        elif kind == "message" and self._by_user(source, args):
            self.talk.say("user", args.get("content"), key)
        elif kind == "condensation":
            self._condense(args)
        elif kind in AROUND:
            self.records.skip(kind)
            return False
        elif source in ("user", "environment"):
            if key is not None:
                self._of_user.add(key)
            self.talk.inexact("attachment")
            self.records.skip("user_action")
            return False
        elif kind in DEEDS or kind == "message":
            self._deed(event, args, kind, key, line)
        else:
            self.records.damage("unknown_record", line, f"an action of the kind {kind[:40]!r}")
            self.lost()
            return False
        return True

    def _by_user(self, source: Any, args: dict[str, Any]) -> bool:
        """Who wrote a message; flat events do not say: the first is the task, and one follows a question."""
        if source is not None:
            return source != "agent"
        last = self.talk.open_turn
        if last is None:
            return not self.talk.items
        return not last.calls and args.get("wait_for_response") is not True

    def _deed(self, event: dict[str, Any], args: dict[str, Any], kind: str, key: str | None, line: int) -> None:
        metadata = dict_at(event, "tool_call_metadata")
        response = dict_at(metadata, "model_response")
        answer = answer_of(response)
        turn = self._inference(args, response, answer, line)
        if key is not None:
            turn.records.append(key)
        if kind == "message" and not metadata:
            return
        call_id = text_or_none(metadata.get("tool_call_id"))
        name, arguments = text_or_none(metadata.get("function_name")), None
        for call in list_at(answer, "tool_calls"):
            if isinstance(call, dict) and call.get("id") == call_id and isinstance(call.get("function"), dict):
                name = text_or_none(call["function"].get("name")) or name
                arguments = call_arguments(call["function"].get("arguments"))
        if arguments is None:
            self.text_action = self.text_action or (None if metadata else TEXT_ACTION)
            fields = {k: v for k, v in args.items() if k not in _INTERNAL and v not in (None, "", [], {})}
            arguments = call_arguments(fields)
        values, raw = arguments
        call = ToolCall(id=call_id or "", name=name_of(name, kind), arguments=values, raw_arguments=raw)
        self.talk.call(turn, call)
        if key is not None:
            self._calls[key] = call.id

    def _inference(self, args: dict[str, Any], response: dict[str, Any], answer: dict[str, Any], line: int) -> Turn:
        """The inference that an action came from: the last one, when it is the same response."""
        name = text_or_none(response.get("id"))
        last = self.talk.last_turn()
        if name is not None and name == self._response and last:
            return last
        self._response = name
        if not self._system:
            self.talk.inexact("system_prompt")
        thought = args.get("thought") or (args.get("content") if args.get("action", "message") == "message" else "")
        thinking = thinking_of(answer) or thinking_of(args)
        if isinstance(thought, dict):
            thought, thinking = thought.get("text"), thinking or text_or_none(thought.get("reasoning_content"))
        content = answer.get("content") if answer.get("content") else thought
        model = text_or_none(response.get("model")) or self.model
        return self.talk.turn(line, content=content, thinking=thinking, model=model)

    def _condense(self, args: dict[str, Any]) -> None:
        ids = args.get("forgotten_event_ids")
        start, end = whole(args.get("forgotten_events_start_id")), whole(args.get("forgotten_events_end_id"))
        if isinstance(ids, list):
            forgotten = {str(i) for i in ids}
        elif start is not None and end is not None:
            known = {key for item in self.talk.items for key in getattr(item, "records", ())}
            forgotten = {key for key in known if key.isdigit() and start <= int(key) <= end}
        else:
            forgotten = set()
        self.talk.rewrite(forgotten, text_or_none(args.get("summary")), whole(args.get("summary_offset")))

    # Observations.

    def _observation(self, event: dict[str, Any], kind: str, key: str | None, line: int) -> bool:
        extras = dict_at(event, "extras") or event
        if kind == "agent_state_changed":
            self.outcome = text_or_none(extras.get("agent_state")) or self.outcome
        if kind == "recall" and any(_payload(extras)):
            self.talk.inexact("attachment")
        call_id = self._target(event)
        if kind in AROUND and call_id is None:
            self.records.skip(kind)
            return False
        cause = str(event.get("cause"))
        if call_id is None and cause in self._of_user:
            self.records.skip("user_action")
            return False
        if call_id is None and kind == "error":
            self.talk.say("user", f"{self._content(event)}\n[Error occurred in processing last action]", key)
            return True
        if call_id is not None and self._answer(event, extras, kind, call_id, line):
            if key is not None:
                self.talk.holder_of(call_id).records.append(key)
            return True
        self.talk.inexact("unlinked")
        self.records.damage("result_without_call", line, "an observation that belongs to no open action")
        return False

    def _content(self, event: dict[str, Any]) -> str:
        return self.talk.text(event.get("content"))

    def _target(self, event: dict[str, Any]) -> str | None:
        """The call that an observation answers."""
        cause = event.get("cause")
        if cause is not None:
            return self._calls.get(str(cause))
        named = text_or_none(dict_at(event, "tool_call_metadata").get("tool_call_id"))
        if named is not None or event.get("id") is not None:
            return named if named and self.talk.holder_of(named) else None
        waiting = self.talk.open_turn.waiting if self.talk.open_turn else []
        return waiting[0].id if waiting and event["observation"] not in AROUND else None

    def _answer(self, event: dict[str, Any], extras: dict[str, Any], kind: str, call_id: str, line: int) -> bool:
        metadata = dict_at(extras, "metadata")
        code = whole(metadata.get("exit_code", extras.get("exit_code")))
        content = self._content(event)
        seen = rendered(content, metadata)
        if kind == "error":
            seen += "\n[Error occurred in processing last action]"
        status = Status.HUMAN_REJECT if kind == "user_rejected" else None
        return self.talk.result(
            call_id, content, line, flagged=kind == "error", exit_code=None if code == -1 else code, status=status,
            seen=seen,
        )  # fmt: skip


def rendered(content: str, metadata: dict[str, Any]) -> str:
    """A command's output as the model sees it (`to_agent_observation`; the same text in V1)."""
    if not metadata:
        return content
    text = f"{metadata.get('prefix') or ''}{content}{metadata.get('suffix') or ''}"
    if metadata.get("working_dir"):
        text += f"\n[Current working directory: {metadata['working_dir']}]"
    if metadata.get("py_interpreter_path"):
        text += f"\n[Python interpreter: {metadata['py_interpreter_path']}]"
    code = whole(metadata.get("exit_code"))
    return text if code in (None, -1) else f"{text}\n[Command finished with exit code {code}]"


def _payload(extras: dict[str, Any]) -> list[str]:
    """What a recall put into the context."""
    names = ("repo_name", "repo_instructions", "runtime_hosts", "additional_agent_instructions", "microagent_knowledge")
    return [json_text(extras[name]) for name in names if extras.get(name)]
