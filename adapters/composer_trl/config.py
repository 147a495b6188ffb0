"""`GRPOConfig` plus one `composer` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.config import ComposerConfig, parse_section
from composer_plugins.errors import ConfigError

#: TRL hands over hidden states, so every level can be had.
LEVELS = (SignalLevel.FULL, SignalLevel.TOPK, SignalLevel.SAMPLED)

#: Options of TRL's own loss that a composer objective would silently ignore, with their neutral values.
_HOST_ONLY = {
    "beta": 0.0,
    "delta": None,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
}


@dataclass
class ComposerGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with our section.

    Args:
        composer: the `composer` section, the same schema as on every host (docs/reference/config.md).

    Raises:
        ConfigError: an unknown key, a value out of range, or an option of TRL's own loss
            (`beta`, `delta`, ...) together with a composer objective, which would not see it.
    """

    composer: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The `composer` section: policy, sdpo, replay_dpo, monitor (see docs/reference/config.md)."},
    )

    # `Trainer` parses these from JSON strings when they come from a command line.
    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "composer"]

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.parsed()
        if config.policy.objective == "host":
            return
        set_here = [name for name, neutral in _HOST_ONLY.items() if getattr(self, name) != neutral]
        if set_here:
            raise ConfigError(
                f"Options of TRL's own loss are set ({', '.join(set_here)}), but `composer.policy.objective: "
                f"{config.policy.objective}` replaces that loss. Use `objective: host` to keep TRL's loss, or set the "
                "composer option instead (policy.kl, policy.clip_low, ...)."
            )

    def parsed(self) -> ComposerConfig:
        """Return the validated `composer` section."""
        if isinstance(self.composer, str):
            raise ConfigError(f"`composer` must be a mapping (or a JSON object), found the text {self.composer!r}.")
        return parse_section(self.composer)
