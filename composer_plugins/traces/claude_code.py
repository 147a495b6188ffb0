"""Reader of Claude Code session logs (JSONL, versions 1.0 to 2.1).

One content block stands on a line; lines that share `message.id` are one inference. Results are tied to
calls by `tool_use_id`. What the log does not say is marked and not guessed: the system prompt is never in
it, so no step has an exact history.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from composer_plugins.traces.beside import read_beside
from composer_plugins.traces.claude_code_build import Builder, conversation_name
from composer_plugins.traces.claude_code_compaction import kept_uuids
from composer_plugins.traces.claude_code_fates import Fates
from composer_plugins.traces.claude_code_records import (
    Body,
    Line,
    Outcome,
    decode_batch,
    decode_line,
    looks_like_agent_meta,
    looks_like_claude_code,
    prompt_text,
)
from composer_plugins.traces.claude_code_stream import STREAM_ABOVE, session_ends, session_of
from composer_plugins.traces.claude_code_tree import Conversation, Forest, Node
from composer_plugins.traces.ledger import Problem, Problems
from composer_plugins.traces.lines import Damage, iter_batches, without_end
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.tools import infer_tools

#: Attachments that are about the program and not put before the model.
SILENT_ATTACHMENTS = ("hook_success", "hook_non_blocking_error", "hook_cancelled", "hook_system_message")
#: Records that change what the model sees and are no messages: results replaced by stubs, a stretch of messages by a
#: summary, the context of the session put before that of a sub-agent.
CHANGES = {
    "content-replacement": "microcompaction",
    "marble-origami-commit": "compaction",
    "fork-context-ref": "unlinked",
}

#: How many damaged places are copied into a trace.
_SHOWN = 100


class ClaudeCodeReader:
    """Turns a Claude Code log into one trace per session and one per sub-agent."""

    name = "claude_code"

    def sniff(self, head: bytes) -> bool:
        """True when one of the first lines is a Claude Code record."""
        return looks_like_claude_code(head)

    def companion(self, head: bytes) -> str | None:
        """`sub_agent_description` for the file beside a sub-agent's log; the log's trace takes it up."""
        return "sub_agent_description" if looks_like_agent_meta(head) else None

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of one file (see `composer_plugins.traces.base.TraceReader`).

        A file above `STREAM_ABOVE` yields a session's traces once its last line is passed, in the memory of the
        sessions that overlap there (one giant session takes its own size); a smaller one is held whole. Damaged
        lines are named in `counts.problems` (for a `Ledger`) and in `trace.extra["problems"]`. Sub-agents have
        `parent_id`, the id of the session's trace.
        """
        ends = session_ends(path) if path.stat().st_size > STREAM_ABOVE else {}
        scan = _Scan(path)
        for first, lines in iter_batches(path):
            done = 0
            for line in [number for number in range(first, first + len(lines)) if number in ends] if ends else ():
                scan.batch(first + done, lines[done : line + 1 - first])
                yield from scan.close(ends[line])
                done = line + 1 - first
            scan.batch(first + done, lines[done:])
        yield from scan.close(None)
        scan.settle(counts)


class _Lost(NamedTuple):
    """A line of which something was lost, and the session that it names."""

    line: int
    session: str | None


class _Scan:
    """One pass over one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, str(path)
        self.forest = Forest()
        self.fates = Fates()
        self.problems = Problems()
        self.lost: list[_Lost] = []

    def batch(self, first: int, lines: list[bytes | None]) -> None:
        """Take the next lines; `first` is the number of the first one."""
        self.fates.extend(len(lines))
        records = decode_batch(lines)
        if records is None:
            for number, raw in enumerate(lines, first):
                self._line(number, raw and without_end(raw))
            return
        for number, record in enumerate(records, first):
            reason = self._record(record, number, lines[number - first])
            if reason is not None:
                self.fates.settle(number, reason)

    def _line(self, number: int, raw: bytes | None) -> None:
        """Take a line that may be damaged, or hold several records."""
        records, damage = decode_line(raw)
        if damage:
            self._damage(number, raw, damage)
        for record in records:
            reason = self._record(record, number, raw)
            if reason is not None:
                self.fates.settle(number, reason)

    def _damage(self, number: int, raw: bytes | None, damage: list[Damage]) -> None:
        for item in damage:
            if item.reason != "blank_line":
                self.problems.append(Problem(self.source, number, item.reason, item.detail, item.lost))
            if item.fatal:
                self.fates.settle(number, item.reason)
        if any(item.lost for item in damage):
            self.lost.append(_Lost(number, session_of(raw)))

    def _record(self, record: Line, number: int, raw: bytes | None) -> str | None:
        """File one record; return why it is not part of a conversation, or None."""
        kind = record.type
        if self.forest.known(record.uuid):
            return "duplicate"
        if record.session_id is not None:
            self.forest.printed(record)
        if kind != "assistant" and kind != "user":
            kind = kind_of(record)
            if kind is None:
                return self._aside(record, number, raw)
        elif record.message is None:
            return self._malformed(number, raw, "malformed_record", "a message without content")
        node = self.forest.add(record, number, kind)
        if kind == "user" and isinstance(record.toolUseResult, Outcome) and record.toolUseResult.agentId:
            self._started(node, record)
        return None

    def _aside(self, record: Line, number: int, raw: bytes | None) -> str:
        kind = record.type
        if not kind:
            return self._malformed(number, raw, "unknown_record", "an object without a type")
        if kind in CHANGES:
            key = (record.sessionId or record.parentSessionId or "", record.agentId)
            self.forest.changed(key, CHANGES[kind])
        if record.uuid is None and kind not in ("progress", "system", "attachment"):
            return kind  # beside the conversation; any other record may be a link of it, of a kind not known here too
        key = self.forest.link(record)
        silent = record.attachment is not None and record.attachment.type in SILENT_ATTACHMENTS
        if kind == "attachment" and not silent:
            self.forest.changed(key, "attachment")
        elif kind == "system" and record.subtype == "snip_boundary":
            self.forest.changed(key, "compaction")
        return kind

    def _malformed(self, number: int, raw: bytes | None, reason: str, detail: str) -> str:
        self._damage(number, raw, [Damage(reason, detail, fatal=False)])
        return reason

    def _started(self, node: Node, record: Line) -> None:
        calls = [b.tool_use_id for b in record.message.content if not isinstance(b, str) and b.tool_use_id]
        if len(calls) == 1 and isinstance(record.toolUseResult.agentId, str):
            self.forest.started(node, record.toolUseResult.agentId, calls[0])

    def close(self, sessions: list[str] | None) -> list[Trace]:
        """Build the conversations that are complete now and have a model step."""
        ready = self.forest.close(sessions, forget=sessions is not None)
        return [trace for trace in map(self._trace, ready) if trace is not None]

    def _trace(self, conversation: Conversation) -> Trace | None:
        if not conversation.nodes:
            return None
        builder = Builder(self.source, self._lost_of(conversation), kept_uuids(conversation))
        outcome: dict[int, str | None] = {}
        for node in conversation.prefix:
            _note(outcome, node.line, builder.add(node, own=False))
        changes, position = conversation.changes, 0
        for node in conversation.nodes:
            while position < len(changes) and changes[position][0] <= node.order:
                builder.inexact(changes[position][1])
                position += 1
            if node.dropped:
                self.fates.settle(node.line, "rewound")
            else:
                _note(outcome, node.line, builder.add(node, own=True))
        builder.finish()
        for line, reason in outcome.items():
            self.fates.settle(line, reason if builder.steps else "no_model_step")
        return self._assemble(conversation, builder) if builder.steps else None

    def _lost_of(self, conversation: Conversation) -> list[int]:
        """Lost lines between the records of a conversation, or of the past that it resumes, that may have been its own."""
        if not self.lost:
            return []
        lost = self._lost_between(conversation.nodes, {conversation.session_id})
        if conversation.prefix:
            lost += self._lost_between(conversation.prefix, {node.key[0] for node in conversation.prefix})
        return sorted(set(lost))

    def _lost_between(self, nodes: list[Node], sessions: set[str]) -> list[int]:
        first, last = nodes[0].line, nodes[-1].line
        later = self.lost[bisect_right(self.lost, first, key=lambda lost: lost.line) :]
        return [lost.line for lost in later if lost.line < last and (lost.session is None or lost.session in sessions)]

    def _assemble(self, conversation: Conversation, builder: Builder) -> Trace:
        first = conversation.nodes[0].record
        extra: dict[str, Any] = {
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
            "sub_agents": conversation.sub_agents,
            "description": self._description(conversation),
            "problems": self._problems(conversation),
        }
        return Trace(
            id=conversation_name(conversation), format=ClaudeCodeReader.name, agent="claude-code",
            session_id=conversation.session_id or None,
            parent_id=(conversation.session_id or None) if conversation.agent_id else None,
            outcome=conversation.outcome, messages=builder.messages, steps=builder.steps, tools=infer_tools(builder.messages),
            source_file=self.source, extra={key: value for key, value in extra.items() if value},
        )  # fmt: skip

    def _problems(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Damaged places that name this session, or no session and are not after its last record."""
        if not self.problems or conversation.agent_id is not None:
            return []
        session, last = conversation.session_id, conversation.nodes[-1].line
        others = {lost.line for lost in self.lost if (lost.session or session) != session}
        others |= {lost.line for lost in self.lost if lost.session is None and lost.line > last}
        mine = [p for p in self.problems if p.line not in others]
        return [{"line": p.line, "reason": p.reason, "detail": p.detail} for p in mine[:_SHOWN]]

    def _description(self, conversation: Conversation) -> dict[str, Any] | None:
        """What `agent-<id>.meta.json` beside a sub-agent's own file says about it."""
        if conversation.agent_id is None or self.path.stem != f"agent-{conversation.agent_id}":
            return None
        head = read_beside(self.path.with_suffix(".meta.json"), 8192) or b""
        return json.loads(head) if looks_like_agent_meta(head) else None

    def settle(self, counts: Counter) -> None:
        """Account for every physical line of the file."""
        self.fates.count(counts)
        problems = getattr(counts, "problems", None)
        if problems is not None:
            problems.extend(self.problems)


def _note(outcome: dict[int, str | None], line: int, reason: str | None) -> None:
    """Two records can be glued on one line: it is used when either is."""
    if reason is None or line not in outcome:
        outcome[line] = reason


def kind_of(record: Line) -> str | None:
    """What a record of the program is to the conversation; None: not part of it."""
    if record.type == "system" and record.subtype == "compact_boundary":
        return "compact"
    if record.type == "system" and record.subtype == "microcompact_boundary":
        return "micro"
    queued = (
        record.type == "attachment" and record.attachment is not None and record.attachment.type == "queued_command"
    )
    if queued and (prompt := prompt_text(record.attachment.prompt)):
        record.message = Body(content=prompt)
        return "user"
    return None


#: What `register_trace_readers` names.
READER = ClaudeCodeReader()
