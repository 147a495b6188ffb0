"""From the messages of a Cline task to a trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

from composer_plugins.traces.accounts import Records
from composer_plugins.traces.claude_code_records import IMAGE
from composer_plugins.traces.cline_results import injected_kind, read_result, removals, split_environment
from composer_plugins.traces.cline_xml import Written, not_run, parse_text, result_header
from composer_plugins.traces.lines import call_arguments, json_text
from composer_plugins.traces.model_fields import dict_at, name_of, text_or_none
from composer_plugins.traces.rewrites import RewrittenConversation
from composer_plugins.traces.schema import ToolCall, Trace
from composer_plugins.traces.turns import Turn

USAGE = ("inputTokens", "outputTokens", "cacheReadTokens", "cacheWriteTokens", "prompt", "completion", "cached")


class Task:
    """Collects the messages of one task.

    Args:
        records: accounts for the messages.
        about: what the document says beside its messages (2026 SDK).
    """

    def __init__(self, records: Records, about: dict[str, Any] | None = None) -> None:
        self.records, self.about = records, about or {}
        self.talk = RewrittenConversation(records.source)
        self.notes: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()
        self.from_xml: list[str] = []
        self.pending: list[tuple[str, str]] = []
        self.native = bool(self.about)  # calls are blocks: a tag in a text is then only a text
        system = text_or_none(self.about.get("system_prompt"))
        if system is None:
            self.talk.inexact("system_prompt")
        else:
            self.talk.say("system", system, 0)

    def add(self, message: Any, line: int, record: int) -> str | None:
        """Take one message; return why it led to nothing, or None when it was used."""
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("user", "assistant") or not isinstance(content, str | list):
            self.records.damage("malformed_record", line, "a message without a role or content", record)
            self.talk.inexact("damaged_line")
            return "malformed_record"
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        blocks = [b if isinstance(b, dict) else {"type": "text", "text": json_text(b)} for b in blocks]
        about = message.get("metadata") if isinstance(message.get("metadata"), dict) else {}
        summary = message.get("isSummary") is True  # of a fork of the extension
        if about.get("kind") == "compaction" or summary:
            self._compacted(record)
        if message.get("isTruncationMarker") is True:
            self.talk.inexact("compaction")
        if role == "assistant":
            return self._assistant(
                message, blocks, line, record, kept=summary or about.get("compaction") == "preserved"
            )
        return _User(self, line, record).take(blocks)

    def _compacted(self, record: int) -> None:
        """The program replaced what came before by this message."""
        self.notes["compactions"] += 1
        system = text_or_none(self.about.get("system_prompt"))
        if len(self.talk.items) <= (system is not None):  # the document starts with it
            self.talk.inexact("compaction")
            return
        self.talk.restart("compaction")
        if system is not None:
            self.talk.say("system", system, record)

    def _assistant(self, message: dict[str, Any], blocks: list[dict], line: int, record: int, *, kept: bool):
        model = message.get("modelInfo")
        model = text_or_none(model.get("id") or model.get("modelId")) if isinstance(model, dict) else None
        turn = self.talk.turn(line, record, model=model or text_or_none(message.get("model")))
        turn.not_trainable = "copied" if kept else None
        self.pending = []
        self.native = self.native or any(block.get("type") == "tool_use" for block in blocks)
        for block in blocks:
            self._block(turn, block, record)
        metrics = message.get("metrics")
        tokens = metrics.get("tokens", metrics) if isinstance(metrics, dict) else None
        if isinstance(tokens, dict):
            self.usage.update({k: v for k in USAGE if type(v := tokens.get(k)) is int and v})
        return None

    def _block(self, turn: Turn, block: dict[str, Any], record: int) -> None:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            self._text(turn, block["text"], record)
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            turn.thinking.extend([block["thinking"]] if block["thinking"] else [])
        elif kind == "tool_use":
            arguments, raw = call_arguments(block.get("input"))
            call_id = text_or_none(block.get("id")) or self._new_id(record, turn)
            call = ToolCall(id=call_id, name=name_of(block.get("name")), arguments=arguments, raw_arguments=raw)
            if self.talk.call(turn, call, record, once=True):
                self.pending.append((call.name, call_id))
            else:
                self.notes["duplicate_calls"] += 1
        elif kind == "redacted_thinking":
            self.notes["encrypted_reasoning"] += 1
            self.talk.inexact("encrypted_reasoning")
        else:
            self.notes["other_blocks"] += 1

    def _text(self, turn: Turn, text: str, record: int) -> None:
        found = Written(text) if self.native else parse_text(text)
        turn.texts.extend([found.text] if found.text else [])
        turn.thinking.extend(found.thinking)
        for name, arguments, closed in found.calls:
            call = ToolCall(id=self._new_id(record, turn), name=name, arguments=dict(arguments))
            self.talk.call(turn, call, record)
            self.pending.append((name, call.id))
            self.from_xml.append(call.id)
            self.notes["unclosed_xml_calls"] += not closed

    @staticmethod
    def _new_id(record: int, turn: Turn) -> str:
        return f"message-{record}-call-{len(turn.calls) + 1}"

    def trace(self) -> Trace | None:
        """The finished trace; None when no model answered."""
        about = self.about
        session = text_or_none(about.get("sessionId"))
        described = about.get("description") or {}
        known = ("source", "provider", "model", "cwd", "workspace_root", "started_at", "ended_at", "exit_code")
        extra = {
            **{key: described.get(key) for key in known}, "forked_from": dict_at(described, "metadata", "fork").get("forkedFromSessionId"),
            "role": about.get("agent"), "usage": dict(self.usage), "injected": self.talk.laid.injected,
            "calls_from_xml": self.from_xml, **+self.notes,
            "problems": self.records.named_problems(),
        }  # fmt: skip
        return self.talk.trace(
            session or "no-session", "cline", agent="cline", session_id=session,
            outcome=text_or_none(described.get("status")), extra=extra,
        )  # fmt: skip


class _User:
    """One user message: results of calls, what the user said, and what Cline added."""

    def __init__(self, task: Task, line: int, record: int) -> None:
        self.task, self.line, self.record = task, line, record
        self.said: list[tuple[str, str | None]] = []
        self.answering: tuple[str, str] | None = None
        self.pieces: list[str] = []
        self.images = self.answered = self.orphans = 0

    def take(self, blocks: list[dict[str, Any]]) -> str | None:
        """Take the blocks in order; return why the message led to nothing, or None."""
        for block in blocks:
            self._block(block)
        self._finish_result()
        self.task.notes["images"] += self.images
        for kind in dict.fromkeys(kind for _, kind in self.said):
            text = "\n\n".join(text for text, of in self.said if of == kind)
            self.task.talk.say("user", text, self.record, injected=kind)
        if self.said or self.answered:
            return None
        return "orphan_result" if self.orphans else "empty_message"

    def _block(self, block: dict[str, Any]) -> None:
        kind = block.get("type")
        if kind == "tool_result":
            self._result(str(block.get("tool_use_id")), block.get("content"), is_error=block.get("is_error") is True)
        elif kind == "text" and isinstance(block.get("text"), str):
            self._text(block["text"])
        elif kind in ("image", "document"):
            self._piece(IMAGE if kind == "image" else "[document]")
            self.images += kind == "image"
        elif kind == "file":  # how the SDK shows an attached file to the model is not recorded
            path, content = text_or_none(block.get("path")) or "", text_or_none(block.get("content")) or ""
            self._piece(f'<file_content path="{path}">\n{content}\n</file_content>')
            self.task.talk.inexact("attachment")
        else:
            self.task.notes["other_blocks"] += 1

    def _text(self, text: str) -> None:
        text, environment = split_environment(text)
        for reason in removals(text):
            self.task.talk.inexact(reason)
        if self.task.pending and text.lstrip().startswith("[TASK RESUMPTION]"):
            self.task.talk.interrupt("[the task was interrupted]", self.line, self.record)
            self.task.pending = []
        name = not_run(text)
        header = result_header(text) if name is None else None
        if name is not None and self._begin(name):
            self.pieces.append(text)
            self._finish_result(failed=True)
        elif header is not None and self._begin(header[0]):
            self._piece(header[1])
        elif (kind := injected_kind(text)) is not None:
            self._finish_result()
            self.said.append((text, kind))
        else:
            self._piece(text)
        if environment:
            self._finish_result()
            self.said.append((environment, "environment_details"))

    def _begin(self, name: str) -> bool:
        """A result of that tool starts; a second header for the same call goes on with it."""
        pending = self.task.pending
        waiting = next((pair for pair in pending if pair[0] == name or pair[0].endswith("_" + name)), None)
        if waiting is None and self.answering is None and len(pending) == 1:
            waiting = pending[0]
        if waiting is None:
            return self.answering is not None and self.answering[0] == name
        self._finish_result()
        self.task.pending.remove(waiting)
        self.answering = waiting
        return True

    def _piece(self, text: str) -> None:
        if not text.strip():
            return
        if self.answering is None:
            self.said.append((text, None))
        else:
            self.pieces.append(text)

    def _finish_result(self, *, failed: bool = False) -> None:
        if self.answering is None:
            return
        (_, call_id), pieces = self.answering, self.pieces
        self.answering, self.pieces = None, []
        self._result(call_id, "\n\n".join(pieces), is_error=failed)

    def _result(self, call_id: str, content: Any, *, is_error: bool) -> None:
        found = read_result(content, is_error=is_error)
        for reason in removals(found.text[:2000]):
            self.task.talk.inexact(reason)
        used = self.task.talk.result(
            call_id, found.text, self.line, self.record, flagged=found.flagged, status=found.status,
            error_class=found.error_class, judged=found.judged,
        )  # fmt: skip
        self.task.pending = [pair for pair in self.task.pending if pair[1] != call_id]
        self.images += found.images if used else 0
        self.answered += used
        self.orphans += not used
