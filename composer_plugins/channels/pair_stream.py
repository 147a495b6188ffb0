"""The pairs of a replay_dpo run (our addition): read, tokenized, in a seeded order, with their reference log-probs.

What every host shares. The position in the order follows from the optimizer step alone, so a resumed run, or one
with other ranks or micro-batches, draws the same pairs at the same step.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.models.tokenizer import tokenizer_fingerprint
from composer_plugins.traces.schema import Message, Pair
from composer_plugins.traces.store import file_sha256, read_manifest, read_stage

REFERENCE_FILE = "composer_pair_reference.json"


@dataclass
class TokenizedPair:
    """One pair as ids; only the two actions carry loss."""

    id: str
    context: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of both rows: the context counts twice."""
        return 2 * len(self.context) + len(self.chosen) + len(self.rejected)


class PairStream:
    """Reads, filters and deals out the pairs of a run.

    Args:
        config: the `replay_dpo` section.
        tokenizer: with the chat template that the policy is prompted with.
        seed: of the order.
        chat_template, template_kwargs: as the trainer renders prompts.
        max_pair_tokens: longest pair in tokens of both rows together that the host can take in; None: no limit.

    Raises:
        ConfigError: the file was filtered with another tokenizer.
        TraceError: no usable pair; the message counts the reasons.
    """

    def __init__(
        self,
        config: ReplayDPOConfig,
        tokenizer,
        *,
        seed: int,
        chat_template: str | None = None,
        max_pair_tokens: int | None = None,
        **template_kwargs: Any,
    ) -> None:
        import torch

        self.config, self.skipped, self.max_pair_tokens = config, Counter(), max_pair_tokens
        self.fingerprint = tokenizer_fingerprint(tokenizer, chat_template)
        self.pairs: list[TokenizedPair] = []
        path = Path(config.pairs)
        records = read_stage(path, Pair)
        for number, pair in enumerate(records):
            if number == 0:
                _refuse_other_tokenizer(path, tokenizer)
            tokenized = self._tokenize(pair, tokenizer, chat_template, template_kwargs)
            if tokenized is not None:
                self.pairs.append(tokenized)
        self.sha256 = file_sha256(path)
        if not self.pairs:
            raise TraceError(
                f"replay_dpo.weight is above 0 but no pair of {config.pairs} can be trained on "
                f"(left out: {dict(self.skipped) or 'the file is empty'}). {self._advice()}"
            )
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(self.pairs), generator=generator).tolist()
        self.reference: dict[int, tuple[list[float], list[float]]] = {}

    def _advice(self) -> str:
        """What to do when nothing is left."""
        advice = {
            "too similar": "raise replay_dpo.max_similarity",
            "longer than max_length": "raise replay_dpo.max_length",
            "longer than the host's token budget": f"raise the host's tokens per device (now {self.max_pair_tokens})",
            "tokens unknown to this tokenizer": "the pairs were made for another tokenizer: make them for this model",
            "not renderable by this chat template": "the pairs were made for another chat template",
            "same tokens on both sides": "use a chat template that shows tool calls",
        }
        fixes = [advice[reason] for reason in self.skipped if reason in advice]
        return ("; ".join(fixes) or "make pairs (`composer-rl pairs`)").capitalize() + "."

    def _tokenize(self, pair: Pair, tokenizer, chat_template, kwargs) -> TokenizedPair | None:
        from jinja2 import TemplateError

        if pair.similarity > self.config.max_similarity:
            self.skipped["too similar"] += 1
            return None
        messages = [m.to_chat() for m in pair.messages]
        # `or None`: some templates print tool boilerplate for an empty list
        render = dict(tools=pair.tool_schemas() or None, tokenize=True, return_dict=False, **kwargs)
        try:
            context = list(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, chat_template=chat_template, **render
                )
            )
            actions = [
                _action_ids(action, messages, context, tokenizer, chat_template, render)
                for action in (pair.chosen, pair.rejected)
            ]
        except TemplateError:  # a role or a tool call that the template does not know
            self.skipped["not renderable by this chat template"] += 1
            return None
        reason = self._unusable(context, actions, tokenizer)
        if reason:
            self.skipped[reason] += 1
            return None
        return TokenizedPair(pair.id, context, actions[0], actions[1], pair.weight)

    def _unusable(self, context: list[int], actions: list[list[int] | None], tokenizer) -> str | None:
        if None in actions:
            return "chat template rewrites the context after an action"
        lengths = [len(context) + len(ids) for ids in actions]
        if max(lengths) > self.config.max_length:
            return "longer than max_length"
        if self.max_pair_tokens is not None and sum(lengths) > self.max_pair_tokens:
            return "longer than the host's token budget"
        unknown = {tokenizer.unk_token_id} - {None, tokenizer.eos_token_id, tokenizer.pad_token_id}
        if any(unknown & set(ids) for ids in actions):
            return "tokens unknown to this tokenizer"
        if actions[0] == actions[1]:
            return "same tokens on both sides"
        return None

    def indices(self, step: int, *, slot: int = 0, slots: int = 1) -> list[int]:
        """Return the pair indices of part `slot` of `slots` (ranks, micro-batches) of optimizer step `step`, from 0."""
        first = step * self.config.pairs_per_step
        return [self.order[(first + j) % len(self.order)] for j in range(slot, self.config.pairs_per_step, slots)]

    def unscored(self, first_step: int, steps: int) -> list[int]:
        """Return, sorted, the pairs without reference log-probs that `steps` optimizer steps from `first_step` draw."""
        draws = min(steps * self.config.pairs_per_step, len(self.order))
        first = first_step * self.config.pairs_per_step
        drawn = {self.order[(first + j) % len(self.order)] for j in range(draws)}
        return sorted(drawn - self.reference.keys())

    def save(self, folder: Path) -> None:
        """Write the reference log-probabilities into a folder (of a checkpoint or a run)."""
        payload = {
            "pairs_sha256": self.sha256,
            "tokenizer_sha256": self.fingerprint,
            "reference": {str(k): v for k, v in sorted(self.reference.items())},
        }
        temporary = folder / (REFERENCE_FILE + ".part")
        temporary.write_text(json.dumps(payload))
        temporary.replace(folder / REFERENCE_FILE)

    def load(self, folder: Path) -> None:
        """Restore the reference log-probabilities of the run's initial weights. Raises `ConfigError`."""
        path = folder / REFERENCE_FILE
        if not path.exists():
            raise ConfigError(
                f"{folder} has no {REFERENCE_FILE}: the reference log-probabilities of the initial weights are lost, "
                "and those of the resumed weights would be wrong. Resume with the recipe that made the checkpoint."
            )
        payload = json.loads(path.read_text())
        if payload["pairs_sha256"] != self.sha256:
            raise ConfigError(
                f"{self.config.pairs} is not the pairs file that {folder} was trained on (SHA-256 differs)."
            )
        if payload.get("tokenizer_sha256", self.fingerprint) != self.fingerprint:
            raise ConfigError(
                f"{folder} was trained with another tokenizer or chat template: its reference log-probabilities belong "
                "to other tokens. Resume with the same ones, or start a new run."
            )
        self.reference = {int(k): (v[0], v[1]) for k, v in payload["reference"].items()}


def _refuse_other_tokenizer(path: Path, tokenizer) -> None:
    """Raise when the manifest names the tokenizer that filtered the pairs and it is another one."""
    made_with = read_manifest(path).options.get("tokenizer") or {}
    expected = made_with.get("sha256")
    if expected and expected != tokenizer_fingerprint(tokenizer, template=False):
        raise ConfigError(
            f"{path} was filtered with the tokenizer of {made_with.get('model')!r}, which is not this model's: its "
            "lengths and limits are wrong here. Run `composer-rl pairs` with --model of the model to be trained."
        )


def _action_ids(action: Message, messages, context: list[int], tokenizer, chat_template, render) -> list[int] | None:
    """Ids of an action as the policy would sample them: after the generation prompt, up to the end-of-turn token."""
    full = list(tokenizer.apply_chat_template([*messages, action.to_chat()], chat_template=chat_template, **render))
    if full[: len(context)] != context:
        return None
    ids = full[len(context) :]
    if tokenizer.eos_token_id in ids:  # templates print a newline after the end of a turn; sampling stops before it
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    return ids
