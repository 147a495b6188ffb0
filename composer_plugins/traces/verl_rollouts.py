"""Reader of verl's own generation dumps: `trainer.rollout_data_dir` and `trainer.validation_data_dir`, `<step>.jsonl`.

A line is one rollout: `input`, `output`, `gts`, `score`, `step`, in training `uid`, in validation what the reward
function returned. Prompt and response are decoded without special tokens, so roles are lost: the prompt is shown as one
message of the user (`text_completion`), and the turns of a rollout with tools stand in one text, which is not trained
on (`turns_in_one_text`). On verl itself `composer_verl.rollouts` writes whole traces instead.

Source: verl 0.9.1 `verl/trainer/ppo/v1/trainer_base.py`, `_write_generations`. verl itself is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from composer_plugins.models.toolcalls import parse_action
from composer_plugins.traces.chat_messages import ChatConversation
from composer_plugins.traces.chat_rows import Note, RowError, RowReader, spare_fields
from composer_plugins.traces.model_fields import number_or_none, text_or_none
from composer_plugins.traces.schema import Trace

_KEYS = frozenset(["input", "output", "score"])
_TRAITS = frozenset(["input", "output", "gts", "score", "step"])
#: What is left of the header of a further message when special tokens are left out.
_HEADER = re.compile(r"<tool_response>|^(?:assistant|user|tool|observation)$", re.MULTILINE)


class VerlDumpReader(RowReader):
    """Turns each line into one trace of one step."""

    name = "verl"

    def sniff(self, head: bytes) -> bool:
        """True when the first line is such an object; a first line longer than `head` is told by its beginning."""
        line, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
        if not line.startswith(b'{"input": "'):
            return False
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return not end
        return isinstance(row, dict) and row.keys() >= _TRAITS

    def _row(self, row: dict[str, Any], path: Path, line: int, note: Note) -> list[Trace]:
        prompt, output = row.get("input"), row.get("output")
        if not isinstance(prompt, str) or not isinstance(output, str):
            raise RowError("malformed_record", "input and output must be texts")
        action = parse_action(output)
        calls = [{"id": c.id, "function": {"name": c.name, "arguments": c.raw_arguments or c.arguments}}
                 for c in action.tool_calls]  # fmt: skip
        several = _HEADER.search(output) is not None
        talk = ChatConversation(str(path), inexact=["text_completion"])
        talk.add({"role": "user", "content": prompt}, line)
        said = {
            "role": "assistant",
            "content": action.content,
            "reasoning_content": action.thinking,
            "tool_calls": calls,
        }
        talk.add(said, line, not_trainable="turns_in_one_text" if several else None)
        uid = text_or_none(row.get("uid"))
        trace = talk.trace(
            uid or f"{path.stem}:{line}", self.name, reward=number_or_none(row.get("score")),
            extra={"fields": spare_fields(row, _KEYS)},
        )  # fmt: skip
        return [trace]


#: What `register_trace_readers` names.
READER = VerlDumpReader()
