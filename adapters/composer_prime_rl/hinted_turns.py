"""Which turns of a verifiers trace are error turns, and what the self-teacher reads before them.

A trace is a graph of messages; every node keeps the token ids that it adds. Nothing is rendered again: the teacher reads
the stored ids of the context, the hint's own ids, and the stored ids of the turn.

Source: verifiers `v1/graph.py` (the node of a sampled message begins with the generation prompt).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import verifiers.v1 as vf
from verifiers.v1.types import content_text

from composer_plugins.config import SDPOConfig
from composer_plugins.envs.tool_errors import NOT_RECORDED
from composer_plugins.errors import ModelError
from composer_plugins.hints.turns import FEEDBACK_HINT, HintSplicer
from composer_plugins.plugins import get_plugin_manager
from composer_plugins.traces.classify import classify_text

#: How the MCP servers of verifiers' tools say that a tool raised (mcp `server/fastmcp/tools/base.py`).
ERROR_PREFIXES = ("Error executing tool ",)


@dataclass
class HintedTurn:
    """A span that gets a self-teacher.

    Args:
        nodes: the messages of the span, in order: the error turn alone, or up to the end of its branch.
        context_ids: what the self-teacher reads before the span's own tokens, hint included.
        own_ids: the span's tokens after the generation prompt of its first turn.
        hint: the text spliced in.
        kind: `rollout`, `recorded` or `feedback`.
        error_class: of the tool result, if one made it an error turn.
    """

    nodes: list[vf.MessageNode]
    context_ids: list[int]
    own_ids: list[int]
    hint: str
    kind: str
    error_class: str | None = None

    @property
    def token_ids(self) -> list[int]:
        """The teacher's whole input."""
        return [*self.context_ids, *self.own_ids]


class TurnFinder:
    """Finds the hinted turns of a trace.

    Args:
        config: the `sdpo` section.
        tokenizer: renders the hint as the policy's own prompts are rendered (`rendering.RenderedTokenizer`).
        error_prefixes: a tool result that begins with one of these is an error by its own word.

    Raises:
        ModelError: the renderer has no generation prompt that can be told apart.
    """

    def __init__(self, config: SDPOConfig, tokenizer, error_prefixes: Sequence[str] = ERROR_PREFIXES) -> None:
        self.config, self.sources, self.error_prefixes = config, set(config.hint.sources), tuple(error_prefixes)
        self.generator = get_plugin_manager().hint_generators.get(config.hint.generator).load()(**config.hint.options)
        self.tokenizer = tokenizer
        self.splicer = HintSplicer(tokenizer, role=config.hint.role)

    def find(self, trace: vf.Trace, counts: Counter[str]) -> list[HintedTurn]:
        """Return the hinted turns of `trace`, each sampled message in one of them at most.

        Args:
            trace: a finished trace with token ids.
            counts: gets `turns`, `tool_results`, `error_turns`, `unhinted` and `unplaced`, and `no_tokens` for a turn
                that the client returned without token ids.
        """
        found: list[HintedTurn] = []
        taken: set[int] = set()  # sampled messages that have a hint
        seen: set[tuple[int, int]] = set()  # branches share messages: (message, the one after it)
        for branch in trace.branches:
            nodes = branch.nodes
            new = [i for i, node in enumerate(nodes) if node.sampled and _edge(nodes, i) not in seen]
            seen.update(_edge(nodes, i) for i in new)
            counts["turns"] += len(new)
            for position, hint, kind, error_class in self._hints(trace, nodes, new, taken, counts):
                turn = self._place(nodes, position, hint, kind, error_class, counts)
                if turn is not None:
                    found.append(turn)
                    taken.update(id(node) for node in turn.nodes if node.sampled)
        return found

    def _hints(self, trace: vf.Trace, nodes, new: list[int], taken: set[int], counts: Counter[str]) -> Iterator:
        """Yield (position in the branch, hint, kind, error class) of the turns to hint at, one hint per turn."""
        hinted = False
        if "recorded" in self.sources and new and not taken and (hint := _text_of(trace, "hint")):
            hinted = True
            yield new[0], hint, "recorded", None
        for i in new if "rollout" in self.sources else ():
            error = None if id(nodes[i]) in taken else self._error(nodes, i, counts)
            if error is not None:
                hinted = True
                yield i, error[0], "rollout", error[1]
        if not hinted and not taken and "feedback" in self.sources and new and (said := _text_of(trace, "feedback")):
            yield new[0], FEEDBACK_HINT.format(feedback=said), "feedback", None

    def _error(self, nodes: list[vf.MessageNode], turn: int, counts: Counter[str]) -> tuple[str, str | None] | None:
        """The hint for the first failed tool result of a turn, and its class."""
        names = {call.id: call.name for call in nodes[turn].message.tool_calls or []}
        failed = False
        for node in nodes[turn + 1 :]:
            message = node.message
            if message.role != "tool":
                break
            counts["tool_results"] += 1
            text, tool = content_text(message.content), message.name or names.get(message.tool_call_id)
            if NOT_RECORDED in text:  # a recorded workspace cannot answer: not the call's fault
                continue
            status, error_class, _ = classify_text(text, flagged=text.startswith(self.error_prefixes), tool=tool)
            if not status.failed:
                continue
            failed = True
            hint = self.generator.generate_for(tool, text, status, error_class)
            if hint is not None:
                counts["error_turns"] += 1
                return hint.text, hint.error_class
        counts["error_turns"] += failed
        counts["unhinted"] += failed
        return None

    def _place(
        self, nodes: list[vf.MessageNode], position: int, hint: str, kind: str, error_class, counts: Counter[str]
    ) -> HintedTurn | None:
        first = nodes[position]
        if not any(first.mask):
            counts["no_tokens"] += 1
            return None
        alone = kind != "feedback" and self.config.scope == "error_turn"
        span = [first] if alone else nodes[position:]
        prompt = first.mask.index(True)  # tokens of the generation prompt, which the node begins with
        before = [token for node in nodes[:position] for token in node.token_ids] + first.token_ids[:prompt]
        try:
            context = self._context(before, hint)
        except ModelError:
            counts["unplaced"] += 1
            return None
        own = first.token_ids[prompt:] + [token for node in span[1:] for token in node.token_ids]
        return HintedTurn(span, context, own, hint, kind, error_class)

    def _context(self, before: list[int], hint: str) -> list[int]:
        if self.config.hint.placement == "leading_system":  # as prime-rl's opsd: a system message before everything
            system = [{"role": "system", "content": hint}]
            return [*self.tokenizer.apply_chat_template(system, add_generation_prompt=False), *before]
        return self.splicer.splice(before, hint)


def _text_of(trace: vf.Trace, key: str) -> str | None:
    """A text that the environment left for us: in `trace.info`, or a field of the task."""
    value = trace.info.get(key)
    if value is None:
        value = getattr(trace.task.data, key, None)
    return value if isinstance(value, str) and value.strip() else None


def _edge(nodes: list[vf.MessageNode], i: int) -> tuple[int, int]:
    return id(nodes[i]), id(nodes[i + 1]) if i + 1 < len(nodes) else 0
