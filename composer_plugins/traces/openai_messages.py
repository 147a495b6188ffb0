"""Reader of OpenAI chat requests: `messages` with `tools`.

Three layouts: one JSON object with `messages`, one JSON list (of messages, or of such objects), and JSON Lines with
one conversation per line (OpenAI's fine-tuning files, request logs). The messages are the whole request, so a
history without a system message is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer_plugins.traces import cline, gemini_cli, mini_swe_agent, swe_agent
from composer_plugins.traces.accounts import Records
from composer_plugins.traces.chat_messages import ChatConversation
from composer_plugins.traces.chat_rows import (
    CONVERSATION_KEYS,
    Head,
    Note,
    RowError,
    read_row_document,
    read_rows,
    row_id,
    sniff_head,
    spare_fields,
)
from composer_plugins.traces.documents import Document, read_document
from composer_plugins.traces.model_fields import text_or_none
from composer_plugins.traces.schema import Trace

_AGENTS = (mini_swe_agent.READER, swe_agent.READER, cline.READER, gemini_cli.READER)


class OpenAIMessagesReader:
    """Turns each recorded conversation into one trace."""

    name = "openai_messages"

    def sniff(self, head: bytes) -> bool:
        """True for chat messages that show no trait of another format (see `chat_rows`).

        Agents whose own files are made of chat messages know their traits best, so they are asked first.
        """
        return sniff_head(head) == self.name and not any(reader.sniff(head) for reader in _AGENTS)

    def read(self, path: Path, counts: Counter) -> Iterator[Trace]:
        """Yield the traces of one file (see `composer_plugins.traces.base.TraceReader`).

        A record is a line of a JSONL file, and a message (or conversation) of a single document.

        Raises:
            TraceError: a single document beyond `documents.MAX_DOCUMENT`.
        """
        if Head.of(path).lines:
            yield from read_rows(path, counts, self._row)
        else:
            yield from self._document(read_document(path), counts)

    def _row(self, row: dict[str, Any], path: Path, line: int, note: Note) -> list[Trace]:
        """One conversation that is one record."""
        if not isinstance(row.get("messages"), list):
            raise RowError("malformed_record", "an object without a list of messages")
        talk = ChatConversation(str(path), model=text_or_none(row.get("model")))
        for position, message in enumerate(row["messages"]):
            reason = talk.add(message, line)
            if reason is not None:
                note(reason, f"message {position} of the conversation")
        return [self._trace(talk, row, row_id(row, path, line))] if talk.has_steps else []

    def _trace(self, talk: ChatConversation, row: dict[str, Any], trace_id: str) -> Trace:
        tools = row.get("tools") or row.get("functions")
        return talk.trace(trace_id, self.name, tools=tools, extra={"fields": spare_fields(row, CONVERSATION_KEYS)})

    def _document(self, document: Document, counts: Counter) -> Iterator[Trace]:
        value = document.value
        if isinstance(value, dict):
            document.note_damage(counts)
            yield from self._messages(document, value, "messages", counts)
        elif isinstance(value, list) and any(isinstance(v, dict) and "messages" in v for v in value):
            yield from read_row_document(document, counts, self._row)
        else:
            document.note_damage(counts)
            if isinstance(value, list):
                yield from self._messages(document, {"messages": value}, None, counts)

    def _messages(self, document: Document, row: dict[str, Any], key: str | None, counts: Counter) -> Iterator[Trace]:
        """One conversation that fills the document: each message is a record."""
        path, messages = document.path, row.get("messages")
        if not isinstance(messages, list):
            return
        lines = document.lines(*([key] if key else []))
        talk = ChatConversation(str(path), model=text_or_none(row.get("model")))
        records = Records(str(path))
        for position, message in enumerate(messages):
            line = lines[position] if position < len(lines) else 0
            reason = talk.add(message, line)
            if reason is None:
                records.use()
            else:
                records.damage(reason, line, f"message {position}")
        if document.damage is not None:
            talk.extra["damaged"] += 1
        records.settle(counts, any_steps=talk.has_steps)
        if talk.has_steps:
            yield self._trace(talk, row, row_id(row, path, 0))


#: What `register_trace_readers` names.
READER = OpenAIMessagesReader()
