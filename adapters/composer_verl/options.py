"""The dataclass that takes the place of verl's `PolicyLossConfig` (Hydra's `_target_`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from verl.workers.config.actor import PolicyLossConfig

from composer_plugins.config import AdvantageConfig
from composer_plugins.errors import ConfigError
from composer_verl import outer
from composer_verl.section import PREFIX, checked_section, knows_channels, plain


@dataclass
class ComposerPolicyLossConfig(PolicyLossConfig):
    """verl's closed dataclass with room for our section.

    In YAML: `policy_loss._target_: composer_verl.options.ComposerPolicyLossConfig` and then
    `policy_loss.composer: {policy: {...}}`. verl builds it on the driver before Ray starts, so what is wrong with
    the section shows there.

    Args:
        composer: the `composer` section, the same as on every host.
        aggregation: "objective" reduces as the objective's paper, with verl's global counts as denominators;
            "host" uses `actor.loss_agg_mode`.
        trainer_mode: `trainer.v1.trainer_mode` (`${trainer.v1.trainer_mode}` in our recipes): channels 2 and 3 in the
            section are refused unless it is `composer`, the trainer that knows them.

    Raises:
        ConfigError: unknown keys, or what a policy loss alone cannot do.
    """

    composer: dict[str, Any] = field(default_factory=dict)
    aggregation: str = "objective"
    trainer_mode: str = "sync"

    def __post_init__(self) -> None:
        if self.aggregation not in ("objective", "host"):
            raise ConfigError(f"policy_loss.aggregation must be objective or host, found {self.aggregation!r}.")
        if not self.loss_mode.startswith(PREFIX):
            if self.composer:
                raise ConfigError(
                    f"policy_loss.composer has no effect on verl's own loss_mode {self.loss_mode!r}: set loss_mode to "
                    f"{PREFIX}<objective>, e.g. {PREFIX}dr_grpo, or take the section out."
                )
            return
        section = checked_section(
            plain(self.composer), self.loss_mode.removeprefix(PREFIX), channels=knows_channels(self.trainer_mode)
        )
        outer.install(section.outer)
        if section.policy.advantage != AdvantageConfig():
            warnings.warn(
                "policy_loss.composer.policy.advantage is not read by the policy loss but by the advantage estimator, "
                "from algorithm.composer.policy.advantage: set it there too (`algorithm.composer: ${composer}` in our "
                "recipes does).",
                stacklevel=2,
            )
