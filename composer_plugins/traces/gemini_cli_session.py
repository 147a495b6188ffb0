"""One recorded Gemini CLI session: messages by id, rewinds, and histories that replace each other.

Source: google-gemini/gemini-cli `packages/core/src/services/chatRecordingService.ts`: a message is written again
whole whenever it grows, `$rewindTo` drops a message and all after it (an unknown id drops everything), and
`$set.messages` replaces the history, after a compression or when old tool output was masked.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_plugins.traces.accounts import Records
from composer_plugins.traces.gemini_cli_parts import (
    SETUP_ANSWER,
    Parts,
    injected_kind,
    read_parts,
    response_text,
    result_of,
    shell_output,
    split_calls,
    status_of,
    thoughts_of,
    to_call,
)  # fmt: skip
from composer_plugins.traces.model_fields import text_or_none
from composer_plugins.traces.rewrites import RewrittenConversation
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.turns import Turn

#: Messages for the screen: never part of the history.
SHOWN_ONLY = ("info", "error", "warning")
TOKENS = ("input", "output", "cached", "thoughts", "tool")
#: Typed to the program and not to the model: a slash command (not a path), or the key for help.
_COMMAND = re.compile(r"\A\s*(?:/[A-Za-z][\w:-]*(?:\s|\Z)|\?\s*\Z)")


@dataclass(eq=False)
class Entry:
    """The newest version of one message. `own` is false when a replaced history repeats or adds it."""

    message: dict[str, Any]
    line: int
    record: int
    own: bool = True
    damaged: bool = False


class Session:
    """Collects the records of one session.

    Args:
        records: accounts for them.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self.segments: list[tuple[str | None, dict[str, Entry]]] = [(None, {})]
        self.meta: dict[str, Any] = {}
        self.notes: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()
        self._damaged = False
        self.talk = RewrittenConversation(records.source)
        self.talk.inexact("system_prompt")

    @property
    def current(self) -> dict[str, Entry]:
        """The history as it stands."""
        return self.segments[-1][1]

    def describe(self, fields: dict[str, Any]) -> None:
        """Take what is known of the session as a whole."""
        self.meta.update(fields)

    def damaged(self) -> None:
        """A record was lost here: what follows has no exact history."""
        self._damaged = True

    def malformed(self, line: int, record: int, detail: str) -> None:
        """A record that cannot be read."""
        self.records.damage("malformed_record", line, detail, record)
        self.damaged()

    def put(self, message: dict[str, Any], line: int, record: int, *, keyed: bool = True) -> None:
        """Add a message; with `keyed` it replaces the version that has its id."""
        key = (text_or_none(message.get("id")) if keyed else None) or f"record {record}"
        old = self.current.get(key)
        entry = Entry(message, line, record, damaged=self._damaged)
        if old is not None:
            if old.own:
                self.records.skip("superseded", old.record)
            entry.own, entry.damaged = old.own, old.damaged
        self.current[key] = entry

    def rewind(self, key: str) -> None:
        """Take back the message with that id and all after it; everything when there is no such message."""
        self.notes["rewinds"] += 1
        names = list(self.current)
        for name in names[names.index(key) if key in self.current else 0 :]:
            entry = self.current.pop(name)
            if entry.own:
                self.records.withdraw([entry.record], "rewound")

    def replace(self, messages: list[Any], record: int) -> None:
        """The program replaced the history. Steps that follow start from the new one."""
        old = self.current
        new = {m["id"]: m for m in messages if isinstance(m, dict) and text_or_none(m.get("id"))}
        if len(new) < len(messages):
            self.notes["messages_without_id"] += len(messages) - len(new)
        if not old:
            for message in new.values():
                self.put(message, record, record)
            return
        before = {k: _signature(e.message) for k, e in old.items()}
        after = {k: _signature(m) for k, m in new.items()}
        gone = [k for k, seen in before.items() if seen is not None and k not in after]
        changed = [k for k, seen in after.items() if seen is not None and before.get(k) != seen]
        if not gone and not changed:
            return
        reason = "compaction" if gone or any(k not in before for k in changed) else "microcompaction"
        self.notes[reason + "s"] += 1
        self.segments.append((reason, {k: Entry(m, record, record, own=False) for k, m in new.items()}))

    def trace(self) -> Trace | None:
        """The finished trace; None when no model answered."""
        for reason, entries in self.segments:
            if reason is not None:
                self.talk.restart(reason)
            for entry in entries.values():
                if entry.damaged:
                    self.talk.inexact("damaged_line")
                self._add(entry)
        session = text_or_none(self.meta.get("sessionId"))
        known = ("projectHash", "startTime", "lastUpdated", "summary", "directories", "kind")
        extra = {
            **{key: self.meta.get(key) for key in known}, **+self.notes, "usage": dict(self.usage),
            "injected": self.talk.laid.injected,
            "problems": self.records.named_problems(),
        }  # fmt: skip
        return self.talk.trace(
            session or "no-session", "gemini_cli", agent="gemini-cli", session_id=session, extra=extra,
            parent_id=self._parent(),
        )  # fmt: skip

    def _parent(self) -> str | None:
        """The session that started this sub-agent: the folder names it, where Gemini CLI keeps its chats."""
        folder = Path(self.records.source).resolve().parent
        return folder.name if self.meta.get("kind") == "subagent" and folder.parent.name == "chats" else None

    def _add(self, entry: Entry) -> None:
        message, record = entry.message, entry.record
        kind = message.get("type")
        parts = read_parts(message.get("content"))
        self.notes["images"] += parts.images
        if kind == "user":
            reason = self._user(parts, entry)
        elif kind == "gemini":
            reason = self._model(message, parts, entry)
        elif isinstance(kind, str):
            reason = kind
        else:
            self.records.damage("malformed_record", entry.line, "a message without a type", record)
            reason = "malformed_record"
        self.records.settle_one(record, reason)

    def _user(self, parts: Parts, entry: Entry) -> str | None:
        answered = False
        for answer in parts.answers:
            text, failed = response_text(answer)
            name = text_or_none(answer.get("id")) or ""
            answered = self.talk.result(name, text, entry.line, entry.record, flagged=failed) or answered
        if not parts.text:
            return None if answered else "duplicate" if parts.answers else "empty_message"
        if _COMMAND.match(parts.text):
            return "command"
        self.talk.say("user", parts.text, entry.record, injected=injected_kind(parts.text))
        return None

    def _model(self, message: dict[str, Any], parts: Parts, entry: Entry) -> str | None:
        recorded = message.get("toolCalls")
        recorded = [c for c in recorded if isinstance(c, dict)] if isinstance(recorded, list) else []
        if parts.calls and not (recorded and any("id" not in c for c in parts.calls)):
            # newer sessions keep the whole answer in its content
            known = [c.get("id") for c in parts.calls]
            groups = [[*parts.calls, *(c for c in recorded if c.get("id") not in known)]]
        else:
            groups = split_calls(recorded) or [[]]
        self.notes["split_inferences"] += len(groups) - 1
        for position, calls in enumerate(groups):
            turn = self.talk.turn(entry.line, entry.record, model=text_or_none(message.get("model")), own=entry.own)
            if position == 0:
                turn.texts.extend([parts.text] if parts.text else [])
                turn.thinking.extend(parts.thoughts or thoughts_of(message))
                if parts.text.strip() == SETUP_ANSWER:
                    turn.not_trainable = "synthetic"
            self._calls(turn, calls, entry)
        for call in {c["id"]: c for c in recorded if text_or_none(c.get("id"))}.values():
            self._result(call, entry)
        if entry.own and isinstance(message.get("tokens"), dict):
            self.usage.update({k: v for k in TOKENS if type(v := message["tokens"].get(k)) is int and v})
        return None

    def _calls(self, turn: Turn, calls: list[dict[str, Any]], entry: Entry) -> None:
        for number, raw in enumerate(calls, 1):
            call = to_call(raw, f"record-{entry.record}-call-{number}")
            if not text_or_none(raw.get("id")):
                raw["id"] = call.id
            if not self.talk.call(turn, call, entry.record, once=True):
                self.notes["duplicate_calls"] += 1

    def _result(self, call: dict[str, Any], entry: Entry) -> None:
        found = result_of(call)
        if found is None:
            if call.get("status") == "cancelled":
                found = ("[cancelled]", True, 0)
            else:
                return
        text, failed, images = found
        self.notes["images"] += images
        status, error_class = status_of(call, text)
        judged, exit_code = shell_output(text)
        flagged = call.get("status") == "error" or (failed and call.get("status") != "success")
        self.talk.result(
            call["id"], text, entry.line, entry.record, flagged=flagged, status=status, error_class=error_class,
            judged=judged, exit_code=exit_code,
        )  # fmt: skip


def _signature(message: dict[str, Any]) -> Any:
    """What a message contributes to the history; None when it adds nothing that other messages do not hold."""
    kind = message.get("type")
    if kind not in ("user", "gemini"):
        return None
    parts = read_parts(message.get("content"))
    if kind == "user":
        return parts.text or None
    calls = message.get("toolCalls")
    results = (
        [(c.get("id"), (result_of(c) or ("",))[0]) for c in calls if isinstance(c, dict)]
        if isinstance(calls, list)
        else []
    )
    return parts.text, tuple((str(name), text) for name, text in results)
