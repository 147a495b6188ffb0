"""One Codex rollout, record by record.

`response_item` lines are what the model was given and gave; `event_msg` lines repeat them for the screen and
are set aside (`mirror`), but for the three that change what the items mean: `token_count` ends an inference,
`turn_aborted` stops one, `thread_rolled_back` takes turns back.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from composer_plugins.traces.accounts import Records
from composer_plugins.traces.codex_items import (
    CALLS,
    ITEMS,
    OPAQUE,
    OUTPUTS,
    SERVER_SIDE,
    injected_kind,
    is_bare_header,
    is_bare_item,
    reasoning_of,
    to_call,
    tools_of,
)  # fmt: skip
from composer_plugins.traces.codex_lineage import records_before
from composer_plugins.traces.codex_output import read_output
from composer_plugins.traces.lines import json_text
from composer_plugins.traces.model_fields import content_of, dig, text_or_none
from composer_plugins.traces.rewrites import RewrittenConversation
from composer_plugins.traces.schema import Status, Trace
from composer_plugins.traces.turns import Turn

FORMAT = "codex"
USAGE = ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_output_tokens")


class Rollout:
    """One pass over one file."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.records = Records(self.source)
        self.talk = RewrittenConversation(self.source)
        self.meta: dict[str, Any] = {}
        self.system: str | None = None
        self.model: str | None = None
        self.open: Turn | None = None
        self.sealed = False
        self.usage: dict[str, Any] = {}
        self.notes: Counter[str] = Counter()
        for number, objects, lost in self.records.lines(path):
            if lost:
                self.talk.inexact("damaged_line")
            for record in objects:
                self.records.settle_one(number, self._record(record, number))

    def _record(self, record: dict[str, Any], line: int) -> str | None:
        """Take one record; return why it led to nothing, or None when it was used."""
        kind, payload = record.get("type"), record.get("payload")
        if payload is None and isinstance(kind, str) and (kind in ITEMS or is_bare_item(record)):
            return self._item(record, line)
        if kind is None:
            if is_bare_header(record):
                return self._meta(record, line)
            return "state" if "record_type" in record else self._malformed(line, "an object without a type")
        if not isinstance(kind, str):
            return self._malformed(line, "a type that is not text")
        if not isinstance(payload, dict):
            return self._malformed(line, f"{kind[:40]} without a payload")
        if kind == "response_item":
            return self._item(payload, line)
        if kind == "event_msg":
            return self._event(payload, line)
        if kind == "session_meta":
            return self._meta(payload, line)
        if kind == "turn_context":
            self.model = text_or_none(payload.get("model")) or self.model
            self._close()
            return None
        if kind == "compacted":
            self._compacted(payload, line)
            return None
        if kind == "token_usage_record":
            self.sealed = True
        if kind == "inter_agent_communication":
            self.talk.inexact("attachment")  # put before the model in a form that the log does not give
        return kind

    def _malformed(self, line: int, detail: str) -> str:
        self.records.damage("malformed_record", line, detail, line)
        self.talk.inexact("damaged_line")
        return "malformed_record"

    def _close(self) -> None:
        self.open, self.sealed = None, False

    def _meta(self, meta: dict[str, Any], line: int) -> str | None:
        if self.meta:
            self.notes["other_sessions"] += 1  # a fork repeats the header of the session it came from
            return None
        self.meta = meta
        base = meta.get("base_instructions")
        self.system = text_or_none(base.get("text") if isinstance(base, dict) else base)
        if self.system is None:
            self.talk.inexact("system_prompt")
            # before base_instructions was recorded, `instructions` held the user's AGENTS.md
            self.system = text_or_none(meta.get("instructions"))
        if self.system is not None and not self.talk.items:
            self.talk.say("system", self.system, line)
        if meta.get("history_base") is not None:
            self._past(records_before(Path(self.source), meta))
        return None

    def _past(self, records: list[dict[str, Any]] | None) -> None:
        """Take what other rollouts hold as context: no steps, and no records of this file (0 is the line of none)."""
        if records is None:
            self.talk.inexact("unlinked")
            return
        mine, self.notes, self.records = (self.notes, self.records), Counter(), Records(self.source)
        for record in records:
            kind, payload = record.get("type"), record.get("payload")
            if not isinstance(payload, dict):
                self.talk.inexact("damaged_line")
            elif kind == "response_item":
                self._item(payload, 0, own=False)
            elif kind == "event_msg":
                self._event(payload, 0)
            elif kind == "compacted":
                self._compacted(payload, 0)
            elif kind == "turn_context":
                self._close()
            elif kind == "inter_agent_communication":
                self.talk.inexact("attachment")
        self._close()
        (self.notes, self.records), self.usage = mine, {}

    def _item(self, item: dict[str, Any], line: int, *, own: bool = True) -> str | None:
        if "type" not in item and isinstance(item.get("item"), dict):
            item = item["item"]
        kind = item.get("type")
        if kind == "message":
            return self._message(item, line, own)
        if kind == "reasoning":
            return self._reasoning(item, line, own)
        if isinstance(kind, str) and kind in CALLS:
            return self._call(item, line, own)
        if isinstance(kind, str) and kind in OUTPUTS:
            return self._output(item, line)
        if isinstance(kind, str) and kind in OPAQUE:
            self._close()
            self.talk.inexact("compaction")
            self.talk.say("user", "[a summary that only the server can read]", line, injected="compact_summary")
            return None
        if kind == "agent_message":
            self._close()
            self.talk.say("user", item.get("content"), line, injected="agent_message")
            return None
        if not isinstance(kind, str):
            return self._malformed(line, "a response item without a type")
        if kind not in ("ghost_snapshot", "compaction_trigger"):
            self.notes["other_items"] += 1
            self.talk.inexact("attachment")  # items are what the model is shown
        return kind

    def _inference(self, line: int, own: bool) -> Turn:
        if not self.meta:
            self.talk.inexact("system_prompt")
        if self.open is None or self.sealed or self.open.own is not own:
            self.open, self.sealed = self.talk.turn(line, line, model=self.model, own=own), False
        else:
            self.open.records.append(line)
        return self.open

    def _message(self, item: dict[str, Any], line: int, own: bool) -> str | None:
        role = item.get("role")
        text, _, images = content_of(item.get("content"))
        if not isinstance(role, str) or not isinstance(item.get("content"), list | str):
            return self._malformed(line, "a message without a role or content")
        self.talk.images += images
        if role == "assistant":
            self._inference(line, own).texts.extend([text] if text else [])
            return None
        self._close()
        if not text:
            return "empty_message"
        if role in ("developer", "system"):
            self.talk.say("system", text, line)
        else:
            self.talk.say("user", text, line, injected=injected_kind(text))
        return None

    def _reasoning(self, item: dict[str, Any], line: int, own: bool) -> str | None:
        turn = self._inference(line, own)
        thinking = reasoning_of(item)
        if thinking:
            turn.thinking.append(thinking)
        if text_or_none(item.get("encrypted_content")):
            self.notes["encrypted_reasoning"] += own
            self.talk.inexact("encrypted_reasoning")  # from the next inference on it stands before the model
        return None

    def _call(self, item: dict[str, Any], line: int, own: bool) -> str | None:
        kind = item["type"]
        if kind not in SERVER_SIDE and not text_or_none(item.get("call_id")) and not text_or_none(item.get("id")):
            self.notes["calls_without_id"] += 1
        call = to_call(item, f"line-{line}")
        raw = call.id
        if not self.talk.call(self._inference(line, own), call, line, once=True):
            return "duplicate"
        if kind in SERVER_SIDE:
            failed = item.get("status") in ("failed", "incomplete")
            self.talk.result(
                raw, SERVER_SIDE[kind], line, line, status=Status.ERROR if failed else Status.OK,
                error_class="tool_error" if failed else None,
            )  # fmt: skip
            self.talk.inexact("missing_result")
        return None

    def _output(self, item: dict[str, Any], line: int) -> str | None:
        self.sealed = True
        call_id = text_or_none(item.get("call_id")) or ""
        value = item.get("output", item.get("tools"))
        if item.get("type") == "tool_search_output":
            value = json_text(value)
        found = read_output(value)
        used = self.talk.result(
            call_id, found.text, line, line, flagged=found.flagged, status=found.status, judged=found.judged,
            error_class=found.error_class, exit_code=found.exit_code,
        )  # fmt: skip
        self.talk.images += found.images if used else 0
        return None if used else "orphan_result"

    def _event(self, event: dict[str, Any], line: int) -> str | None:
        kind = event.get("type")
        if kind == "token_count":
            self.sealed = True
            total = dig(event, "info", "total_token_usage")
            if isinstance(total, dict):
                self.usage = total
            return "token_count"
        if kind == "turn_aborted":
            self._close()
            self.notes["aborted_turns"] += 1
            reason = text_or_none(event.get("reason")) or "no reason given"
            self.talk.interrupt(f"[the turn was aborted: {reason}]", line, line)
            return None
        if kind == "thread_rolled_back":
            self._close()
            number = event.get("num_turns")
            gone = self.talk.drop_user_turns(number if type(number) is int else 1)
            self.records.withdraw(gone, "rewound")
            self.notes["rollbacks"] += 1
            return None
        return "mirror"

    def _compacted(self, payload: dict[str, Any], line: int) -> None:
        """The history is replaced: by what the log gives, or by the user's messages and a summary."""
        self._close()
        self.notes["compactions"] += 1
        asked = [said.message.content for _, said in self.talk.asked()]
        self.talk.restart("compaction")
        if self.system is not None:
            self.talk.say("system", self.system, line)
        replacement = payload.get("replacement_history")
        if isinstance(replacement, list):
            for item in replacement:
                if isinstance(item, dict):
                    self._item(item, line, own=False)
        else:
            for text in asked:
                self.talk.say("user", text, line)
            summary = text_or_none(payload.get("message"))
            if summary:
                self.talk.say("user", summary, line, injected="compact_summary")
        self._close()

    def trace(self) -> Trace | None:
        """The finished trace; None when no model answered."""
        meta = self.meta
        session = text_or_none(meta.get("id"))
        extra = {
            "version": meta.get("cli_version"), "cwd": meta.get("cwd"), "git": meta.get("git"),
            "originator": meta.get("originator"), "model_provider": meta.get("model_provider"),
            "forked_from": meta.get("forked_from_id"), "continues": dig(meta, "history_base", "thread_id"),
            "images": self.talk.images or None, "injected": self.talk.laid.injected,
            "usage": {k: v for k in USAGE if type(v := self.usage.get(k)) is int}, **+self.notes,
            "problems": self.records.named_problems(),
        }  # fmt: skip
        return self.talk.trace(
            session or "no-session", FORMAT, agent="codex", session_id=session, tools=tools_of(meta),
            parent_id=text_or_none(dig(meta, "source", "subagent", "thread_spawn", "parent_thread_id")),
            extra=extra,
        )  # fmt: skip
