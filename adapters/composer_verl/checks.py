"""What `ComposerTrainer` cannot do under a configuration, said on the driver before any worker starts."""

from __future__ import annotations

from typing import Any

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.sdpo import resolve_level
from composer_plugins.config import ComposerConfig, SDPOConfig, parse_section
from composer_plugins.errors import ConfigError, UnsupportedError
from composer_verl.section import PREFIX, plain, refuse_unsupported, scales_verls_loss
from composer_verl.teachers import check_teacher, lora

#: What verl lets channel 2 see of the distributions. `auto` is sampled here: topk costs a second forward and k values
#: per response token in TransferQueue, so it has to be asked for.
LEVELS = (SignalLevel.TOPK, SignalLevel.SAMPLED)


def section_of(config) -> ComposerConfig:
    """Return the `composer` section of verl's whole configuration.

    Raises:
        ConfigError: unknown keys or contradictions.
    """
    return parse_section(plain(config.get("composer", None) or {}))


def check(config, section: ComposerConfig) -> None:
    """Raise when the trainer cannot do what the section asks for.

    Args:
        config: verl's whole configuration (DictConfig).
        section: from `section_of`.

    Raises:
        UnsupportedError: an option that verl cannot give.
        ConfigError: options that contradict each other.
    """
    refuse_unsupported(section, channels=True)
    check_policy(config, section)
    _check_weight(config.actor_rollout_ref.actor, section.policy.weight)
    if section.monitor.grad_norms_every > 0 or section.monitor.token_view > 0:
        raise UnsupportedError(
            "composer.monitor.grad_norms_every and token_view are not available on verl (a backward per channel, and a "
            "report that reads verl's runs); set both to 0."
        )
    ours = section.sdpo.weight > 0 or section.replay_dpo.weight > 0 or scales_verls_loss(config, section)
    if ours and (config.get("distillation", None) or {}).get("enabled", False):
        raise UnsupportedError(
            "distillation.enabled has a loss function of its own in verl's workers, which ours would replace; set it to "
            "false, or composer.sdpo.weight and composer.replay_dpo.weight to 0 and composer.policy.weight to 1."
        )
    if section.sdpo.weight > 0:
        level_of(config, section.sdpo)
        check_teacher(section.sdpo.teacher.kind, config)
        _refuse_shuffled(config)


def level_of(config, sdpo: SDPOConfig) -> SignalLevel:
    """Return the signal level of channel 2 under verl's configuration.

    Raises:
        UnsupportedError: the level or an option cannot be had, with the reason.
    """
    if sdpo.level == "auto":
        return resolve_level(sdpo, (SignalLevel.SAMPLED,))
    level = resolve_level(sdpo, LEVELS)
    reasons = [] if level is SignalLevel.SAMPLED else _no_logits(config, sdpo)
    if reasons:
        raise UnsupportedError(f"sdpo.level: topk needs the logits in verl's engine; {'; '.join(reasons)}.")
    return level


def _no_logits(config, sdpo: SDPOConfig) -> list[str]:
    """Why verl's engine does not show the logits to a loss function, or not all of them."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    engine = actor.get("fsdp_config", None) or {}
    parallel = (actor.get("ulysses_sequence_parallel_size", 1), engine.get("ulysses_sequence_parallel_size", 1))
    reasons = {
        "model.use_fused_kernels makes none: set it to false": model.get("use_fused_kernels", False),
        "sequence parallelism cuts them: set ulysses_sequence_parallel_size: 1": max(p or 1 for p in parallel) > 1,
        "pad_to_length shifts them: set it to false": actor.get("pad_to_length", False) or engine.get("pad_to_length"),
        f"actor.strategy {actor.strategy} was not tried: use fsdp2": actor.strategy not in ("fsdp2", "composer_fsdp2"),
        "verl's reference worker has no loss function to show them to: use teacher.kind: ema or live": (
            sdpo.teacher.kind == "reference" and not lora(config)
        ),
    }
    return [text for text, holds in reasons.items() if holds]


def _check_weight(actor, weight: float) -> None:
    """A policy term that is left out, or scaled as a whole, would take verl's own KL and entropy terms along."""
    other = [name for name, on in (("use_kl_loss", actor.use_kl_loss), ("entropy_coeff", actor.entropy_coeff)) if on]
    if other and (weight == 0 or (weight != 1 and not actor.policy_loss.loss_mode.startswith(PREFIX))):
        raise ConfigError(
            f"composer.policy.weight: {weight} with actor.{' and actor.'.join(other)}: these belong to verl's policy loss "
            f"and would be {'left out' if weight == 0 else 'scaled'} with it. Turn them off, or set policy.weight: 1."
        )


def _refuse_shuffled(config) -> None:
    """The driver cannot know which rows verl will train on together."""
    if config.actor_rollout_ref.actor.shuffle:
        raise UnsupportedError(
            "actor_rollout_ref.actor.shuffle: true makes mini-batches that the driver does not know, and the sdpo term "
            "is divided by the hinted tokens of its mini-batch; set it to false."
        )


def check_policy(config, section: ComposerConfig) -> None:
    """Refuse options of `composer.policy` that the policy loss does not read.

    The loss mode and the section must name the same objective, with the same options. Those of the advantage are the
    estimator's (`preflight`).

    Raises:
        ConfigError: the policy loss would train with other options than the section says.
    """
    loss = config.actor_rollout_ref.actor.policy_loss
    mode, named = loss.get("loss_mode", "vanilla"), section.policy.objective
    if not mode.startswith(PREFIX):
        given = plain(config.get("composer", None) or {}).get("policy") or {}
        if unread := sorted(set(given) - {"objective", "weight", "advantage"}):
            raise ConfigError(
                f"policy_loss.loss_mode {mode!r} is verl's own and reads no composer.policy (found "
                f"{', '.join(unread)}): set loss_mode: {PREFIX}{named}, or keep policy.objective: host and "
                "policy.weight only."
            )
        return
    own: dict[str, Any] = plain(loss.get("composer", None) or {})
    named = {**own.get("policy", {}), "objective": mode.removeprefix(PREFIX)}
    seen = parse_section({**own, "policy": named}).policy
    if seen.model_copy(update={"advantage": section.policy.advantage}) != section.policy:
        raise ConfigError(
            f"policy_loss.composer.policy (with loss_mode {mode}) is not composer.policy: the policy loss would train "
            "with other options than the section says. Set policy_loss.composer: ${composer} (with "
            "policy_loss._target_: composer_verl.options.ComposerPolicyLossConfig) and "
            f"loss_mode: {PREFIX}${{composer.policy.objective}}."
        )
