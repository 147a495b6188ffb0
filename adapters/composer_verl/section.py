"""From verl's configuration to our options: the policy loss reads the actor's, the advantage estimator the algorithm's.

Like all modules here but `options` and `register`, this one imports verl inside functions at most: importing verl
loads `register`, which must find them complete.
"""

from __future__ import annotations

import logging
from typing import Any

from composer_plugins.config import AdvantageConfig, ComposerConfig, PolicyConfig, parse_section
from composer_plugins.errors import ConfigError, UnsupportedError

logger = logging.getLogger("composer_verl")

PREFIX = "composer_"
#: `trainer.v1.trainer_mode` of the trainer that trains all three channels.
TRAINER_MODE = "composer"
#: verl's defaults: a value that differs was set by the user, and then it is meant.
VERL_CLIP, VERL_DUAL_CLIP, VERL_AGGREGATION = 0.2, 3.0, "token-mean"


def policy_options(actor, objective: str) -> tuple[PolicyConfig, str]:
    """Return our policy section and the aggregation for one actor configuration.

    A clip distance of `composer.policy` wins; then `actor.clip_ratio_low`, `clip_ratio_high` and `clip_ratio_c`
    where they differ from verl's defaults; then the objective's paper.

    Args:
        actor: verl's `ActorConfig`.
        objective: name of the menu, from the loss mode.

    Raises:
        ConfigError: unknown keys, or `composer.policy.objective` contradicts the loss mode.
    """
    loss = actor.policy_loss
    section = checked_section(
        plain(getattr(loss, "composer", None) or {}),
        objective,
        channels=knows_channels(getattr(loss, "trainer_mode", "")),
    )
    updates = {}
    for key, value, default in (
        ("clip_low", _first(actor.clip_ratio_low, actor.clip_ratio), VERL_CLIP),
        ("clip_high", _first(actor.clip_ratio_high, actor.clip_ratio), VERL_CLIP),
        ("dual_clip", actor.get("clip_ratio_c", VERL_DUAL_CLIP), VERL_DUAL_CLIP),
        ("length_constant", actor.loss_scale_factor, None),
    ):
        if getattr(section.policy, key) is None and value is not None and value != default:
            updates[key] = value
    if updates:
        section = parse_section({"policy": {**section.policy.model_dump(), **updates}})
    return section.policy, getattr(loss, "aggregation", "objective")


def advantage_options(algorithm) -> AdvantageConfig:
    """Return `algorithm.composer.policy.advantage`, or its defaults.

    Args:
        algorithm: verl's `algorithm` section as its trainer hands it over (a DictConfig), or None.

    Raises:
        ConfigError: unknown keys.
    """
    section = algorithm.get("composer", None) if algorithm is not None else None
    return parse_section(plain(section or {})).policy.advantage


def plain(section: Any) -> dict[str, Any]:
    """Turn what Hydra hands over into plain dictionaries."""
    from omegaconf import DictConfig, OmegaConf

    if isinstance(section, DictConfig):
        return OmegaConf.to_container(section, resolve=True)
    return {key: plain(value) if isinstance(value, DictConfig | dict) else value for key, value in section.items()}


def knows_channels(trainer_mode: Any) -> bool:
    """True for the trainer that trains channels 2 and 3; verl's own leave them out."""
    return trainer_mode == TRAINER_MODE


def checked_section(section: dict[str, Any], objective: str, *, channels: bool = False) -> ComposerConfig:
    """Parse a section for the policy loss of one loss mode; refuse what would have no effect there.

    Args:
        channels: the trainer knows channels 2 and 3.
    """
    policy = section.get("policy")
    if isinstance(policy, dict) and "objective" in policy and policy["objective"] != objective:
        raise ConfigError(
            f"policy_loss.loss_mode names the objective {objective!r} and composer.policy.objective "
            f"{policy['objective']!r}: keep one of them, or make them agree."
        )
    parsed = parse_section({**section, "policy": {**(policy or {}), "objective": objective}})
    refuse_unsupported(parsed, channels=channels)
    return parsed


def refuse_unsupported(section: ComposerConfig, *, channels: bool = False) -> None:
    """Raise `UnsupportedError` for channels and options that have no effect on verl.

    Args:
        channels: the trainer knows channels 2 and 3 (`trainer_mode: composer`).
    """
    kl = section.policy.kl
    problems = [] if channels else refuse_channels(section)
    problems += [
        f"composer.channels.{name}: plugins' channels do not run on verl yet; take it out, or set its weight to 0."
        for name, extra in section.channels.items()
        if extra.weight > 0
    ]
    if kl.coef > 0 and kl.placement == "reward":
        problems.append(
            "composer.policy.kl: verl has this itself; set algorithm.use_kl_in_reward=true algorithm.kl_penalty=kl "
            f"algorithm.kl_ctrl.kl_coef={kl.coef} and take composer.policy.kl out."
        )
    if kl.coef > 0 and kl.placement == "loss":
        problems.append(
            "composer.policy.kl: verl has this itself; set actor_rollout_ref.actor.use_kl_loss=true "
            f"actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.kl_loss_coef={kl.coef} and take "
            "composer.policy.kl out."
        )
    if problems:
        raise UnsupportedError("\n".join(problems))


def scales_verls_loss(config: Any, section: ComposerConfig) -> bool:
    """True when `policy.weight` has to multiply one of verl's own loss modes, which do not read our section.

    Args:
        config: verl's whole configuration (DictConfig).
        section: its `composer` section.
    """
    mode = config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla")
    return section.policy.weight != 1 and not mode.startswith(PREFIX)


def refuse_channels(section: ComposerConfig) -> list[str]:
    """Sentences about the channels that verl's own trainers would leave out without a word."""
    weights = {"sdpo": section.sdpo.weight, "replay_dpo": section.replay_dpo.weight}
    return [
        f"composer.{name}.weight is {weight}, but verl's own trainers do not know this channel: set "
        f"trainer.v1.trainer_mode={TRAINER_MODE}, or the weight to 0 (a policy loss of its own also reads "
        "policy_loss.trainer_mode, which our recipes set to ${trainer.v1.trainer_mode})."
        for name, weight in weights.items()
        if weight > 0
    ]


def _first(*values: Any) -> Any:
    """Return the first value that is not None (verl: clip_ratio_low falls back to clip_ratio)."""
    return next((value for value in values if value is not None), None)
