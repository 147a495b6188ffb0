"""The canonical records: trace, step, state, hint, replay, pair.

Shaped like ATIF 1.8 (one step = one model inference; results tied to calls by id) plus what ATIF lacks:
where each record came from, whether its history is exact, how each result ended, and whether a step may
be trained on. Every record is a `msgspec.Struct`: typed, validated when decoded, one JSON line each.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Status(StrEnum):
    """How a tool call ended. `error` is flagged by the log itself; `inferred_error` we found in the text."""

    OK = "ok"
    ERROR = "error"
    INFERRED_ERROR = "inferred_error"
    HUMAN_REJECT = "human_reject"
    INTERRUPTED = "interrupted"
    MISSING = "missing"

    @property
    def failed(self) -> bool:
        """True for the three classes that make an error turn: flagged, inferred, human."""
        return self in (Status.ERROR, Status.INFERRED_ERROR, Status.HUMAN_REJECT)


class Record(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """Base: keyword-only, defaults left out of the JSON.

    Records are trees and never hold themselves, so the cyclic garbage collector need not follow them (`gc=False`):
    that is a fifth of the time of reading a log.
    """


class SourceRef(Record, frozen=True):
    """Where a record was read: `file` as given by the user, `line` counted from 1 (0: whole document)."""

    file: str
    line: int


class ToolCall(Record):
    """One call of an action. `raw_arguments` is kept only when `arguments` could not be parsed."""

    id: str
    name: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    raw_arguments: str | None = None


class ToolResult(Record):
    """What came back for one call. `error_class` names a template in `composer_plugins/hints`."""

    call_id: str
    content: str
    status: Status = Status.OK
    exit_code: int | None = None
    error_class: str | None = None
    source_ref: SourceRef | None = None


class Message(Record):
    """One message of a conversation, in the OpenAI chat vocabulary. `thinking` is kept, never merged."""

    role: str  # system | user | assistant | tool
    content: str = ""
    tool_calls: list[ToolCall] = msgspec.field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None
    thinking: str | None = None

    def to_chat(self) -> dict[str, Any]:
        """Return the dict that chat templates take: arguments as an object, or as written when unreadable."""
        chat: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            chat["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _arguments(c)}}
                for c in self.tool_calls
            ]
        if self.tool_call_id is not None:
            chat["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            chat["name"] = self.name
        return chat


def _arguments(call: ToolCall) -> dict[str, Any] | str:
    return call.arguments if call.raw_arguments is None else call.raw_arguments


class Step(Record):
    """One model inference: its state is `trace.messages[state_start:action]`, its action one message.

    `state_start` > 0 after a compaction. `trainable` is false for synthetic, API-error, copied and
    interrupted steps. `inexact` says why `history_exact` is false: system_prompt (the log does not record
    it), compaction, microcompaction, attachment, demonstration (worked examples that the reader leaves out),
    missing_result, encrypted_reasoning (only the provider can read it), text_completion (a prompt that was
    plain text, shown as a message), prompt_differs and context_from_text (verl rollouts), unlinked or
    damaged_line.
    """

    index: int
    action: int
    source_ref: SourceRef
    state_start: int = 0
    results: list[ToolResult] = msgspec.field(default_factory=list)
    history_exact: bool = True
    inexact: list[str] = msgspec.field(default_factory=list)
    trainable: bool = True
    model: str | None = None
    not_trainable_reason: str | None = None
    reward: float | None = None

    @property
    def status(self) -> Status:
        """The worst outcome among the results (a step without calls is `ok`)."""
        order = [
            Status.HUMAN_REJECT, Status.ERROR, Status.INFERRED_ERROR, Status.INTERRUPTED, Status.MISSING,
        ]  # fmt: skip
        found = {r.status for r in self.results}
        return next((s for s in order if s in found), Status.OK)


class Trace(Record):
    """One agent session. `tools` maps each tool name seen to a JSON schema inferred from its calls."""

    id: str
    format: str
    messages: list[Message]
    steps: list[Step]
    agent: str | None = None
    session_id: str | None = None
    parent_id: str | None = None
    tools: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    outcome: str | None = None
    reward: float | None = None
    source_file: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)

    def action_of(self, step: Step) -> Message:
        """The assistant message that `step` produced."""
        return self.messages[step.action]

    def state_of(self, step: Step) -> list[Message]:
        """The messages before `step`, whole (see `composer_plugins.traces.states` for the budget)."""
        return self.messages[step.state_start : step.action]


class Hint(Record):
    """Text spliced in at an error turn, and why it is there. `generator` is the plugin that wrote it."""

    text: str
    error_class: str
    status: Status
    generator: str
    evidence: str = ""


class Cut(Record):
    """What the token budget removed from a state. The system prompt and the action are never cut."""

    messages_dropped: int = 0
    messages_shortened: int = 0
    tokens_removed: int = 0
    tools_dropped: int = 0


class State(Record):
    """The messages before one step, fit to a budget, with the recorded action and an optional hint.

    The unit of the pipeline after `ingest`: hints are added to it, teachers replay it, pairs and
    training prompts are made from it.

    `model` is the one that the log names for the recorded action; `cwd` the directory in which it was taken, when
    that is certain.
    """

    id: str
    trace_id: str
    step: int
    messages: list[Message]
    action: Message
    source_ref: SourceRef
    tools: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    results: list[ToolResult] = msgspec.field(default_factory=list)
    status: Status = Status.OK
    history_exact: bool = True
    trainable: bool = True
    cut: Cut = msgspec.field(default_factory=Cut)
    hint: Hint | None = None
    model: str | None = None
    cwd: str | None = None

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Tools in the OpenAI function format that chat templates and teachers take."""
        return [{"type": "function", "function": schema} for _, schema in sorted(self.tools.items())]


class Replay(Record):
    """What one teacher answered for one state. `error` is set, and `action` empty, when it failed.

    Teachers with the same `weights_id` are not independent votes. `request` is a hash of what was asked
    (teacher configuration, messages, tools, sample): an answer is reused only for the same request.
    `model` is what the server says it ran, `seconds` the time to the answer with all waiting and retries,
    `cost_usd` what the answer cost by the configured prices (None: no price is known).
    """

    state_id: str
    teacher: str
    model: str
    action: Message | None = None
    weights_id: str | None = None
    demonstration: bool = False
    sample: int = 0
    request: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    seconds: float | None = None


class Provenance(Record):
    """Why a pair exists: its rule, and who stood on each side ("recorded" or teacher names).

    `demonstration` is true when a demonstration teacher stood on a side, or when several samples of one
    set of weights were counted as votes.
    `ballots` says what each teacher voted for: chosen, rejected, other, or the kind of an answer that is no vote;
    `models` names the model of each teacher and of the recorded action. `cost_usd` is this pair's share of what the
    answers for its state cost. `confidence` is the posterior of a weighted vote, `own_family` the teachers on a side
    whose model is of the student's or the recorded agent's family, `error_class` how the recorded action failed.
    """

    rule: str  # agreement | disagreement | invalid_call | recovered_error | teachers
    chosen_by: list[str]
    rejected_by: list[str]
    source_ref: SourceRef
    votes: int = 0
    voters: int = 0
    demonstration: bool = False
    ballots: dict[str, str] = msgspec.field(default_factory=dict)
    models: dict[str, str] = msgspec.field(default_factory=dict)
    cost_usd: float | None = None
    confidence: float | None = None
    own_family: list[str] = msgspec.field(default_factory=list)
    trace_id: str | None = None
    error_class: str | None = None


class Pair(Record):
    """(state, chosen action, rejected action, provenance): one preference of the replay_dpo channel."""

    id: str
    state_id: str
    messages: list[Message]
    chosen: Message
    rejected: Message
    provenance: Provenance
    tools: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    similarity: float = 0.0
    weight: float = 1.0

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Tools in the OpenAI function format."""
        return [{"type": "function", "function": schema} for _, schema in sorted(self.tools.items())]
