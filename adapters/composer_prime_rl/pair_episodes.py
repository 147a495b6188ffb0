"""Plays a preference pair as one episode of two traces: channel 3 (our addition) through prime-rl's own wire.

Both actions are scored under the live policy, the token weights follow from the margin (`pair_weights`), and the traces go
the way of every rollout. Exact when the policy that is trained is the one that scored: no weight update in between.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import verifiers.v1 as vf

from composer_prime_rl.endpoints import endpoint_of
from composer_prime_rl.pair_taskset import PairData, PairTasksetConfig
from composer_prime_rl.pair_weights import PairWeights, pair_weights
from composer_prime_rl.scoring import Endpoint, PrefillScorer, ScoringError

SIDES = ("chosen", "rejected")


class PairPlayer:
    """Makes episodes of pairs.

    Args:
        config: `[env.taskset]`.
        scorer: asks the inference server, and the reference server if there is one.
        env_id: how the episode names its environment.
    """

    def __init__(self, config: PairTasksetConfig, scorer: PrefillScorer, env_id: str) -> None:
        self.config, self.section, self.scorer, self.env_id = config, config.section(), scorer, env_id

    async def play(self, task: vf.Task, ctx: vf.ModelContext, endpoint: Endpoint) -> vf.Episode:
        """Return the pair's episode; a server that cannot score gives a failed one, which does not train.

        Args:
            task: with `PairData`.
            ctx: of the request; its temperature must be 1 (DPO compares log-probs at temperature 1).
            endpoint: where the live policy is served.
        """
        data: PairData = task.data
        recorded = vf.TraceTask(type=type(task).__name__, data=data, key=task.key, hash=task.hash)
        episode = vf.Episode(env=vf.EnvInfo(id=self.env_id), task=recorded)
        if ctx.sampling.temperature not in (None, 1.0):
            episode.errors.append(_error("replay_dpo needs sampling.temperature = 1 for the source of the pairs"))
            return episode
        try:
            live = await self._score(endpoint, data)
            reference = data.reference or await self._score(self._reference(), data)
        except ScoringError as error:
            episode.errors.append(_error(f"the pair was not scored ({error.reason}): {error}"))
            return episode
        weights = pair_weights(self.section, *live, *reference)
        agent = vf.AgentInfo(config=vf.AgentConfig(model=ctx.model, client=ctx.client), name="replay_dpo")
        for side, logprobs in enumerate(live):
            episode.traces.append(self._trace(episode.task, agent, data, side, logprobs, weights))
        episode.ok = True
        return episode

    async def _score(self, endpoint: Endpoint, data: PairData) -> tuple[list[float], list[float]]:
        start = len(data.context_ids)
        actions = (data.chosen_ids, data.rejected_ids)
        both = await asyncio.gather(*(self.scorer.score(endpoint, data.context_ids + ids, start) for ids in actions))
        return both[0], both[1]

    def _reference(self) -> Endpoint:
        return endpoint_of(self.config.reference_server, self.config.reference_server.model)

    def _trace(
        self, task: vf.TraceTask, agent: vf.AgentInfo, data: PairData, side: int, logprobs: list[float],
        weights: PairWeights,
    ) -> vf.Trace:  # fmt: skip
        """One action as a finished trace: the context in its nodes, the action in the last."""
        per_token = (weights.chosen, weights.rejected)[side] * self.section.weight * data.pair_weight
        scale = data.tokens_per_pair if self.config.route == "ce" else 1.0
        ids = (data.chosen_ids, data.rejected_ids)[side]
        trace = vf.Trace(task=task, agent=agent, nodes=_context(data))
        action = vf.MessageNode(
            parent=len(trace.nodes) - 1 if trace.nodes else None, message=_message(data.actions[side]), sampled=True,
            token_ids=list(ids), mask=[True] * len(ids), logprobs=list(logprobs),
        )  # fmt: skip
        if self.config.route == "ce":
            action.loss_weights = {"ce": [per_token * scale] * len(ids)}
        trace.nodes.append(action)
        usage = vf.Usage(prompt_tokens=len(data.context_ids), completion_tokens=len(ids))
        trace.calls.append(vf.ModelCall(node=len(trace.nodes) - 1, model=agent.config.model, usage=usage))
        trace.record_reward("replay_dpo", per_token if self.config.route == "rl" else 0.0)
        trace.record_metrics(self._metrics(weights, side, len(ids), scale))
        trace.info["replay_dpo"] = {"side": SIDES[side], "pair": data.pair_id}
        trace.stop("replay_dpo")
        trace.ok = True
        return trace

    def _metrics(self, weights: PairWeights, side: int, tokens: int, scale: float) -> dict[str, float]:
        """`replay_dpo/pairs` is a half on each of the two traces; the multiplier is what a pair token's DPO weight gets."""
        return {
            "replay_dpo/pairs": 0.5,
            "replay_dpo/tokens": tokens,
            "replay_dpo/margin": weights.margin,
            "replay_dpo/accuracy": float(weights.margin > 0),
            f"replay_dpo/{SIDES[side]}_shift": (weights.chosen_shift, weights.rejected_shift)[side],
            "replay_dpo/multiplier": self.section.weight * scale,
        }


def _context(data: PairData) -> list[vf.MessageNode]:
    """The context's messages; the last one carries all of its tokens (no message is sampled, so none is split)."""
    nodes = [
        vf.MessageNode(parent=i - 1 if i else None, message=_message(message))
        for i, message in enumerate(data.messages)
    ]
    if nodes:
        nodes[-1].token_ids = list(data.context_ids)
        nodes[-1].mask = [False] * len(data.context_ids)
    return nodes


def _message(chat: dict[str, Any]) -> Any:
    """A chat dict of ours as verifiers' typed message."""
    role, content = chat["role"], chat.get("content") or ""
    if role == "tool":
        return vf.ToolMessage(tool_call_id=chat.get("tool_call_id") or "", content=content, name=chat.get("name"))
    if role == "system":
        return vf.SystemMessage(content=content)
    if role == "user":
        return vf.UserMessage(content=content)
    calls = [_call(call) for call in chat.get("tool_calls") or []]
    return vf.AssistantMessage(content=content or None, tool_calls=calls or None)


def _call(call: dict[str, Any]) -> vf.ToolCall:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return vf.ToolCall(id=call["id"], name=function["name"], arguments=text)


def _error(message: str) -> vf.Error:
    return vf.Error(type="ReplayDPO", message=message)
