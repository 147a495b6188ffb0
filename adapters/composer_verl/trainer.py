"""`ComposerTrainer`: verl's own v1 sync trainer with the channels in its actor update.

    trainer: {v1: {trainer_mode: composer}}
    composer: {sdpo: {weight: 0.1}}

One step: verl samples, scores and computes advantages; then, in `_update_actor`, the error turns get their hints and
the self-teacher reads them (`hinted_rows`), the pairs of the step join the rollouts (`pair_rows`), and verl's own update
runs with our loss function (`channel_loss`), which calls verl's for the policy. With `sdpo.weight` and
`replay_dpo.weight` at 0 every override hands over to verl, and the loss function is verl's own (unless `policy.weight`
has to multiply one of verl's loss modes, which do not read it).
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from verl.trainer.ppo.utils import Role, need_reference_policy
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.errors import ConfigError
from composer_verl.channel_loss import composer_loss
from composer_verl.checks import section_of
from composer_verl.fields import EMA_RATE
from composer_verl.hinted_rows import HintedRows
from composer_verl.monitor import StepMonitor
from composer_verl.pair_rows import PairRows
from composer_verl.preflight import check_config
from composer_verl.section import scales_verls_loss
from composer_verl.teachers import lora

NAME = "composer"


class ComposerTrainer(PPOTrainerSync):
    """verl's synchronous PPO trainer whose actor loss is policy + alpha * sdpo + beta * replay_dpo.

    Args:
        config: verl's whole configuration with a `composer` section at its top.

    Raises:
        ConfigError: unknown keys, or options that contradict each other.
        UnsupportedError: an option that verl cannot give.
        TraceError: the pairs file has nothing to train on.
    """

    #: verl asks for its own name of the mode in many places.
    trainer_mode = property(lambda self: "sync", lambda self, _: None)

    def __init__(self, config) -> None:
        self.composer = section_of(config)
        if found := check_config(config):
            raise ConfigError("\n".join(found))
        self._sdpo, self._pairs_on = self.composer.sdpo.weight > 0, self.composer.replay_dpo.weight > 0
        self._plain = not (self._sdpo or self._pairs_on or scales_verls_loss(config, self.composer))
        self.hinted_rows: HintedRows | None = None
        self.pair_rows: PairRows | None = None
        self.monitor = StepMonitor(self.composer)
        super().__init__(config)
        if self._sdpo and self.composer.sdpo.teacher.kind == "ema":
            from omegaconf import open_dict

            from composer_verl.ema_engine import STRATEGY

            with open_dict(config):
                config.actor_rollout_ref.actor.strategy = STRATEGY
        self.use_reference_policy = self.use_reference_policy or self._needs_reference_worker

    @property
    def _needs_reference_worker(self) -> bool:
        return self._sdpo and self.composer.sdpo.teacher.kind == "reference"

    # Set-up

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        if self._pairs_on:  # the pairs file is checked before any worker starts
            self.pair_rows = PairRows(self.composer, self.config, self.tokenizer)
        if self._sdpo:
            self.hinted_rows = HintedRows(self.composer.sdpo, self)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self._needs_reference_worker and not lora(self.config) and Role.ActorRollout in self.role_worker_mapping:
            # verl builds the reference worker for a KL term only
            for mapping in (self.role_worker_mapping, self.mapping):
                mapping[Role.ActorRolloutRef] = mapping.pop(Role.ActorRollout)

    def _setup(self) -> None:
        super()._setup()
        if self._plain:
            return
        from verl.utils.config import omega_conf_to_dataclass

        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(composer_loss, actor, self.composer))
        if self.pair_rows is not None:
            self.pair_rows.begin(self)

    # The step

    def _compute_ref_log_prob(self, batch, metrics: dict):
        if not need_reference_policy(self.config):  # the reference worker is there for channel 2 only
            return batch
        return super()._compute_ref_log_prob(batch, metrics)

    def _update_actor(self, batch, metrics: dict):
        if self._plain:
            return super()._update_actor(batch, metrics)
        if self.hinted_rows is not None:
            with marked_timer("sdpo_teacher", self.timing_raw, color="olive"):
                batch = self.hinted_rows.add(batch)
            metrics.update(_named(self.hinted_rows.metrics()))
        if self.pair_rows is not None:
            with marked_timer("replay_dpo_pairs", self.timing_raw, color="olive"):
                batch = self.pair_rows.add(batch, self)
        group, self.actor_rollout_wg = self.actor_rollout_wg, _LastWord(self.actor_rollout_wg, self._tell)
        try:
            batch = super()._update_actor(batch, metrics)
        finally:
            self.actor_rollout_wg = group
        if self.pair_rows is not None:
            batch = self.pair_rows.remove(batch)
            metrics.update(_named(self.pair_rows.metrics()))
        return batch

    def _tell(self, batch) -> None:
        """Put what the channels need over what verl tells its workers about an update."""
        if self._sdpo and self.composer.sdpo.teacher.kind == "ema":
            batch.extra_info[EMA_RATE] = self.composer.sdpo.teacher.ema_rate
        if self.hinted_rows is not None and self.hinted_rows.level is SignalLevel.TOPK:
            batch.extra_info["distillation_use_topk"] = True  # verl's engine shows our loss the logits
        if self.pair_rows is not None:
            self.pair_rows.override(batch)

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        if not self._plain:
            why = {} if self.hinted_rows is None else {"sdpo": self.hinted_rows.why_silent()}
            self.monitor.close(metrics, why)

    def _log_rollout_data(self, batch, timing_raw: dict, rollout_data_dir: str) -> None:
        super()._log_rollout_data(batch, timing_raw, rollout_data_dir)
        from composer_verl.rollouts import export_rollouts

        export_rollouts(batch, self, rollout_data_dir)

    # Checkpoints

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        if not self._plain:
            self.monitor.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps > 0 and not self._plain:
            self.monitor.load(self._resumed_from())

    def _resumed_from(self) -> Path:
        settings = self.config.trainer
        if settings.resume_mode == "resume_path":
            return Path(os.getcwd(), settings.resume_from_path)
        return Path(os.getcwd(), settings.default_local_dir, f"global_step_{self.global_steps}")


class _LastWord:
    """verl's worker group for one actor update: has the last word on what the update is told."""

    def __init__(self, group, tell) -> None:
        self._group, self._tell = group, tell

    def update_actor(self, batch) -> Any:
        self._tell(batch)
        return self._group.update_actor(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """verl's prefix for what concerns the actor's update."""
    return {f"actor/{name}": value for name, value in metrics.items()}


if NAME not in TRAINER_REGISTRY:
    register_trainer(NAME)(ComposerTrainer)
