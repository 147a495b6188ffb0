"""Reader of Claude Code session logs (JSONL, versions 1.0 to 2.1).

One content block stands on a line; lines that share `message.id` are one inference. Results are tied to
calls by `tool_use_id`. What the log does not say is marked and not guessed: the system prompt is never in
it, so no step has an exact history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer_plugins.traces.claude_code_build import Builder, conversation_name
from composer_plugins.traces.claude_code_records import Body, Line, decode_line, looks_like_claude_code
from composer_plugins.traces.claude_code_tree import Conversation, Forest, Node
from composer_plugins.traces.ledger import Problem
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.tools import infer_tools

#: Attachments that are about the program and not put before the model.
SILENT_ATTACHMENTS = ("hook_success", "hook_non_blocking_error", "hook_cancelled", "hook_system_message")


class ClaudeCodeReader:
    """Turns a Claude Code log into one trace per session and one per sub-agent."""

    name = "claude_code"

    def sniff(self, head: bytes) -> bool:
        """True when one of the first lines is a Claude Code record."""
        return looks_like_claude_code(head)

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of one file (see `composer_plugins.traces.base.TraceReader`).

        Damaged lines are named in `counts.problems` (for a `Ledger`) and in `trace.extra["problems"]`.
        Sub-agents have `parent_id`, the id of the session's trace.
        """
        scan = _Scan(path)
        traces = scan.traces()
        scan.settle(counts)
        yield from traces


class _Scan:
    """One pass over one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, str(path)
        self.forest = Forest()
        self.reasons: dict[int, str] = {}
        self.used: set[int] = set()
        self.problems: list[Problem] = []
        self.attachments: dict[tuple[str, str | None], list[int]] = {}
        self.total = 0
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                self.total = number
                self._line(number, raw)

    def _line(self, number: int, raw: bytes) -> None:
        records, damage = decode_line(raw)
        for item in damage:
            if item.reason != "blank_line":
                self.problems.append(Problem(self.source, number, item.reason, item.detail, item.fatal))
            if item.fatal:
                self.reasons.setdefault(number, item.reason)
        for record in records:
            reason = self._record(record, number)
            if reason is not None:
                self.reasons.setdefault(number, reason)

    def _record(self, record: Line, number: int) -> str | None:
        """File one record; return why it is not part of a conversation, or None."""
        kind = kind_of(record)
        if self.forest.known(record.uuid):
            return "duplicate"
        if kind in ("user", "assistant") and record.message is None:
            self.problems.append(Problem(self.source, number, "malformed_record", "a message without content"))
            return "malformed_record"
        if kind is None:
            if record.type in ("progress", "system", "attachment"):
                self.forest.pass_through(record)
                if record.type == "attachment":
                    self._attachment(record)
            elif not record.type:
                self.problems.append(Problem(self.source, number, "unknown_record", "an object without a type"))
                return "unknown_record"
            return record.type
        self.forest.add(record, number, kind)
        return None

    def _attachment(self, record: Line) -> None:
        """Remember where something unlogged entered a context."""
        if record.attachment is not None and record.attachment.type in SILENT_ATTACHMENTS:
            return
        key = (record.sessionId or "", self.forest.chain(record))
        self.attachments.setdefault(key, []).append(self.forest.size)

    def traces(self) -> list[Trace]:
        """Build every conversation that has a model step."""
        damaged = sorted({p.line for p in self.problems if p.lost})
        found = []
        for conversation in self.forest.finish():
            trace = self._trace(conversation, damaged)
            if trace is not None:
                found.append(trace)
        if found and self.problems:
            found[0].extra["problems"] = [
                {"line": p.line, "reason": p.reason, "detail": p.detail} for p in self.problems[:100]
            ]
        return found

    def _trace(self, conversation: Conversation, damaged: list[int]) -> Trace | None:
        builder = Builder(self.source, damaged)
        entered = self.attachments.get((conversation.session_id, conversation.agent_id), [])
        position = 0
        outcome: dict[int, str | None] = {}
        for node in conversation.prefix:
            self._note(outcome, node, builder.add(node, own=False))
        for node in conversation.nodes:
            while position < len(entered) and entered[position] <= node.order:
                builder.attachment()
                position += 1
            if node.dropped:
                self.reasons.setdefault(node.line, "rewound")
                continue
            self._note(outcome, node, builder.add(node, own=True))
        builder.finish()
        if not builder.steps:
            for line in outcome:
                self.reasons.setdefault(line, "no_model_step")
            return None
        for line, reason in outcome.items():
            if reason is None:
                self.used.add(line)
            else:
                self.reasons.setdefault(line, reason)
        return self._assemble(conversation, builder)

    @staticmethod
    def _note(outcome: dict[int, str | None], node: Node, reason: str | None) -> None:
        if reason is None or node.line not in outcome:
            outcome[node.line] = reason

    def _assemble(self, conversation: Conversation, builder: Builder) -> Trace:
        first = conversation.nodes[0].record
        extra: dict[str, Any] = {
            key: value
            for key, value in {
                "version": first.version,
                "cwd": first.cwd,
                "git_branch": first.gitBranch,
                "usage": builder.usage(),
                "images": builder.images,
                "injected": builder.injected,
                "compactions": builder.compactions,
                "cleared_results": builder.cleared,
                "resumed_messages": len(conversation.prefix),
                "other_blocks": dict(builder.blocks),
            }.items()
            if value
        }
        return Trace(
            id=conversation_name(conversation), format=ClaudeCodeReader.name, agent="claude-code",
            session_id=conversation.session_id or None,
            parent_id=(conversation.session_id or None) if conversation.agent_id else None,
            messages=builder.messages, steps=builder.steps, tools=infer_tools(builder.messages),
            source_file=self.source, extra=extra,
        )  # fmt: skip

    def settle(self, counts: Counter) -> None:
        """Account for every physical line of the file."""
        counts["read"] += self.total
        counts["used"] += len(self.used)
        for number in range(1, self.total + 1):
            if number not in self.used:
                counts["skipped:" + self.reasons.get(number, "not_used")] += 1
        problems = getattr(counts, "problems", None)
        if problems is not None:
            problems.extend(self.problems)


def kind_of(record: Line) -> str | None:
    """What a record is to the conversation; None: not part of it."""
    if record.type in ("user", "assistant"):
        return record.type
    if record.type == "system" and record.subtype == "compact_boundary":
        return "compact"
    if record.type == "system" and record.subtype == "microcompact_boundary":
        return "micro"
    if record.type == "attachment" and record.attachment is not None and record.attachment.type == "queued_command":
        prompt = record.attachment.prompt
        if isinstance(prompt, str) and prompt:
            record.message = Body(content=prompt)
            return "user"
    return None


#: What `register_trace_readers` names.
READER = ClaudeCodeReader()
