"""Scores hinted turns under the live policy and stamps the result on their message nodes, and on nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Literal

import verifiers.v1 as vf

from composer_plugins.channels.sdpo import ACTIVE_NATS
from composer_plugins.config import SDPOConfig
from composer_prime_rl.hinted_turns import HintedTurn, TurnFinder
from composer_prime_rl.reference import stamped
from composer_prime_rl.scoring import Endpoint, PrefillScorer, ScoringError

logger = logging.getLogger(__name__)

Route = Literal["ref_kl", "loss"]
#: Logged for every trace, 0 included, so that prime-rl's means are over all of them.
METRICS = (
    "turns", "tool_results", "error_turns", "hinted_turns", "scored_turns", "failed_turns", "tokens", "active_tokens",
)  # fmt: skip


class Stamper:
    """Channel 2 on the traces of one environment worker.

    Args:
        config: the `sdpo` section; its weight becomes the ref_kl weight of every token.
        route: `ref_kl` stamps reference log-probs and ref_kl weights; `loss` only the log-probs, for `composer_loss`.
        scorer: asks the inference server.
        deadline: longest time for one episode, seconds.
    """

    def __init__(self, config: SDPOConfig, route: Route, scorer: PrefillScorer, deadline: float) -> None:
        self.config, self.route, self.scorer, self.deadline = config, route, scorer, deadline

    async def stamp(self, traces: list[vf.Trace], finder: TurnFinder, endpoint: Endpoint) -> Counter[str]:
        """Stamp the hinted turns of an episode and record the counts of each trace in its metrics.

        Never raises for what the server does: a turn without an answer stays as it was and is counted, by reason, in
        `sdpo/failed_turns` and `sdpo/failed/<reason>`.

        Args:
            traces: finished traces of one episode.
            finder: for their tokenizer.
            endpoint: where the live policy is served.

        Returns:
            The counts of all traces together.
        """
        total: Counter[str] = Counter()
        counts = [Counter() for _ in traces]
        work = [
            (turn, count) for trace, count in zip(traces, counts, strict=True) for turn in finder.find(trace, count)
        ]
        for _, count in work:
            count["hinted_turns"] += 1
        tasks = [asyncio.create_task(self._score(turn, count, endpoint)) for turn, count in work]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.deadline)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task, (_, count) in zip(tasks, work, strict=True):
                if task in late:
                    _failed(count, "deadline")
        for trace, count in zip(traces, counts, strict=True):
            _record(trace, count)
            total.update(count)
        return total

    async def _score(self, turn: HintedTurn, count: Counter[str], endpoint: Endpoint) -> None:
        try:
            logprobs = await self.scorer.score(endpoint, turn.token_ids, len(turn.context_ids))
        except ScoringError as error:
            logger.debug("hinted turn not scored: %s", error)
            _failed(count, error.reason)
            return
        position = 0
        for number, node in enumerate(turn.nodes):
            prompt = node.mask.index(True) if number == 0 else 0
            size = len(node.token_ids) - prompt
            if node.sampled and any(node.mask):
                self._stamp(node, logprobs[position : position + size], prompt, count)
            position += size
        count["scored_turns"] += 1

    def _stamp(self, node: vf.MessageNode, logprobs: list[float], prompt: int, count: Counter[str]) -> None:
        """Write on one node: log-probs over its sampled tokens only, weights over all of its tokens."""
        sampled = stamped(value for value, own in zip(logprobs, node.mask[prompt:], strict=True) if own)
        node.reference_logprobs = sampled
        if self.route == "ref_kl":
            weights = dict(node.loss_weights or {})
            weights["ref_kl"] = [self.config.weight if own else 0.0 for own in node.mask]
            node.loss_weights = weights
        moved = [old - new for old, new in zip(node.logprobs, sampled, strict=False)]
        count["tokens"] += len(sampled)
        count["active_tokens"] += sum(abs(value) > ACTIVE_NATS for value in moved)
        count["divergence_sum"] += sum(moved)


def _failed(count: Counter[str], reason: str) -> None:
    count["failed_turns"] += 1
    count[f"failed/{reason}"] += 1


def _record(trace: vf.Trace, count: Counter[str]) -> None:
    for name in METRICS:
        trace.record_metric(f"sdpo/{name}", count[name])
    for name, value in count.items():
        if name.startswith("failed/") or name in ("unhinted", "unplaced", "no_tokens"):
            trace.record_metric(f"sdpo/{name}", value)
    if count["tokens"]:
        # the sampled estimate of KL(student || teacher): mean of log pi - log pi_T over tokens that pi sampled
        trace.record_metric("sdpo/divergence", count["divergence_sum"] / count["tokens"])
