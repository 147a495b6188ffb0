"""From the records of one conversation to a trace: messages, steps, results."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from operator import itemgetter
from typing import Any

import msgspec

from composer_plugins.traces.classify import classify_text
from composer_plugins.traces.claude_code_records import (
    IMAGE,
    Block,
    Line,
    blocks_of,
    cleared_ids,
    text_of,
    to_call,
)
from composer_plugins.traces.claude_code_tree import Conversation, Node, injected_kind
from composer_plugins.traces.schema import Message, SourceRef, Status, Step, ToolCall, ToolResult

NO_RESULT = "[no result in the log]"
USAGE = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Inference(msgspec.Struct, eq=False, gc=False):
    """One model inference, gathered from the lines that share its `message.id`."""

    node: Node
    own: bool
    start: int
    inexact: list[str]
    texts: list[str] = []
    thinking: list[str] = []
    calls: dict[str, ToolCall] = {}
    results: dict[str, ToolResult] = {}
    usage: dict[str, Any] = {}
    interrupted: bool = False


class UserText(msgspec.Struct, eq=False, gc=False):
    """A user message; `injected` says what put it there when it was not the user."""

    content: str
    injected: str | None


class Builder:
    """Builds the messages and steps of one conversation.

    Args:
        source: file name for `SourceRef`.
        damaged: sorted numbers of lines that were lost; steps after one have an inexact history.
        kept_by: uuids of the records that a compaction keeps, by the `order` of its boundary (`kept_uuids`): they are
            shown again after its summary.
    """

    def __init__(self, source: str, damaged: list[int], kept_by: dict[int, list[str]] | None = None) -> None:
        self.source, self.damaged, self.kept_by = source, damaged, kept_by or {}
        self.kept = frozenset().union(*self.kept_by.values())
        self.found: dict[str, tuple[int, Inference | UserText]] = {}  # what is kept by some compaction, and its rank
        self.to_show: list[str] = []  # what stands again after the next summary
        self.items: list[Inference | UserText] = []
        self.by_message: dict[str, Inference] = {}
        self.by_call: dict[str, Inference] = {}
        self.reasons: list[str] = ["system_prompt"]  # Claude Code does not log its system prompt
        self.start = 0
        self.begun = False  # a record of the conversation's own was added
        self.images = 0
        self.blocks: Counter[str] = Counter()
        self.compactions = self.cleared = 0
        self.messages: list[Message] = []
        self.steps: list[Step] = []
        self.injected: list[list[Any]] = []

    def add(self, node: Node, *, own: bool) -> str | None:
        """Take one record; return why it led to nothing, or None when it was used."""
        if node.kind == "compact":
            self._compact()
            self.to_show = self.kept_by.get(node.order, [])
            return None
        if node.kind == "micro":
            self.cleared += len(cleared_ids(node.record))
            self.inexact("microcompaction")
            return None
        if (node.parent is None or own) and self._unlinked(node, own) and not node.record.isCompactSummary:
            self.inexact("unlinked")
        self.begun = self.begun or own
        count = len(self.items)
        reason = self._assistant(node, own) if node.kind == "assistant" else self._user(node.record, node.line)
        if self.kept and node.record.uuid in self.kept:
            item = self.by_message.get(_message_key(node)) if node.kind == "assistant" else None
            item = item or (self.items[count] if len(self.items) > count else None)
            if item is not None:
                self.found[node.record.uuid] = (len(self.found), item)
        return reason

    def _show_again(self) -> None:
        """Lay out what the compaction kept: once each, in the order of the records, and no steps of their own."""
        places = sorted((self.found[uuid] for uuid in self.to_show if uuid in self.found), key=itemgetter(0))
        again, self.to_show = {id(item): item for _, item in places}.values(), []
        self.items += [i if isinstance(i, UserText) else msgspec.structs.replace(i, own=False) for i in again]

    def _unlinked(self, node: Node, own: bool) -> bool:
        """True when what stood before a record in the model's context is not what stands before it here."""
        if node.parent is None:
            return node.dangling or bool(self.items and node.kind == "user" and own)
        return own and self.begun and node.parent.key != node.key

    def inexact(self, reason: str) -> None:
        """From here on the context is another one than the messages show."""
        if reason not in self.reasons:
            self.reasons = [*self.reasons, reason]

    def _compact(self) -> None:
        self.start = len(self.items)
        self.compactions += 1
        self.inexact("compaction")

    def _assistant(self, node: Node, own: bool) -> str | None:
        body, key = node.record.message, _message_key(node)
        inference = self.by_message.get(key)
        fresh = inference is None
        if fresh:
            inference = Inference(node, own, self.start, self._reasons_at(node.line))
        taken = False
        for block in blocks_of(body):
            taken = self._take(inference, block) or taken
        if body.usage:
            inference.usage = body.usage
        if fresh:
            self.by_message[key] = inference
            self.items.append(inference)
        return None if taken or fresh else "duplicate"

    def _reasons_at(self, line: int) -> list[str]:
        if self.damaged and bisect_left(self.damaged, line) > 0:
            self.inexact("damaged_line")
        return self.reasons

    def _take(self, inference: Inference, block: Block) -> bool:
        """Add one block; False when the inference has it already or it is of no use."""
        kind = block.type
        if kind == "tool_use" and block.id and block.name:
            if block.id in self.by_call:
                return False
            inference.calls[block.id] = to_call(block)
            self.by_call[block.id] = inference
            return True
        if kind == "text":
            text, known = block.text, inference.texts
        elif kind == "thinking":
            text, known = block.thinking, inference.thinking
        else:
            self._other(kind)
            return False
        if not text and kind == "thinking":
            self.inexact("encrypted_reasoning")  # its signature holds it, and stands before the next inference
        if not text or text in known:
            return False
        known.append(text)
        return True

    def _other(self, kind: str) -> None:
        """A block that has no place in a message here, and had one in the context."""
        self.blocks[kind] += 1
        self.inexact("encrypted_reasoning" if kind == "redacted_thinking" else "attachment")

    def _user(self, record: Line, line: int) -> str | None:
        texts, answered, orphans = [], False, 0
        for block in blocks_of(record.message):
            if block.type == "tool_result" or block.tool_use_id:
                taken = self._result(block, line)
                answered, orphans = answered or taken, orphans + (not taken)
            elif block.type == "text":
                texts.append(block.text or "")
            elif block.type in ("image", "document"):
                texts.append(IMAGE if block.type == "image" else "[document]")
                self.images += block.type == "image"
            else:
                self._other(block.type)
        content = "\n\n".join(t for t in texts if t)
        if not content:
            return None if answered else "orphan_result" if orphans else "empty_message"
        kind = injected_kind(record)
        if kind == "compact_summary" and "compaction" not in self.reasons:
            self._compact()  # a session that starts with the summary of another one
        if kind == "interruption":
            self._interrupt(content, line)
        self.items.append(UserText(content, kind))
        if kind == "compact_summary":
            self._show_again()
        return None

    def _result(self, block: Block, line: int) -> bool:
        inference = self.by_call.get(block.tool_use_id or "")
        if inference is None or block.tool_use_id in inference.results:
            return False
        text, images = text_of(block.content)
        self.images += images
        call = inference.calls[block.tool_use_id]
        status, error_class, exit_code = classify_text(text, flagged=bool(block.is_error), tool=call.name)
        inference.results[call.id] = ToolResult(
            call_id=call.id, content=text, status=status, error_class=error_class, exit_code=exit_code,
            source_ref=SourceRef(file=self.source, line=line),
        )  # fmt: skip
        return True

    def _interrupt(self, text: str, line: int) -> None:
        last = next((item for item in reversed(self.items) if isinstance(item, Inference)), None)
        if last is None:
            return
        waiting = [call for call in last.calls if call not in last.results]
        for call in waiting:
            last.results[call] = ToolResult(
                call_id=call, content=text, status=Status.INTERRUPTED, error_class="interrupted",
                source_ref=SourceRef(file=self.source, line=line),
            )  # fmt: skip
        if not last.calls and self.items[-1] is last:
            last.interrupted = True

    def finish(self) -> None:
        """Lay the items out as chat messages: an action, then the results of its calls, in call order."""
        messages, starts, missing = self.messages, [], False
        for item in self.items:
            starts.append(len(messages))
            if isinstance(item, UserText):
                if item.injected:
                    self.injected.append([len(messages), item.injected])
                messages.append(Message(role="user", content=item.content))
                continue
            self._step(item, starts, missing)
            for call in item.calls.values():
                result = item.results.get(call.id)
                if result is None:
                    missing = True
                    if item is self.items[-1]:
                        continue
                text = NO_RESULT if result is None else result.content
                messages.append(Message(role="tool", content=text, tool_call_id=call.id, name=call.name))

    def _step(self, item: Inference, starts: list[int], missing: bool) -> None:
        action = Message(
            role="assistant", content="\n\n".join(item.texts), tool_calls=list(item.calls.values()),
            thinking="\n\n".join(item.thinking) or None,
        )  # fmt: skip
        self.messages.append(action)
        if not item.own:
            return
        inexact = [*item.inexact, "missing_result"] if missing else item.inexact.copy()
        results = [item.results.get(c) or ToolResult(call_id=c, content="", status=Status.MISSING) for c in item.calls]
        reason = not_trainable(item, action, results)
        self.steps.append(
            Step(
                index=len(self.steps), action=len(self.messages) - 1, results=results, inexact=inexact,
                state_start=starts[item.start] if item.start < len(starts) else 0,
                source_ref=SourceRef(file=self.source, line=item.node.line), history_exact=not inexact,
                model=item.node.record.message.model, trainable=reason is None, not_trainable_reason=reason,
            )
        )  # fmt: skip

    def usage(self) -> dict[str, int]:
        """Token counts over the inferences; of split lines the last one counts."""
        total: dict[str, int] = {}
        for item in self.items:
            if isinstance(item, Inference) and item.own:
                for name in USAGE:
                    if isinstance(count := item.usage.get(name), int):
                        total[name] = total.get(name, 0) + count
        return total


def _message_key(node: Node) -> str:
    return node.record.message.id or node.record.uuid or f"line {node.line}"


def not_trainable(item: Inference, action: Message, results: list[ToolResult]) -> str | None:
    """Why a step must not be trained on, or None."""
    record = item.node.record
    if record.isApiErrorMessage:
        return "api_error"
    if record.message.model == "<synthetic>":
        return "synthetic"
    if item.interrupted:
        return "interrupted"
    for result in results:
        if result.status is Status.INTERRUPTED:
            return "interrupted"
    if not action.content and not action.tool_calls:
        return "empty_action"
    return None


def conversation_name(conversation: Conversation) -> str:
    """Trace id: the session, and for a sub-agent its name."""
    session = conversation.session_id or "no-session"
    return session if conversation.agent_id is None else f"{session}/{conversation.agent_id}"
