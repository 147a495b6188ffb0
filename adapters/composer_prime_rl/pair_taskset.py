"""The verifiers taskset `composer-prime-rl`: each task is one preference pair of a replay_dpo run (our addition).

    [[orchestrator.train.source]]
    env = { taskset = { id = "composer-prime-rl", model = "your/model", reference = "out/pair_reference",
            composer = { replay_dpo = { weight = 0.1, pairs = "pairs.jsonl" } } } }
    group_size = 1

The tasks carry token ids, so that workers need no tokenizer, and the reference's log-probs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import verifiers.v1 as vf
from pydantic import Field, SerializeAsAny, model_validator
from renderers import RendererConfig

from composer_plugins.channels.pair_stream import PairStream
from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError
from composer_plugins.traces.schema import Pair
from composer_plugins.traces.store import read_stage
from composer_prime_rl.channel_section import channel_section

logger = logging.getLogger(__name__)


class PairData(vf.TaskData):
    """One pair on prime-rl's wire."""

    pair_id: str
    messages: list[dict[str, Any]]
    """The context, as chat dicts, for the saved rollouts."""
    actions: list[dict[str, Any]]
    """The chosen and the rejected message, as chat dicts."""
    context_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    pair_weight: float = 1.0
    reference: tuple[list[float], list[float]] | None = None
    """Log-probs of both actions under the reference, nats at temperature 1; None: ask the reference server."""
    tokens_per_pair: float
    """Mean number of action tokens per pair of the whole file."""


class PairTask(vf.Task[PairData]):
    """A pair; nothing is generated and nothing is graded."""

    @property
    def key(self) -> str:
        """The pair's own id: the same in every run on the file."""
        return self.data.pair_id


class ReferenceServer(vf.EvalClientConfig):
    """A server that holds the reference (the initial weights)."""

    model: str
    """Served name."""


class PairTasksetConfig(vf.TasksetConfig):
    """`[env.taskset]` with id `composer-prime-rl`."""

    model: str = ""
    """Tokenizer of the policy (a name or a directory)."""
    renderer: SerializeAsAny[RendererConfig] | None = None
    """The same as `orchestrator.renderer`; None: found by the model's name."""
    composer: dict[str, Any] = Field(default_factory=dict)
    """The `composer` section; `replay_dpo` is read."""
    reference: Path | None = None
    """Folder that `python -m composer_prime_rl.pair_reference` wrote with the initial weights."""
    reference_server: ReferenceServer | None = None
    """Instead of `reference`: a server with the initial weights, asked every time."""
    route: Literal["ce", "rl"] = "ce"
    """ce: signed weights of prime-rl's ce component, which has its own denominator and leaves trainer.loss out of it;
    rl: rewards +-w for the grpo algorithm, in one denominator with the policy's tokens."""
    seed: int = 0
    """Of the order of the pairs."""

    @model_validator(mode="after")
    def _complete(self) -> PairTasksetConfig:
        if not self.composer:  # verifiers builds an empty one to ask for the class
            return self
        section = self.section()
        if section.weight <= 0:
            raise ValueError("composer.replay_dpo.weight is 0: leave this source out, so that no pair is scored")
        if not self.model:
            raise ValueError("model names no tokenizer; set it to the policy's")
        if (self.reference is None) == (self.reference_server is None):
            raise ValueError(
                "give one of reference (a folder written by `python -m composer_prime_rl.pair_reference` with the initial "
                "weights) and reference_server"
            )
        if self.route == "rl" and (section.length_normalized or section.nll_weight > 0):
            raise ValueError(
                "length_normalized and nll_weight make the weights of the two actions differ, and the grpo algorithm "
                "subtracts their mean; use route: ce"
            )
        return self

    def section(self) -> ReplayDPOConfig:
        """Return the checked `replay_dpo` section."""
        return channel_section(self.composer, "replay_dpo").replay_dpo


class PairTaskset(vf.Taskset[PairTask, PairTasksetConfig]):
    """Reads, filters and orders the pairs (`composer_plugins.channels.pair_stream`)."""

    def load(self) -> Iterable[PairTask]:
        """Yield the pairs in their seeded order.

        Raises:
            ConfigError: no section, another tokenizer's file, or reference log-probs that are missing or of another file.
            TraceError: no usable pair; the message counts the reasons.
        """
        config = self.config
        if not config.composer:
            raise ConfigError("taskset composer-prime-rl needs composer.replay_dpo with pairs and a weight above 0.")
        stream = open_pairs(config.section(), config.model, config.renderer, config.seed)
        if config.reference is not None:
            stream.load(config.reference)
            if missing := set(range(len(stream.pairs))) - stream.reference.keys():
                raise ConfigError(
                    f"{config.reference} lacks {len(missing)} of {len(stream.pairs)} pairs; run "
                    "`python -m composer_prime_rl.pair_reference` with the same replay_dpo section."
                )
        records = {pair.id: pair for pair in read_stage(Path(config.section().pairs), Pair)}
        mean = tokens_per_pair(stream)
        for position, index in enumerate(stream.order):
            pair = stream.pairs[index]
            record = records[pair.id]
            yield PairTask(
                PairData(
                    idx=position, pair_id=pair.id, messages=[m.to_chat() for m in record.messages],
                    actions=[record.chosen.to_chat(), record.rejected.to_chat()], context_ids=pair.context,
                    chosen_ids=pair.chosen, rejected_ids=pair.rejected, pair_weight=pair.weight,
                    reference=stream.reference.get(index), tokens_per_pair=mean,
                ),
                config.task,
            )  # fmt: skip


def open_pairs(section: ReplayDPOConfig, model: str, renderer: Any = None, seed: int = 0) -> PairStream:
    """Return the usable pairs of a section, rendered as prime-rl renders prompts; what is left out is logged.

    Raises: as `PairStream`.
    """
    from composer_prime_rl.rendering import rendered_tokenizer

    stream = PairStream(section, rendered_tokenizer(model, renderer), seed=seed)
    if stream.skipped:
        logger.warning("replay_dpo: pairs left out of %s: %s", section.pairs, dict(stream.skipped))
    return stream


def tokens_per_pair(stream: PairStream) -> float:
    """Mean number of action tokens per pair."""
    return sum(len(p.chosen) + len(p.rejected) for p in stream.pairs) / len(stream.pairs)
