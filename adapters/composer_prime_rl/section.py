"""From the keyword arguments of `[trainer.loss.kwargs]` to typed options.

prime-rl hands the table on as it is: values from the command line arrive as strings. TOML has no null: write "None".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.policy import resolve_objective
from composer_plugins.channels.sdpo import resolve_level
from composer_plugins.config import AdvantageConfig, ComposerConfig, PolicyConfig, Section, explain
from composer_plugins.errors import ConfigError, UnsupportedError
from composer_plugins.losses.policy import Objective
from composer_plugins.losses.reduction import Reduction
from composer_prime_rl.trust_region import TRUST_REGIONS, TrustRegion

#: What a loss on prime-rl sees: log-probs of the sampled tokens.
LEVELS = (SignalLevel.SAMPLED,)


class LossOptions(Section):
    """The keyword arguments of `composer_loss`."""

    composer: ComposerConfig = ComposerConfig()
    """The section, the same as on every host."""
    sdpo_route: Literal["ref_kl", "loss"] = "ref_kl"
    """ref_kl: the environment stamps prime-rl's own ref_kl component; loss: this function computes the term."""
    aggregation: Literal["objective", "host"] = "objective"
    """objective: weigh tokens as the objective's paper; host: every token the same (prime-rl's own reduction)."""
    tokens_per_sample: float | None = Field(None, gt=0)
    """Assumed mean of loss tokens per sample; prime-rl divides by tokens, and some papers by sequences."""
    kl_tau: float | None = Field(None, ge=0)
    """dppo and ipo: weight of the squared log-ratio; None: prime-rl's 1e-3."""
    host: dict[str, Any] = Field(default_factory=dict)
    """objective: host only: the options of prime-rl's own loss (`type` default or ipo, and that config's fields)."""

    @model_validator(mode="after")
    def _fits_together(self) -> LossOptions:
        name = self.composer.policy.objective
        if self.host and name != "host":
            raise ValueError(f"host has no effect on the objective {name}; set composer.policy.objective: host")
        if self.kl_tau is not None and name not in TRUST_REGIONS:
            raise ValueError(f"kl_tau has no effect on the objective {name}; it belongs to dppo and ipo")
        return self

    def region(self, region: TrustRegion) -> TrustRegion:
        """Return a trust region with the bounds of `policy` and `kl_tau`, where they are set."""
        policy, changes = self.composer.policy, {}
        low, high = policy.clip_low, policy.clip_high
        if region.name == "ipo":
            low = high = high if high is not None else low
        for name, value in (("low", low), ("high", high), ("kl_tau", self.kl_tau)):
            if value is not None:
                changes[name] = value
        return replace(region, **changes)


def loss_options(kwargs: Mapping[str, Any]) -> LossOptions:
    """Return the checked options of a call; the same arguments are parsed once per process.

    Raises:
        ConfigError: unknown keys or values, one line each; `UnsupportedError` for what prime-rl cannot give.
    """
    return _parsed(json.dumps(kwargs, sort_keys=True, default=str))


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> LossOptions:
    try:
        options = LossOptions.model_validate(_decoded(json.loads(text)))
    except ValidationError as error:
        raise ConfigError(explain(error, prefix="trainer.loss.kwargs")) from error
    refuse_unsupported(options)
    return options


def _decoded(value: Any) -> Any:
    """Turn "None" into null and JSON text into what it says; everything else is left to the schema."""
    if isinstance(value, Mapping):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, str):
        if value.strip() in ("None", "null"):
            return None
        if value.lstrip().startswith(("{", "[")):
            try:
                return _decoded(json.loads(value))
            except json.JSONDecodeError:
                return value
    return value


def refuse_unsupported(options: LossOptions) -> None:
    """Raise `UnsupportedError` for options that prime-rl's seams cannot give; nothing is approximated silently."""
    section = options.composer
    problems = [*_policy_problems(options), *_sdpo_problems(options)]
    problems += [
        f"composer.monitor.{name} is not available on prime-rl (a loss sees one sample, and no report reads prime-rl's runs); "
        "set it to 0."
        for name in ("grad_norms_every", "token_view")
        if getattr(section.monitor, name) > 0
    ]
    problems += [
        f"composer.channels.{name}: plugins' channels do not run on prime-rl yet; take it out, or set its weight to 0."
        for name, extra in section.channels.items()
        if extra.weight > 0
    ]
    if section.outer.sync_every > 0:
        problems.append(
            "composer.outer.sync_every above 0: the loss gets its arguments after the optimizer was built; set the outer "
            "loop in [trainer.env_vars] COMPOSER_OUTER instead (docs/how-to/prime-rl.md)."
        )
    if problems:
        raise UnsupportedError("\n".join(problems))
    if section.sdpo.weight > 0:
        resolve_level(section.sdpo, LEVELS)


def objective_of(policy: PolicyConfig) -> Objective | TrustRegion | None:
    """Return the objective that a policy section names; None: prime-rl's own loss."""
    if policy.objective == "host":
        return None
    return TRUST_REGIONS.get(policy.objective) or resolve_objective(policy.objective)


def _policy_problems(options: LossOptions) -> list[str]:
    policy, problems = options.composer.policy, []
    if policy.weight == 0:
        return []
    if policy.kl.coef > 0:
        problems.append(
            "composer.policy.kl: prime-rl carries one reference per token, and it is the hint-reading teacher of channel "
            "2; set kl.coef: 0. Its own regulariser is kl_tau of objective: host, dppo and ipo."
        )
    if policy.advantage != AdvantageConfig():
        problems.append(
            "composer.policy.advantage has no effect here: advantages come from orchestrator.algo (grpo: R - mean of the "
            "group, max_rl: that over the mean). Take it out."
        )
    objective = objective_of(policy)
    ours = isinstance(objective, Objective)
    by_objective = ours and options.aggregation == "objective"
    reduction = objective.reduction if by_objective else Reduction.GLOBAL_TOKEN_MEAN
    if not ours:
        problems += _foreign_options(policy)
    if reduction is Reduction.SEQUENCE_MEAN and options.tokens_per_sample is None:
        problems.append(
            f"{policy.objective} is a mean over sequences, and prime-rl divides by the step's token count, which it does "
            "not tell a loss: set tokens_per_sample to the loss tokens of a typical sample (metric policy/tokens/mean), "
            "or aggregation: host for prime-rl's token mean."
        )
    if reduction is Reduction.CONSTANT_LENGTH and (policy.length_constant is None) != (
        options.tokens_per_sample is None
    ):
        problems.append(
            f"{policy.objective}: set both composer.policy.length_constant and tokens_per_sample (the term is multiplied "
            "by their quotient), or neither (the constant length is then the step's mean)."
        )
    if ours and policy.length_constant is not None and reduction is not Reduction.CONSTANT_LENGTH:
        problems.append(f"composer.policy.length_constant has no effect on {policy.objective} here; take it out.")
    if options.tokens_per_sample is not None and reduction in (
        Reduction.GLOBAL_TOKEN_MEAN,
        Reduction.LOCAL_TOKEN_MEAN,
    ):
        problems.append(f"tokens_per_sample has no effect on a mean over tokens ({policy.objective}); take it out.")
    return problems


def _foreign_options(policy: PolicyConfig) -> list[str]:
    """Options of our clip that prime-rl's own losses do not have."""
    names = ["dual_clip", "log_ratio_clamp", "length_constant"]
    names += ["clip_low", "clip_high"] if policy.objective == "host" else []
    given = [name for name in names if getattr(policy, name) is not None]
    problems = [
        f"composer.policy.{name} has no effect on the objective {policy.objective}; take it out." for name in given
    ]
    if (
        policy.objective == "ipo"
        and None not in (policy.clip_low, policy.clip_high)
        and policy.clip_low != policy.clip_high
    ):
        problems.append("ipo has one threshold: give composer.policy.clip_low and clip_high the same value.")
    return problems


def _sdpo_problems(options: LossOptions) -> list[str]:
    sdpo, problems = options.composer.sdpo, []
    if sdpo.weight == 0:
        return []
    if sdpo.teacher.kind != "live":
        problems.append(
            f"composer.sdpo.teacher.kind: {sdpo.teacher.kind} needs weights that prime-rl does not serve; set it to live "
            "(the current policy reads the hint)."
        )
    if sdpo.denominator_floor > 0:
        problems.append("composer.sdpo.denominator_floor: the denominators are prime-rl's own; set it to 0.")
    if options.sdpo_route == "ref_kl" and sdpo.is_clip is not None and "is_clip" in sdpo.model_fields_set:
        problems.append(
            "composer.sdpo.is_clip: prime-rl's ref_kl component has an uncapped ratio; leave is_clip out, or set "
            "sdpo_route: loss."
        )
    return problems
