"""The `composer` section: one schema for every host.

A recipe is a file in the host's own format with this section in it. Unknown keys are refused; an option
that the host's signal level cannot give is refused, never approximated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from composer_plugins.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class AdvantageConfig(Section):
    """How rewards of one group become advantages."""

    scale: Literal["none", "group", "batch"] | None = None
    """Divide by the standard deviation of the group or the batch; None: what the objective's paper does."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation (TRL 1e-4, verl 1e-6)."""
    ddof: Literal[0, 1] = 1
    """Degrees of freedom of the standard deviation (TRL and verl: 1)."""
    singleton: Literal["zero", "reward"] = "zero"
    """Advantage of a group of one: 0, or the raw reward as verl does."""


class KLConfig(Section):
    """KL to the initial policy. Composer 2 reports the k1 estimator; its placement is not published."""

    coef: float = Field(0.0, ge=0)
    """Weight of the KL term; 0: not computed."""
    estimator: Literal["k1", "k3"] = "k1"
    """k1 = logprobs - ref_logprobs (in the reward); k3 (in the loss), as TRL and DeepSeek use."""
    placement: Literal["reward", "loss"] = "reward"
    """Subtract it from the reward, or add it to the loss."""

    @model_validator(mode="after")
    def _k1_is_not_a_loss(self) -> KLConfig:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 differentiated as a loss has an expected gradient of zero, so it regularises "
                "nothing; use placement: reward, or estimator: k3"
            )
        if self.placement == "reward" and self.estimator == "k3":
            raise ValueError("placement: reward takes estimator: k1 (the unbiased per-token log-ratio)")
        return self


class PolicyConfig(Section):
    """Channel 1: the policy-gradient objective."""

    weight: float = Field(1.0, ge=0)
    """Weight of the policy term; 0: not computed."""
    objective: str = "dr_grpo"
    """`host` keeps the framework's own loss; or a name of the menu (`composer-rl plugins`)."""
    clip_low: float | None = Field(None, ge=0)
    """Lower clip distance of the ratio; None: the objective's paper."""
    clip_high: float | None = Field(None, ge=0)
    """Upper clip distance of the ratio; None: the objective's paper."""
    dual_clip: float | None = Field(None, gt=1)
    """Cap on the loss of negative advantages, c > 1 (verl uses 3); None: off, as TRL."""
    log_ratio_clamp: float | None = Field(None, gt=0)
    """Clamp of |log ratio| before exp (verl 20); None: off, as TRL."""
    cispo_bound: Literal["one_plus", "absolute"] = "one_plus"
    """`one_plus` clips the ratio to [1-low, 1+high] (paper, verl); `absolute` to [0, high] (TRL)."""
    length_constant: int | None = Field(None, gt=0)
    """dr_grpo's constant length in tokens; None: the host's maximum completion length."""
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()


class TeacherWeights(Section):
    """Which weights read the hint (the self-teacher of channel 2)."""

    kind: Literal["ema", "live", "reference", "trust_region"] = "ema"
    """ema: moving average; live: current weights; reference: initial weights; trust_region: mix of the last two."""
    ema_rate: float = Field(0.05, gt=0, le=1)
    """Share of the current weights taken in per optimizer step (an update rate, not a decay)."""
    mix: float = Field(0.5, ge=0, le=1)
    """trust_region: q proportional to ref^(1-mix) * live^mix."""


class HintConfig(Section):
    """Where hints come from and where they go."""

    generator: str = "template"
    """Hint generator plugin."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the generator."""
    sources: list[Literal["recorded", "rollout", "feedback", "sibling"]] = ["recorded", "rollout"]
    """recorded: the dataset's `hint` column; rollout: tool errors inside the rollout; feedback: text that a
    reward function logs; sibling: a successful completion of the same group (SDPO paper)."""
    placement: Literal["local", "leading_system", "last_user"] = "local"
    """local: a message right before the error turn; the others as prime-rl's opsd and the SDPO paper do."""
    role: Literal["user", "system"] = "user"
    """Role of the spliced message for `local`."""
    success_threshold: float = 1.0
    """sibling: reward from which a completion counts as a success."""


class SDPOConfig(Section):
    """Channel 2: hint-conditioned self-distillation on error turns."""

    weight: float = Field(0.0, ge=0)
    """Alpha of the total loss; 0: not computed (no teacher forward)."""
    alpha: float = Field(1.0, ge=0, le=1)
    """Direction: 0 forward KL(T||S), 1 reverse KL(S||T), between: generalised Jensen-Shannon."""
    level: Literal["auto", "full", "topk", "sampled"] = "auto"
    """Signal level; auto: the best that host and options share."""
    top_k: int = Field(100, gt=0)
    """topk: number of vocabulary entries."""
    top_k_of: Literal["student", "teacher"] = "student"
    """topk: whose top entries (SDPO: student; OPSD, verl: teacher)."""
    tail: bool = True
    """topk: keep the left-over mass as one bucket; False: renormalise."""
    temperature: float | None = Field(None, gt=0)
    """Temperature of both distributions; None: the rollout temperature."""
    entry_clip: float | None = Field(None, gt=0)
    """Upper clip of each vocabulary entry's contribution (OPSD 0.05); None: off."""
    is_clip: float | None = Field(2.0, gt=0)
    """Cap on the detached importance weight pi/pi_old; None: no importance weight."""
    scope: Literal["error_turn", "completion"] = "error_turn"
    """Which tokens carry the KL: the hinted turn's (Composer 2.5) or the whole completion's (SDPO paper)."""
    denominator_floor: int = Field(0, ge=0)
    """Lower bound of the token count that divides the term, so that one hinted token does not carry all of it."""
    teacher: TeacherWeights = TeacherWeights()
    hint: HintConfig = HintConfig()

    @model_validator(mode="after")
    def _sampled_can_only_reverse(self) -> SDPOConfig:
        if self.level == "sampled":
            check_sampled_level(self)
        return self


class ReplayDPOConfig(Section):
    """Channel 3 (our addition, not Cursor's): DPO on pairs from trace replay."""

    weight: float = Field(0.0, ge=0)
    """Beta of the total loss; 0: not computed (no pair forward)."""
    pairs: Path | None = None
    """The pairs stage file (`composer-rl pairs`)."""
    beta: float = Field(0.1, gt=0)
    """DPO's inverse temperature."""
    pairs_per_step: int = Field(4, gt=0)
    """Pairs per optimizer step, over all processes and accumulation steps."""
    form: Literal["direct", "advantage"] = "direct"
    """Pairwise loss, or the advantage form with the same gradient (for hosts that see one sample at a time)."""
    length_normalized: bool = False
    """Divide each action's log-ratio by its own token count."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is flipped (conservative DPO)."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of a negative log-likelihood term on the chosen action."""
    max_similarity: float = Field(1.0, gt=0, le=1)
    """Pairs whose two actions are more alike than this (edit similarity) are left out and counted."""
    max_length: int = Field(2048, gt=0)
    """Longest context + action in tokens; a longer pair is left out and counted, never cut."""


class MonitorConfig(Section):
    """What the run says about itself."""

    silent_after: int = Field(5, gt=0)
    """Warn when a channel with weight > 0 contributed nothing for this many optimizer steps."""
    on_silence: Literal["warn", "error"] = "warn"
    """error: stop the run instead."""
    grad_norms_every: int = Field(0, ge=0)
    """Measure each channel's own gradient norm every N optimizer steps (one extra backward per channel); 0: off."""
    token_view: int = Field(0, ge=0)
    """Keep the token-by-token divergence of up to N error turns per optimizer step for the report; 0: off."""


class OuterTimeouts(Section):
    """Seconds; `composer-rl islands doctor` checks that they fit together and explains a bad combination."""

    allreduce: float = Field(60.0, gt=0)
    """Longest exchange of one fragment; also the stall when a peer stops (SIGSTOP) inside it."""
    quorum: float = Field(3600.0, gt=0)
    """Longest wait for the other islands at a sync: longer than a round of the slowest island."""
    connect: float = Field(30.0, gt=0)
    """Reaching the lighthouse or another island."""
    quorum_retries: int | None = Field(None, ge=0)
    """Further attempts, spread evenly over `quorum`, while the lighthouse is down; None: one a second; 0: end at once."""


class OuterConfig(Section):
    """DiLoCo outer loop (arXiv:2311.08105, Streaming DiLoCo arXiv:2501.18512): islands that exchange parameters."""

    sync_every: int = Field(0, ge=0)
    """Inner optimizer steps between two outer steps of a parameter; 0: no outer loop."""
    kind: str = "diloco"
    """Which outer loop (`composer-rl plugins`)."""
    lr: float = Field(0.7, gt=0)
    """Outer learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Outer momentum."""
    nesterov: bool = True
    """Nesterov momentum, as in the paper."""
    fragments: int = Field(1, ge=1)
    """Streaming DiLoCo: parts of the model by depth, synced in turn; 1: DiLoCo."""
    sync_delay: int = Field(0, ge=0)
    """Inner steps between sending a fragment and applying the result (tau)."""
    mixing_alpha: float = Field(0.0, ge=0, lt=1)
    """Share of the local parameters kept when the result is applied; 0: take the global ones."""
    min_islands: int = Field(1, ge=1)
    """Fewest islands that may make an outer step."""
    start_with: int = Field(1, ge=1)
    """Fewest islands that may begin a run. Set it to their number: restarted ones then wait for one that has the state
    instead of beginning anew among themselves."""
    max_retries: int = Field(3, ge=0)
    """Further attempts at one sync before its inner steps are given up (and counted)."""
    lighthouse: str | None = None
    """Address such as `http://10.0.0.1:29510`; None: the environment variable TORCHFT_LIGHTHOUSE."""
    island: str | None = None
    """Unique name of this island; None: the environment variable COMPOSER_ISLAND, else host name and process."""
    log: Path | None = None
    """JSONL file that gets one record per exchange; None: `outer.jsonl` in the run folder, where the host tells it."""
    interface: str = "127.0.0.1"
    """Address of this machine that other islands reach; the transports have no authentication: private networks only."""
    timeouts: OuterTimeouts = OuterTimeouts()

    @model_validator(mode="after")
    def _schedule_fits(self) -> OuterConfig:
        if not self.sync_every:
            return self
        if self.sync_every % self.fragments:
            raise ValueError(
                f"sync_every {self.sync_every} must be a multiple of fragments {self.fragments}: one fragment is "
                "synced every sync_every / fragments steps"
            )
        if self.sync_delay >= self.sync_every // self.fragments:
            raise ValueError(
                f"sync_delay {self.sync_delay} must be below sync_every / fragments "
                f"({self.sync_every // self.fragments}): a fragment is applied before the next is sent"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0; set nesterov: false for plain averaging")
        return self


class ExtraChannelConfig(Section):
    """A channel that a plugin adds."""

    weight: float = Field(0.0, ge=0)
    """Weight of the term; 0: not computed."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the plugin's channel."""


class ComposerConfig(Section):
    """The `composer` section of a recipe."""

    policy: PolicyConfig = PolicyConfig()
    sdpo: SDPOConfig = SDPOConfig()
    replay_dpo: ReplayDPOConfig = ReplayDPOConfig()
    channels: dict[str, ExtraChannelConfig] = Field(default_factory=dict)
    """Channels that plugins add, by name (`composer-rl plugins`): each a mapping with `weight` and `options`."""
    outer: OuterConfig = OuterConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _needs_pairs(self) -> ComposerConfig:
        if self.replay_dpo.weight > 0 and self.replay_dpo.pairs is None:
            raise ValueError("replay_dpo.weight is above 0 but replay_dpo.pairs names no file; `composer-rl pairs`")
        weights = [self.policy.weight, self.sdpo.weight, self.replay_dpo.weight]
        if not any([*weights, *(extra.weight for extra in self.channels.values())]):
            raise ValueError("all weights are 0: nothing would be trained")
        return self


def check_sampled_level(config: SDPOConfig) -> None:
    """Raise `ValueError` when an option of `config` cannot be had from sampled tokens alone."""
    refused = {
        f"alpha: {config.alpha} (only 1, reverse KL)": config.alpha != 1.0,
        "entry_clip (there is one entry per token)": config.entry_clip is not None,
        "teacher.kind: trust_region (its normaliser needs the vocabulary)": config.teacher.kind == "trust_region",
    }
    bad = [text for text, is_bad in refused.items() if is_bad]
    if bad:
        raise ValueError(f"at signal level `sampled` these cannot be given: {'; '.join(bad)}; use level: full or topk")


def parse_section(section: dict[str, Any] | None) -> ComposerConfig:
    """Validate a `composer` section. Raises `ConfigError` with one line per problem."""
    try:
        return ComposerConfig.model_validate(section or {})
    except ValidationError as error:
        raise ConfigError(explain(error, prefix="composer")) from error


def explain(error: ValidationError, *, prefix: str = "") -> str:
    """Turn a pydantic error into sentences that name the key and list the keys there are."""
    lines = []
    for item in error.errors():
        key = ".".join([prefix, *map(str, item["loc"])]).strip(".")
        if item["type"] == "extra_forbidden":
            lines.append(
                f"Unknown key `{key}`: remove it or check its spelling (docs/reference/config.md lists all keys)."
            )
        else:
            found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
            lines.append(f"`{key}`: {item['msg'].removeprefix('Value error, ')}{found}.")
    return "\n".join(lines)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises `ConfigError` when missing, empty or not a mapping."""
    if not path.is_file():
        raise ConfigError(f"Expected a YAML file at {path}: there is no such file.")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(data).__name__}.")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Change one key of a recipe.

    Args:
        data: the recipe; changed in place.
        override: `a.b=value`; the value is read as YAML.

    Raises:
        ConfigError: it is no such text, or `a` is no section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"Expected an override like composer.sdpo.weight=0.5, found {override!r}.")
    *parents, leaf = key.split(".")
    section = data
    for name in parents:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"Override {override!r}: {name!r} is not a section of the recipe.")
    try:
        section[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: {text!r} is no YAML: {error}") from error
