"""From TRL's rollouts to hinted turns: recorded hints, tool errors, reward feedback, successful siblings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from composer_plugins.config import SDPOConfig
from composer_plugins.envs.tool_errors import NOT_RECORDED
from composer_plugins.hints.splice import splice_messages
from composer_plugins.hints.turns import FEEDBACK_HINT, SIBLING_HINT
from composer_plugins.plugins import get_plugin_manager
from composer_plugins.traces.classify import classify_text
from composer_trl.hinted_turns import HintedTurn, HintSplicer, tool_results, turns_of

if TYPE_CHECKING:
    from composer_trl.trainer import ComposerGRPOTrainer


@dataclass
class Rollout:
    """What TRL's generation returned for the local rows, before padding."""

    prompts: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None
    completions: list[Any]
    rewards_per_func: torch.Tensor | None = None
    feedback: list[str | None] = field(default_factory=list)


class HintSources:
    """Finds the error turns of a generation batch and the hint of each.

    Args:
        config: the `sdpo` section.
        trainer: for the tokenizer, template, tools and reward weights.
        hint_for_result: the user's own hint for a tool result; default: the recipe's generator.
    """

    def __init__(
        self,
        config: SDPOConfig,
        trainer: ComposerGRPOTrainer,
        hint_for_result: Callable[[str | None, str], tuple[str, str] | None] | None,
    ) -> None:
        self.config, self.trainer = config, trainer
        self.sources = set(config.hint.sources)
        generator = get_plugin_manager().hint_generators.get(config.hint.generator).load()
        self.generator = generator(**config.hint.options)
        self.hint_for_result = hint_for_result or self._generated_hint
        self._splicer: HintSplicer | None = None

    def _generated_hint(self, tool: str | None, text: str) -> tuple[str, str] | None:
        if NOT_RECORDED in text:  # the log cannot answer: not the call's fault
            return None
        status, error_class, _ = classify_text(text, tool=tool)
        if not status.failed:
            return None
        hint = self.generator.generate_for(tool, text, status, error_class)
        return None if hint is None else (hint.text, hint.error_class)

    def turns(self, inputs: list[dict[str, Any]], rollout: Rollout) -> list[list[HintedTurn]]:
        """Return the hinted turns of each local row.

        Args:
            inputs: the dataset rows, one per completion.
            rollout: what was generated for them.
        """
        siblings = self._sibling_hints(rollout) if "sibling" in self.sources else [None] * len(inputs)
        result = []
        for row, example in enumerate(inputs):
            hints = self._row_hints(row, example, rollout, siblings[row])
            result.append([self._turn(row, example, rollout, *hint) for hint in hints])
        return [[turn for turn in row if self._fits(turn)] for row in result]

    def _row_hints(self, row: int, example: dict[str, Any], rollout: Rollout, sibling: str | None):
        """Yield (turn number or None for the whole attempt, kind, hint, error, error class); one hint per turn."""
        hinted: dict[int, tuple] = {}
        if "rollout" in self.sources and isinstance(rollout.completions[row], list):
            for turn, message, text in tool_results(rollout.completions[row]):
                found = self.hint_for_result(message.get("name"), text)
                if found is not None:
                    hinted.setdefault(turn, (turn, "rollout", found[0], text, found[1]))
        if "recorded" in self.sources and example.get("hint"):
            hinted[0] = (0, "recorded", example["hint"], example.get("error"), example.get("error_class"))
        if hinted:
            return list(hinted.values())
        attempt = []
        if "feedback" in self.sources and row < len(rollout.feedback) and rollout.feedback[row]:
            attempt.append(("feedback", FEEDBACK_HINT.format(feedback=rollout.feedback[row])))
        if sibling is not None:
            attempt.append(("sibling", sibling))
        if not attempt:
            return []
        return [(None, attempt[0][0], "\n\n".join(text for _, text in attempt), None, None)]

    def _turn(self, row: int, example, rollout: Rollout, number, kind, hint, error, error_class) -> HintedTurn:
        completion = rollout.completion_ids[row]
        tool_mask = None if rollout.tool_mask is None else rollout.tool_mask[row]
        start, end = 0, len(completion)
        if number is not None and self.config.scope == "error_turn":
            start, end = turns_of(tool_mask, len(completion))[number]
        elif number is not None:  # from the hinted turn to the end of the completion
            start = turns_of(tool_mask, len(completion))[number][0]
        sampled = [1] * len(completion) if tool_mask is None else tool_mask
        prefix = self._prefix(row, rollout, completion[:start], hint)
        messages = rollout.prompts[row] if isinstance(rollout.prompts[row], list) else []
        return HintedTurn(
            start,
            end,
            [bool(m) for m in sampled[start:end]],
            prefix,
            hint,
            kind,
            error,
            error_class,
            messages,
            example,
        )

    def _prefix(self, row: int, rollout: Rollout, before: list[int], hint: str) -> list[int]:
        prompt, placement = rollout.prompts[row], self.config.hint.placement
        if not isinstance(prompt, list):  # plain text prompts: the hint follows the prompt on its own lines
            text_ids = self.trainer._tokenizer(f"\n{hint}\n", add_special_tokens=False)["input_ids"] if hint else []
            return [*rollout.prompt_ids[row], *before, *text_ids]
        if placement == "local":
            return self.splicer.splice([*rollout.prompt_ids[row], *before], hint)
        if not hint:
            return [*rollout.prompt_ids[row], *before]
        messages = splice_messages(prompt, hint, placement, self.config.hint.role)
        trainer = self.trainer
        tools = trainer.tools
        if trainer.environment_factories is not None:
            tools = trainer._env_tools[trainer._batch_environments[row]]
        ids = trainer._tokenizer.apply_chat_template(
            messages, tools=tools or None, chat_template=trainer.chat_template, add_generation_prompt=True,
            tokenize=True, return_dict=False, **trainer.chat_template_kwargs,
        )  # fmt: skip
        return [*ids, *before]

    @property
    def splicer(self) -> HintSplicer:
        """Built on first use: plain-text prompts need no chat template."""
        if self._splicer is None:
            trainer = self.trainer
            self._splicer = HintSplicer(
                trainer._tokenizer,
                role=self.config.hint.role,
                chat_template=trainer.chat_template,
                **trainer.chat_template_kwargs,
            )
        return self._splicer

    def _fits(self, turn: HintedTurn) -> bool:
        fits = len(turn.prefix_ids) + turn.end - turn.start <= self.trainer.access.max_positions
        if not fits:
            self.trainer.monitor.metrics.add("sdpo/too_long", 1)
        return fits

    def _sibling_hints(self, rollout: Rollout) -> list[str | None]:
        """For each failed local row, the first successful completion of its group (over all ranks)."""
        trainer = self.trainer
        rewards = (rollout.rewards_per_func * trainer.reward_weights.to(rollout.rewards_per_func.device)).nansum(1)
        local = trainer._tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        texts = gather_object(local)
        first, size = trainer.accelerator.process_index * len(local), trainer.num_generations
        hints: list[str | None] = []
        for row in range(first, first + len(local)):
            group = range(row // size * size, row // size * size + size)
            good = [i for i in group if i != row and rewards[i] >= self.config.hint.success_threshold]
            failed = rewards[row] < self.config.hint.success_threshold
            hints.append(SIBLING_HINT.format(solution=texts[good[0]]) if good and failed else None)
        return hints
