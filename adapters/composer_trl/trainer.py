"""`ComposerGRPOTrainer`: TRL's GRPOTrainer with the three channels.

How one batch flows: `_generate` (TRL's rollouts, kept aside) -> `_generate_and_score_completions`
(advantages of our objective; hints become `HintedTurn`s) -> `_prepare_inputs` (denominators over the
whole optimizer step) -> `_compute_loss` (one student forward, shared by policy and sdpo; pairs).

With `policy.objective: host` and both other weights at 0, every override hands over to TRL unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from trl import GRPOTrainer

from composer_plugins.channels.base import Term, TokenBatch
from composer_plugins.channels.extra import extra_channels
from composer_plugins.errors import ConfigError, UnsupportedError
from composer_trl.config import LEVELS, ComposerGRPOConfig
from composer_trl.hint_sources import HintSources, Rollout
from composer_trl.model_access import ModelAccess
from composer_trl.monitor import StepMonitor
from composer_trl.outer import OuterLoopCallback
from composer_trl.pair_channel import PairChannel
from composer_trl.policy_channel import PolicyChannel, loss_mask
from composer_trl.sdpo_channel import SDPOChannel

TURNS, DENOMINATORS = "composer_turns", "composer_denominators"


class ComposerGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is policy + alpha * sdpo + beta * replay_dpo.

    Takes the same arguments as `trl.GRPOTrainer`; the channels are set in `args.composer`. Dataset rows
    may have a `hint` column (text or None): the hint for the turn that follows the prompt. Reward
    functions may log textual feedback with `log_extra("feedback", [...])`, one entry per completion.

    Args:
        hint_for_result: `(tool name, result text) -> (hint text, error class) | None` for errors inside
            rollouts; default: the recipe's hint generator on results that classify as failed.

    Raises:
        ConfigError: contradictory options. UnsupportedError: a channel cannot work on this model or
        under this parallelism. TraceError: the pairs file has nothing to train on.
    """

    _tag_names: ClassVar = [*GRPOTrainer._tag_names, "composer"]

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: ComposerGRPOConfig | None = None,
        *positional: Any,
        hint_for_result: Callable[[str | None, str], tuple[str, str] | None] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and not isinstance(args, ComposerGRPOConfig):
            raise ConfigError(
                f"Expected a ComposerGRPOConfig (a GRPOConfig with a `composer` section), found {type(args).__name__}."
            )
        self.composer = (args if args is not None else ComposerGRPOConfig("composer-grpo")).parsed()
        policy = self.composer.policy
        self.extra = extra_channels(self.composer)
        others = self.composer.sdpo.weight > 0 or self.composer.replay_dpo.weight > 0 or bool(self.extra)
        self._plain = policy.objective == "host" and policy.weight == 1.0 and not others
        self.token_view_sink: Callable[[Any], None] | None = None
        self._rollout: Rollout | None = None
        self._denominated: list | None = None
        self._seen_logps: list[torch.Tensor] | None = None
        super().__init__(model, reward_funcs, args or ComposerGRPOConfig("composer-grpo"), *positional, **kwargs)
        if not self._plain:
            self._set_up_channels(hint_for_result)
        self.outer_loop = OuterLoopCallback(self.composer.outer) if self.composer.outer.sync_every else None
        if self.outer_loop is not None:
            self._refuse_sharded_outer()
            self.add_callback(self.outer_loop)

    def _refuse_sharded_outer(self) -> None:
        if self.is_deepspeed_enabled:
            raise UnsupportedError(
                "The outer loop cannot see DeepSpeed's partitions. Use DDP or FSDP2 inside an island."
            )

    def _set_up_channels(self, hint_for_result) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UnsupportedError(
                "The composer channels read parameters directly, which sharded ones (FSDP, DeepSpeed ZeRO) do not "
                "allow in this version. Use DDP (accelerate, several processes) or LoRA on one device per process; "
                "`policy.objective: host` with both other weights at 0 works under any parallelism."
            )
        unwrapped = self.accelerator.unwrap_model(self.model)
        self.access = ModelAccess(unwrapped)
        self.policy_channel = PolicyChannel(self.composer.policy, self)
        self.sdpo_channel = self.pair_channel = self.hint_sources = None
        if self.composer.sdpo.weight > 0:
            self.hint_sources = HintSources(self.composer.sdpo, self, hint_for_result)
            self.sdpo_channel = SDPOChannel(self.composer.sdpo, self, LEVELS)
        if self.composer.replay_dpo.weight > 0:
            self.pair_channel = PairChannel(self.composer.replay_dpo, self)
        self.monitor = StepMonitor(self.composer, self)
        self.add_callback(self.monitor)

    # Rollouts

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if not self._plain:
            prompt_ids, completion_ids, tool_mask, completions = generated[:4]
            self._rollout = Rollout(prompts, prompt_ids, completion_ids, tool_mask, completions)
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self._plain and self._rollout is not None:
            self._rollout.rewards_per_func = rewards
            self._rollout.feedback = list(self._pending_extra_logs.get("feedback", []))
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._plain or not self.model.training:
            return output
        rollout, self._rollout = self._rollout, None
        self.policy_channel.prepare(output, rollout)
        if self.hint_sources is not None:
            output[TURNS] = self.hint_sources.turns(inputs, rollout)
        return output

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self._plain and self.model.training and self._denominated is not self._buffered_inputs:
            self._set_denominators(self._buffered_inputs)
            self._denominated = self._buffered_inputs
        return inputs

    def _set_denominators(self, batches: list[dict[str, Any]]) -> None:
        """Count, per optimizer step and over all ranks, what each channel's sum is divided by."""
        counts = torch.tensor(
            [
                [
                    self.policy_channel.units(b),
                    self.sdpo_channel.units(b[TURNS]) if self.sdpo_channel else 0.0,
                    *self._extra_units(b),
                ]
                for b in batches
            ],
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        counts = self.accelerator.reduce(counts, reduction="sum")
        window = self.args.gradient_accumulation_steps
        for i, batch in enumerate(batches):
            if len(batches) % window == 0:
                first = i // window * window
                total = counts[first : first + window].sum(0)
            else:  # the step mixes generation batches: scale this one's mean to a step, as TRL does
                total = counts.mean(0) * window
            names = ("policy", "sdpo", *(extra.name for extra in self.extra))
            batch[DENOMINATORS] = dict(zip(names, total.tolist(), strict=True))

    def _extra_units(self, batch: dict[str, Any]) -> list[float]:
        mask, constant = loss_mask(batch).bool(), self.policy_channel.length_constant
        return [extra.units(mask, length_constant=constant) for extra in self.extra]

    # Loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any):
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._seen_logps is not None:
            self._seen_logps.append(outputs[0])
        return outputs

    @contextmanager
    def record_logps(self) -> Iterator[list[torch.Tensor]]:
        """Collect the log-probs that TRL's own loss computes, so that its forward serves the channels too."""
        self._seen_logps = seen = []
        try:
            yield seen
        finally:
            self._seen_logps = None

    def _compute_loss(self, model, inputs):
        if self._plain:
            return super()._compute_loss(model, inputs)
        if not self.model.training:  # evaluation reports the policy term only
            return self.policy_channel.evaluate(model, inputs, super()._compute_loss)
        with self.access.capture_hidden() as hidden:
            policy_loss, logps = self.policy_channel.loss(model, inputs, super()._compute_loss)
        terms: list[Term] = []
        if self.sdpo_channel is not None:
            terms += self.sdpo_channel.terms(inputs, logps, hidden[0], inputs[TURNS], inputs[DENOMINATORS]["sdpo"])
        if self.pair_channel is not None:
            terms += self.pair_channel.terms()
        terms += self._extra_terms(inputs, logps)
        # DDP averages gradients over ranks; the denominators are global, so undo that
        world = self.accelerator.num_processes
        parts = {"policy": policy_loss, **{t.name: t.loss() * world for t in terms}}
        self.monitor.micro_batch(parts)
        # the zero ties the loss to the student's forward, which DDP expects in every micro-batch
        return sum(parts.values()) + logps.sum() * 0.0

    def _extra_terms(self, inputs: dict[str, Any], logps: torch.Tensor) -> list[Term]:
        """The terms of plugins' channels, from the log-probs that the policy forward gave."""
        if not self.extra:
            return []
        mask, old, advantages = loss_mask(inputs).bool(), inputs.get("old_per_token_logps"), inputs["advantages"]
        batch = TokenBatch(
            logprobs=logps, old_logprobs=logps.detach() if old is None else old, mask=mask,
            advantages=advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logps),
            token_ids=inputs["completion_ids"],
        )  # fmt: skip
        terms = [extra.term(batch, max(inputs[DENOMINATORS][extra.name], 1.0)) for extra in self.extra]
        for term in terms:
            self.monitor.extra(term, mask)
        return terms

    # Checkpoints

    def train(self, *args: Any, **kwargs: Any):
        if self._plain:
            return super().train(*args, **kwargs)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.monitor.close()

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if not self._plain and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            for part in (self.sdpo_channel, self.pair_channel, self.monitor):
                if part is not None:
                    part.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.outer_loop is not None and checkpoint is not None:
            self.outer_loop.resume = Path(checkpoint)
        if not self._plain and checkpoint is not None:
            for part in (self.sdpo_channel, self.pair_channel, self.monitor):
                if part is not None:
                    part.load(Path(checkpoint))
