"""From verl's rollouts to hinted turns: recorded hints, tool errors, what the reward function said, siblings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from composer_plugins.config import SDPOConfig
from composer_plugins.envs.tool_errors import NOT_RECORDED
from composer_plugins.errors import ModelError
from composer_plugins.hints.splice import splice_messages
from composer_plugins.hints.turns import FEEDBACK_HINT, SIBLING_HINT, HintSplicer
from composer_plugins.plugins import get_plugin_manager
from composer_plugins.traces.classify import classify_text
from composer_plugins.traces.schema import Status
from composer_verl.rollout_rows import RolloutRow
from composer_verl.turns import TurnReader, Turns, host_error, spans

#: The class of the errors that verl's tool agent loop writes itself, by the start of the text.
HOST_CLASSES = (("Unknown function '", "unknown_tool"), ("Invalid JSON in arguments for '", "invalid_arguments"))
_EXECUTION = re.compile(r"\AError executing tool '[^'\n]*': ")


@dataclass
class Attempt:
    """One rollout, and the texts that came with it.

    Args:
        row: the rollout.
        said: `hint`, `error`, `error_class` of the dataset's row; `feedback`, `advice` (a whole hint) of the reward
            function or the agent loop; what is missing is not in it.
        usable: per response token, False where verl's rollout correction rejected it.
    """

    row: RolloutRow
    said: dict[str, str] = field(default_factory=dict)
    usable: list[bool] | None = None


@dataclass
class HintedTurn:
    """A span of response tokens [start, end) that has a self-teacher.

    Args:
        attempt: index of the rollout.
        mask: which tokens of the span carry the KL: sampled ones that rollout correction keeps.
        prefix_ids: what the self-teacher reads before the span, hint included.
        hint, kind: the text and where it came from. error_class: of the failure, if it was one.
    """

    attempt: int
    start: int
    end: int
    mask: list[bool]
    prefix_ids: list[int]
    hint: str
    kind: str
    error_class: str | None = None


class HintSources:
    """Finds the error turns of a step's rollouts and the hint of each.

    Args:
        config: the `sdpo` section.
        tokenizer: of the policy, with its chat template.
        reader: reads rollouts back into messages.
        max_tokens: longest hinted context and span together.
        template_kwargs: what verl gives to the chat template (`data.apply_chat_template_kwargs`).

    Raises:
        ModelError: placement `local` cannot work with the chat template.
        ConfigError: wrong options of the hint generator.
    """

    def __init__(
        self, config: SDPOConfig, tokenizer, reader: TurnReader, *, max_tokens: int,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.reader, self.max_tokens = config, tokenizer, reader, max_tokens
        self.sources = set(config.hint.sources)
        generator = get_plugin_manager().hint_generators.get(config.hint.generator).load()
        self.generator = generator(**config.hint.options)
        self.splicer = None
        if config.hint.placement == "local":
            self.splicer = HintSplicer(tokenizer, role=config.hint.role, **(template_kwargs or {}))
        #: What happened since it was last cleared: error_turns, unhinted, hinted_turns, too_long, unplaced, rejected.
        self.counts: Counter[str] = Counter()
        self.unplaced_why = ""

    def turns(self, attempts: list[Attempt]) -> list[HintedTurn]:
        """Return the hinted turns of a step, in the order of the rollouts."""
        siblings = self._sibling_hints(attempts) if "sibling" in self.sources else [None] * len(attempts)
        found = []
        for number, attempt in enumerate(attempts):
            for hint in self._hints(attempt, siblings[number]):
                turn = self._turn(number, attempt, *hint)
                if turn is not None and self._counts_as_usable(turn):
                    found.append(turn)
        self.counts["hinted_turns"] += len(found)
        return found

    def _hints(self, attempt: Attempt, sibling: str | None) -> list[tuple]:
        """Return (span or None for the whole attempt, kind, hint, error class), one per turn."""
        parts, said = spans(attempt.row.mask), attempt.said
        actions = [part for part in parts if part.sampled]
        hinted: dict[int, tuple] = {}
        if "rollout" in self.sources and actions and len(parts) > 1:  # tools, or the environment, answered
            for number, tool, text, flagged in tool_results(self._read(attempt.row)):
                found = self._failure(tool, text, flagged)
                if found is not None and number not in hinted:
                    hinted[number] = (actions[number], "rollout", *found)
        # every output of a session has the dataset's columns; the recorded state is the one that the first began with
        if "recorded" in self.sources and said.get("hint") and actions and attempt.row.name[2] == 0:
            hinted[0] = (actions[0], "recorded", said["hint"], said.get("error_class"))
        if hinted:
            return list(hinted.values())
        texts = []
        if "feedback" in self.sources:
            if attempt.said.get("advice"):
                texts.append(("feedback", attempt.said["advice"]))
            elif attempt.said.get("feedback"):
                texts.append(("feedback", FEEDBACK_HINT.format(feedback=attempt.said["feedback"])))
        if sibling is not None:
            texts.append(("sibling", sibling))
        return [(None, texts[0][0], "\n\n".join(text for _, text in texts), None)] if texts else []

    def _read(self, row: RolloutRow) -> Turns:
        return self.reader.read(row.prompt, row.prompt_ids, row.response_ids, row.mask, kept=row.extra.get("messages"))

    def _failure(self, tool: str | None, text: str, flagged: bool) -> tuple[str, str | None] | None:
        """Return (hint, error class) for a tool result that is a failure and has a hint."""
        if NOT_RECORDED in text:  # the log cannot answer: not the call's fault
            return None
        status, error_class = classify(text, tool, flagged)
        if not status.failed:
            return None
        self.counts["error_turns"] += 1
        hint = self.generator.generate_for(tool, text, status, error_class)
        if hint is None:
            self.counts["unhinted"] += 1
            return None
        return hint.text, hint.error_class

    def _turn(self, number: int, attempt: Attempt, span, kind: str, hint: str, error_class) -> HintedTurn | None:
        row = attempt.row
        start, end = (0, len(row.response_ids)) if span is None else (span.start, span.end)
        if self.config.scope == "completion":
            end = len(row.response_ids)
        usable = attempt.usable or [True] * len(row.response_ids)
        mask = [bool(m) and usable[start + i] for i, m in enumerate(row.mask[start:end])]
        try:
            prefix = self._prefix(row, start, hint)
        except ModelError as error:
            self.counts["unplaced"] += 1
            self.unplaced_why = str(error)
            return None
        return HintedTurn(number, start, end, mask, prefix, hint, kind, error_class)

    def _prefix(self, row: RolloutRow, start: int, hint: str) -> list[int]:
        before = list(row.response_ids[:start])
        if self.splicer is not None:
            return self.splicer.splice([*row.prompt_ids, *before], hint)
        builder, tools = self.reader.builder, self.reader.tools
        if list(builder.build_initial_tokens(row.prompt, tools=tools)) != list(row.prompt_ids):
            raise ModelError(
                f"The prompt rendered again differs from what the rollout began with (it was cut, or its agent loop "
                f"renders it in another way), so hint.placement: {self.config.hint.placement} cannot change it. Use "
                "hint.placement: local."
            )
        messages = splice_messages(row.prompt, hint, self.config.hint.placement, self.config.hint.role)
        return [*builder.build_initial_tokens(messages, tools=tools), *before]

    def _counts_as_usable(self, turn: HintedTurn) -> bool:
        if not any(turn.mask):
            self.counts["rejected"] += 1
            return False
        if len(turn.prefix_ids) + turn.end - turn.start > self.max_tokens:
            self.counts["too_long"] += 1
            return False
        return True

    def _sibling_hints(self, attempts: list[Attempt]) -> list[str | None]:
        """For each failed rollout, the solution of the first successful session of its group: its last output.

        verl copies a session's final reward to all its outputs, and hands rows over in any order.
        """
        threshold = self.config.hint.success_threshold
        good: dict[str, RolloutRow] = {}
        for row in (attempt.row for attempt in attempts):
            if row.reward is None or row.reward < threshold:
                continue
            uid, session, output = row.name
            best = good.get(uid)
            if best is None or (session, -output) < (best.name[1], -best.name[2]):
                good[uid] = row
        hints: list[str | None] = []
        for attempt in attempts:
            found = good.get(attempt.row.name[0])
            failed = attempt.row.reward is not None and attempt.row.reward < threshold
            text = None
            if found is not None and failed:
                text = SIBLING_HINT.format(solution=self.tokenizer.decode(found.response_ids, skip_special_tokens=True))
            hints.append(text)
        return hints


def classify(text: str, tool: str | None, flagged: bool) -> tuple[Status, str | None]:
    """Return (status, error class) of a tool result; verl's own error texts show no trait of one but their start."""
    for start, error_class in HOST_CLASSES:
        if text.startswith(start):
            return Status.ERROR, error_class
    if host_error(text):
        text, flagged = _EXECUTION.sub("", text), True
    status, error_class, _ = classify_text(text, flagged=flagged, tool=tool)
    return status, error_class


def tool_results(turns: Turns) -> Iterator[tuple[int, str | None, str, bool]]:
    """Yield (number of the action, tool, text, whether the host said that it failed) of every tool result."""
    ends = [index for index, _ in turns.actions[1:]] + [len(turns.messages)]
    for number, ((index, _), end) in enumerate(zip(turns.actions, ends, strict=True)):
        names = {call.get("id"): call["function"]["name"] for call in turns.messages[index].get("tool_calls") or []}
        for message in turns.messages[index + 1 : end]:
            if message.get("role") == "tool":
                content = message.get("content")
                text = content if isinstance(content, str) else str(content)
                name = message.get("name") or names.get(message.get("tool_call_id"))
                yield number, name, text, bool(message.get("is_error"))
