"""The algorithm `composer`: channel 2 scored in the orchestrator, in place of the environment wrapper (optional path).

prime-rl has no plugin for algorithms, so `register()` adds one to its registry in this process, before its configuration
classes are built: `python -m composer_prime_rl.launcher` does that in the launcher and in the orchestrator. Credit is
grpo's; traces that come with credit of their own (pairs) keep it.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import Field

from composer_plugins.errors import ConfigError

#: Modules that hold the union of algorithms by the time they are imported.
_TOO_LATE = ("prime_rl.configs.orchestrator", "prime_rl.configs.rl")


def register() -> type:
    """Add `orchestrator.algo.type = "composer"` to prime-rl; return its config class. A second call does nothing.

    Raises:
        ConfigError: prime-rl's configuration was imported before, so its models no longer take a new algorithm.
    """
    import prime_rl.configs.algorithm as algorithm

    known = getattr(algorithm, "ComposerAlgoConfig", None)
    if known is not None:
        return known
    early = [name for name in _TOO_LATE if name in sys.modules]
    if early:
        raise ConfigError(
            f"register() must run before {early[0]} is imported. Use `python -m composer_prime_rl.launcher`."
        )

    class ComposerAlgoConfig(algorithm.GRPOAlgoConfig):
        """grpo, and channel 2 on the error turns."""

        type: Literal["composer"] = "composer"
        composer: dict[str, Any] = Field(default_factory=dict)
        """The `composer` section; `sdpo` is read."""
        sdpo_route: Literal["ref_kl", "loss"] = "ref_kl"
        """The same value as for the loss."""
        scoring: dict[str, Any] = Field(default_factory=dict)
        """Patience with the inference server (`composer_prime_rl.scoring.ScoringOptions`)."""
        silent_after: int = Field(32, ge=1)
        """Warn when this many rollouts in a row gave channel 2 nothing."""

    union = algorithm.AlgoConfig.__origin__
    algorithm.AlgoConfig = Annotated[union | ComposerAlgoConfig, Field(discriminator="type")]
    algorithm.ComposerAlgoConfig = ComposerAlgoConfig
    return ComposerAlgoConfig


def register_runtime() -> None:
    """Add the algorithm's runtime; for the orchestrator's process, after `register`."""
    from prime_rl.orchestrator import algo
    from prime_rl.orchestrator.algo.grpo import GRPOAlgorithm

    if "composer" in algo.ALGORITHM_CLASSES:
        return
    algo.ALGORITHM_CLASSES["composer"] = type(
        "ComposerAlgorithm", (_Composer, GRPOAlgorithm), {"__doc__": _Composer.__doc__, "__module__": __name__}
    )


class _Composer:
    """grpo's credit; the hinted turns of each episode are scored under the live policy as soon as it arrives."""

    action_loss_type = "rl"

    def __init__(self, config: Any, policy_pool: Any) -> None:
        from composer_prime_rl.channel_section import channel_section
        from composer_prime_rl.scoring import ScoringOptions
        from composer_prime_rl.silent_rollouts import SilentRollouts

        super().__init__(config, policy_pool)
        self.sdpo = channel_section(config.composer, "sdpo", sdpo_route=config.sdpo_route).sdpo
        self.route, self.scoring = config.sdpo_route, ScoringOptions(**config.scoring)
        self.silence = SilentRollouts(config.silent_after)
        self._scorer = self._finder = None

    async def setup(self) -> None:
        """Make the renderer and the connections; prime-rl calls it once, before the first episode."""
        from composer_prime_rl.hinted_turns import TurnFinder
        from composer_prime_rl.rendering import rendered_tokenizer
        from composer_prime_rl.scoring import PrefillScorer

        await super().setup()
        if self.sdpo.weight > 0:
            client = self.policy_pool.train_client
            name = client.renderer_model_name or self.policy_pool.model_name
            self._finder = TurnFinder(self.sdpo, rendered_tokenizer(name, client.renderer))
            self._scorer = PrefillScorer(self.scoring)

    async def score_episode(self, episode: Any) -> None:
        """Stamp the hinted turns of one episode; a server that fails leaves them unstamped, and counted."""
        from composer_prime_rl.endpoints import endpoint_of
        from composer_prime_rl.stamping import Stamper

        await super().score_episode(episode)
        if self._scorer is None:
            return
        traces = [t for t in episode.traces if t.ok and t.agent.trainable]
        stamper = Stamper(self.sdpo, self.route, self._scorer, self.scoring.deadline)
        endpoint = endpoint_of(self.policy_pool.train_client, self.policy_pool.model_name)
        self.silence.update(await stamper.stamp(traces, self._finder, endpoint))

    async def score_group(self, episodes: list[Any]) -> None:
        """grpo's credit for the traces that have none yet."""
        own = [
            (node, node.advantages)
            for episode in episodes
            for trace in episode.traces
            for node in trace.nodes
            if node.advantages is not None
        ]
        await super().score_group(episodes)
        for node, advantages in own:
            node.advantages = advantages
