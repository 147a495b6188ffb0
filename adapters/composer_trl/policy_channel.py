"""Channel 1 on TRL: the objective of the menu on TRL's batch, or TRL's own loss.

Quirks of TRL handled here: advantages are computed before our objective is known (so they are computed
again from the same rewards), `old_per_token_logps` is absent on-policy, the vLLM correction is a factor.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from composer_plugins.channels.policy import policy_term, reference_penalty, resolve_objective
from composer_plugins.config import PolicyConfig
from composer_plugins.losses.advantages import group_advantages
from composer_plugins.losses.reduction import Reduction, count_units
from composer_trl.model_access import in_chunks

if TYPE_CHECKING:
    from composer_trl.hint_sources import Rollout
    from composer_trl.trainer import ComposerGRPOTrainer

REF_LOGPS = "composer_ref_logprobs"

MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class PolicyChannel:
    """Builds the policy loss of a micro-batch.

    Args:
        config: the `policy` section.
        trainer: whose forward, rewards and importance ratios are used.
    """

    def __init__(self, config: PolicyConfig, trainer: ComposerGRPOTrainer) -> None:
        self.config, self.trainer = config, trainer
        self.is_host = config.objective == "host"
        self.objective = None if self.is_host else resolve_objective(config.objective)
        self.reference = None
        if not self.is_host and config.kl.coef > 0:
            self.reference = {n: p.detach().clone() for n, p in trainer.access.trainable().items()}

    @property
    def length_constant(self) -> int:
        """dr_grpo's constant length in tokens."""
        return self.config.length_constant or self.trainer.max_completion_length

    def prepare(self, output: dict[str, Any], rollout: Rollout) -> None:
        """Replace TRL's advantages (generation batch, local rows) by those of our objective."""
        if self.is_host:
            return
        trainer, config = self.trainer, self.config.advantage
        per_function = rollout.rewards_per_func
        rewards = (per_function * trainer.reward_weights.to(per_function.device)).nansum(dim=1)
        rewards[torch.isnan(per_function).all(dim=1)] = torch.nan
        if self.reference is not None:
            kl = self._reference_kl(output)
            if self.config.kl.placement == "reward":
                rewards = rewards - self.config.kl.coef * trainer.accelerator.gather(kl)
        scale = config.scale or self.objective.advantage_scale
        advantages = group_advantages(
            rewards,
            trainer.num_generations,
            scale=scale,
            eps=config.eps,
            ddof=config.ddof,
            singleton=config.singleton,
        )
        rows = len(output["completion_ids"])
        first = trainer.accelerator.process_index * rows
        output["advantages"] = advantages[first : first + rows].to(output["advantages"])

    @torch.no_grad()
    def _reference_kl(self, output: dict[str, Any]) -> torch.Tensor:
        """Store reference log-probs in the batch and return the k1 estimate per row, in nats, shape (B,)."""
        trainer = self.trainer
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        keep, size = output["completion_ids"].size(1), trainer.args.per_device_train_batch_size
        reference = []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            with trainer.accelerator.autocast():
                hidden = trainer.access.hidden(ids[rows], attention[rows], self.reference)
            flat = hidden[:, -keep - 1 : -1].flatten(0, 1)
            logits = trainer.access.logits(flat, self.reference) / trainer.temperature
            targets = output["completion_ids"][rows].flatten()
            reference.append(torch.log_softmax(logits, -1).gather(-1, targets[:, None]).view(-1, keep))
        output[REF_LOGPS] = torch.cat(reference)
        if self.config.kl.placement == "loss":
            return torch.zeros(len(ids), device=ids.device)
        old = output.get("old_per_token_logps")
        if old is None:
            old, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, keep, batch_size=size)
        return reference_penalty(old, output[REF_LOGPS], loss_mask(output).bool())

    def units(self, batch: dict[str, Any]) -> float:
        """This micro-batch's share of the denominator."""
        if self.is_host or self.config.weight == 0:
            return 0.0
        return float(
            count_units(loss_mask(batch).bool(), self.objective.reduction, length_constant=self.length_constant)
        )

    def loss(self, model, inputs: dict[str, Any], host_loss: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the one student forward of a training micro-batch; return (weighted policy loss, logps (B, T))."""
        trainer = self.trainer
        mask = loss_mask(inputs).bool()
        advantages = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"][:, None]
        trainer.monitor.metrics.add("policy/active_tokens", ((advantages != 0) & mask).sum())
        if self.is_host:
            with trainer.record_logps() as seen:
                loss = host_loss(model, inputs)
            return self.config.weight * loss, seen[0]
        logps, entropies, aux_loss = self._forward(model, inputs)
        trainer.monitor.metrics.mean("entropy", entropies.detach()[mask].sum() / mask.sum().clamp(min=1), mask.sum())
        if self.config.weight == 0:
            return logps.sum() * 0.0, logps
        denominator = self._denominator(inputs, mask)
        term = self._term(inputs, logps, mask, denominator)
        loss = term.loss() * trainer.accelerator.num_processes
        trainer.monitor.policy(term, mask)
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * aux_loss / trainer.current_gradient_accumulation_steps
        return loss, logps

    def evaluate(self, model, inputs: dict[str, Any], host_loss: Callable) -> torch.Tensor:
        """Return the policy loss of an evaluation batch, with local denominators."""
        if self.is_host:
            return host_loss(model, inputs)
        logps, _, _ = self._forward(model, inputs)
        mask = loss_mask(inputs).bool()
        units = count_units(mask, self.objective.reduction, length_constant=self.length_constant)
        return self._term(inputs, logps, mask, units.clamp(min=1)).loss()

    def _denominator(self, inputs: dict[str, Any], mask: torch.Tensor) -> float:
        if self.objective.reduction is Reduction.LOCAL_TOKEN_MEAN:  # local by definition: mean of local means
            local = float(count_units(mask, self.objective.reduction, length_constant=self.length_constant))
            steps = self.trainer.current_gradient_accumulation_steps * self.trainer.accelerator.num_processes
            return max(local, 1.0) * steps
        return max(inputs["composer_denominators"]["policy"], 1.0)

    def _term(self, inputs: dict[str, Any], logps: torch.Tensor, mask: torch.Tensor, denominator):
        old = inputs.get("old_per_token_logps")
        return policy_term(
            self.config,
            self.objective,
            logprobs=logps,
            old_logprobs=logps.detach() if old is None else old,
            advantages=inputs["advantages"],
            mask=mask,
            denominator=denominator,
            importance_weights=inputs.get("importance_sampling_ratio"),
            ref_logprobs=inputs.get(REF_LOGPS),
        )

    def _forward(self, model, inputs: dict[str, Any]):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].size(1)
        multimodal = {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}
        if (
            ids.device.type == "cpu"
            and self.takes_logits_to_keep
            and not multimodal
            and not self.trainer.aux_loss_enabled
        ):
            return (*self._score_completion(model, ids, attention, inputs["completion_mask"].bool()), None)
        return self.trainer._get_per_token_logps_and_entropies(
            model,
            ids,
            attention,
            keep,
            compute_entropy=True,
            compute_aux_loss=self.trainer.aux_loss_enabled,
            **multimodal,
        )

    def _score_completion(self, model, ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor):
        """Log-probs and entropies (B, T) from a projection of the completion tokens only.

        Off Triton, TRL's fused head projects every position, prompts included, to the vocabulary; for long
        prompts that costs more than the backbone.
        """
        trainer = self.trainer
        with trainer.access.capture_hidden() as hidden, trainer.accelerator.autocast():
            model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=1)
            flat = hidden[0][:, -mask.size(1) - 1 : -1][mask]
            logps, entropies = in_chunks(self._token_scores, flat, ids[:, -mask.size(1) :][mask])
        zeros = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
        return zeros.masked_scatter(mask, logps), zeros.masked_scatter(mask, entropies)

    def _token_scores(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.log_softmax(self.trainer.access.logits(hidden) / self.trainer.temperature, dim=-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, token_ids[:, None])[:, 0], entropy

    @functools.cached_property
    def takes_logits_to_keep(self) -> bool:
        """Whether the model can be asked for the last position's logits only."""
        return "logits_to_keep" in inspect.signature(type(self.trainer.access.model).forward).parameters


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Completion tokens that the model sampled, (B, T): TRL's completion mask without tool results."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
