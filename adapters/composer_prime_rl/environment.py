"""The verifiers environment `composer-prime-rl`: plays another environment and stamps channel 2 on its error turns.

    [[orchestrator.train.source]]
    env = { id = "composer-prime-rl", taskset = { id = "your-taskset" }, composer = { sdpo = { weight = 0.5 } } }

prime-rl finds it by its id, because `composer_prime_rl` exports it (verifiers `v1/utils/loaders.py`
`environment_class`). Everything about playing a task stays with the environment inside. After an episode the wrapper
looks for error turns, asks the hint generator, has the live policy score the same tokens with the hint in front of the
turn, and writes `reference_logprobs` and `loss_weights["ref_kl"]` on that turn's nodes. prime-rl's train sink, packer
and trainer then do the rest. Channel 2 replicates Cursor's published recipe (Composer 2.5) as far as it is public.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from typing import Any, Literal

import verifiers.v1 as vf
from pydantic import Field, SerializeAsAny, model_validator
from verifiers.v1.utils.loaders import env_config_type, load_environment

from composer_plugins.config import ComposerConfig
from composer_prime_rl.channel_section import channel_section
from composer_prime_rl.endpoints import endpoint_of
from composer_prime_rl.hinted_turns import ERROR_PREFIXES, TurnFinder
from composer_prime_rl.pair_episodes import PairPlayer
from composer_prime_rl.pair_taskset import PairTaskset
from composer_prime_rl.rendering import rendered_tokenizer
from composer_prime_rl.scoring import PrefillScorer, ScoringOptions
from composer_prime_rl.silent_rollouts import SilentRollouts
from composer_prime_rl.stamping import Stamper

logger = logging.getLogger(__name__)

#: Fields of an environment's config that the wrapped one takes over.
_SHARED = ("taskset", "agent", "timeout", "retries", "max_concurrent_agents", "interception")


class ComposerEnvConfig(vf.EnvConfig):
    """`[env]` with id `composer-prime-rl`."""

    agent: vf.AgentConfig = vf.AgentConfig()
    """The one seat of a plain taskset, as without the wrapper."""
    wraps: SerializeAsAny[vf.EnvConfig] | None = None
    """An environment with roles of its own: its `[env]` table without the taskset. None: the taskset's own."""
    composer: dict[str, Any] = Field(default_factory=dict)
    """The `composer` section, the same as on every host; the wrapper reads `sdpo` (or `replay_dpo`, for pairs)."""
    sdpo_route: Literal["ref_kl", "loss"] = "ref_kl"
    """ref_kl: prime-rl's own component trains the stamped tokens; loss: `composer_loss` does. Same value as there."""
    scoring: ScoringOptions = ScoringOptions()
    """Patience with the server that scores."""
    error_prefixes: tuple[str, ...] = ERROR_PREFIXES
    """A tool result that begins with one of these is an error; others are classified by their shape."""
    silent_after: int = Field(32, ge=1)
    """Warn when this many rollouts in a row, in one worker, gave channel 2 nothing."""

    @model_validator(mode="before")
    @classmethod
    def _narrow_wraps(cls, data: Any) -> Any:
        """Find the wrapped environment's own config class; it shares our taskset."""
        wraps = data.get("wraps") if isinstance(data, dict) else None
        if isinstance(wraps, dict):
            taskset = data.get("taskset") or {}
            name = taskset.get("id", "") if isinstance(taskset, dict) else taskset.id
            kind = env_config_type(name, wraps.get("id", ""))
            data = {**data, "wraps": kind.model_validate({"taskset": taskset, **wraps})}
        return data

    @model_validator(mode="after")
    def _section_is_valid(self) -> ComposerEnvConfig:
        section = self.section()
        sources = set(section.sdpo.hint.sources)
        if section.sdpo.weight > 0:
            if section.sdpo.hint.placement == "last_user":
                raise ValueError("composer.sdpo.hint.placement: last_user would render the context anew; use local")
            if "sibling" in sources:
                raise ValueError(
                    "composer.sdpo.hint.sources: sibling needs the whole group; an environment sees one rollout"
                )
            if section.sdpo.temperature not in (None, 1.0):
                raise ValueError("composer.sdpo.temperature: prime-rl's server scores at temperature 1; leave it out")
        return self

    def section(self) -> ComposerConfig:
        """Return the checked `composer` section, with channel 2 alone in it."""
        return channel_section(self.composer, "sdpo", sdpo_route=self.sdpo_route)


class ComposerEnv(vf.Env[ComposerEnvConfig]):
    """Plays the wrapped environment; stamps what it returns.

    Args:
        config: `[env]`.

    Raises:
        ValueError: verifiers cannot load the taskset or the wrapped environment.
    """

    def __init__(self, config: ComposerEnvConfig) -> None:
        super().__init__(config)
        self.section = config.section()
        self.pairs = isinstance(self.taskset, PairTaskset)
        self.inner = None if self.pairs else load_environment(_inner_config(config))
        self.silence = SilentRollouts(config.silent_after)
        self._scorer: PrefillScorer | None = None
        self._finders: dict[str, TurnFinder] = {}

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        """Never called: `run_episode` hands the whole episode to the wrapped environment."""
        raise NotImplementedError("composer-prime-rl plays whole episodes")

    def complete(self, episode: vf.Episode) -> bool:
        """As the wrapped environment says."""
        return super().complete(episode) if self.inner is None else self.inner.complete(episode)

    @contextlib.asynccontextmanager
    async def serving(self):
        """Hold the wrapped environment's resources and the connections to the scoring server."""
        self._scorer = PrefillScorer(self.config.scoring)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if self.inner is not None:
                    await stack.enter_async_context(self.inner.serving())
                yield
        finally:
            scorer, self._scorer = self._scorer, None
            await scorer.aclose()

    async def run_episode(self, task: vf.Task, ctx: vf.ModelContext, **observers: Any) -> vf.Episode:
        """Play one episode and stamp it; what goes wrong in stamping never fails the episode.

        Args:
            task, ctx, observers: as `vf.Env.run_episode`.
        """
        if self.inner is None:
            player = PairPlayer(self.config.taskset, self._connected(), self.config.env_id)
            return await player.play(task, ctx, endpoint_of(ctx.client, ctx.model, ctx.sampling))
        episode = await self.inner.run_episode(task, ctx, **observers)
        if self.section.sdpo.weight > 0 and isinstance(ctx.client, vf.TrainClientConfig):
            self.silence.update(await self._stamp(episode, ctx))
        return episode

    async def _stamp(self, episode: vf.Episode, ctx: vf.ModelContext) -> Counter[str]:
        temperature = ctx.sampling.temperature
        traces = [t for t in episode.traces if t.ok and t.agent.trainable and _plays_the_policy(t, ctx)]
        if temperature not in (None, 1.0):
            for trace in traces:
                trace.record_metric("sdpo/refused_temperature", 1.0)
            return Counter(temperature=1)
        try:
            stamper = Stamper(
                self.section.sdpo, self.config.sdpo_route, self._connected(), self.config.scoring.deadline
            )
            return await stamper.stamp(traces, self._finder(ctx), endpoint_of(ctx.client, ctx.model, ctx.sampling))
        except Exception:
            logger.exception("stamping failed; the episode trains without channel 2")
            for trace in traces:
                trace.record_metric("sdpo/failed/internal", 1.0)
            return Counter({"failed/internal": 1, "turns": 1, "tool_results": 1, "error_turns": 1, "hinted_turns": 1})

    def _connected(self) -> PrefillScorer:
        if self._scorer is None:
            raise RuntimeError("run_episode outside of `async with env.serving()`.")
        return self._scorer

    def _finder(self, ctx: vf.ModelContext) -> TurnFinder:
        """The finder for a renderer and its tokenizer; one of each per worker."""
        name, config = ctx.client.renderer_model_name or ctx.model, ctx.client.renderer
        key = f"{name} {config.model_dump_json() if config is not None else ''}"
        if key not in self._finders:
            self._finders[key] = TurnFinder(
                self.section.sdpo, rendered_tokenizer(name, config), self.config.error_prefixes
            )
        return self._finders[key]


def _inner_config(config: ComposerEnvConfig) -> vf.EnvConfig:
    """The wrapped environment's config: `wraps`, or the taskset's own environment with what it shares with ours."""
    shared = {name: getattr(config, name) for name in _SHARED}
    if config.wraps is not None:
        return config.wraps.model_copy(update={"taskset": config.taskset})
    kind = env_config_type(config.taskset.id)
    return kind(**{name: value for name, value in shared.items() if name in kind.model_fields})


def _plays_the_policy(trace: vf.Trace, ctx: vf.ModelContext) -> bool:
    """Whether a role has no model or endpoint of its own."""
    agent = trace.agent.config
    return agent.model in (None, ctx.model) and agent.client in (None, ctx.client)
