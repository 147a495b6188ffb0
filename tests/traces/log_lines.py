"""Hand-made Claude Code lines for the tests (shapes as in the real logs beside them)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path


class Log:
    """Writes a log line by line; `parent` defaults to the record before."""

    def __init__(self, session: str = "s1") -> None:
        self.lines: list[str] = []
        self.session = session
        self.last: str | None = None
        self._numbers = itertools.count(1)

    def record(self, type_: str, parent: str | None = "last", **fields) -> str:
        uuid = fields.pop("uuid", None) or f"u{next(self._numbers)}"
        record = {
            "type": type_,
            "uuid": uuid,
            "parentUuid": self.last if parent == "last" else parent,
            "sessionId": self.session,
            "isSidechain": False,
            "version": "2.1.0",
            **fields,
        }
        self.lines.append(json.dumps(record))
        self.last = uuid
        return uuid

    def user(self, content, **fields) -> str:
        return self.record("user", message={"role": "user", "content": content}, **fields)

    def assistant(self, *blocks, id: str, model: str = "claude-x", usage: dict | None = None, **fields) -> str:
        body = {"role": "assistant", "id": id, "model": model, "content": list(blocks), "usage": usage or {}}
        return self.record("assistant", message=body, **fields)

    def result(self, call: str, content="fine", error: bool = False, **fields) -> str:
        block = {"type": "tool_result", "tool_use_id": call, "content": content, "is_error": error}
        return self.user([block], **fields)

    def write(self, path: Path, end: str = "\n") -> Path:
        path.write_text("\n".join(self.lines) + end)
        return path


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def thinking(value: str) -> dict:
    return {"type": "thinking", "thinking": value, "signature": "x"}


def call(id: str, name: str = "Bash", **arguments) -> dict:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}
